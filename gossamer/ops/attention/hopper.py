"""Prefill of 16-bit rows on Hopper: a warp feeds pages by TMA to two warpgroups that take turns at the tensor cores.

A warpgroup's softmax runs beside the other's products, and beside its own product with values (FlashAttention-3,
arXiv:2407.08608); paging and the packing of query heads are as in the plain kernel.
"""

from __future__ import annotations

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gossamer.ops.dispatch import is_hopper
from gossamer.ops.quantize_fp8.hopper import quantize_rows

_STAGES = 2
_BLOCK_M = 128  # rows of a program: 64 for each of its two warpgroups
# Triton 3.6's names, and those of later versions.
copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
view = getattr(gl.shared_memory_descriptor, "reinterpret", None) or gl.shared_memory_descriptor._reinterpret


@gluon.jit
def add(a, b):
    return a + b


@gluon.jit
def new_barriers(size: gl.constexpr, count: gl.constexpr):
    """mbarriers [size], each of `count` arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [size, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(size):
        mbarrier.init(bars.index(i), count=count)
    return bars


@gluon.jit
def _order(item, num_items, num_rows):
    """A single row's items become ever shorter: every second round of the programs takes them backwards, to even sums.

    Many rounds are even without, and several rows repeat their blocks' lengths at a pace of their own.
    """
    size = gl.num_programs(0)
    end = (item // size + 1) * size
    back = (num_rows == 1) & (num_items < 64 * size) & (item // size % 2 == 1) & (end <= num_items)
    return gl.where(back, 2 * end - size - 1 - item, item)


@gluon.jit
def _locate(
    block, cu_seqlens_q, seq_lens, slots, num_rows, window,
    BLOCK_R: gl.constexpr, TOKENS: gl.constexpr, PAGE: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """Where a block's tokens lie: first and end token, token to position, length, slot, pages (none: padding)."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    rows = gl.arange(0, BLOCK_R, layout)
    starts = gl.load(cu_seqlens_q + rows, mask=rows < num_rows, other=0)
    counts = gl.load(cu_seqlens_q + rows + 1, mask=rows < num_rows, other=0) - starts
    ends = gl.associative_scan((counts + TOKENS - 1) // TOKENS, 0, add)
    used = gl.max(ends, 0)
    row = gl.minimum(gl.sum((ends <= block).to(gl.int32), 0), num_rows - 1)
    row_stop = gl.load(cu_seqlens_q + row + 1)
    seq_len = gl.load(seq_lens + row)
    shift = seq_len - row_stop
    first = gl.load(cu_seqlens_q + row) + (block - gl.max(gl.where(ends <= block, ends, 0), 0)) * TOKENS
    low = 0
    if HAS_WINDOW:
        low = gl.maximum(first + shift - window + 1, 0) // PAGE
    padding = block >= used
    high = gl.where(padding, low, (gl.minimum(first + TOKENS, row_stop) - 1 + shift) // PAGE + 1)
    first = gl.where(padding, gl.load(cu_seqlens_q + num_rows) + (block - used) * TOKENS, first)
    return first, row_stop, shift, seq_len, gl.maximum(gl.load(slots + row), 0), low, high


@gluon.jit
def _feed(
    k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty,
    page_table, cu_seqlens_q, seq_lens, slots, num_rows, num_blocks, table_stride, window,
    NUM_KV_HEADS: gl.constexpr, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr, TOKENS: gl.constexpr,
    BLOCK_R: gl.constexpr, HAS_WINDOW: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: tiles of two pages, a block's last tile first; a tile's absent second page repeats its first."""
    CHUNKS: gl.constexpr = HEAD_DIM // 64
    BYTES: gl.constexpr = 2 * PAGE * HEAD_DIM * 2
    step = 0
    for place in range(gl.program_id(0), num_blocks * NUM_KV_HEADS, gl.num_programs(0)):
        item = _order(place, num_blocks * NUM_KV_HEADS, num_rows)
        head = item % NUM_KV_HEADS
        block = num_blocks - 1 - item // NUM_KV_HEADS
        _first, _row_stop, _shift, _seq_len, slot, low, high = _locate(
            block, cu_seqlens_q, seq_lens, slots, num_rows, window, BLOCK_R, TOKENS, PAGE, HAS_WINDOW
        )
        table = page_table + slot.to(gl.int64) * table_stride
        num_tiles = (high - low + 1) // 2
        for i in range(num_tiles):
            page = low + 2 * (num_tiles - 1 - i)
            row0 = (gl.load(table + page) * NUM_KV_HEADS + head) * PAGE
            row1 = (gl.load(table + gl.minimum(page + 1, high - 1)) * NUM_KV_HEADS + head) * PAGE
            stage = step % STAGES
            phase = (step // STAGES) & 1
            mbarrier.wait(k_empty.index(stage), phase ^ 1)
            mbarrier.expect(k_full.index(stage), BYTES)
            for c in gl.static_range(CHUNKS):
                part = (stage * CHUNKS + c) * 2
                copy_tile(k_desc, [row0, c * 64], k_full.index(stage), k_tiles.index(part))
                copy_tile(k_desc, [row1, c * 64], k_full.index(stage), k_tiles.index(part + 1))
            mbarrier.wait(v_empty.index(stage), phase ^ 1)
            mbarrier.expect(v_full.index(stage), BYTES)
            for c in gl.static_range(CHUNKS):
                part = (stage * CHUNKS + c) * 2
                copy_tile(v_desc, [row0, c * 64], v_full.index(stage), v_tiles.index(part))
                copy_tile(v_desc, [row1, c * 64], v_full.index(stage), v_tiles.index(part + 1))
            step += 1


@gluon.jit
def _softmax(
    scores, peak, weight, position, tile_start, scale_log2, window, dtype: gl.constexpr, P_LAYOUT: gl.constexpr,
    MASKED: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """Weights of a tile as the next product's operand, the new maximum and sum, and what fades the old ones."""
    if MASKED:
        token = tile_start + gl.arange(0, scores.shape[1], gl.SliceLayout(0, scores.type.layout))
        visible = token[None, :] <= position[:, None]
        if HAS_WINDOW:
            visible = visible & (token[None, :] > position[:, None] - window)
        scores = gl.where(visible, scores, float("-inf"))
    highest = gl.maximum(peak, gl.max(scores, 1) * scale_log2)
    fade = gl.exp2(peak - highest)
    weights = gl.exp2(scores * scale_log2 - highest[:, None])
    weight = weight * fade + gl.sum(weights, 1)
    return gl.convert_layout(weights.to(dtype), P_LAYOUT), highest, weight, fade


@gluon.jit
def _clean(v, tile_start, seq_len):
    """Zeroes the values beyond the sequence, which may be NaN. Both warpgroups do, each before its own product."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    values = v.load(layout)
    token = tile_start + gl.arange(0, v.shape[0], gl.SliceLayout(1, layout))
    v.store(gl.where((token < seq_len)[:, None], values, 0.0))
    fence_async_shared()


@gluon.jit
def _attend(
    count, tile, step, total, weights, peak, weight, q_tile, k_wide, v_wide, k_full, k_empty, v_full, v_empty,
    turns, position, low, scale_log2, window, HALF: gl.constexpr, S_LAYOUT: gl.constexpr, P_LAYOUT: gl.constexpr,
    O_LAYOUT: gl.constexpr, PAGE: gl.constexpr, STAGES: gl.constexpr, MASKED: gl.constexpr, HAS_WINDOW: gl.constexpr,
):  # fmt: skip
    """`count` tiles, downwards: a tile's scores are computed beside the product of the tile before with its values.

    Both products are issued in this warpgroup's turn; then the other's are, while this one computes weights.
    """
    ROWS: gl.constexpr = q_tile.shape[0]
    TILE: gl.constexpr = 2 * PAGE
    for _ in range(count):
        stage = step % STAGES
        mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
        zeros = gl.zeros([ROWS, TILE], gl.float32, S_LAYOUT)
        k = k_wide.index(stage).permute((1, 0))
        mbarrier.wait(turns.index(HALF), step & 1)
        s_token = warpgroup_mma(q_tile, k, zeros, use_acc=False, is_async=True)
        last = (step - 1) % STAGES
        mbarrier.wait(v_full.index(last), ((step - 1) // STAGES) & 1)
        o_token = warpgroup_mma(weights, v_wide.index(last), total, is_async=True)
        mbarrier.arrive(turns.index(1 - HALF))
        scores = warpgroup_mma_wait(1, deps=[s_token])
        mbarrier.arrive(k_empty.index(stage))
        next_weights, peak, weight, fade = _softmax(
            scores, peak, weight, position, (low + 2 * tile) * PAGE, scale_log2, window, weights.dtype, P_LAYOUT,
            MASKED, HAS_WINDOW,
        )  # fmt: skip
        total, weights = warpgroup_mma_wait(0, deps=[o_token, weights])
        mbarrier.arrive(v_empty.index(last))
        total = total * gl.convert_layout(fade, gl.SliceLayout(1, O_LAYOUT))[:, None]
        weights = next_weights
        tile -= 1
        step += 1
    return tile, step, total, weights, peak, weight


@gluon.jit
def _consume(
    HALF: gl.constexpr, q, out, sinks, q_tile, k_wide, v_wide, k_full, k_empty, v_full, v_empty, turns,
    cu_seqlens_q, seq_lens, slots, num_tokens, num_rows, num_blocks, scale_log2, window, out_scales, strides,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr,
    TOKENS: gl.constexpr, BLOCK_R: gl.constexpr, HAS_SINKS: gl.constexpr, HAS_WINDOW: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 rows of every block of its program."""
    ROWS: gl.constexpr = q_tile.shape[0]
    TILE: gl.constexpr = 2 * PAGE
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TILE, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_DIM, 16])
    P_LAYOUT: gl.constexpr = gl.DotOperandLayout(0, O_LAYOUT, 2)
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_DIM, HEAD_DIM // 8], [4, 1], [1, 0])
    dtype: gl.constexpr = q.dtype.element_ty
    step = 0
    for place in range(gl.program_id(0), num_blocks * NUM_KV_HEADS, gl.num_programs(0)):
        item = _order(place, num_blocks * NUM_KV_HEADS, num_rows)
        head = item % NUM_KV_HEADS
        block = num_blocks - 1 - item // NUM_KV_HEADS
        first, row_stop, shift, seq_len, _slot, low, high = _locate(
            block, cu_seqlens_q, seq_lens, slots, num_rows, window, BLOCK_R, TOKENS, PAGE, HAS_WINDOW
        )
        num_tiles = (high - low + 1) // 2
        limit = gl.where(num_tiles > 0, row_stop, num_tokens)

        m = HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, LINES))
        d = gl.arange(0, HEAD_DIM, gl.SliceLayout(0, LINES))
        token = first + m // GROUP
        inside = (m < TOKENS * GROUP) & (token < limit)
        lines = ((token * NUM_KV_HEADS + head) * GROUP + m % GROUP).to(gl.int64)
        offsets = lines[:, None] * HEAD_DIM + d[None, :]

        rows = HALF * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, S_LAYOUT))
        position = first + rows // GROUP + shift
        peak = gl.full([ROWS], -1e30, gl.float32, gl.SliceLayout(1, S_LAYOUT))
        weight = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, S_LAYOUT))
        if HAS_SINKS:
            sink = gl.load(sinks + head * GROUP + rows % GROUP).to(gl.float32)
            peak = gl.maximum(sink * 1.4426950408889634, peak)
            weight = gl.full([ROWS], 1.0, gl.float32, gl.SliceLayout(1, S_LAYOUT))
        total = gl.zeros([ROWS, HEAD_DIM], gl.float32, O_LAYOUT)
        if num_tiles > 0:
            q_tile.store(gl.load(q + offsets, mask=inside[:, None], other=0.0))
            fence_async_shared()
            # Tiles that end beyond the first token's position, and those that begin before the last one's window.
            whole_high = gl.maximum((first + shift + 1) // PAGE - low, 0) // 2
            whole_low = 0
            if HAS_WINDOW:
                last_position = gl.minimum(first + TOKENS, row_stop) - 1 + shift
                begin = gl.maximum(last_position - window + 1, 0)
                whole_low = gl.minimum(gl.maximum((begin - low * PAGE + TILE - 1) // TILE, 0), num_tiles)
                whole_high = gl.maximum(whole_high, whole_low)
            tile = num_tiles - 1
            stage = step % STAGES
            tile_start = (low + 2 * tile) * PAGE
            mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
            zeros = gl.zeros([ROWS, TILE], gl.float32, S_LAYOUT)
            mbarrier.wait(turns.index(HALF), step & 1)
            s_token = warpgroup_mma(q_tile, k_wide.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True)
            mbarrier.arrive(turns.index(1 - HALF))
            scores = warpgroup_mma_wait(0, deps=[s_token])
            mbarrier.arrive(k_empty.index(stage))
            weights, peak, weight, _fade = _softmax(
                scores, peak, weight, position, tile_start, scale_log2, window, dtype, P_LAYOUT, True, HAS_WINDOW
            )
            if tile_start + TILE > seq_len:
                mbarrier.wait(v_full.index(stage), (step // STAGES) & 1)
                _clean(v_wide.index(stage), tile_start, seq_len)
            tile -= 1
            step += 1
            masked = gl.maximum(tile + 1 - whole_high, 0)
            tile, step, total, weights, peak, weight = _attend(
                masked, tile, step, total, weights, peak, weight, q_tile, k_wide, v_wide,
                k_full, k_empty, v_full, v_empty, turns, position, low, scale_log2, window, HALF, S_LAYOUT, P_LAYOUT,
                O_LAYOUT, PAGE, STAGES, True, HAS_WINDOW,
            )  # fmt: skip
            whole = gl.maximum(tile + 1 - whole_low, 0)
            tile, step, total, weights, peak, weight = _attend(
                whole, tile, step, total, weights, peak, weight, q_tile, k_wide, v_wide,
                k_full, k_empty, v_full, v_empty, turns, position, low, scale_log2, window, HALF, S_LAYOUT, P_LAYOUT,
                O_LAYOUT, PAGE, STAGES, False, HAS_WINDOW,
            )  # fmt: skip
            if HAS_WINDOW:
                tile, step, total, weights, peak, weight = _attend(
                    tile + 1, tile, step, total, weights, peak, weight, q_tile, k_wide, v_wide,
                    k_full, k_empty, v_full, v_empty, turns, position, low, scale_log2, window, HALF, S_LAYOUT,
                    P_LAYOUT, O_LAYOUT, PAGE, STAGES, True, HAS_WINDOW,
                )  # fmt: skip
            last = (step - 1) % STAGES
            mbarrier.wait(v_full.index(last), ((step - 1) // STAGES) & 1)
            o_token = warpgroup_mma(weights, v_wide.index(last), total, is_async=True)
            total, weights = warpgroup_mma_wait(0, deps=[o_token, weights])
            mbarrier.arrive(v_empty.index(last))
        scale = 1.0 / gl.maximum(weight, 1e-30)
        result = (total * gl.convert_layout(scale, gl.SliceLayout(1, O_LAYOUT))[:, None]).to(dtype)
        if out_scales is not None:
            result, own = quantize_rows(result.to(gl.float32), out.dtype.element_ty)
            own = gl.convert_layout(own, gl.SliceLayout(1, LINES))
            gl.store(out_scales + token * strides[0] + (head * GROUP + m % GROUP) * strides[1], own, mask=inside)
        gl.store(out + offsets, gl.convert_layout(result, LINES), mask=inside[:, None])


# As the plain kernel's: the metadata begins behind that of a step's decode rows.
@gluon.jit(
    do_not_specialize=["num_tokens", "num_rows", "num_blocks", "row_stride", "head_stride", "window"],
    do_not_specialize_on_alignment=["slots", "cu_seqlens_q", "seq_lens", "out_scales"],
)
def _hopper_prefill_kernel(
    q, k_desc, v_desc, page_table, slots, cu_seqlens_q, seq_lens, sinks, out, out_scales,
    num_tokens, num_rows, num_blocks, table_stride, row_stride, head_stride, scale_log2, window,
    NUM_KV_HEADS: gl.constexpr, GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, PAGE: gl.constexpr,
    BLOCK_R: gl.constexpr, HAS_SINKS: gl.constexpr, HAS_WINDOW: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    BLOCK_M: gl.constexpr = 128
    TOKENS: gl.constexpr = BLOCK_M // GROUP
    TILE: gl.constexpr = 2 * PAGE
    REGS: gl.constexpr = 240 if BLOCK_R <= 256 else 232  # the feeder looks through many rows with more
    FEED_REGS: gl.constexpr = 24 if BLOCK_R <= 256 else 40
    dtype: gl.constexpr = q.dtype.element_ty
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TILE, HEAD_DIM], dtype)
    k_wide = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], wide)
    v_wide = gl.allocate_shared_memory(dtype, [STAGES, TILE, HEAD_DIM], wide)
    k_tiles = view(k_wide, dtype, [STAGES * 2 * (HEAD_DIM // 64), PAGE, 64], k_desc.layout)
    v_tiles = view(v_wide, dtype, [STAGES * 2 * (HEAD_DIM // 64), PAGE, 64], k_desc.layout)
    q_wide = gl.allocate_shared_memory(dtype, [2, 64, HEAD_DIM], wide)
    k_full, k_empty = new_barriers(STAGES, 1), new_barriers(STAGES, 2)
    v_full, v_empty = new_barriers(STAGES, 1), new_barriers(STAGES, 2)
    turns = new_barriers(2, 1)
    mbarrier.arrive(turns.index(0))
    fence_async_shared()
    strides = (row_stride, head_stride)
    gl.warp_specialize([
        (_consume, (
            gl.constexpr(0), q, out, sinks, q_wide.index(0), k_wide, v_wide, k_full, k_empty, v_full, v_empty, turns,
            cu_seqlens_q, seq_lens, slots, num_tokens, num_rows, num_blocks, scale_log2, window, out_scales, strides,
            NUM_KV_HEADS, GROUP, HEAD_DIM, PAGE, TOKENS, BLOCK_R, HAS_SINKS, HAS_WINDOW, STAGES,
        )),
        (_consume, (
            gl.constexpr(1), q, out, sinks, q_wide.index(1), k_wide, v_wide, k_full, k_empty, v_full, v_empty, turns,
            cu_seqlens_q, seq_lens, slots, num_tokens, num_rows, num_blocks, scale_log2, window, out_scales, strides,
            NUM_KV_HEADS, GROUP, HEAD_DIM, PAGE, TOKENS, BLOCK_R, HAS_SINKS, HAS_WINDOW, STAGES,
        )),
        (_feed, (
            k_desc, v_desc, k_tiles, v_tiles, k_full, k_empty, v_full, v_empty,
            page_table, cu_seqlens_q, seq_lens, slots, num_rows, num_blocks, table_stride, window,
            NUM_KV_HEADS, HEAD_DIM, PAGE, TOKENS, BLOCK_R, HAS_WINDOW, STAGES,
        )),
    ], [4, 1], [REGS, FEED_REGS])  # fmt: skip


def serves(q: torch.Tensor, k_pages: torch.Tensor) -> bool:
    """Whether the kernel of this module runs these shapes on this device; FP8 pages once they are widened to bf16."""
    num_kv_heads, page_size, head_dim = k_pages.shape[1:]
    fits = page_size == 64 and head_dim in (64, 128) and q.shape[1] // num_kv_heads <= _BLOCK_M
    widened = q.dtype == torch.bfloat16 and k_pages.dtype == torch.float8_e4m3fn
    return is_hopper(q) and fits and q.element_size() == 2 and (widened or q.dtype == k_pages.dtype)


def paged_prefill(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, page_table: torch.Tensor, slots: torch.Tensor,
    cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor, scale_log2: float, out: torch.Tensor,
    out_scales: torch.Tensor | None, strides: tuple[int, ...], window: int | None, sinks: torch.Tensor | None,
) -> None:  # fmt: skip
    """`ops.attention.paged_prefill` of what `serves` accepts, checked by the caller, with a token and a row at least.

    scale_log2: the scale times log2(e). strides: of out_scales.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1:3]
    num_rows, group = seq_lens.shape[0], num_q_heads // num_kv_heads
    num_blocks = triton.cdiv(num_tokens, _BLOCK_M // group) + num_rows
    num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    k_desc, v_desc = (
        TensorDescriptor.from_tensor(pages.view(-1, head_dim), [page_size, 64], layout) for pages in (k_pages, v_pages)
    )
    _hopper_prefill_kernel[(min(num_sms, num_blocks * num_kv_heads),)](
        q, k_desc, v_desc, page_table, slots, cu_seqlens_q, seq_lens, sinks, out, out_scales,
        num_tokens, num_rows, num_blocks, page_table.stride(0), *strides, scale_log2, window or 2**31 - 1,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, HEAD_DIM=head_dim, PAGE=page_size,
        BLOCK_R=max(32, triton.next_power_of_2(num_rows)), HAS_SINKS=sinks is not None, HAS_WINDOW=window is not None,
        STAGES=_STAGES, num_warps=4,
    )  # fmt: skip

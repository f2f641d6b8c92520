"""Absorbed decode of 64 query heads on Hopper: a warp feeds pages by TMA to two warpgroups that share each product.

Of scores a warpgroup has half the page's tokens, of values half the latent; what the plain kernel's compiler gives both
to each is computed once. Shares and parts are the plain kernel's, and so is the merging. Tokens of lists take the place
of a page's, 64 at a time: four warps gather their rows.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gossamer.ops.attention.hopper import add, copy_tile, new_barriers, view
from gossamer.ops.dispatch import is_hopper
from gossamer.ops.gemm_fp8.hopper import copy_rows, thread_barrier

_STAGES = 2
HEADS, RANK, ROPE, PAGE = 64, 512, 64, 64


@gluon.jit
def _share(slots, seq_lens, num_rows, program, num_programs, BLOCK_R: gl.constexpr, MIN_PAGES: gl.constexpr):
    """A program's share of all rows' pages laid end to end: its bounds, its first row, where that row begins."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    rows = gl.arange(0, BLOCK_R, layout)
    lens = gl.load(seq_lens + rows, mask=rows < num_rows, other=0)
    lens = gl.where(gl.load(slots + rows, mask=rows < num_rows, other=-1) >= 0, lens, 0)
    pages = (lens + 63) // 64
    ends = gl.associative_scan(pages, 0, add)
    num_pages = gl.sum(pages, 0)
    share = gl.maximum((num_pages + num_programs - 1) // num_programs, MIN_PAGES)
    begin = program * share
    stop = gl.minimum(begin + share, num_pages)
    row = gl.sum((ends <= begin).to(gl.int32), 0)
    return begin, stop, row, gl.max(gl.where(ends <= begin, ends, 0), 0)


@gluon.jit
def _listed_share(num_rows, program, num_programs, TOP: gl.constexpr):
    """As `_share`: each row has as many programs, and its pages are 64 tokens of its list."""
    parts = num_programs // num_rows
    share = ((TOP + 63) // 64 + parts - 1) // parts
    return program * share, program * share + share, program // parts, program // parts * parts * share


@gluon.jit
def _feed_listed(pages, ring, chosen, slots, positions, num_rows, program, num_programs, TOP, STAGES: gl.constexpr):
    tiles, keys, full, empty = ring
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    columns = gl.arange(0, 64, gl.SliceLayout(0, layout))[None, :]
    begin, stop, row, row_begin = _listed_share(num_rows, program, num_programs, TOP)
    count = gl.where(gl.load(slots + row) >= 0, gl.minimum(gl.load(positions + row) + 1, TOP), 0)
    n = (begin - row_begin) * 64 + gl.arange(0, 64, gl.SliceLayout(1, layout))
    for step in range(gl.minimum(stop - row_begin, (count + 63) // 64) - (begin - row_begin)):
        at = gl.load(chosen + row.to(gl.int64) * TOP + n, mask=n < count, other=-1)[:, None]
        lines = pages + at.to(gl.int64) * 576 + columns
        stage = step % STAGES
        mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
        for c in gl.static_range(8):
            copy_rows(tiles.index(stage * 8 + c), lines + c * 64, mask=at >= 0)
        copy_rows(keys.index(stage), lines + 512, mask=at >= 0)
        async_copy.mbarrier_arrive(full.index(stage), increment_count=False)
        n += 64


@gluon.jit
def _feed(
    fed, ring, page_table, slots, seq_lens, own,
    BLOCK_R: gl.constexpr, MIN_PAGES: gl.constexpr, STAGES: gl.constexpr, TOP: gl.constexpr,
):  # fmt: skip
    pages, desc, table_stride = fed
    num_rows, _row_stride, _head_stride, _scale, _block, program, num_programs = own
    if TOP:
        _feed_listed(pages, ring, page_table, slots, seq_lens, num_rows, program, num_programs, TOP, STAGES)
    else:
        tiles, keys, full, empty = ring
        unit, stop, row, row_begin = _share(slots, seq_lens, num_rows, program, num_programs, BLOCK_R, MIN_PAGES)
        step = 0
        while unit < stop:
            slot = gl.load(slots + row)
            seq_len = gl.where(slot >= 0, gl.load(seq_lens + row), 0)
            row_end = row_begin + (seq_len + 63) // 64
            table = page_table + slot.to(gl.int64) * table_stride
            part_end = gl.minimum(row_end, stop)
            for p in range(unit - row_begin, part_end - row_begin):
                line = gl.load(table + p) * 64
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(full.index(stage), 64 * 576 * 2)
                for c in gl.static_range(8):
                    copy_tile(desc, [line, c * 64], full.index(stage), tiles.index(stage * 8 + c))
                copy_tile(desc, [line, 512], full.index(stage), keys.index(stage))
                step += 1
            unit = gl.maximum(part_end, unit)
            row_begin = row_end
            row += 1


@gluon.jit
def _attend(
    queries, latents, ring, slots, seq_lens, own,
    NUM_BLOCKS: gl.constexpr, BLOCK_R: gl.constexpr, MIN_PAGES: gl.constexpr, STAGES: gl.constexpr, TOP: gl.constexpr,
):  # fmt: skip
    latent_q, rope_q, out, partials, lse, q_wide, q_keys, weights_tile = queries
    tiles, keys, full, empty = ring
    num_rows, row_stride, head_stride, scale_log2, block, program, num_programs = own
    S_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 32, 16])
    O_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 2], [16, 256, 16])
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [8, 1], [1, 0])
    NARROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [8, 1], [1, 0])
    dtype: gl.constexpr = latent_q.dtype.element_ty
    if TOP:
        begin, stop, row, row_begin = _listed_share(num_rows, program, num_programs, TOP)
    else:
        begin, stop, row, row_begin = _share(slots, seq_lens, num_rows, program, num_programs, BLOCK_R, MIN_PAGES)
    unit = begin
    step = 0
    heads = block * 64 + gl.arange(0, 64, gl.SliceLayout(1, LINES))
    columns = gl.arange(0, 512, gl.SliceLayout(0, LINES))
    rope_heads = block * 64 + gl.arange(0, 64, gl.SliceLayout(1, NARROW))
    rope_columns = gl.arange(0, 64, gl.SliceLayout(0, NARROW))
    g = gl.arange(0, 64, gl.SliceLayout(1, O_LAYOUT))
    r = gl.arange(0, 512, gl.SliceLayout(0, O_LAYOUT))
    while unit < stop:
        if TOP:
            seq_len = gl.where(gl.load(slots + row) >= 0, gl.minimum(gl.load(seq_lens + row) + 1, TOP), 0)
            row_end = row_begin + (stop - begin) * (num_programs // num_rows)
        else:
            seq_len = gl.where(gl.load(slots + row) >= 0, gl.load(seq_lens + row), 0)
            row_end = row_begin + (seq_len + 63) // 64
        if row_end > unit:
            part_end = gl.minimum(row_end, stop)
            low, high = unit - row_begin, part_end - row_begin
            lines = (row * NUM_BLOCKS * 64 + heads).to(gl.int64)[:, None] * 512 + columns[None, :]
            q_wide.store(gl.load(latent_q + lines))
            rope_lines = row.to(gl.int64) * row_stride + rope_heads[:, None] * head_stride + rope_columns[None, :]
            q_keys.store(gl.load(rope_q + rope_lines))
            fence_async_shared()
            peak = gl.full([64], -1e30, gl.float32, gl.SliceLayout(1, S_LAYOUT))
            weight = gl.zeros([64], gl.float32, gl.SliceLayout(1, S_LAYOUT))
            total = gl.zeros([64, 512], gl.float32, O_LAYOUT)
            if TOP:
                high = gl.minimum(high, (seq_len + 63) // 64)
            for p in range(low, high):
                stage = step % STAGES
                latent = latents.index(stage)
                mbarrier.wait(full.index(stage), (step // STAGES) & 1)
                if TOP:
                    fence_async_shared()  # rows were copied by threads, and wgmma reads through the async proxy
                zeros = gl.zeros([64, 64], gl.float32, S_LAYOUT)
                scores = warpgroup_mma(q_wide, latent.permute((1, 0)), zeros, use_acc=False, is_async=True)
                scores = warpgroup_mma(q_keys, keys.index(stage).permute((1, 0)), scores, is_async=True)
                scores = warpgroup_mma_wait(0, deps=[scores])
                if (p + 1) * 64 > seq_len:
                    token = p * 64 + gl.arange(0, 64, gl.SliceLayout(0, S_LAYOUT))
                    scores = gl.where((token < seq_len)[None, :], scores, float("-inf"))
                    # What a page holds beyond the sequence may be NaN, and 0 * NaN is NaN.
                    present = p * 64 + gl.arange(0, 64, gl.SliceLayout(1, NARROW)) < seq_len
                    for c in gl.static_range(8):
                        tile = tiles.index(stage * 8 + c)
                        tile.store(gl.where(present[:, None], tile.load(NARROW), 0.0))
                highest = gl.maximum(peak, gl.max(scores, 1) * scale_log2)
                fade = gl.exp2(peak - highest)
                weights = gl.exp2(scores * scale_log2 - highest[:, None])
                weight = weight * fade + gl.sum(weights, 1)
                peak = highest
                weights_tile.store(weights.to(dtype))
                fence_async_shared()
                total = total * gl.convert_layout(fade, gl.SliceLayout(1, O_LAYOUT))[:, None]
                total = warpgroup_mma(weights_tile, latent, total, is_async=True)
                total = warpgroup_mma_wait(0, deps=[total])
                thread_barrier()  # the other warpgroup reads the page too
                mbarrier.arrive(empty.index(stage))
                step += 1
            if TOP:
                weight = gl.maximum(weight, 1e-30)  # of no token at all
            result = total * gl.convert_layout(1.0 / weight, gl.SliceLayout(1, O_LAYOUT))[:, None]
            if (low == 0) & (part_end == row_end):
                at = (row * NUM_BLOCKS * 64 + block * 64 + g).to(gl.int64)[:, None] * 512 + r[None, :]
                gl.store(out + at, result.to(dtype))
            else:
                index = (program * NUM_BLOCKS + block) * 2 + (unit > begin).to(gl.int32)
                size = gl.convert_layout(peak + gl.log2(weight), gl.SliceLayout(1, O_LAYOUT))
                gl.store(lse + index * 64 + g, size)
                gl.store(partials + (index * 64 + g)[:, None] * 512 + r[None, :], result)
            unit = part_end
        row_begin = row_end
        row += 1


@gluon.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["slots", "seq_lens"])
def _hopper_decode_kernel(
    latent_q, rope_q, pages, desc, page_table, slots, seq_lens, out, partials, lse,
    num_rows, row_stride, head_stride, table_stride, scale_log2,
    NUM_BLOCKS: gl.constexpr, BLOCK_R: gl.constexpr, MIN_PAGES: gl.constexpr, STAGES: gl.constexpr, TOP: gl.constexpr,
):  # fmt: skip
    """TOP: rows of `page_table` are lists of as many tokens, a row's own, and `seq_lens` positions."""
    dtype: gl.constexpr = latent_q.dtype.element_ty
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 512], dtype)
    latents = gl.allocate_shared_memory(dtype, [STAGES, 64, 512], wide)
    tiles = view(latents, dtype, [STAGES * 8, 64, 64], desc.layout)
    keys = gl.allocate_shared_memory(dtype, [STAGES, 64, 64], desc.layout)
    q_wide = gl.allocate_shared_memory(dtype, [64, 512], wide)
    q_keys = gl.allocate_shared_memory(dtype, [64, 64], desc.layout)
    weights_tile = gl.allocate_shared_memory(dtype, [64, 64], desc.layout)
    full, empty = new_barriers(STAGES, 128 if TOP else 1), new_barriers(STAGES, 1)
    fence_async_shared()
    block = gl.program_id(0) % NUM_BLOCKS
    program = gl.program_id(0) // NUM_BLOCKS
    num_programs = gl.num_programs(0) // NUM_BLOCKS
    queries = (latent_q, rope_q, out, partials, lse, q_wide, q_keys, weights_tile)
    fed, ring = (pages, desc, table_stride), (tiles, keys, full, empty)
    own = (num_rows, row_stride, head_stride, scale_log2, block, program, num_programs)
    FEEDERS: gl.constexpr = 4 if TOP else 1
    gl.warp_specialize([
        (_attend, (queries, latents, ring, slots, seq_lens, own, NUM_BLOCKS, BLOCK_R, MIN_PAGES, STAGES, TOP)),
        (_feed, (fed, ring, page_table, slots, seq_lens, own, BLOCK_R, MIN_PAGES, STAGES, TOP)),
    ], [FEEDERS], [40])  # fmt: skip


def serves(q: torch.Tensor, pages: torch.Tensor, group: int) -> bool:
    """Whether the kernel of this module runs these shapes on this device."""
    fits = (group, q.shape[2], *pages.shape[2:]) == (HEADS, RANK, PAGE, RANK + ROPE)
    return is_hopper(q) and fits and q.dtype == pages.dtype and q.element_size() == 2


def decode(
    q_latent: torch.Tensor, q_rope: torch.Tensor, pages: torch.Tensor, page_table: torch.Tensor, slots: torch.Tensor,
    seq_lens: torch.Tensor, scale_log2: float, out: torch.Tensor, partials: torch.Tensor, lse: torch.Tensor,
    num_programs: int, **cut: Any,
) -> None:  # fmt: skip
    """The plain kernel's launch, for what `serves` accepts; `cut`: NUM_BLOCKS, BLOCK_R, MIN_PAGES, TOP."""
    layout = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    desc = TensorDescriptor.from_tensor(pages.view(-1, pages.shape[3]), [PAGE, 64], layout)
    _hopper_decode_kernel[(num_programs * cut["NUM_BLOCKS"],)](
        q_latent, q_rope, pages, desc, page_table, slots, seq_lens, out, partials, lse, seq_lens.shape[0],
        *q_rope.stride()[:2], page_table.stride(0), scale_log2, STAGES=_STAGES, num_warps=8, **cut,
    )  # fmt: skip

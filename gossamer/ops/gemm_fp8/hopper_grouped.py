"""The routed FP8 experts of few rows each on Hopper, bound by reading their weights: one kernel makes both products, in
which a warp of each program keeps a ring of weights in flight from its start to its end, across tiles and products.

The weight is in front, for wgmma wants 64 rows; rows of x are its 16 or 32 columns.
"""

from __future__ import annotations

from typing import NamedTuple

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
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gossamer.ops.activation.triton import gated_activation, swiglu_options
from gossamer.ops.dispatch import overlap_options
from gossamer.ops.gemm_fp8.hopper import BLOCK, copy_rows, copy_tile, hand_over, load_scale, thread_barrier
from gossamer.ops.moe.triton import ExpertOrder
from gossamer.ops.quantize_fp8.hopper import quantize_rows

STAGES = gl.constexpr(6)
LAG = gl.constexpr(2)  # steps whose rows of x are on their way
AHEAD = gl.constexpr(256)  # bytes of each row that are guessed beside the ring


class GroupedConfig(NamedTuple):
    """`block_m` rows of an expert by 256 of the weight: 128 each of gate and up, or neighbours of down."""

    block_m: int


@gluon.jit
def _begin(gate, order):
    """Number of blocks, and whether the first tile is the one that was guessed: as if every expert had one block."""
    block, num_m = gl.program_id(0) // gate[0], gl.load(order[2], cache_modifier=".cg")
    return num_m, (gl.load(order[1] + block, cache_modifier=".cg") == block) & (block < num_m)


@gluon.jit
def _second(num_tiles):
    """A program's first tile of down: they go on behind the `num_tiles` of gate and up."""
    programs = gl.num_programs(0)
    return (gl.program_id(0) - num_tiles % programs + programs) % programs


@gluon.jit
def _bring_weights(step, group, row, product, tiles, GATED: gl.constexpr):
    """Of two steps: memory gives 256 bytes of a row sooner than twice 128."""
    w_tiles, full, empty = tiles[1], tiles[4], tiles[5]
    for j in gl.static_range(2):
        stage = (step + j) % STAGES
        mbarrier.wait(empty.index(stage), (((step + j) // STAGES) & 1) ^ 1)
        mbarrier.expect(full.index(stage), 2 * BLOCK * BLOCK)
    for i in gl.static_range(2):
        for j in gl.static_range(2):
            stage = (step + j) % STAGES
            down, right = (0, i * product[2]) if GATED else (i * BLOCK, 0)
            place = [row + down, right + (group + j) * BLOCK]
            copy_tile(product[3], place, full.index(stage), w_tiles.index(stage * 2 + i))


@gluon.jit
def _feed_product(step, begin, first, num_m, product, tiles, order, GATED: gl.constexpr):
    """Weights of a program's tiles, of the first one from step `begin` on, as stages become free."""
    num_n, N, K = product[0], product[1], product[2]
    last = gl.maximum(num_m * num_n, 1) - 1
    expert = gl.load(order[1] + gl.minimum(first, last) // num_n, cache_modifier=".cg")
    for tile in range(first, num_m * num_n, gl.num_programs(0)):
        row = expert * N + tile % num_n * (BLOCK if GATED else 2 * BLOCK)
        expert = gl.load(order[1] + gl.minimum(tile + gl.num_programs(0), last) // num_n, cache_modifier=".cg")
        for group in range(gl.where(tile == first, begin, 0), K // BLOCK, 2):
            _bring_weights(step, group, row, product, tiles, GATED)
            step += 2
    return step


@gluon.jit
def _feed_weights(w1, gate, down, tiles, order, PDL: gl.constexpr):
    """While kernels ahead still sort, weights are guessed: a ring of them, and as far as L2 what follows."""
    n1, inter, hidden, w1_desc = gate[0], gate[1], gate[2], gate[3]
    row = gl.program_id(0) // n1 * inter + gl.program_id(0) % n1 * BLOCK
    for group in range(0, STAGES, 2):
        _bring_weights(group, group, row, gate, tiles, True)
    lanes = gl.arange(0, 2 * BLOCK, gl.BlockedLayout([1], [32], [1], [0]))
    beyond = w1 + gl.minimum(row, w1_desc.shape[0] - BLOCK).to(gl.int64) * 2 * hidden + STAGES * BLOCK
    gl.inline_asm_elementwise(
        "{ cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }", "=r,l,r",
        [beyond + lanes * hidden, lanes * 0 + AHEAD], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    num_m, right = _begin(gate, order)
    step, begin = gl.to_tensor(STAGES), gl.where(right, STAGES, 0)
    step = _feed_product(step, begin, gl.program_id(0), num_m, gate, tiles, order, True)
    _feed_product(step, 0, _second(num_m * n1), num_m, down, tiles, order, False)


@gluon.jit
def _bring_rows(
    step, first, num_m, product, n_before, tiles, order, M: gl.constexpr, TOP_K: gl.constexpr, GATED: gl.constexpr
):
    """Rows of x by token, or of what gate and up made of them once that is there, and all scales of a product."""
    num_n, N, K, _w_desc, w_scales, a, a_scales, row_stride, group_stride, _out = product
    a_tiles, _w_tiles, a_scale_tiles, w_scale_tiles, full, empty = tiles
    rows, block_expert, _num_blocks, ready, num_rows = order
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    groups, n_blocks = K // BLOCK, N // BLOCK
    begin = step
    for tile in range(first, num_m * num_n, gl.num_programs(0)):
        m, n = tile // num_n, tile % num_n
        expert = gl.load(block_expert + m, cache_modifier=".cg")
        own, place = m * M + gl.arange(0, M, line), m * M + gl.arange(0, M, gl.SliceLayout(1, layout))
        assignment = gl.load(rows + place, cache_modifier=".cg")
        if GATED:
            own = gl.minimum(gl.load(rows + own, cache_modifier=".cg"), num_rows - 1) // TOP_K
            place = assignment // TOP_K
            w_scale, beside = w_scales + (expert * 2 * n_blocks + n) * groups, n_blocks * groups
        else:
            w_scale, beside = w_scales + (expert * n_blocks + n * 2) * groups, groups
            done = gl.atomic_add(ready + m, 0)
            while done < n_before:
                done = gl.atomic_add(ready + m, 0)
        source = a + place[:, None] * K + gl.arange(0, BLOCK, gl.SliceLayout(0, layout))[None, :]
        for group in range(groups):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            copy_rows(a_tiles.index(stage), source + group * BLOCK, mask=(assignment < num_rows)[:, None])
            copy_rows(a_scale_tiles.index(stage), a_scales + own * row_stride + group * group_stride)
            for i in gl.static_range(2):
                copy_rows(w_scale_tiles.index(stage * 2 + i), w_scale + i * beside + group + gl.arange(0, 1, line))
            async_copy.commit_group()
            if step - begin >= LAG:
                async_copy.wait_group(LAG)
                hand_over(full.index((step - LAG) % STAGES))
            step += 1
        if not GATED:  # the last of those that waited leaves a zero
            gl.store(ready + m, 0, mask=gl.atomic_add(ready + m, 1) == n_before + num_n - 1)
    async_copy.wait_group(0)
    for late in range(gl.maximum(step - LAG, begin), step):
        hand_over(full.index(late % STAGES))
    return step


@gluon.jit
def _feed_rows(gate, down, tiles, order, M: gl.constexpr, TOP_K: gl.constexpr, PDL: gl.constexpr):
    if PDL:
        gdc_wait()
    num_m, right = _begin(gate, order)
    step = gl.where(right, 0, STAGES)
    for wrong in range(step):  # nothing of what was guessed is used
        mbarrier.arrive(tiles[4].index(wrong), count=1)
    step = _bring_rows(step, gl.program_id(0), num_m, gate, 0, tiles, order, M, TOP_K, True)
    _bring_rows(step, _second(num_m * gate[0]), num_m, down, gate[0], tiles, order, M, TOP_K, False)


@gluon.jit
def _store(y, out, m, column, N, live):
    """A tile of rows, without those of padding."""
    LAYOUT: gl.constexpr = live.type.layout.parent
    row = m * y.shape[0] + gl.arange(0, y.shape[0], gl.SliceLayout(1, LAYOUT))
    place = column + gl.arange(0, BLOCK, gl.SliceLayout(0, LAYOUT))
    y = gl.convert_layout(y.to(out.dtype.element_ty), LAYOUT)
    gl.store(out + row.to(gl.int64)[:, None] * N + place[None, :], y, mask=live[:, None])


@gluon.jit
def _multiply_tiles(
    step, first, num_m, product, tiles, order, M: gl.constexpr, GATED: gl.constexpr, ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
):  # fmt: skip
    num_n, N, K = product[0], product[1], product[2]
    out, act_scales, act_stride = product[9]
    a_tiles, w_tiles, a_scales, w_scales, full, empty = tiles
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, M, 32])
    LINES: gl.constexpr = gl.SliceLayout(0, ACC)
    WIDE: gl.constexpr = 16 if GATED else 8  # results of a thread, 16 bytes
    OUT: gl.constexpr = gl.BlockedLayout([1, WIDE], [WIDE // 4, 128 // WIDE], [4, 1], [1, 0])
    for tile in range(first, num_m * num_n, gl.num_programs(0)):
        m, n = tile // num_n, tile % num_n
        live = gl.load(order[0] + m * M + gl.arange(0, M, gl.SliceLayout(1, OUT)), cache_modifier=".cg") < order[4]
        acc0 = gl.zeros([BLOCK, M], gl.float32, ACC)
        acc1 = gl.zeros([BLOCK, M], gl.float32, ACC)
        for _ in range(K // BLOCK):
            stage = step % STAGES
            mbarrier.wait(full.index(stage), (step // STAGES) & 1)
            a_tile, zeros = a_tiles.index(stage).permute((1, 0)), gl.zeros([BLOCK, M], gl.float32, ACC)
            token0 = warpgroup_mma(w_tiles.index(stage * 2), a_tile, zeros, use_acc=False, is_async=True)
            token1 = warpgroup_mma(w_tiles.index(stage * 2 + 1), a_tile, zeros, use_acc=False, is_async=True)
            scale0 = load_scale(a_scales, w_scales, stage, stage * 2, -1, LINES)
            scale1 = load_scale(a_scales, w_scales, stage, stage * 2 + 1, -1, LINES)
            acc0 += warpgroup_mma_wait(1, deps=[token0]) * scale0[None, :]
            second = warpgroup_mma_wait(0, deps=[token1])
            mbarrier.arrive(empty.index(stage), count=1)
            acc1 += second * scale1[None, :]
            step += 1
        if GATED:
            y = gl.permute(gated_activation(acc0, acc1, ALPHA, LIMIT), (1, 0))
            q, scale = quantize_rows(y, out.dtype.element_ty)
            gl.store(act_scales + n * act_stride + m * M + gl.arange(0, M, gl.SliceLayout(1, q.type.layout)), scale)
            _store(q, out, m, n * BLOCK, N, live)
            thread_barrier()
            gl.atomic_add(order[3] + m, 1)
        else:
            for i in gl.static_range(2):
                _store(gl.permute(acc1 if i else acc0, (1, 0)), out, m, (n * 2 + i) * BLOCK, N, live)
    return step


@gluon.jit
def _multiply(gate, down, tiles, order, M: gl.constexpr, ALPHA: gl.constexpr, LIMIT: gl.constexpr, PDL: gl.constexpr):
    """The consumer."""
    if PDL:
        gdc_wait()
    num_m, right = _begin(gate, order)
    step = gl.where(right, 0, STAGES)
    for wrong in range(step):
        mbarrier.wait(tiles[4].index(wrong), 0)
        thread_barrier()
        mbarrier.arrive(tiles[5].index(wrong), count=1)
    step = _multiply_tiles(step, gl.program_id(0), num_m, gate, tiles, order, M, True, ALPHA, LIMIT)
    _multiply_tiles(step, _second(num_m * gate[0]), num_m, down, tiles, order, M, False, ALPHA, LIMIT)


@gluon.jit(do_not_specialize=["num_rows", "row_stride", "group_stride", "act_stride"])
def _experts_kernel(
    a, a_scales, w1, w1_desc, w1_scales, w2_desc, w2_scales, act, act_scales, y, rows, block_expert, num_blocks, ready,
    num_rows, inter, hidden, row_stride, group_stride, act_stride, ALPHA: gl.constexpr, LIMIT: gl.constexpr,
    M: gl.constexpr, TOP_K: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """What two of `triton._product_kernel` compute. A tile of down waits for those of gate and up that it reads, which
    other programs make: all are resident, one for each multiprocessor, and begin with those. So of these kernels one
    runs at a time: `dispatch.device_users` sees to that.
    """
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    a_tiles = gl.allocate_shared_memory(w1_desc.dtype, [STAGES, M, BLOCK], w1_desc.layout)
    w_tiles = gl.allocate_shared_memory(w1_desc.dtype, [STAGES * 2, BLOCK, BLOCK], w1_desc.layout)
    a_scale_tiles = gl.allocate_shared_memory(gl.float32, [STAGES, M], plain)
    w_scale_tiles = gl.allocate_shared_memory(gl.float32, [STAGES * 2, 1], plain)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=2)
        mbarrier.init(empty.index(i), count=1)
    fence_async_shared()
    tiles = (a_tiles, w_tiles, a_scale_tiles, w_scale_tiles, full, empty)
    order = (rows, block_expert, num_blocks, ready, num_rows)
    n1, n2 = inter // BLOCK, hidden // (2 * BLOCK)
    between = (act, act_scales, act_stride)
    gate = (n1, inter, hidden, w1_desc, w1_scales, a, a_scales, row_stride, group_stride, between)
    down = (n2, hidden, inter, w2_desc, w2_scales, act, act_scales, 1, act_stride, (y, act_scales, 0))
    gl.warp_specialize([
        (_multiply, (gate, down, tiles, order, M, ALPHA, LIMIT, PDL)),
        (_feed_weights, (w1, gate, down, tiles, order, PDL)),
        (_feed_rows, (gate, down, tiles, order, M, TOP_K, PDL)),
    ], [1, 1], [56, 88])  # fmt: skip


def serves(hidden: int, inter: int) -> bool:
    """Steps come in pairs, and a row of gate's and up's holds what is guessed."""
    return hidden % 256 == inter % 256 == 0 and hidden >= STAGES.value * BLOCK.value + AHEAD.value


def experts(
    q: torch.Tensor, scales: torch.Tensor, w_gate_up: torch.Tensor, gate_up_scales: torch.Tensor, w_down: torch.Tensor,
    down_scales: torch.Tensor, act: torch.Tensor, act_scales: torch.Tensor, y: torch.Tensor, config: GroupedConfig,
    counters: torch.Tensor, *, order: ExpertOrder, num_rows: int, top_k: int, strides: tuple[int, int],
    multiprocessors: int, swiglu: tuple[float, float] | None,
) -> None:  # fmt: skip
    """Both of `triton._product` by expert, to 16-bit y, for what `serves` says. act: rows between them, quantised."""
    hidden, inter = w_down.shape[1:]
    bytes_ = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    w1_desc = TensorDescriptor.from_tensor(w_gate_up.view(-1, 2 * hidden), [128, 128], bytes_)
    w2_desc = TensorDescriptor.from_tensor(w_down.view(-1, inter), [128, 128], bytes_)
    _experts_kernel[(min(order.block_expert.numel() * (inter // 128), multiprocessors),)](
        q, scales, w_gate_up, w1_desc, gate_up_scales, w2_desc, down_scales, act, act_scales, y, *order[:3], counters,
        num_rows, inter, hidden, *strides, act_scales.stride(1), M=config.block_m, TOP_K=top_k, num_warps=4,
        maxnreg=128, **swiglu_options(swiglu), **overlap_options(q),
    )  # fmt: skip

"""FP8 products of few rows on Hopper, bound by reading the weight: a warp keeps a deep ring of its tiles in flight.

The ring fills before the kernel ahead has ended, for no kernel writes weights; two programs fit a multiprocessor, so
that one's end and the next one's start overlap.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
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

from gossamer.ops.dispatch import overlap_options
from gossamer.ops.gemm_fp8.hopper import BLOCK, ROWS, copy_rows, copy_tile, thread_barrier


class FewConfig(NamedTuple):
    """Cut of a product: a program has 64 rows of x by 64 of the weight, or twice as many of either.

    `split_k` programs share a tile's K; the stages fit a multiprocessor twice.
    """

    tokens: int = 1
    parts: int = 1
    split_k: int = 1
    w_stages: int = 8
    a_stages: int = 5

    @property
    def block_m(self) -> int:
        return 64 * self.tokens


@gluon.jit
def _bring_weight(step, w_desc, scales, tiles, w_row, first, PARTS: gl.constexpr, W_STAGES: gl.constexpr):
    """A step's tile of the weight and the scales of its parts."""
    w_tiles, w_scale_tiles, w_full = tiles
    stage = step % W_STAGES
    bar = w_full.index(stage)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    mbarrier.expect(bar, PARTS * ROWS * BLOCK)
    for i in gl.static_range(PARTS):
        tile = w_tiles.index(stage * PARTS + i)
        copy_tile(w_desc, [w_row + i * ROWS, (first + step) * BLOCK], bar, tile)
        pointer = scales[i] + first + step + gl.arange(0, 1, one)
        copy_rows(w_scale_tiles.index(stage * PARTS + i), pointer)
    async_copy.mbarrier_arrive(bar, increment_count=False)


@gluon.jit
def _feed(
    a_desc, w_desc, a_scales, w_scales, tiles, m, n, first, groups, num_rows, N, K, row_stride, group_stride,
    TOKENS: gl.constexpr, PARTS: gl.constexpr, W_STAGES: gl.constexpr, A_STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The producer. A step that was multiplied frees a tile of x and, further ahead, one of the weight.

    Scales travel with the tiles: they were the longest wait of a step when the consumer loaded them, a step ahead.
    """
    a_tiles, a_scale_tiles, a_full, w_tiles, w_scale_tiles, w_full, empty = tiles
    w_ring = (w_tiles, w_scale_tiles, w_full)
    AHEAD: gl.constexpr = W_STAGES - A_STAGES
    w_row = n * (PARTS * ROWS)
    scales = ()
    for i in gl.static_range(PARTS):
        block = gl.minimum(w_row + i * ROWS, N - 1) // BLOCK
        source = (w_scales + block * ((K + BLOCK - 1) // BLOCK),)
        scales = scales + source  # type: ignore[assignment]
    for step in range(gl.minimum(groups, W_STAGES)):
        _bring_weight(step, w_desc, scales, w_ring, w_row, first, PARTS, W_STAGES)
    if PDL:
        gdc_wait()
    line: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    for step in range(groups):
        stage = step % A_STAGES
        bar = a_full.index(stage)
        mbarrier.wait(empty.index(stage), ((step // A_STAGES) & 1) ^ 1)
        mbarrier.expect(bar, TOKENS * ROWS * BLOCK)
        for i in gl.static_range(TOKENS):
            row = (m * TOKENS + i) * ROWS
            copy_tile(a_desc, [row, (first + step) * BLOCK], bar, a_tiles.index(stage * TOKENS + i))
            rows = gl.minimum(row + gl.arange(0, ROWS, line), num_rows - 1)
            copy_rows(
                a_scale_tiles.index(stage * TOKENS + i), a_scales + rows * row_stride + (first + step) * group_stride
            )
        async_copy.mbarrier_arrive(bar, increment_count=False)
        ahead = step + AHEAD
        if (step >= A_STAGES) & (ahead < groups):
            _bring_weight(ahead, w_desc, scales, w_ring, w_row, first, PARTS, W_STAGES)


@gluon.jit
def _product(i: gl.constexpr, a_tiles, w_tiles, a_stage, w_stage, TOKENS: gl.constexpr, PARTS: gl.constexpr):
    """Issues the product of 64 rows and 64 of the weight's, in fresh accumulators."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32])
    zeros = gl.zeros([ROWS, ROWS], gl.float32, layout)
    a_tile, w_tile = a_tiles.index(a_stage * TOKENS + i % TOKENS), w_tiles.index(w_stage * PARTS + i // TOKENS)
    return warpgroup_mma(a_tile, w_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _add(acc, token, scale, running: gl.constexpr):
    """Waits for a product, behind which `running` more were issued, and adds it.

    The second wait has nothing to wait for: it keeps the sum in its place, for registers hold no more products.
    """
    product = warpgroup_mma_wait(running, deps=[token])
    return warpgroup_mma_wait(running, deps=[acc + product * scale[:, None]])


@gluon.jit
def _scale(
    i: gl.constexpr, a_scale_tiles, w_scale_tiles, a, w, TOKENS: gl.constexpr, PARTS: gl.constexpr, LAYOUT: gl.constexpr
):
    """Of product i of a step: the rows' scales times that of its part of the weight."""
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    part = gl.max(w_scale_tiles.index(w * PARTS + i // TOKENS).load(one), 0)
    return a_scale_tiles.index(a * TOKENS + i % TOKENS).load(gl.SliceLayout(1, LAYOUT)) * part


@gluon.jit
def _store(acc, out, row0, column, num_rows, N):
    row = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout))
    place = column + gl.arange(0, ROWS, gl.SliceLayout(0, acc.type.layout))
    mask = (row < num_rows)[:, None] & (place < N)[None, :]
    gl.store(out + row[:, None] * N + place[None, :], acc.to(out.dtype.element_ty), mask=mask)


@gluon.jit
def _add_splits(
    acc0, acc1, partial, counter, split, out, row0, column, num_rows, N,
    TOKENS: gl.constexpr, PARTS: gl.constexpr, SPLIT_K: gl.constexpr,
):  # fmt: skip
    """Leaves a program's part; the last of a tile's programs adds all of them, in order, and stores. None waits."""
    NUM: gl.constexpr = TOKENS * PARTS
    AREA: gl.constexpr = ROWS * ROWS
    row = gl.arange(0, ROWS, gl.SliceLayout(1, acc0.type.layout))
    place = gl.arange(0, ROWS, gl.SliceLayout(0, acc0.type.layout))
    # Eight columns of all rows lie together: what a warp stores at a time is one stretch of memory.
    partial += place[None, :] // 8 * (8 * ROWS) + row[:, None] * 8 + place[None, :] % 8
    for i in gl.static_range(NUM):
        gl.store(partial + (split * NUM + i) * AREA, acc1 if i else acc0)
    thread_barrier()
    if gl.atomic_add(counter, 1) == SPLIT_K - 1:
        gl.store(counter, 0)
        for i in gl.static_range(NUM):
            total = gl.load(partial + i * AREA, cache_modifier=".cg")
            for k in gl.static_range(1, SPLIT_K):
                total += gl.load(partial + (k * NUM + i) * AREA, cache_modifier=".cg")
            _store(total, out, row0 + i % TOKENS * ROWS, column + i // TOKENS * ROWS, num_rows, N)


@gluon.jit
def _multiply(
    own, tiles, m, n, split, groups, TOKENS: gl.constexpr, PARTS: gl.constexpr,
    SPLIT_K: gl.constexpr, W_STAGES: gl.constexpr, A_STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The consumer. A product is scaled and added while the next one runs."""
    out, partial, counters, num_rows, N = own
    a_tiles, a_scale_tiles, a_full, w_tiles, w_scale_tiles, w_full, empty = tiles
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32])
    NUM: gl.constexpr = TOKENS * PARTS
    column, row0 = n * (PARTS * ROWS), m * (TOKENS * ROWS)
    if PDL:
        gdc_wait()
    acc0 = gl.zeros([ROWS, ROWS], gl.float32, ACC)
    acc1 = gl.zeros([ROWS, ROWS], gl.float32, ACC)
    for step in range(groups):
        w, a = step % W_STAGES, step % A_STAGES
        mbarrier.wait(w_full.index(w), (step // W_STAGES) & 1)
        mbarrier.wait(a_full.index(a), (step // A_STAGES) & 1)
        token0 = _product(gl.constexpr(0), a_tiles, w_tiles, a, w, TOKENS, PARTS)
        scale0 = _scale(gl.constexpr(0), a_scale_tiles, w_scale_tiles, a, w, TOKENS, PARTS, ACC)
        if NUM == 2:
            scale1 = _scale(gl.constexpr(1), a_scale_tiles, w_scale_tiles, a, w, TOKENS, PARTS, ACC)
            token1 = _product(gl.constexpr(1), a_tiles, w_tiles, a, w, TOKENS, PARTS)
            acc0 = _add(acc0, token0, scale0, 1)
            acc1 = _add(acc1, token1, scale1, 0)
        else:
            acc0 = _add(acc0, token0, scale0, 0)
        mbarrier.arrive(empty.index(a), count=1)
    if SPLIT_K > 1:
        unit = m * (gl.num_programs(0) // SPLIT_K) + n
        partial += unit.to(gl.int64) * (SPLIT_K * NUM * ROWS * ROWS)
        _add_splits(acc0, acc1, partial, counters + unit, split, out, row0, column, num_rows, N, TOKENS, PARTS, SPLIT_K)
    else:
        for i in gl.static_range(NUM):
            _store(acc1 if i else acc0, out, row0 + i % TOKENS * ROWS, column + i // TOKENS * ROWS, num_rows, N)


@gluon.jit(do_not_specialize=["num_rows", "row_stride", "group_stride"])
def _few_kernel(
    a_desc, w_desc, out, a_scales, w_scales, partial, counters, num_rows, N, K, row_stride, group_stride,
    TOKENS: gl.constexpr, PARTS: gl.constexpr, SPLIT_K: gl.constexpr, W_STAGES: gl.constexpr,
    A_STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out [num_rows, N] = a @ w.T, each 128 of K promoted with its scales: `triton._product_kernel`, dense."""
    if PDL:
        gdc_launch_dependents()
    dtype: gl.constexpr = w_desc.dtype
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    a_tiles = gl.allocate_shared_memory(dtype, [A_STAGES * TOKENS, ROWS, BLOCK], a_desc.layout)
    w_tiles = gl.allocate_shared_memory(dtype, [W_STAGES * PARTS, ROWS, BLOCK], w_desc.layout)
    a_scale_tiles = gl.allocate_shared_memory(gl.float32, [A_STAGES * TOKENS, ROWS], plain)
    w_scale_tiles = gl.allocate_shared_memory(gl.float32, [W_STAGES * PARTS, 1], plain)
    a_full = gl.allocate_shared_memory(gl.int64, [A_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [A_STAGES, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(A_STAGES):
        mbarrier.init(a_full.index(i), count=33)  # 32 lanes, when what they copied has landed
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(W_STAGES):
        mbarrier.init(w_full.index(i), count=33)
    fence_async_shared()
    split, n, m = gl.program_id(0) % SPLIT_K, gl.program_id(0) // SPLIT_K, gl.program_id(1)
    span = ((K + BLOCK - 1) // BLOCK + SPLIT_K - 1) // SPLIT_K
    first = split * span
    groups = gl.minimum(span, gl.maximum((K + BLOCK - 1) // BLOCK - first, 0))
    tiles = (a_tiles, a_scale_tiles, a_full, w_tiles, w_scale_tiles, w_full, empty)
    own = (out, partial, counters, num_rows, N)
    gl.warp_specialize([
        (_multiply, (own, tiles, m, n, split, groups, TOKENS, PARTS, SPLIT_K, W_STAGES, A_STAGES, PDL)),
        (_feed, (
            a_desc, w_desc, a_scales, w_scales, tiles, m, n, first, groups, num_rows, N, K, row_stride, group_stride,
            TOKENS, PARTS, W_STAGES, A_STAGES, PDL,
        )),
    ], [1], [40])  # fmt: skip


def product(
    a: torch.Tensor, a_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, out: torch.Tensor,
    config: FewConfig, counters: torch.Tensor, strides: tuple[int, int],
) -> None:  # fmt: skip
    """`triton._product` of dense operands with scales of blocks, to 16 bits and without bias; N a multiple of 8."""
    (num_rows, k), n, split_k = a.shape, w.shape[0], config.split_k
    tiles, blocks = triton.cdiv(n, 64 * config.parts), triton.cdiv(num_rows, config.block_m)
    bytes_ = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    area = blocks * tiles * split_k * config.tokens * config.parts * 64 * 64
    partial = a_scales if split_k == 1 else a_scales.new_empty(area)
    _few_kernel[(tiles * split_k, blocks)](
        TensorDescriptor.from_tensor(a, [64, 128], bytes_), TensorDescriptor.from_tensor(w, [64, 128], bytes_),
        out, a_scales, w_scales, partial, counters, num_rows, n, k, *strides,
        TOKENS=config.tokens, PARTS=config.parts, SPLIT_K=split_k, W_STAGES=config.w_stages, A_STAGES=config.a_stages,
        num_warps=4, maxnreg=128, **overlap_options(a),
    )  # fmt: skip

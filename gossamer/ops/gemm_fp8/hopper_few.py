"""FP8 products of few rows on Hopper, bound by reading the weight: a warp keeps a deep ring of its tiles in flight.

The ring fills before the kernel ahead has ended, for no kernel writes weights; two programs fit a multiprocessor, so
that one's end and the next one's start overlap. Programs that share a tile's K each add a part of its rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gossamer.ops.dispatch import overlap_options
from gossamer.ops.gemm_fp8.hopper import BLOCK, ROWS, copy_tile

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


class FewConfig(NamedTuple):
    """Cut of a product: `tokens` times 64 rows of x by `parts` times 64 of the weight a program, 4 of these at most.

    `split_k` programs, all resident at once, share a tile's K.
    """

    tokens: int = 1
    parts: int = 2
    split_k: int = 1
    w_stages: int = 5
    a_stages: int = 3

    @property
    def block_m(self) -> int:
        return 64 * self.tokens


@gluon.jit
def _feed(
    a_desc, w_desc, tiles, m, w_row, first, groups, TOKENS: gl.constexpr, PARTS: gl.constexpr,
    W_STAGES: gl.constexpr, A_STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The producer. A step that was multiplied frees a tile of x and, further ahead, one of the weight."""
    a_tiles, w_tiles, a_full, w_full, empty = tiles
    AHEAD: gl.constexpr = W_STAGES - A_STAGES
    for step in range(gl.minimum(groups, W_STAGES)):
        mbarrier.expect(w_full.index(step), PARTS * ROWS * BLOCK)
        for i in gl.static_range(PARTS):
            tile = w_tiles.index(step * PARTS + i)
            copy_tile(w_desc, [w_row + i * ROWS, (first + step) * BLOCK], w_full.index(step), tile)
    if PDL:
        gdc_wait()
    for step in range(groups):
        stage = step % A_STAGES
        mbarrier.wait(empty.index(stage), ((step // A_STAGES) & 1) ^ 1)
        mbarrier.expect(a_full.index(stage), TOKENS * ROWS * BLOCK)
        for i in gl.static_range(TOKENS):
            tile = a_tiles.index(stage * TOKENS + i)
            copy_tile(a_desc, [(m * TOKENS + i) * ROWS, (first + step) * BLOCK], a_full.index(stage), tile)
        ahead = step + AHEAD
        stage = ahead % W_STAGES
        more = (step >= A_STAGES) & (ahead < groups)
        mbarrier.expect(w_full.index(stage), PARTS * ROWS * BLOCK, pred=more)
        for i in gl.static_range(PARTS):
            tile = w_tiles.index(stage * PARTS + i)
            copy_tile(w_desc, [w_row + i * ROWS, (first + ahead) * BLOCK], w_full.index(stage), tile, pred=more)


@gluon.jit
def _product(i: gl.constexpr, a_tiles, w_tiles, a_stage, w_stage, TOKENS: gl.constexpr, PARTS: gl.constexpr):
    """Issues the product of 64 rows and 64 of the weight's, in fresh accumulators."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32])
    zeros = gl.zeros([ROWS, ROWS], gl.float32, layout)
    a_tile, w_tile = a_tiles.index(a_stage * TOKENS + i % TOKENS), w_tiles.index(w_stage * PARTS + i // TOKENS)
    return warpgroup_mma(a_tile, w_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _load_scales(a_ptrs0, a_ptrs1, w_ptrs, group, group_stride, TOKENS: gl.constexpr, PARTS: gl.constexpr):
    """Of a group of K: those of the rows and of each part of the weight."""
    a0 = gl.load(a_ptrs0 + group * group_stride)
    a1 = gl.load(a_ptrs1 + group * group_stride) if TOKENS == 2 else a0
    w0 = gl.load(w_ptrs[0] + group)
    w1 = gl.load(w_ptrs[1] + group) if PARTS > 1 else w0
    w2 = gl.load(w_ptrs[2] + group) if PARTS > 2 else w0
    w3 = gl.load(w_ptrs[3] + group) if PARTS > 3 else w0
    return a0, a1, w0, w1, w2, w3


@gluon.jit
def _store(acc, out, row0, column, num_rows, N):
    row = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout))
    place = column + gl.arange(0, ROWS, gl.SliceLayout(0, acc.type.layout))
    mask = (row < num_rows)[:, None] & (place < N)[None, :]
    gl.store(out + row[:, None] * N + place[None, :], acc.to(out.dtype.element_ty), mask=mask)


@gluon.jit
def _store_partial(acc, partial):
    row = gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout))
    column = gl.arange(0, ROWS, gl.SliceLayout(0, acc.type.layout))
    gl.store(partial + row[:, None] * ROWS + column[None, :], acc)


@gluon.jit
def _add_splits(
    partial, counter, split, out, row0, column, num_rows, N,
    TOKENS: gl.constexpr, PARTS: gl.constexpr, SPLIT_K: gl.constexpr,
):  # fmt: skip
    """Waits for all programs of the tile, then adds their parts, in order, of a share of the rows."""
    HEIGHT: gl.constexpr = TOKENS * ROWS
    SHARE: gl.constexpr = HEIGHT // SPLIT_K
    AREA: gl.constexpr = HEIGHT * ROWS
    LINES: gl.constexpr = gl.BlockedLayout([1, 4], [2, 16], [4, 1], [1, 0])
    _barrier()
    arrived = gl.atomic_add(counter, 1) + 1
    while arrived < SPLIT_K:
        arrived = gl.atomic_add(counter, 0)
    row = split * SHARE + gl.arange(0, SHARE, gl.SliceLayout(1, LINES))
    place = gl.arange(0, ROWS, gl.SliceLayout(0, LINES))
    for part in gl.static_range(PARTS):
        total = gl.zeros([SHARE, ROWS], gl.float32, LINES)
        for i in gl.static_range(SPLIT_K):
            offsets = row[:, None] * ROWS + place[None, :] + (i * PARTS + part) * AREA
            total += gl.load(partial + offsets, cache_modifier=".cg")
        own = column + part * ROWS + place
        mask = (row0 + row < num_rows)[:, None] & (own < N)[None, :]
        gl.store(out + (row0 + row)[:, None] * N + own[None, :], total.to(out.dtype.element_ty), mask=mask)
    _barrier()
    if gl.atomic_add(counter, 1) == 2 * SPLIT_K - 1:  # the last to leave
        gl.store(counter, 0)


@gluon.jit
def _multiply(
    own, tiles, m, n, split, first, groups, TOKENS: gl.constexpr, PARTS: gl.constexpr,
    SPLIT_K: gl.constexpr, W_STAGES: gl.constexpr, A_STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The consumer. A product is scaled and added while the next one runs."""
    out, a_scales, w_scales, partial, counters, num_rows, N, K, row_stride, group_stride = own
    a_tiles, w_tiles, a_full, w_full, empty = tiles
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32])
    NUM: gl.constexpr = TOKENS * PARTS
    column, row0 = n * (PARTS * ROWS), m * (TOKENS * ROWS)
    num_groups = (K + BLOCK - 1) // BLOCK
    last = num_groups - 1
    w_ptrs = ()
    for i in gl.static_range(4):
        block = gl.minimum(column + i * ROWS, N - 1) // BLOCK
        w_ptrs = w_ptrs + (w_scales + block * num_groups,)  # type: ignore[assignment]
    row = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
    a_ptrs0 = a_scales + gl.minimum(row, num_rows - 1) * row_stride
    a_ptrs1 = a_scales + gl.minimum(row + ROWS, num_rows - 1) * row_stride
    if PDL:
        gdc_wait()
    a0, a1, w0, w1, w2, w3 = _load_scales(
        a_ptrs0, a_ptrs1, w_ptrs, gl.minimum(first, last), group_stride, TOKENS, PARTS
    )
    acc0 = gl.zeros([ROWS, ROWS], gl.float32, ACC)
    acc1 = gl.zeros([ROWS, ROWS], gl.float32, ACC)
    acc2 = gl.zeros([ROWS, ROWS], gl.float32, ACC)
    acc3 = gl.zeros([ROWS, ROWS], gl.float32, ACC)
    for step in range(groups):
        w, a = step % W_STAGES, step % A_STAGES
        mbarrier.wait(w_full.index(w), (step // W_STAGES) & 1)
        mbarrier.wait(a_full.index(a), (step // A_STAGES) & 1)
        even = _product(gl.constexpr(0), a_tiles, w_tiles, a, w, TOKENS, PARTS)
        s0 = a0 * w0
        s1 = a1 * w0 if TOKENS == 2 else a0 * w1
        s2 = a0 * w1 if TOKENS == 2 else a0 * w2
        s3 = a1 * w1 if TOKENS == 2 else a0 * w3
        # Loaded while the products run, for the next step.
        ahead = gl.minimum(first + step + 1, last)
        a0, a1, w0, w1, w2, w3 = _load_scales(a_ptrs0, a_ptrs1, w_ptrs, ahead, group_stride, TOKENS, PARTS)
        if NUM > 1:
            odd = _product(gl.constexpr(1), a_tiles, w_tiles, a, w, TOKENS, PARTS)
            product = warpgroup_mma_wait(1, deps=[even])
            # Waits with nothing to wait for keep the sums in their place: registers hold two products.
            acc0 = warpgroup_mma_wait(1, deps=[acc0 + product * s0[:, None]])
            if NUM > 2:
                even = _product(gl.constexpr(2), a_tiles, w_tiles, a, w, TOKENS, PARTS)
                product = warpgroup_mma_wait(1, deps=[odd])
                acc1 = warpgroup_mma_wait(1, deps=[acc1 + product * s1[:, None]])
                if NUM > 3:
                    odd = _product(gl.constexpr(3), a_tiles, w_tiles, a, w, TOKENS, PARTS)
                    product = warpgroup_mma_wait(1, deps=[even])
                    acc2 = warpgroup_mma_wait(1, deps=[acc2 + product * s2[:, None]])
                    product = warpgroup_mma_wait(0, deps=[odd])
                    acc3 += product * s3[:, None]
                else:
                    product = warpgroup_mma_wait(0, deps=[even])
                    acc2 += product * s2[:, None]
            else:
                product = warpgroup_mma_wait(0, deps=[odd])
                acc1 += product * s1[:, None]
        else:
            product = warpgroup_mma_wait(0, deps=[even])
            acc0 += product * s0[:, None]
        mbarrier.arrive(empty.index(a), count=1)
    unit = m * (gl.num_programs(0) // SPLIT_K) + n
    partial += (unit * SPLIT_K + split).to(gl.int64) * (NUM * ROWS * ROWS)
    for i in gl.static_range(NUM):
        acc = acc0 if i == 0 else (acc1 if i == 1 else (acc2 if i == 2 else acc3))
        if SPLIT_K == 1:
            _store(acc, out, row0 + i % TOKENS * ROWS, column + i // TOKENS * ROWS, num_rows, N)
        else:
            _store_partial(acc, partial + ((i // TOKENS) * TOKENS + i % TOKENS) * (ROWS * ROWS))
    if SPLIT_K > 1:
        partial -= split * (NUM * ROWS * ROWS)
        _add_splits(partial, counters + unit, split, out, row0, column, num_rows, N, TOKENS, PARTS, SPLIT_K)


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
    a_tiles = gl.allocate_shared_memory(dtype, [A_STAGES * TOKENS, ROWS, BLOCK], a_desc.layout)
    w_tiles = gl.allocate_shared_memory(dtype, [W_STAGES * PARTS, ROWS, BLOCK], w_desc.layout)
    a_full = gl.allocate_shared_memory(gl.int64, [A_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [A_STAGES, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(A_STAGES):
        mbarrier.init(a_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(W_STAGES):
        mbarrier.init(w_full.index(i), count=1)
    fence_async_shared()
    split, n, m = gl.program_id(0) % SPLIT_K, gl.program_id(0) // SPLIT_K, gl.program_id(1)
    span = ((K + BLOCK - 1) // BLOCK + SPLIT_K - 1) // SPLIT_K
    first = split * span
    groups = gl.minimum(span, gl.maximum((K + BLOCK - 1) // BLOCK - first, 0))
    tiles = (a_tiles, w_tiles, a_full, w_full, empty)
    own = (out, a_scales, w_scales, partial, counters, num_rows, N, K, row_stride, group_stride)
    w_row = n * (PARTS * ROWS)
    gl.warp_specialize([
        (_multiply, (own, tiles, m, n, split, first, groups, TOKENS, PARTS, SPLIT_K, W_STAGES, A_STAGES, PDL)),
        (_feed, (a_desc, w_desc, tiles, m, w_row, first, groups, TOKENS, PARTS, W_STAGES, A_STAGES, PDL)),
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

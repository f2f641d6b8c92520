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
from gossamer.ops.gemm_fp8.hopper import BLOCK, ROWS, _line_layout, copy_tile

_barrier = getattr(gl, "barrier", None) or gl.thread_barrier


class FewConfig(NamedTuple):
    """Cut of a product: `tokens` times 64 rows of x by `warpgroups` times `block_n` of the weight a program.

    `split_k` programs, all resident at once, share a tile's K.
    """

    tokens: int = 1
    block_n: int = 128
    split_k: int = 1
    w_stages: int = 5
    a_stages: int = 3
    warpgroups: int = 1

    @property
    def block_m(self) -> int:
        return 64 * self.tokens


@gluon.jit
def _feed(
    a_desc, w_desc, tiles, m, w_row, first, groups, TOKENS: gl.constexpr, WGS: gl.constexpr, BLOCK_N: gl.constexpr,
    W_STAGES: gl.constexpr, A_STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """The producer. A step that was multiplied frees a tile of x and, further ahead, one of the weight."""
    a_tiles, w_tiles, a_full, w_full, empty = tiles
    AHEAD: gl.constexpr = W_STAGES - A_STAGES
    for step in range(gl.minimum(groups, W_STAGES)):
        mbarrier.expect(w_full.index(step), WGS * BLOCK_N * BLOCK)
        for i in gl.static_range(WGS):
            tile = w_tiles.index(step * WGS + i)
            copy_tile(w_desc, [w_row + i * BLOCK_N, (first + step) * BLOCK], w_full.index(step), tile)
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
        mbarrier.expect(w_full.index(stage), WGS * BLOCK_N * BLOCK, pred=more)
        for i in gl.static_range(WGS):
            tile = w_tiles.index(stage * WGS + i)
            copy_tile(w_desc, [w_row + i * BLOCK_N, (first + ahead) * BLOCK], w_full.index(stage), tile, pred=more)


@gluon.jit
def _product(a_tile, w_tile, BLOCK_N: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, layout)
    return warpgroup_mma(a_tile, w_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _store(acc, out, row0, column, num_rows, N):
    lines: gl.constexpr = _line_layout(8, acc.shape[1])
    row = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, lines))
    place = column + gl.arange(0, acc.shape[1], gl.SliceLayout(0, lines))
    y = gl.convert_layout(acc.to(out.dtype.element_ty), lines)
    gl.store(out + row[:, None] * N + place[None, :], y, mask=(row < num_rows)[:, None] & (place < N)[None, :])


@gluon.jit
def _store_partial(acc, partial, row0):
    row = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout))
    column = gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
    gl.store(partial + row[:, None] * acc.shape[1] + column[None, :], acc)


@gluon.jit
def _add_splits(
    partial, counter, split, out, row0, column, num_rows, N,
    HEIGHT: gl.constexpr, WIDTH: gl.constexpr, SPLIT_K: gl.constexpr,
):  # fmt: skip
    """Waits for all programs of the tile, then adds their parts, in order, of a share of the rows."""
    SHARE: gl.constexpr = HEIGHT // SPLIT_K
    LINES: gl.constexpr = gl.BlockedLayout([1, 4], [128 // WIDTH, WIDTH // 4], [4, 1], [1, 0])
    _barrier()
    arrived = gl.atomic_add(counter, 1) + 1
    while arrived < SPLIT_K:
        arrived = gl.atomic_add(counter, 0)
    row = split * SHARE + gl.arange(0, SHARE, gl.SliceLayout(1, LINES))
    place = gl.arange(0, WIDTH, gl.SliceLayout(0, LINES))
    offsets = row[:, None] * WIDTH + place[None, :]
    total = gl.zeros([SHARE, WIDTH], gl.float32, LINES)
    for i in gl.static_range(SPLIT_K):
        total += gl.load(partial + i * (HEIGHT * WIDTH) + offsets, cache_modifier=".cg")
    row, place = row0 + row, column + place
    mask = (row < num_rows)[:, None] & (place < N)[None, :]
    gl.store(out + row[:, None] * N + place[None, :], total.to(out.dtype.element_ty), mask=mask)
    _barrier()
    if gl.atomic_add(counter, 1) == 2 * SPLIT_K - 1:  # the last to leave
        gl.store(counter, 0)


@gluon.jit
def _multiply(
    WG: gl.constexpr, own, tiles, m, n, split, first, groups, TOKENS: gl.constexpr, WGS: gl.constexpr,
    BLOCK_N: gl.constexpr, SPLIT_K: gl.constexpr, W_STAGES: gl.constexpr, A_STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """One warpgroup: all rows of the program by `BLOCK_N` of the weight's."""
    out, a_scales, w_scales, partial, counters, num_rows, N, K, row_stride, group_stride = own
    a_tiles, w_tiles, a_full, w_full, empty = tiles
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 32])
    column = (n * WGS + WG) * BLOCK_N
    row0 = m * (TOKENS * ROWS)
    num_groups = (K + BLOCK - 1) // BLOCK
    last = num_groups - 1
    w_scale_ptr = w_scales + gl.minimum(column // BLOCK, (N - 1) // BLOCK) * num_groups
    row = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))
    a_scale_ptrs0 = a_scales + gl.minimum(row, num_rows - 1) * row_stride
    a_scale_ptrs1 = a_scales + gl.minimum(row + ROWS, num_rows - 1) * row_stride
    w_scale = gl.load(w_scale_ptr + gl.minimum(first, last))
    if PDL:
        gdc_wait()
    a_scale0 = gl.load(a_scale_ptrs0 + gl.minimum(first, last) * group_stride)
    a_scale1 = gl.load(a_scale_ptrs1 + gl.minimum(first, last) * group_stride) if TOKENS == 2 else a_scale0
    acc0 = gl.zeros([ROWS, BLOCK_N], gl.float32, ACC)
    acc1 = gl.zeros([ROWS, BLOCK_N], gl.float32, ACC)
    for step in range(groups):
        w_stage, a_stage = step % W_STAGES, step % A_STAGES
        ahead = gl.minimum(first + step + 1, last)
        mbarrier.wait(w_full.index(w_stage), (step // W_STAGES) & 1)
        mbarrier.wait(a_full.index(a_stage), (step // A_STAGES) & 1)
        w_tile = w_tiles.index(w_stage * WGS + WG)
        token = _product(a_tiles.index(a_stage * TOKENS), w_tile, BLOCK_N)
        scale0, scale1 = a_scale0 * w_scale, a_scale1 * w_scale
        # Loaded while the products run, for the next step.
        w_scale = gl.load(w_scale_ptr + ahead)
        a_scale0 = gl.load(a_scale_ptrs0 + ahead * group_stride)
        if TOKENS == 2:
            a_scale1 = gl.load(a_scale_ptrs1 + ahead * group_stride)
        product = warpgroup_mma_wait(0, deps=[token])
        if TOKENS == 1:
            mbarrier.arrive(empty.index(a_stage), count=1)
            acc0 += product * scale0[:, None]
        else:
            # Waits with nothing to wait for keep the sums in their place: registers hold but one product.
            acc0 = warpgroup_mma_wait(0, deps=[acc0 + product * scale0[:, None]])
            token = _product(a_tiles.index(a_stage * TOKENS + 1), w_tile, BLOCK_N)
            product = warpgroup_mma_wait(0, deps=[token])
            mbarrier.arrive(empty.index(a_stage), count=1)
            acc1 = warpgroup_mma_wait(0, deps=[acc1 + product * scale1[:, None]])
    if SPLIT_K == 1:
        _store(acc0, out, row0, column, num_rows, N)
        if TOKENS == 2:
            _store(acc1, out, row0 + ROWS, column, num_rows, N)
    else:
        HEIGHT: gl.constexpr = TOKENS * ROWS
        unit = (m * (gl.num_programs(0) // SPLIT_K) + n) * WGS + WG
        partial += unit.to(gl.int64) * (SPLIT_K * HEIGHT * BLOCK_N)
        own_part = partial + split * (HEIGHT * BLOCK_N)
        _store_partial(acc0, own_part, 0)
        if TOKENS == 2:
            _store_partial(acc1, own_part, ROWS)
        _add_splits(partial, counters + unit, split, out, row0, column, num_rows, N, HEIGHT, BLOCK_N, SPLIT_K)


@gluon.jit(do_not_specialize=["num_rows", "row_stride", "group_stride"])
def _few_kernel(
    a_desc, w_desc, out, a_scales, w_scales, partial, counters, num_rows, N, K, row_stride, group_stride,
    TOKENS: gl.constexpr, WGS: gl.constexpr, BLOCK_N: gl.constexpr, SPLIT_K: gl.constexpr, W_STAGES: gl.constexpr,
    A_STAGES: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out [num_rows, N] = a @ w.T, each 128 of K promoted with its scales: `triton._product_kernel`, dense."""
    if PDL:
        gdc_launch_dependents()
    dtype: gl.constexpr = w_desc.dtype
    a_tiles = gl.allocate_shared_memory(dtype, [A_STAGES * TOKENS, ROWS, BLOCK], a_desc.layout)
    w_tiles = gl.allocate_shared_memory(dtype, [W_STAGES * WGS, BLOCK_N, BLOCK], w_desc.layout)
    a_full = gl.allocate_shared_memory(gl.int64, [A_STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [A_STAGES, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(A_STAGES):
        mbarrier.init(a_full.index(i), count=1)
        mbarrier.init(empty.index(i), count=WGS)
    for i in gl.static_range(W_STAGES):
        mbarrier.init(w_full.index(i), count=1)
    fence_async_shared()
    split, n, m = gl.program_id(0) % SPLIT_K, gl.program_id(0) // SPLIT_K, gl.program_id(1)
    span = ((K + BLOCK - 1) // BLOCK + SPLIT_K - 1) // SPLIT_K
    first = split * span
    groups = gl.minimum(span, gl.maximum((K + BLOCK - 1) // BLOCK - first, 0))
    tiles = (a_tiles, w_tiles, a_full, w_full, empty)
    own = (out, a_scales, w_scales, partial, counters, num_rows, N, K, row_stride, group_stride)
    w_row = n * (WGS * BLOCK_N)
    if WGS == 1:
        gl.warp_specialize([
            (_multiply, (
                gl.constexpr(0), own, tiles, m, n, split, first, groups, TOKENS, WGS, BLOCK_N, SPLIT_K, W_STAGES,
                A_STAGES, PDL,
            )),
            (_feed, (a_desc, w_desc, tiles, m, w_row, first, groups, TOKENS, WGS, BLOCK_N, W_STAGES, A_STAGES, PDL)),
        ], [1], [40])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (
                gl.constexpr(0), own, tiles, m, n, split, first, groups, TOKENS, WGS, BLOCK_N, SPLIT_K, W_STAGES,
                A_STAGES, PDL,
            )),
            (_multiply, (
                gl.constexpr(1), own, tiles, m, n, split, first, groups, TOKENS, WGS, BLOCK_N, SPLIT_K, W_STAGES,
                A_STAGES, PDL,
            )),
            (_feed, (a_desc, w_desc, tiles, m, w_row, first, groups, TOKENS, WGS, BLOCK_N, W_STAGES, A_STAGES, PDL)),
        ], [4, 1], [232, 40])  # fmt: skip


def product(
    a: torch.Tensor, a_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, out: torch.Tensor,
    config: FewConfig, counters: torch.Tensor, strides: tuple[int, int],
) -> None:  # fmt: skip
    """`triton._product` of dense operands with scales of blocks, to 16 bits and without bias; N a multiple of 8."""
    (num_rows, k), n, split_k = a.shape, w.shape[0], config.split_k
    tiles = triton.cdiv(n, config.block_n * config.warpgroups)
    blocks = triton.cdiv(num_rows, config.block_m)
    bytes_ = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8, rank=2)
    area = blocks * tiles * split_k * config.block_m * config.block_n * config.warpgroups
    partial = a_scales if split_k == 1 else a_scales.new_empty(area)
    options = {"maxnreg": 128} if config.warpgroups == 1 else {}
    _few_kernel[(tiles * split_k, blocks)](
        TensorDescriptor.from_tensor(a, [64, 128], bytes_),
        TensorDescriptor.from_tensor(w, [config.block_n, 128], bytes_),
        out, a_scales, w_scales, partial, counters, num_rows, n, k, *strides,
        TOKENS=config.tokens, WGS=config.warpgroups, BLOCK_N=config.block_n, SPLIT_K=split_k,
        W_STAGES=config.w_stages, A_STAGES=config.a_stages, num_warps=4, **options, **overlap_options(a),
    )  # fmt: skip

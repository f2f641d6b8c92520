"""FP8 products of few rows on Hopper, bound by reading the weight: a warp keeps a deep ring of its tiles in flight.

The ring fills before the kernel ahead has ended, for no kernel writes weights. Small rings leave room for a program of
the next kernel beside one of this.
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
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gossamer.ops.attention.hopper import new_barriers, view
from gossamer.ops.dispatch import overlap_options
from gossamer.ops.gemm_fp8.hopper import BLOCK, ROWS, copy_rows, copy_tile, load_scale, store_tile, thread_barrier


class FewConfig(NamedTuple):
    """Cut of a product: a program has 64 * `tokens` rows of x by 64 * `parts` of the weight, in rings of such stages.

    `split_k` programs share a tile's K. One or two `tokens` and up to four `parts`: a warpgroup has 64 x 64, or both
    tokens of a part where that makes more than four.
    """

    tokens: int = 1
    parts: int = 1
    split_k: int = 1
    w_stages: int = 7
    a_stages: int = 6

    @property
    def block_m(self) -> int:
        return 64 * self.tokens


@gluon.jit
def _wait_free(step, empty, STAGES: gl.constexpr, DEEP: gl.constexpr):
    """For the step whose tile this one's replaces: `empty` has a barrier for each stage of the deeper ring."""
    free = step + (DEEP - STAGES)
    mbarrier.wait(empty.index(free % DEEP), ((free // DEEP) & 1) ^ 1)


@gluon.jit
def _await(step, full, STAGES: gl.constexpr):
    """A step's stage, when it is there."""
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
    return step % STAGES


@gluon.jit
def _product(a, w, rows, weight):
    """Issues the product of 64 rows and 64 of the weight's, in fresh accumulators; its scales."""
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32])
    zeros = gl.zeros([ROWS, ROWS], gl.float32, ACC)
    token = warpgroup_mma(rows[0].index(a), weight[0].index(w).permute((1, 0)), zeros, use_acc=False, is_async=True)
    return token, load_scale(rows[1], weight[1], a, w, -1, gl.SliceLayout(1, ACC))


@gluon.jit
def _add(acc, token, scale, running: gl.constexpr):
    """Waits for a product, behind which `running` more were issued, and adds it.

    The second wait has nothing to wait for: it keeps the sum in its place, for registers hold no more products.
    """
    product = warpgroup_mma_wait(running, deps=[token])
    return warpgroup_mma_wait(running, deps=[acc + product * scale[:, None]])


@gluon.jit
def _add_splits(acc, partial, split, STEP: gl.constexpr, SPLIT_K: gl.constexpr):
    """The parts of all programs of a tile, in order; its own is `acc`."""
    total = gl.zeros_like(acc)
    for k in gl.static_range(SPLIT_K):
        part = gl.load(partial + k * STEP, mask=split != k, other=0.0, cache_modifier=".cg")
        total += gl.where(split != k, part, acc)
    return total


@gluon.jit
def _multiply(
    WG: gl.constexpr, own, rows, weight, empty, m, n, split, groups, WGS: gl.constexpr, TOKENS: gl.constexpr,
    PARTS: gl.constexpr, STEPS: gl.constexpr, SPLIT_K: gl.constexpr, W_STAGES: gl.constexpr, A_STAGES: gl.constexpr,
    DEEP: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A consumer: one or two blocks of rows by one part. A product is scaled and added while the next one runs, which
    is of the next step or the other block.
    """
    out_desc, partial, counters = own
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32])
    BLOCKS: gl.constexpr = TOKENS * PARTS // WGS
    token, part = WG // PARTS, WG % PARTS
    if PDL:
        gdc_wait()
    acc0 = gl.zeros([ROWS, ROWS], gl.float32, ACC)
    acc1 = gl.zeros([ROWS, ROWS], gl.float32, ACC)
    for step in range(0, groups, STEPS):
        w, a = _await(step, weight[2], W_STAGES) * PARTS + part, _await(step, rows[2], A_STAGES) * TOKENS + token
        product0, scale0 = _product(a, w, rows, weight)
        if STEPS == 2:
            w, a = _await(step + 1, weight[2], W_STAGES) * PARTS + part, _await(step + 1, rows[2], A_STAGES)
            product1, scale1 = _product(a * TOKENS + token, w, rows, weight)
            acc0 = _add(acc0, product0, scale0, 1)
            mbarrier.arrive(empty.index(step % DEEP), count=1)
            acc0 = _add(acc0, product1, scale1, 0)
        elif BLOCKS == 2:
            product1, scale1 = _product(a + 1, w, rows, weight)
            acc0 = _add(acc0, product0, scale0, 1)
            acc1 = _add(acc1, product1, scale1, 0)
        else:
            acc0 = _add(acc0, product0, scale0, 0)
        mbarrier.arrive(empty.index((step + STEPS - 1) % DEEP), count=1)
    last = True
    if SPLIT_K > 1:
        AREA: gl.constexpr = ROWS * ROWS
        place = gl.arange(0, ROWS, gl.SliceLayout(0, ACC))[None, :]
        # Eight columns of all rows lie together: what a warp stores at a time is one stretch of memory.
        place = place // 8 * (8 * ROWS) + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))[:, None] * 8 + place % 8
        unit = (m * (gl.num_programs(0) // SPLIT_K) + n) * WGS + WG
        partial += unit.to(gl.int64) * (SPLIT_K * BLOCKS * AREA) + place
        for i in gl.static_range(BLOCKS):
            gl.store(partial + (split * BLOCKS + i) * AREA, acc1 if i else acc0)
        thread_barrier()
        last = gl.atomic_add(counters + unit, 1) == SPLIT_K - 1
    if last:  # of a tile's programs: none waits for another
        if SPLIT_K > 1:
            gl.store(counters + unit, 0)
            acc0 = _add_splits(acc0, partial, split, BLOCKS * AREA, SPLIT_K)
            if BLOCKS == 2:
                acc1 = _add_splits(acc1, partial + AREA, split, BLOCKS * AREA, SPLIT_K)
        end = gl.maximum(groups, 1) - 1  # when all warpgroups are through, tiles of the weight give place to results
        mbarrier.wait(empty.index(end % DEEP), (end // DEEP) & 1, pred=groups > 0)
        for i in gl.static_range(BLOCKS):
            tile = view(weight[0].index((token + i) * PARTS + part), out_desc.dtype, [ROWS, ROWS], out_desc.layout)
            tile.store((acc1 if i else acc0).to(out_desc.dtype))
            fence_async_shared()
            store_tile(out_desc, [(m * TOKENS + token + i) * ROWS, (n * PARTS + part) * ROWS], tile)
        tma.store_wait(0)


@gluon.jit
def _work(
    ROLE: gl.constexpr, own, fed, rows, weight, empty, m, n, split, first, groups, WGS: gl.constexpr,
    TOKENS: gl.constexpr, PARTS: gl.constexpr, STEPS: gl.constexpr, SPLIT_K: gl.constexpr, W_STAGES: gl.constexpr,
    A_STAGES: gl.constexpr, DEEP: gl.constexpr, LATE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A warpgroup multiplies. Three warps feed: the weight's tiles and scales, tiles of x, its scales.

    Scales travel with the tiles: they were the longest wait of a step when consumers loaded them, a step ahead. Steps
    beyond K are zero. LATE: the next kernel's programs start behind the last read of the weight, not to hold it up.
    """
    a_desc, w_desc, a_scales, w_scales, num_rows, N, K, row_stride, group_stride = fed
    line: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    row, column, last = m * (TOKENS * ROWS), n * (PARTS * ROWS), (K + BLOCK - 1) // BLOCK - 1
    if ROLE < WGS:
        _multiply(
            ROLE, own, rows, weight, empty, m, n, split, groups, WGS, TOKENS, PARTS, STEPS, SPLIT_K, W_STAGES, A_STAGES,
            DEEP, PDL,
        )  # fmt: skip
    elif ROLE == WGS:
        for step in range(groups):
            stage, group = step % W_STAGES, first + step
            bar = weight[2].index(stage)
            _wait_free(step, empty, W_STAGES, DEEP)
            mbarrier.expect(bar, PARTS * ROWS * BLOCK)
            for i in gl.static_range(PARTS):
                copy_tile(w_desc, [column + i * ROWS, group * BLOCK], bar, weight[0].index(stage * PARTS + i))
            for i in gl.static_range(PARTS):
                place = gl.minimum(column + i * ROWS, N - 1) // BLOCK * (last + 1) + gl.minimum(group, last)
                copy_rows(weight[1].index(stage * PARTS + i), w_scales + place + gl.arange(0, 1, line))
            async_copy.mbarrier_arrive(bar, increment_count=False)
        if LATE:
            gdc_launch_dependents()
    else:
        if PDL:
            gdc_wait()
        for step in range(groups):
            stage, group = step % A_STAGES, first + step
            bar = rows[2].index(stage)
            _wait_free(step, empty, A_STAGES, DEEP)
            if ROLE == WGS + 1:
                mbarrier.expect(bar, TOKENS * ROWS * BLOCK)
            for i in gl.static_range(TOKENS):
                if ROLE == WGS + 1:
                    copy_tile(a_desc, [row + i * ROWS, group * BLOCK], bar, rows[0].index(stage * TOKENS + i))
                else:
                    own_row = gl.minimum(row + i * ROWS + gl.arange(0, ROWS, line), num_rows - 1)
                    source = a_scales + own_row * row_stride + gl.minimum(group, last) * group_stride
                    copy_rows(rows[1].index(stage * TOKENS + i), source)
            if ROLE == WGS + 2:
                async_copy.mbarrier_arrive(bar, increment_count=False)


@gluon.jit(do_not_specialize=["num_rows", "row_stride", "group_stride"])
def _few_kernel(
    a_desc, w_desc, out_desc, a_scales, w_scales, partial, counters, num_rows, N, K, row_stride, group_stride,
    WGS: gl.constexpr, TOKENS: gl.constexpr, PARTS: gl.constexpr, STEPS: gl.constexpr, SPLIT_K: gl.constexpr,
    W_STAGES: gl.constexpr, A_STAGES: gl.constexpr, REGS: gl.constexpr, LATE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out [num_rows, N] = a @ w.T, each 128 of K promoted with its scales: `triton._product_kernel`, dense."""
    if PDL and not LATE:
        gdc_launch_dependents()
    dtype: gl.constexpr = w_desc.dtype
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    DEEP: gl.constexpr = W_STAGES if W_STAGES > A_STAGES else A_STAGES
    a_tiles = gl.allocate_shared_memory(dtype, [A_STAGES * TOKENS, ROWS, BLOCK], a_desc.layout)
    w_tiles = gl.allocate_shared_memory(dtype, [W_STAGES * PARTS, ROWS, BLOCK], w_desc.layout)
    a_scale_tiles = gl.allocate_shared_memory(gl.float32, [A_STAGES * TOKENS, ROWS], plain)
    w_scale_tiles = gl.allocate_shared_memory(gl.float32, [W_STAGES * PARTS, 1], plain)
    a_full = new_barriers(A_STAGES, 33)  # 32 lanes, when what they copied has landed, and one that expects a tile
    w_full = new_barriers(W_STAGES, 33)
    empty = new_barriers(DEEP, WGS)
    fence_async_shared()
    split, n, m = gl.program_id(0) % SPLIT_K, gl.program_id(0) // SPLIT_K, gl.program_id(1)
    span = ((K + BLOCK - 1) // BLOCK + SPLIT_K * STEPS - 1) // (SPLIT_K * STEPS) * STEPS
    first = split * span
    groups = gl.minimum(span, gl.maximum((K + BLOCK - 1) // BLOCK - first, 0))
    groups = (groups + STEPS - 1) // STEPS * STEPS
    rows, weight = (a_tiles, a_scale_tiles, a_full), (w_tiles, w_scale_tiles, w_full)
    own = (out_desc, partial, counters)
    fed = (a_desc, w_desc, a_scales, w_scales, num_rows, N, K, row_stride, group_stride)
    gl.warp_specialize(
        [(_work, (
            role, own, fed, rows, weight, empty, m, n, split, first, groups, WGS, TOKENS, PARTS, STEPS, SPLIT_K,
            W_STAGES, A_STAGES, DEEP, LATE, PDL,
        )) for role in (0, 1, 2, 3, 4, 5, 6)[: WGS + 3]],
        [4] * (WGS - 1) + [1, 1, 1], [REGS] * (WGS - 1) + [40, 40, 40],
    )  # fmt: skip


def product(
    a: torch.Tensor, a_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, out: torch.Tensor,
    config: FewConfig, counters: torch.Tensor, strides: tuple[int, int], multiprocessors: int,
) -> None:  # fmt: skip
    """`triton._product` of dense operands with scales of blocks, to 16 bits and without bias; N a multiple of 8."""
    (num_rows, k), n, split_k = a.shape, w.shape[0], config.split_k
    tiles, blocks = triton.cdiv(n, 64 * config.parts), triton.cdiv(num_rows, config.block_m)
    halves, bytes_ = (gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=b, rank=2) for b in (16, 8))
    area = blocks * tiles * split_k * config.tokens * config.parts * 64 * 64
    partial = a_scales if split_k == 1 else a_scales.new_empty(area)
    products, overlap = config.tokens * config.parts, overlap_options(a)
    wgs = products if products <= 4 else config.parts
    residents = 1 + (config.w_stages * config.parts + config.a_stages * config.tokens <= 13)  # of a multiprocessor
    regs = min(216, (512 // residents - 40) // wgs // 8 * 8)
    _few_kernel[(tiles * split_k, blocks)](
        TensorDescriptor.from_tensor(a, [64, 128], bytes_), TensorDescriptor.from_tensor(w, [64, 128], bytes_),
        TensorDescriptor.from_tensor(out, [64, 64], halves), a_scales, w_scales, partial, counters, num_rows, n, k,
        *strides, WGS=wgs, TOKENS=config.tokens, PARTS=config.parts, STEPS=2 if regs >= 128 and wgs == products else 1,
        SPLIT_K=split_k, W_STAGES=config.w_stages, A_STAGES=config.a_stages, REGS=regs,
        LATE=overlap["PDL"] and residents == 2 and split_k < 4 and tiles * split_k * blocks <= multiprocessors,
        num_warps=4, maxnreg=512 // residents // (wgs + 1) // 8 * 8, **overlap,
    )  # fmt: skip

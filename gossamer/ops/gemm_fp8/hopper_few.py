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
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gossamer.ops.dispatch import overlap_options
from gossamer.ops.gemm_fp8.hopper import BLOCK, ROWS, copy_rows, copy_tile, store_tile, thread_barrier


class FewConfig(NamedTuple):
    """Cut of a product: `tokens` times 64 rows of x by `parts` times `width` of the weight, shared by `warpgroups`.

    `split_k` programs share a tile's K; a warpgroup multiplies `steps` of K at a time.
    """

    tokens: int = 1
    parts: int = 1
    split_k: int = 1
    w_stages: int = 8
    a_stages: int = 5
    warpgroups: int = 1
    width: int = 64
    steps: int = 1
    tma_out: int = 0
    rotate: int = 0
    feeders: int = 3
    warm: int = 0
    diag: int = 0
    late: int = 0
    pre: int = 0

    @property
    def block_m(self) -> int:
        return 64 * self.tokens


@gluon.jit
def _group(step, n, first, groups, total, ROTATE: gl.constexpr):
    """Of K, that a step multiplies; the last one may be beyond its end."""
    if ROTATE:
        step += n * ROTATE % gl.maximum(groups, 1)
        step = gl.where(step >= groups, step - groups, step)
    group = first + step
    return group, gl.minimum(group, total - 1)


@gluon.jit
def _wait_free(step, empty, STAGES: gl.constexpr, DEEP: gl.constexpr):
    """For the step whose tile this step's replaces: `empty` has a barrier for each stage of the deeper ring."""
    free = step + (DEEP - STAGES)
    mbarrier.wait(empty.index(free % DEEP), ((free // DEEP) & 1) ^ 1)


@gluon.jit
def _feed_weight(
    w, w_desc, w_scales, tiles, n, first, groups, N, K,
    PARTS: gl.constexpr, WIDTH: gl.constexpr, W_STAGES: gl.constexpr, DEEP: gl.constexpr, ROTATE: gl.constexpr, LATE: gl.constexpr, PRE: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Tiles of the weight and the scales of their parts, which no kernel ahead writes."""
    w_tiles, w_scale_tiles, w_full, empty = tiles
    one: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    w_row, total = n * (PARTS * WIDTH), (K + BLOCK - 1) // BLOCK
    for step in range(groups):
        stage = step % W_STAGES
        bar = w_full.index(stage)
        group, place = _group(step, n, first, groups, total, ROTATE)
        _wait_free(step, empty, W_STAGES, DEEP)
        mbarrier.expect(bar, PARTS * WIDTH * BLOCK)
        for i in gl.static_range(PARTS):
            copy_tile(w_desc, [w_row + i * WIDTH, group * BLOCK], bar, w_tiles.index(stage * PARTS + i))
        for i in gl.static_range(PARTS):
            block = gl.minimum(w_row + i * WIDTH, N - 1) // BLOCK
            copy_rows(w_scale_tiles.index(stage * PARTS + i), w_scales + block * total + place + gl.arange(0, 1, one))
        async_copy.mbarrier_arrive(bar, increment_count=False)
        if PRE > 0 and step == W_STAGES - 1:
            size = gl.minimum(gl.minimum(groups - W_STAGES, PRE) * BLOCK, K - (first + W_STAGES) * BLOCK)
            if size > 0:
                for i in gl.static_range(PARTS):
                    lanes = w_row + i * WIDTH + gl.arange(0, WIDTH, one)
                    beyond = w + gl.minimum(lanes, N - 1).to(gl.int64) * K + (first + W_STAGES) * BLOCK
                    gl.inline_asm_elementwise(
                        "{ cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0; }", "=r,l,r",
                        [beyond, lanes * 0 + size], dtype=gl.int32, is_pure=False, pack=1,
                    )  # fmt: skip
        if LATE == 2 and step == W_STAGES - 1 and PDL:
            gdc_launch_dependents()
    if LATE == 1 and PDL:
        gdc_launch_dependents()


@gluon.jit
def _feed_rows(
    a_desc, a_scales, tiles, m, n, first, groups, num_rows, K, row_stride, group_stride, ROLE: gl.constexpr,
    WGS: gl.constexpr, TOKENS: gl.constexpr, A_STAGES: gl.constexpr, DEEP: gl.constexpr, ROTATE: gl.constexpr,
    FEEDERS: gl.constexpr, WARM: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Tiles of x (WHAT 1), their scales (2) or both (3)."""
    a_tiles, a_scale_tiles, a_full, empty, warm = tiles
    line: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    total = (K + BLOCK - 1) // BLOCK
    if WARM and ROLE == WGS + 1:  # rows that are not there bring the descriptor
        mbarrier.expect(warm, ROWS * BLOCK)
        copy_tile(a_desc, [num_rows, 0], warm, a_tiles.index(0))
        mbarrier.wait(warm, 0)
    if PDL:
        gdc_wait()
    for step in range(groups):
        stage = step % A_STAGES
        bar = a_full.index(stage)
        group, place = _group(step, n, first, groups, total, ROTATE)
        _wait_free(step, empty, A_STAGES, DEEP)
        if ROLE == WGS + 1:
            mbarrier.expect(bar, TOKENS * ROWS * BLOCK)
            for i in gl.static_range(TOKENS):
                tile = a_tiles.index(stage * TOKENS + i)
                copy_tile(a_desc, [(m * TOKENS + i) * ROWS, group * BLOCK], bar, tile)
        if ROLE == WGS + FEEDERS - 1:
            for i in gl.static_range(TOKENS):
                rows = gl.minimum((m * TOKENS + i) * ROWS + gl.arange(0, ROWS, line), num_rows - 1)
                source = a_scales + rows * row_stride + place * group_stride
                copy_rows(a_scale_tiles.index(stage * TOKENS + i), source)
            async_copy.mbarrier_arrive(bar, increment_count=False)


@gluon.jit
def _product(a_tile, w_tile):
    """Issues the product of 64 rows and a part of the weight, in fresh accumulators."""
    WIDTH: gl.constexpr = w_tile.shape[0]
    zeros = gl.zeros([ROWS, WIDTH], gl.float32, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32]))
    return warpgroup_mma(a_tile, w_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _add(acc, token, scale, running: gl.constexpr):
    """Waits for a product, behind which `running` more were issued, and adds it.

    The second wait has nothing to wait for: it keeps the sum in its place, for registers hold no more products.
    """
    product = warpgroup_mma_wait(running, deps=[token])
    return warpgroup_mma_wait(running, deps=[acc + product * scale[:, None]])


@gluon.jit
def _wait(step, full, STAGES: gl.constexpr):
    mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
    return step % STAGES


@gluon.jit
def _store(acc, out, out_desc, out_tile, row0, column, num_rows, N, TMA_OUT: gl.constexpr):
    if TMA_OUT:
        out_tile = out_tile._reinterpret(out_desc.dtype, [ROWS, acc.shape[1]], out_desc.layout)
        out_tile.store(acc.to(out_desc.dtype))
        fence_async_shared()
        store_tile(out_desc, [row0, column], out_tile)
    else:
        row = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, acc.type.layout))
        place = column + gl.arange(0, acc.shape[1], gl.SliceLayout(0, acc.type.layout))
        mask = (row < num_rows)[:, None] & (place < N)[None, :]
        gl.store(out + row[:, None] * N + place[None, :], acc.to(out.dtype.element_ty), mask=mask)


@gluon.jit
def _add_split(acc, mine, partial, split, i: gl.constexpr, NUM: gl.constexpr, SPLIT_K: gl.constexpr):
    """The parts of all programs of a tile, in order: its own is still here."""
    AREA: gl.constexpr = acc.shape[0] * acc.shape[1]
    total = gl.load(partial + i * AREA, mask=mine != 0, other=0.0, cache_modifier=".cg")
    total = gl.where(mine != 0, total, acc)
    for k in gl.static_range(1, SPLIT_K):
        part = gl.load(partial + (k * NUM + i) * AREA, mask=mine != k, other=0.0, cache_modifier=".cg")
        total += gl.where(mine != k, part, acc)
    return total


@gluon.jit
def _clock(x):
    return gl.inline_asm_elementwise("{ .reg .u32 e; add.u32 e, $1, 0; mov.u32 $0, %clock; }", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _smid(x):
    return gl.inline_asm_elementwise("{ .reg .u32 e; add.u32 e, $1, 0; mov.u32 $0, %smid; }", "=r,r", [x], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def _multiply(
    WG: gl.constexpr, own, tiles, m, n, split, groups, WGS: gl.constexpr, TOKENS: gl.constexpr, PARTS: gl.constexpr,
    WIDTH: gl.constexpr, STEPS: gl.constexpr, SPLIT_K: gl.constexpr, W_STAGES: gl.constexpr, A_STAGES: gl.constexpr,
    DEEP: gl.constexpr, TMA_OUT: gl.constexpr, DIAG: gl.constexpr, LATE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """A consumer. A product is scaled and added while the next one runs."""
    out, out_desc, partial, counters, num_rows, N, t0 = own
    a_tiles, a_scale_tiles, a_full, empty, _warm = tiles[0]
    w_tiles, w_scale_tiles, w_full, _empty = tiles[1]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 32])
    HIGH: gl.constexpr = TOKENS if WGS % TOKENS == 0 else 1  # warpgroups in rows
    TALL: gl.constexpr = TOKENS // HIGH
    WIDE: gl.constexpr = PARTS * HIGH // WGS
    NUM: gl.constexpr = TALL * WIDE
    SERIAL: gl.constexpr = NUM == 2 and WIDTH == 128
    token, part = WG % HIGH * TALL, WG // HIGH * WIDE
    row0, column = (m * TOKENS + token) * ROWS, (n * PARTS + part) * WIDTH
    one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    LINES: gl.constexpr = gl.SliceLayout(1, ACC)
    NEXT_A: gl.constexpr = 1 if NUM == 2 and TALL == 2 else 0
    NEXT_W: gl.constexpr = 1 if NUM == 2 and TALL == 1 else 0
    if PDL:
        gdc_wait()
    if DIAG == 5 and WG == 0:
        pid = gl.program_id(0) + gl.num_programs(0) * gl.program_id(1)
        stamps = counters + 4096 + pid * 8
        gl.store(stamps + 1, _clock(pid))
        mbarrier.wait(w_full.index(0), 0)
        gl.store(stamps + 2, _clock(pid))
        mbarrier.wait(a_full.index(0), 0)
        gl.store(stamps + 3, _clock(pid))
        gl.store(stamps + 6, _smid(pid))
        gl.store(stamps, t0)
    acc0 = gl.zeros([ROWS, WIDTH], gl.float32, ACC)
    acc1 = gl.zeros([ROWS, WIDTH], gl.float32, ACC)
    for step in range(0, groups, STEPS):
        w = _wait(step, w_full, W_STAGES)
        a = step % A_STAGES
        if DIAG != 2 and DIAG != 3:
            a = _wait(step, a_full, A_STAGES)
        a_at, w_at = a * TOKENS + token, w * PARTS + part
        if DIAG == 1 or DIAG == 3:
            if STEPS == 2:
                _wait(step + 1, w_full, W_STAGES)
                if DIAG == 1:
                    _wait(step + 1, a_full, A_STAGES)
                mbarrier.arrive(empty.index(step % DEEP), count=1)
        else:
            token0 = _product(a_tiles.index(a_at), w_tiles.index(w_at))
            scale0 = a_scale_tiles.index(a_at).load(LINES) * gl.max(w_scale_tiles.index(w_at).load(one), 0)
            if NUM * STEPS == 2:
                w1, a1 = w, a
                if STEPS == 2:
                    w1 = _wait(step + 1, w_full, W_STAGES)
                    a1 = (step + 1) % A_STAGES
                    if DIAG != 2 and DIAG != 3:
                        a1 = _wait(step + 1, a_full, A_STAGES)
                a_at, w_at = a1 * TOKENS + token + NEXT_A, w1 * PARTS + part + NEXT_W
                if SERIAL:
                    acc0 = _add(acc0, token0, scale0, 0)
                scale1 = a_scale_tiles.index(a_at).load(LINES) * gl.max(w_scale_tiles.index(w_at).load(one), 0)
                token1 = _product(a_tiles.index(a_at), w_tiles.index(w_at))
                if not SERIAL:
                    acc0 = _add(acc0, token0, scale0, 1)
                if STEPS == 2:
                    mbarrier.arrive(empty.index(step % DEEP), count=1)
                    acc0 = _add(acc0, token1, scale1, 0)
                else:
                    acc1 = _add(acc1, token1, scale1, 0)
            else:
                acc0 = _add(acc0, token0, scale0, 0)
        mbarrier.arrive(empty.index((step + STEPS - 1) % DEEP), count=1)
    last = True
    if LATE == 3 and PDL:
        gdc_launch_dependents()
    if DIAG == 5 and WG == 0:
        gl.store(stamps + 4, _clock(pid))
    if SPLIT_K > 1:
        unit = (m * (gl.num_programs(0) // SPLIT_K) + n) * WGS + WG
        at = gl.arange(0, WIDTH, gl.SliceLayout(0, ACC))[None, :]
        # Eight columns of all rows lie together: what a warp stores at a time is one stretch of memory.
        at = at // 8 * (8 * ROWS) + gl.arange(0, ROWS, gl.SliceLayout(1, ACC))[:, None] * 8 + at % 8
        partial += unit.to(gl.int64) * (SPLIT_K * NUM * ROWS * WIDTH) + at
        for i in gl.static_range(NUM):
            gl.store(partial + (split * NUM + i) * (ROWS * WIDTH), acc1 if i else acc0)
        thread_barrier()
        last = gl.atomic_add(counters + unit, 1) == SPLIT_K - 1
    if last:
        if SPLIT_K > 1:
            gl.store(counters + unit, 0)
        for i in gl.static_range(NUM):
            y = acc1 if i else acc0
            if SPLIT_K > 1:
                y = _add_split(y, split, partial, split, i, NUM, SPLIT_K)
            stage = WG % HIGH * TALL + i * NEXT_A
            if TMA_OUT and HIGH > 1:  # the other warpgroup may still multiply with this tile
                end = stage + ((groups - stage + W_STAGES - 1) // W_STAGES - 1) * W_STAGES
                mbarrier.wait(empty.index((end + DEEP) % DEEP), (end // DEEP) & 1, pred=end >= 0)
            out_tile = w_tiles.index(stage * PARTS + part + i * NEXT_W)
            _store(
                y, out, out_desc, out_tile, row0 + i * (NEXT_A * ROWS), column + i * (NEXT_W * WIDTH), num_rows, N, TMA_OUT
            )
        if TMA_OUT:
            tma.store_wait(0)
    if DIAG == 5 and WG == 0:
        gl.store(stamps + 5, _clock(pid))


@gluon.jit
def _work(
    ROLE: gl.constexpr, own, rows, weight, fed, m, n, split, groups, WGS: gl.constexpr, TOKENS: gl.constexpr,
    PARTS: gl.constexpr, WIDTH: gl.constexpr, STEPS: gl.constexpr, SPLIT_K: gl.constexpr, W_STAGES: gl.constexpr,
    A_STAGES: gl.constexpr, TMA_OUT: gl.constexpr, ROTATE: gl.constexpr, FEEDERS: gl.constexpr, WARM: gl.constexpr,
    DIAG: gl.constexpr, LATE: gl.constexpr, PRE: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """What a partition of warps does."""
    w_raw, a_desc, w_desc, a_scales, w_scales, first, K, row_stride, group_stride = fed
    DEEP: gl.constexpr = W_STAGES if W_STAGES > A_STAGES else A_STAGES
    num_rows, N = own[4], own[5]
    if ROLE < WGS:
        _multiply(
            ROLE, own, (rows, weight), m, n, split, groups, WGS, TOKENS, PARTS, WIDTH, STEPS, SPLIT_K, W_STAGES, A_STAGES,
            DEEP, TMA_OUT, DIAG, LATE, PDL,
        )  # fmt: skip
    elif ROLE == WGS:
        _feed_weight(
            w_raw, w_desc, w_scales, weight, n, first, groups, N, K, PARTS, WIDTH, W_STAGES, DEEP, ROTATE, LATE, PRE, PDL
        )
    elif DIAG != 2 and DIAG != 3:
        _feed_rows(
            a_desc, a_scales, rows, m, n, first, groups, num_rows, K, row_stride, group_stride, ROLE, WGS, TOKENS,
            A_STAGES, DEEP, ROTATE, FEEDERS, WARM, PDL,
        )  # fmt: skip


@gluon.jit(do_not_specialize=["num_rows", "row_stride", "group_stride"])
def _few_kernel(
    w_raw, a_desc, w_desc, out_desc, out, a_scales, w_scales, partial, counters, num_rows, N, K, row_stride, group_stride,
    WGS: gl.constexpr, TOKENS: gl.constexpr, PARTS: gl.constexpr, WIDTH: gl.constexpr, STEPS: gl.constexpr,
    SPLIT_K: gl.constexpr, W_STAGES: gl.constexpr, A_STAGES: gl.constexpr, TMA_OUT: gl.constexpr,
    ROTATE: gl.constexpr, FEEDERS: gl.constexpr, WARM: gl.constexpr, DIAG: gl.constexpr, LATE: gl.constexpr, PRE: gl.constexpr, REGS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """out [num_rows, N] = a @ w.T, each 128 of K promoted with its scales: `triton._product_kernel`, dense."""
    t0 = gl.program_id(0)
    if DIAG == 5:
        t0 = _clock(t0)
    if PDL and LATE == 0:
        gdc_launch_dependents()
    dtype: gl.constexpr = w_desc.dtype
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    a_tiles = gl.allocate_shared_memory(dtype, [A_STAGES * TOKENS, ROWS, BLOCK], a_desc.layout)
    w_tiles = gl.allocate_shared_memory(dtype, [W_STAGES * PARTS, WIDTH, BLOCK], w_desc.layout)
    a_scale_tiles = gl.allocate_shared_memory(gl.float32, [A_STAGES * TOKENS, ROWS], plain)
    w_scale_tiles = gl.allocate_shared_memory(gl.float32, [W_STAGES * PARTS, 1], plain)
    a_full = gl.allocate_shared_memory(gl.int64, [A_STAGES, 1], mbarrier.MBarrierLayout())
    DEEP: gl.constexpr = W_STAGES if W_STAGES > A_STAGES else A_STAGES
    empty = gl.allocate_shared_memory(gl.int64, [DEEP, 1], mbarrier.MBarrierLayout())
    w_full = gl.allocate_shared_memory(gl.int64, [W_STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(A_STAGES):
        mbarrier.init(a_full.index(i), count=33)  # 32 lanes, when what they copied has landed
    for i in gl.static_range(W_STAGES):
        mbarrier.init(w_full.index(i), count=33)
    for i in gl.static_range(DEEP):
        mbarrier.init(empty.index(i), count=WGS)
    warm = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(warm, count=1)
    fence_async_shared()
    split, n, m = gl.program_id(0) % SPLIT_K, gl.program_id(0) // SPLIT_K, gl.program_id(1)
    span = ((K + BLOCK - 1) // BLOCK + SPLIT_K * STEPS - 1) // (SPLIT_K * STEPS) * STEPS
    first = split * span
    groups = gl.minimum(span, gl.maximum((K + BLOCK - 1) // BLOCK - first, 0))
    groups = (groups + STEPS - 1) // STEPS * STEPS
    if DIAG == 4:
        groups = groups * 0
    rows, weight = (a_tiles, a_scale_tiles, a_full, empty, warm), (w_tiles, w_scale_tiles, w_full, empty)
    own = (out, out_desc, partial, counters, num_rows, N, t0)
    fed = (w_raw, a_desc, w_desc, a_scales, w_scales, first, K, row_stride, group_stride)
    gl.warp_specialize(
        [(_work, (
            role, own, rows, weight, fed, m, n, split, groups, WGS, TOKENS, PARTS, WIDTH, STEPS, SPLIT_K, W_STAGES,
            A_STAGES, TMA_OUT, ROTATE, FEEDERS, WARM, DIAG, LATE, PRE, PDL,
        )) for role in (0, 1, 2, 3, 4, 5, 6)[: WGS + FEEDERS]],
        [4] * (WGS - 1) + [1] * FEEDERS, [REGS] * (WGS - 1) + [40] * FEEDERS,
    )  # fmt: skip


def product(
    a: torch.Tensor, a_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, out: torch.Tensor,
    config: FewConfig, counters: torch.Tensor, strides: tuple[int, int],
) -> None:  # fmt: skip
    """`triton._product` of dense operands with scales of blocks, to 16 bits and without bias; N a multiple of 8."""
    (num_rows, k), n, split_k = a.shape, w.shape[0], config.split_k
    tiles, blocks = triton.cdiv(n, config.width * config.parts), triton.cdiv(num_rows, config.block_m)
    halves, bytes_ = (gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=b, rank=2) for b in (16, 8))
    area = blocks * tiles * split_k * config.tokens * config.parts * 64 * config.width
    partial = a_scales if split_k == 1 else a_scales.new_empty(area)
    _few_kernel[(tiles * split_k, blocks)](
        w, TensorDescriptor.from_tensor(a, [64, 128], bytes_), TensorDescriptor.from_tensor(w, [config.width, 128], bytes_),
        TensorDescriptor.from_tensor(out, [64, config.width], halves),
        out, a_scales, w_scales, partial, counters, num_rows, n, k, *strides, WGS=config.warpgroups,
        TOKENS=config.tokens, PARTS=config.parts, WIDTH=config.width, STEPS=config.steps,
        SPLIT_K=split_k, W_STAGES=config.w_stages, A_STAGES=config.a_stages, TMA_OUT=config.tma_out,
        ROTATE=config.rotate, FEEDERS=config.feeders, WARM=config.warm, DIAG=config.diag, LATE=config.late, PRE=config.pre, **registers(config), num_warps=4, **overlap_options(a),
    )  # fmt: skip


def registers(config: FewConfig) -> dict[str, int]:
    """Of a multiprocessor's, by what fits beside one another."""
    stages = config.w_stages * config.parts * config.width + config.a_stages * config.tokens * 64
    residents = max(1, min(3, 224 // (stages // 8 + 2)))
    threads = 128 * config.warpgroups
    each = min(240, (65536 // residents - 40 * 128) // threads // 8 * 8)
    return {"REGS": each, "maxnreg": min(255, 65536 // residents // (threads + 128) // 8 * 8)}

"""FP8 products of many rows on Hopper: while a warpgroup scales and adds its sums of 128, the others multiply.

Written in Gluon, for roles of warps, barriers and asynchronous products are what Triton's own loop can not say; the
kernel of `triton.py` stays the proof and serves everything else.
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

from gossamer.ops.activation.triton import gated_activation, swiglu_options
from gossamer.ops.dispatch import overlap_options
from gossamer.ops.quantize_fp8.hopper import quantize_usual_rows

# Triton 3.6's names, and those of later versions.
copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared
store_tile = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global
thread_barrier = gl.barrier if hasattr(gl, "barrier") else gl.thread_barrier
ROWS = gl.constexpr(64)  # of a warpgroup
BLOCK = gl.constexpr(128)  # of K, and of columns: what shares a scale; 128 bytes, the widest row that memory swizzles
FEEDERS = 4  # warps that gather rows; one is enough for TMA


class HopperConfig(NamedTuple):
    """Tile of a product: `warpgroups` of 64 rows each by `parts` of 128 columns (gate-up: gate's and up's).

    Registers hold three warpgroups of one part or two of two; `group_m` blocks of rows go through all columns together.
    """

    warpgroups: int = 3
    parts: int = 1
    group_m: int = 8
    num_stages: int = 4

    @property
    def block_m(self) -> int:
        return 64 * self.warpgroups


@gluon.jit
def _locate(tile, num_m, num_n, GROUP_M: gl.constexpr):
    """A tile's block of rows and of columns."""
    band = tile // (GROUP_M * num_n) * GROUP_M
    height = gl.minimum(num_m - band, GROUP_M)
    rest = tile - band * num_n
    return band + rest % height, rest // height


@gluon.jit
def _feed(
    fed, shared, WGS: gl.constexpr, PARTS: gl.constexpr, TOP_K: gl.constexpr, GATED: gl.constexpr,
    GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: brings the operands, as far ahead as there are stages."""
    a, a_desc, w_desc = fed
    a_tiles, w_tiles, full, empty, rows, block_expert, num_m_ptr, num_rows, N, K, num_m, num_n, _turns = shared
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    columns = gl.arange(0, BLOCK, gl.SliceLayout(0, layout))[None, :]
    if TOP_K:
        num_m = gl.load(num_m_ptr)
    step = 0
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        m, n = _locate(tile, num_m, num_n, GROUP_M)
        w_row = n * (BLOCK if GATED else BLOCK * PARTS)
        if TOP_K:
            w_row += gl.load(block_expert + m) * N
        sources = ()
        if GATED:
            for i in gl.static_range(WGS):
                assignment = gl.load(rows + (m * WGS + i) * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout)))
                offsets = (assignment // TOP_K)[:, None] * K + columns
                source = (offsets, (assignment < num_rows)[:, None])
                sources = sources + source  # type: ignore[assignment]
        for k in range(0, K, BLOCK):
            stage = step % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, (PARTS * BLOCK + (0 if GATED else WGS * ROWS)) * BLOCK)
            for i in gl.static_range(PARTS):
                if GATED:
                    copy_tile(w_desc, [w_row, i * K + k], bar, w_tiles.index(stage * PARTS + i))
                else:
                    copy_tile(w_desc, [w_row + i * BLOCK, k], bar, w_tiles.index(stage * PARTS + i))
            for i in gl.static_range(WGS):
                a_tile = a_tiles.index(stage * WGS + i)
                if GATED:
                    copy_rows(a_tile, a + k + sources[2 * i], mask=sources[2 * i + 1])
                else:
                    copy_tile(a_desc, [(m * WGS + i) * ROWS, k], bar, a_tile)
            if GATED:
                async_copy.mbarrier_arrive(bar, increment_count=False)
            step += 1


@gluon.jit
def _product(a_tile, w_tile):
    """Issues the product of a tile's 128 of K, in fresh accumulators."""
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
    zeros = gl.zeros([ROWS, BLOCK], gl.float32, layout)
    return warpgroup_mma(a_tile, w_tile.permute((1, 0)), zeros, use_acc=False, is_async=True)


@gluon.jit
def _in_turn(a_tile, w_tile, turns, turn, WG: gl.constexpr, WGS: gl.constexpr, TURNS: gl.constexpr):
    """`_product`, issued behind that of the warpgroup before, so that this one multiplies while that one adds."""
    if TURNS:
        mbarrier.wait(turns.index(WG), turn & 1)
    token = _product(a_tile, w_tile)
    if TURNS:
        mbarrier.arrive(turns.index((WG + 1) % WGS), count=1)
    return token


@gluon.jit
def _store_dense(
    acc, out_desc, out_tile, bias, w_scales, row, column, N, BIAS: gl.constexpr, CHANNEL_STEP: gl.constexpr
):
    """A part of a dense tile, with what a column has of its own."""
    own = column + gl.arange(0, BLOCK, gl.SliceLayout(0, acc.type.layout))
    if CHANNEL_STEP >= 0:
        acc *= gl.load(w_scales + own * CHANNEL_STEP, own < N, 0.0)[None, :]
    if BIAS:
        acc += gl.load(bias + own, own < N, 0.0).to(gl.float32)[None, :]
    tma.store_wait(0)
    out_tile.store(acc.to(out_desc.dtype))
    fence_async_shared()
    store_tile(out_desc, [row, column], out_tile)


@gluon.jit
def _silu(x):
    """x / (1 + exp(-x)), to some units in the last place."""
    return gl.inline_asm_elementwise(
        """{
        .reg .f32 e;
        mul.f32 e, $1, 0fBFB8AA3B;
        ex2.approx.ftz.f32 e, e;
        add.f32 e, e, 0f3F800000;
        rcp.approx.ftz.f32 e, e;
        mul.f32 $0, $1, e;
        }""",
        "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1,
    )  # fmt: skip


@gluon.jit
def _store_quantized(
    gate, up, out_desc, out_tile, out_scales, row0, n, scale_stride, ALPHA: gl.constexpr, LIMIT: gl.constexpr
):
    """The activation in FP8, with one scale a row. Rows of padding have places too, and get zeros."""
    if LIMIT > 0.0:
        y = gated_activation(gate, up, ALPHA, LIMIT)
    else:
        y = _silu(gate) * up
    q, scale = quantize_usual_rows(y, out_desc.dtype)
    row = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, q.type.layout))
    gl.store(out_scales + n * scale_stride + row, scale)
    tma.store_wait(0)
    out_tile.store(q)
    fence_async_shared()
    store_tile(out_desc, [row0, n * BLOCK], out_tile)


@gluon.jit
def _look(
    tile, num_m, num_n, rows, block_expert, WG: gl.constexpr, WGS: gl.constexpr, TOP_K: gl.constexpr,
    GATED: gl.constexpr, GROUP_M: gl.constexpr, LINES: gl.constexpr,
):  # fmt: skip
    """Loads what a warpgroup must know of a tile: its first row, its expert and the assignments of its rows.

    Behind the last tile, of the place of that one, for expert 0: what follows from these may be loaded, not used.
    """
    inside = tile < num_m * num_n
    num_m = gl.maximum(num_m, 1)
    m, n = _locate(gl.minimum(tile, num_m * num_n - 1), num_m, num_n, GROUP_M)
    row0 = (m * WGS + WG) * ROWS
    places = row0 + gl.arange(0, ROWS, LINES)
    first = gl.load(rows + row0, inside, 0) if TOP_K else row0
    expert = gl.load(block_expert + m, inside, 0) if TOP_K else 0
    assignments = gl.load(rows + places, inside & (places >= 0), 0) if GATED else places
    return row0, n, first, expert, assignments


@gluon.jit
def _scales(
    looked, a_scales, w_scales, num_rows, N, K, row_stride, PARTS: gl.constexpr, TOP_K: gl.constexpr,
    GATED: gl.constexpr, CHANNEL_STEP: gl.constexpr,
):  # fmt: skip
    """Where the scales of a tile begin, of rows and of both parts of the weight, and the first of each."""
    _row0, n, _first, expert, assignments = looked
    groups, n_blocks = (K + BLOCK - 1) // BLOCK, (N + BLOCK - 1) // BLOCK
    a_row = assignments
    block = n if GATED else n * PARTS
    following = gl.minimum(block + 1, n_blocks - 1)
    if GATED:
        a_row = gl.minimum(assignments, num_rows - 1) // TOP_K
        block += expert * 2 * n_blocks
        following = block + n_blocks
    elif TOP_K:
        block += expert * n_blocks
        following += expert * n_blocks
    else:
        a_row = gl.minimum(assignments, num_rows - 1)
    places = a_scales + a_row * row_stride
    place0, place1 = w_scales + block * groups, w_scales + following * groups
    first0 = gl.load(place0) if CHANNEL_STEP < 0 else 1.0
    first1 = gl.load(place1) if CHANNEL_STEP < 0 and PARTS == 2 else 1.0
    return places, place0, place1, gl.load(places), first0, first1


@gluon.jit
def _multiply(
    WG: gl.constexpr, own, shared, WGS: gl.constexpr, PARTS: gl.constexpr, TOP_K: gl.constexpr, GATED: gl.constexpr,
    BIAS: gl.constexpr, CHANNEL_STEP: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    ALPHA: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 rows of every tile of its program. CHANNEL_STEP -1: weights have scales of blocks.

    What it must know of the next tile is loaded while it multiplies, the first scales of that while it stores.
    """
    out_desc, out_tiles, out_scales, bias, a_scales, w_scales, row_stride, group_stride, scale_stride = own
    a_tiles, w_tiles, full, empty, rows, block_expert, num_m_ptr, num_rows, N, K, num_m, num_n, turns = shared
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
    LINES: gl.constexpr = gl.SliceLayout(1, ACC)
    groups = (K + BLOCK - 1) // BLOCK
    if TOP_K:
        num_m = gl.load(num_m_ptr)
    TURNS: gl.constexpr = TOP_K > 0
    step = 0
    turn = 0
    looked = _look(gl.program_id(0), num_m, num_n, rows, block_expert, WG, WGS, TOP_K, GATED, GROUP_M, LINES)
    row0, n, first = looked[0], looked[1], looked[2]
    a_ptrs, w_ptr0, w_ptr1, a_scale, w_scale0, w_scale1 = _scales(
        looked, a_scales, w_scales, num_rows, N, K, row_stride, PARTS, TOP_K, GATED, CHANNEL_STEP
    )
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        looked = _look(
            tile + gl.num_programs(0), num_m, num_n, rows, block_expert, WG, WGS, TOP_K, GATED, GROUP_M, LINES
        )
        if first < num_rows:
            acc0 = gl.zeros([ROWS, BLOCK], gl.float32, ACC)
            acc1 = gl.zeros([ROWS, BLOCK], gl.float32, ACC)
            for group in range(groups):
                stage = step % STAGES
                ahead = gl.minimum(group + 1, groups - 1)
                mbarrier.wait(full.index(stage), (step // STAGES) & 1)
                if GATED:
                    fence_async_shared()  # rows were copied by threads, and wgmma reads through the async proxy
                a_tile = a_tiles.index(stage * WGS + WG)
                token = _in_turn(a_tile, w_tiles.index(stage * PARTS), turns, turn, WG, WGS, TURNS)
                scale0 = a_scale * w_scale0
                scale1 = a_scale * w_scale1
                # Loaded while the products run, for the next step.
                a_scale = gl.load(a_ptrs + ahead * group_stride)
                if CHANNEL_STEP < 0:
                    w_scale0 = gl.load(w_ptr0 + ahead)
                if CHANNEL_STEP < 0 and PARTS == 2:
                    w_scale1 = gl.load(w_ptr1 + ahead)
                product = warpgroup_mma_wait(0, deps=[token])
                if PARTS == 1:
                    mbarrier.arrive(empty.index(stage), count=1)
                    acc0 += product * scale0[:, None]
                else:
                    # Waits with nothing to wait for keep the sums in their place: registers hold but one product.
                    acc0 = warpgroup_mma_wait(0, deps=[acc0 + product * scale0[:, None]])
                    token = _in_turn(a_tile, w_tiles.index(stage * PARTS + 1), turns, turn + 1, WG, WGS, TURNS)
                    product = warpgroup_mma_wait(0, deps=[token])
                    mbarrier.arrive(empty.index(stage), count=1)
                    acc1 = warpgroup_mma_wait(0, deps=[acc1 + product * scale1[:, None]])
                step += 1
                turn += PARTS
            a_ptrs, w_ptr0, w_ptr1, a_scale, w_scale0, w_scale1 = _scales(
                looked, a_scales, w_scales, num_rows, N, K, row_stride, PARTS, TOP_K, GATED, CHANNEL_STEP
            )
            out_tile = out_tiles.index(WG)
            if GATED:
                _store_quantized(acc0, acc1, out_desc, out_tile, out_scales, row0, n, scale_stride, ALPHA, LIMIT)
            else:
                column = n * (PARTS * BLOCK)
                _store_dense(acc0, out_desc, out_tile, bias, w_scales, row0, column, N, BIAS, CHANNEL_STEP)
                if PARTS == 2:
                    column += BLOCK
                    _store_dense(acc1, out_desc, out_tile, bias, w_scales, row0, column, N, BIAS, CHANNEL_STEP)
        else:  # rows of padding alone
            for _ in range(groups):
                for part in gl.static_range(PARTS if TURNS else 0):
                    mbarrier.wait(turns.index(WG), (turn + part) & 1)
                    thread_barrier()  # one thread arrives: another might still wait when the phase comes round
                    mbarrier.arrive(turns.index((WG + 1) % WGS), count=1)
                turn += PARTS
                mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
                thread_barrier()
                mbarrier.arrive(empty.index(step % STAGES), count=1)
                step += 1
            a_ptrs, w_ptr0, w_ptr1, a_scale, w_scale0, w_scale1 = _scales(
                looked, a_scales, w_scales, num_rows, N, K, row_stride, PARTS, TOP_K, GATED, CHANNEL_STEP
            )
        row0, n, first = looked[0], looked[1], looked[2]
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["num_rows", "num_m", "num_n", "row_stride", "group_stride", "scale_stride"])
def _hopper_kernel(
    a, a_desc, w_desc, out_desc, out_scales, bias, a_scales, w_scales, rows, block_expert, num_m_ptr,
    num_rows, N, K, num_m, num_n, row_stride, group_stride, scale_stride, ALPHA: gl.constexpr, LIMIT: gl.constexpr,
    WGS: gl.constexpr, PARTS: gl.constexpr, TOP_K: gl.constexpr, GATED: gl.constexpr, BIAS: gl.constexpr,
    CHANNEL_STEP: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, FEEDERS: gl.constexpr,
    REGS: gl.constexpr, FEED_REGS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """What `triton._product_kernel` computes."""
    dtype: gl.constexpr = w_desc.dtype
    a_tiles = gl.allocate_shared_memory(dtype, [STAGES * WGS, ROWS, BLOCK], w_desc.layout)
    w_tiles = gl.allocate_shared_memory(dtype, [STAGES * PARTS, BLOCK, BLOCK], w_desc.layout)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1 + FEEDERS * 32 if GATED else 1)
        mbarrier.init(empty.index(i), count=WGS)
    turns = gl.allocate_shared_memory(gl.int64, [WGS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(WGS):
        mbarrier.init(turns.index(i), count=1)
    mbarrier.arrive(turns.index(0))
    fence_async_shared()
    out_tiles = gl.allocate_shared_memory(out_desc.dtype, [WGS, ROWS, BLOCK], out_desc.layout)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    shared = (a_tiles, w_tiles, full, empty, rows, block_expert, num_m_ptr, num_rows, N, K, num_m, num_n, turns)
    own = (out_desc, out_tiles, out_scales, bias, a_scales, w_scales, row_stride, group_stride, scale_stride)
    fed = (a, a_desc, w_desc)
    if WGS == 2:
        gl.warp_specialize([
            (_multiply, (
                gl.constexpr(0), own, shared, WGS, PARTS, TOP_K, GATED, BIAS, CHANNEL_STEP, GROUP_M, STAGES,
                ALPHA, LIMIT,
            )),
            (_multiply, (
                gl.constexpr(1), own, shared, WGS, PARTS, TOP_K, GATED, BIAS, CHANNEL_STEP, GROUP_M, STAGES,
                ALPHA, LIMIT,
            )),
            (_feed, (fed, shared, WGS, PARTS, TOP_K, GATED, GROUP_M, STAGES)),
        ], [4, FEEDERS], [REGS, FEED_REGS])  # fmt: skip
    else:
        gl.warp_specialize([
            (_multiply, (
                gl.constexpr(0), own, shared, WGS, PARTS, TOP_K, GATED, BIAS, CHANNEL_STEP, GROUP_M, STAGES,
                ALPHA, LIMIT,
            )),
            (_multiply, (
                gl.constexpr(1), own, shared, WGS, PARTS, TOP_K, GATED, BIAS, CHANNEL_STEP, GROUP_M, STAGES,
                ALPHA, LIMIT,
            )),
            (_multiply, (
                gl.constexpr(2), own, shared, WGS, PARTS, TOP_K, GATED, BIAS, CHANNEL_STEP, GROUP_M, STAGES,
                ALPHA, LIMIT,
            )),
            (_feed, (fed, shared, WGS, PARTS, TOP_K, GATED, GROUP_M, STAGES)),
        ], [4, 4, FEEDERS], [REGS, REGS, FEED_REGS])  # fmt: skip


def product(
    a: torch.Tensor, a_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, out: torch.Tensor,
    config: HopperConfig, *, num_rows: int, most_blocks: int, n: int, order: tuple[torch.Tensor, ...] | None,
    top_k: int, gated: bool, out_scales: torch.Tensor | None, bias: torch.Tensor | None, kind: str,
    strides: tuple[int, int], multiprocessors: int, swiglu: tuple[float, float] | None,
) -> None:  # fmt: skip
    """`triton._product` for 16-bit or quantised results; n a multiple of 8, by expert K and gate-up's n of 128."""
    k, num_n = a.shape[1], triton.cdiv(n, 128 * (1 if gated else config.parts))
    halves, bytes_ = (gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=b, rank=2) for b in (16, 8))
    a_desc = TensorDescriptor.from_tensor(a, [64, 128], bytes_)
    feeders, regs = (FEEDERS if gated else 1), (216 if config.warpgroups == 2 else 160)
    absent = w_scales.view(torch.int32)
    _hopper_kernel[(min(most_blocks * num_n, multiprocessors),)](
        a, a_desc, TensorDescriptor.from_tensor(w.view(-1, 2 * k if gated else k), [128, 128], bytes_),
        TensorDescriptor.from_tensor(out, [64, 128], bytes_ if gated else halves),
        a_scales if out_scales is None else out_scales, a if bias is None else bias, a_scales, w_scales,
        *(order or (absent, absent, absent))[:3], num_rows, n, k, most_blocks, num_n, *strides,
        0 if out_scales is None else out_scales.stride(1),
        WGS=config.warpgroups, PARTS=config.parts, TOP_K=top_k, GATED=gated, BIAS=bias is not None,
        CHANNEL_STEP={"block": -1, "channel": 1, "tensor": 0}[kind], GROUP_M=config.group_m,
        STAGES=config.num_stages, FEEDERS=feeders, REGS=regs, FEED_REGS=80 if gated else 32,
        num_warps=4, **swiglu_options(swiglu), **overlap_options(a),
    )  # fmt: skip

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
from gossamer.ops.attention.hopper import new_barriers
from gossamer.ops.dispatch import overlap_options
from gossamer.ops.quantize_fp8.hopper import quantize_rows

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
def hand_over(bar):
    """What threads copied: wgmma reads through the async proxy, and a fence among the products would hold them up."""
    fence_async_shared()
    thread_barrier()
    mbarrier.arrive(bar, count=1)


@gluon.jit
def _feed(
    fed, shared, WGS: gl.constexpr, PARTS: gl.constexpr, TOP_K: gl.constexpr, GATED: gl.constexpr,
    CHANNEL_STEP: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: brings the operands with their scales, as far ahead as there are stages.

    A wait for scales that consumers load themselves, a step ahead, falls between their products.
    """
    a, a_desc, w_desc, a_scales, w_scales, row_stride, group_stride = fed
    a_tiles, w_tiles, a_scale_tiles, w_scale_tiles, full, empty = shared[0]
    rows, block_expert, num_m_ptr, num_rows, N, K, num_m, num_n, _turns = shared[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 16], [4, 8], [gl.num_warps(), 1], [1, 0])
    line: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    columns = gl.arange(0, BLOCK, gl.SliceLayout(0, layout))[None, :]
    groups, n_blocks = (K + BLOCK - 1) // BLOCK, (N + BLOCK - 1) // BLOCK
    if TOP_K:
        num_m = gl.load(num_m_ptr)
    step = 0
    last = -1
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        m, n = _locate(tile, num_m, num_n, GROUP_M)
        new = (m != last) | (groups != STAGES)  # else the stages hold these rows, each the group that it is to
        last = m
        expert = gl.load(block_expert + m) if TOP_K else 0
        w_row = expert * N + n * (BLOCK if GATED else BLOCK * PARTS)
        # Past the end the last block's scale serves: nothing there is stored.
        w_scale = w_scales + (expert * n_blocks * (2 if GATED else 1) + (n if GATED else n * PARTS)) * groups
        following = n_blocks * groups if GATED else gl.where(n * PARTS + 1 < n_blocks, groups, 0)
        sources = ()
        scales = ()
        for i in gl.static_range(WGS):
            at = (m * WGS + i) * ROWS
            own = at + gl.arange(0, ROWS, line)
            if GATED:
                own = gl.minimum(gl.load(rows + own), num_rows - 1) // TOP_K
                assignment = gl.load(rows + at + gl.arange(0, ROWS, gl.SliceLayout(1, layout)))
                offsets = (assignment // TOP_K)[:, None] * K + columns
                source = (offsets, (assignment < num_rows)[:, None])
                sources = sources + source  # type: ignore[assignment]
            elif TOP_K == 0:
                own = gl.minimum(own, num_rows - 1)
            scale = (a_scales + own * row_stride,)
            scales = scales + scale  # type: ignore[assignment]
        for group in range(groups):
            k = group * BLOCK
            stage = step % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(bar, (PARTS * BLOCK + (0 if GATED else WGS * ROWS)) * BLOCK, pred=new | GATED)
            mbarrier.expect(bar, PARTS * BLOCK * BLOCK, pred=not (new | GATED))
            for i in gl.static_range(PARTS):
                if GATED:
                    copy_tile(w_desc, [w_row, i * K + k], bar, w_tiles.index(stage * PARTS + i))
                else:
                    copy_tile(w_desc, [w_row + i * BLOCK, k], bar, w_tiles.index(stage * PARTS + i))
                if CHANNEL_STEP < 0:
                    pointer = w_scale + i * following + group + gl.arange(0, 1, line)
                    copy_rows(w_scale_tiles.index(stage * PARTS + i), pointer)
            for i in gl.static_range(WGS):
                a_tile = a_tiles.index(stage * WGS + i)
                copy_rows(a_scale_tiles.index(stage * WGS + i), scales[i] + group * group_stride)
                if GATED:
                    copy_rows(a_tile, a + k + sources[2 * i], mask=sources[2 * i + 1])
                else:
                    copy_tile(a_desc, [(m * WGS + i) * ROWS, k], bar, a_tile, pred=new)
            if GATED:
                async_copy.commit_group()
                if step > 0:
                    async_copy.wait_group(1)
                    hand_over(full.index((step - 1) % STAGES))
            else:
                async_copy.mbarrier_arrive(bar, increment_count=False)
            step += 1
    if GATED:
        async_copy.wait_group(0)
        if step > 0:
            hand_over(full.index((step - 1) % STAGES))


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
    q, scale = quantize_rows(y, out_desc.dtype)
    row = row0 + gl.arange(0, ROWS, gl.SliceLayout(1, q.type.layout))
    gl.store(out_scales + n * scale_stride + row, scale)
    tma.store_wait(0)
    out_tile.store(q)
    fence_async_shared()
    store_tile(out_desc, [row0, n * BLOCK], out_tile)


@gluon.jit
def _look(tile, num_m, num_n, rows, WG: gl.constexpr, WGS: gl.constexpr, TOP_K: gl.constexpr, GROUP_M: gl.constexpr):
    """A warpgroup's first row in a tile, the tile's columns, and what is in that row; behind the last tile, of that."""
    m, n = _locate(gl.minimum(tile, gl.maximum(num_m * num_n, 1) - 1), gl.maximum(num_m, 1), num_n, GROUP_M)
    row0 = (m * WGS + WG) * ROWS
    return row0, n, gl.load(rows + row0) if TOP_K else row0


@gluon.jit
def load_scale(a_scale_tiles, w_scale_tiles, a, w, CHANNEL_STEP: gl.constexpr, LINES: gl.constexpr):
    """Of a product: the rows' scales times that of a block of the weight."""
    scale = a_scale_tiles.index(a).load(LINES)
    if CHANNEL_STEP < 0:
        one: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        scale *= gl.max(w_scale_tiles.index(w).load(one), 0)
    return scale


@gluon.jit
def _multiply(
    WG: gl.constexpr, own, shared, WGS: gl.constexpr, PARTS: gl.constexpr, TOP_K: gl.constexpr, GATED: gl.constexpr,
    BIAS: gl.constexpr, CHANNEL_STEP: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    ALPHA: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 rows of every tile of its program. CHANNEL_STEP -1: weights have scales of blocks.

    Where the next tile begins is loaded while it multiplies this one.
    """
    out_desc, out_tiles, out_scales, bias, w_scales, scale_stride = own
    a_tiles, w_tiles, a_scale_tiles, w_scale_tiles, full, empty = shared[0]
    rows, _block_expert, num_m_ptr, num_rows, N, K, num_m, num_n, turns = shared[1]
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK, 32])
    LINES: gl.constexpr = gl.SliceLayout(1, ACC)
    groups = (K + BLOCK - 1) // BLOCK
    if TOP_K:
        num_m = gl.load(num_m_ptr)
    TURNS: gl.constexpr = TOP_K > 0
    step = 0
    turn = 0
    row0, n, first = _look(gl.program_id(0), num_m, num_n, rows, WG, WGS, TOP_K, GROUP_M)
    for tile in range(gl.program_id(0), num_m * num_n, gl.num_programs(0)):
        looked = _look(tile + gl.num_programs(0), num_m, num_n, rows, WG, WGS, TOP_K, GROUP_M)
        if first < num_rows:
            acc0 = gl.zeros([ROWS, BLOCK], gl.float32, ACC)
            acc1 = gl.zeros([ROWS, BLOCK], gl.float32, ACC)
            for _ in range(groups):
                stage = step % STAGES
                mbarrier.wait(full.index(stage), (step // STAGES) & 1)
                a_tile = a_tiles.index(stage * WGS + WG)
                token = _in_turn(a_tile, w_tiles.index(stage * PARTS), turns, turn, WG, WGS, TURNS)
                scale0 = load_scale(a_scale_tiles, w_scale_tiles, stage * WGS + WG, stage * PARTS, CHANNEL_STEP, LINES)
                if PARTS == 2:
                    scale1 = load_scale(
                        a_scale_tiles, w_scale_tiles, stage * WGS + WG, stage * PARTS + 1, CHANNEL_STEP, LINES
                    )
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
        row0, n, first = looked
    tma.store_wait(0)


@gluon.jit
def _work(
    ROLE: gl.constexpr, own, fed, shared, WGS: gl.constexpr, PARTS: gl.constexpr, TOP_K: gl.constexpr,
    GATED: gl.constexpr, BIAS: gl.constexpr, CHANNEL_STEP: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr,
    ALPHA: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    """A warpgroup multiplies; the last role feeds."""
    if ROLE < WGS:
        _multiply(ROLE, own, shared, WGS, PARTS, TOP_K, GATED, BIAS, CHANNEL_STEP, GROUP_M, STAGES, ALPHA, LIMIT)
    else:
        _feed(fed, shared, WGS, PARTS, TOP_K, GATED, CHANNEL_STEP, GROUP_M, STAGES)


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
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, order=[0])
    a_tiles = gl.allocate_shared_memory(dtype, [STAGES * WGS, ROWS, BLOCK], w_desc.layout)
    w_tiles = gl.allocate_shared_memory(dtype, [STAGES * PARTS, BLOCK, BLOCK], w_desc.layout)
    a_scale_tiles = gl.allocate_shared_memory(gl.float32, [STAGES * WGS, ROWS], plain)
    w_scale_tiles = gl.allocate_shared_memory(gl.float32, [STAGES * PARTS, 1], plain)
    full = new_barriers(STAGES, 2 if GATED else 33)  # of scales each lane that copied them
    empty, turns = new_barriers(STAGES, WGS), new_barriers(WGS, 1)
    mbarrier.arrive(turns.index(0))
    fence_async_shared()
    out_tiles = gl.allocate_shared_memory(out_desc.dtype, [WGS, ROWS, BLOCK], out_desc.layout)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    tiles = (a_tiles, w_tiles, a_scale_tiles, w_scale_tiles, full, empty)
    shared = (tiles, (rows, block_expert, num_m_ptr, num_rows, N, K, num_m, num_n, turns))
    own = (out_desc, out_tiles, out_scales, bias, w_scales, scale_stride)
    fed = (a, a_desc, w_desc, a_scales, w_scales, row_stride, group_stride)
    gl.warp_specialize(
        [(_work, (
            role, own, fed, shared, WGS, PARTS, TOP_K, GATED, BIAS, CHANNEL_STEP, GROUP_M, STAGES, ALPHA, LIMIT,
        )) for role in (0, 1, 2, 3)[: WGS + 1]],
        [4] * (WGS - 1) + [FEEDERS], [REGS] * (WGS - 1) + [FEED_REGS],
    )  # fmt: skip


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

"""Grouped products of many rows per expert on Hopper: one partition feeds tiles to two warpgroups that run wgmma.

Tiles are 192 x 256, because at 128 x 256 loading the operands sets the pace: each warpgroup has 64 rows of its own and
half of the columns of the other 64, all that its registers hold. Gluon, because Triton's loop has no such roles; the
kernel of `triton.py` serves every other case.
"""

from __future__ import annotations

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
from gossamer.ops.moe.triton import ExpertOrder

BLOCK_M, BLOCK_N = gl.constexpr(192), gl.constexpr(256)
BLOCK_K = gl.constexpr(64)  # 128 bytes, the widest row that shared memory swizzles
STAGES = gl.constexpr(3)
# Later versions of Triton renamed 3.6's copies.
copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
copy_rows = async_copy.async_load if hasattr(async_copy, "async_load") else async_copy.async_copy_global_to_shared


@gluon.constexpr_function
def _line_layout(columns):
    """A thread holds 8 neighbours of a row, a quad of lanes 32, a warp the 16 rows that its accumulator has.

    Results change to it within a warp, and leave in lines of 64 bytes.
    """
    high = [[0, 1 << bit] for bit in range(5, columns.bit_length() - 1)]
    return gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], *high], lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[64, columns],
    )  # fmt: skip


@gluon.jit
def _post(value, turn, tiles, tile_full, tile_empty):
    """Tells both warpgroups of a tile: its number times 4 and how many times 64 rows it has, or 0 at the end."""
    mbarrier.wait(tile_empty.index(turn % 2), ((turn // 2) & 1) ^ 1)
    tiles.index(turn % 2).store(gl.full([1], value, gl.int32, gl.BlockedLayout([1], [32], [gl.num_warps()], [0])))
    mbarrier.arrive(tile_full.index(turn % 2), count=1)


@gluon.jit
def _receive(turn, tiles, tile_full, tile_empty):
    mbarrier.wait(tile_full.index(turn % 2), (turn // 2) & 1)
    value = gl.max(tiles.index(turn % 2).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)
    mbarrier.arrive(tile_empty.index(turn % 2), count=1)
    return value


@gluon.jit
def _feed(
    a, a_desc, w_desc, block_expert, num_blocks, a_tiles, w_tiles, shared, TOP_K: gl.constexpr, GATED: gl.constexpr
):
    """The producer: draws tiles, so that programs end together, and brings their operands as stages become free.

    What it must know of a tile it loads while it feeds the one before.
    """
    rows, full, empty, tiles, tile_full, tile_empty, num_assignments, N, K = shared
    W_BYTES: gl.constexpr = BLOCK_N * BLOCK_K * 2
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    lines = gl.arange(0, 64, gl.SliceLayout(1, layout))
    columns = gl.arange(0, BLOCK_K, gl.SliceLayout(0, layout))[None, :]
    cursor = num_blocks + (1 if GATED else 2)
    n_tiles = (N + BLOCK_N - 1) // BLOCK_N
    num_tiles = gl.load(num_blocks) * n_tiles
    step = 0
    turn = 0
    tile = gl.program_id(0)
    block = gl.minimum(tile, gl.maximum(num_tiles, 1) - 1) // n_tiles
    first = rows + block * BLOCK_M
    expert, second, third = gl.load(block_expert + block), gl.load(first + 64), gl.load(first + 128)
    if GATED:
        row0, row1, row2 = gl.load(first + lines), gl.load(first + 64 + lines), gl.load(first + 128 + lines)
    while tile < num_tiles:
        following = gl.num_programs(0) + gl.atomic_add(cursor, 1, sem="relaxed")
        groups = 1 + (second < num_assignments).to(gl.int32) + (third < num_assignments).to(gl.int32)
        _post(tile * 4 + groups, turn, tiles, tile_full, tile_empty)
        turn += 1
        a_row, w_row = block * BLOCK_M, expert * N + tile % n_tiles * BLOCK_N
        if GATED:
            inside0, inside1, inside2 = row0 < num_assignments, row1 < num_assignments, row2 < num_assignments
            from0 = (row0 // TOP_K)[:, None] * K + columns
            from1 = (row1 // TOP_K)[:, None] * K + columns
            from2 = (row2 // TOP_K)[:, None] * K + columns
        block = gl.minimum(following, num_tiles - 1) // n_tiles
        first = rows + block * BLOCK_M
        expert, second, third = gl.load(block_expert + block), gl.load(first + 64), gl.load(first + 128)
        if GATED:
            row0, row1, row2 = gl.load(first + lines), gl.load(first + 64 + lines), gl.load(first + 128 + lines)
        for k in range(0, K, BLOCK_K):
            stage = step % STAGES
            bar = full.index(stage)
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            if GATED:
                mbarrier.expect(bar, W_BYTES)
                copy_tile(w_desc, [w_row, k], bar, w_tiles.index(stage))
                copy_rows(a_tiles.index(stage * 3), a + k + from0, mask=inside0[:, None])
                copy_rows(a_tiles.index(stage * 3 + 1), a + k + from1, mask=inside1[:, None])
                copy_rows(a_tiles.index(stage * 3 + 2), a + k + from2, mask=inside2[:, None])
                async_copy.mbarrier_arrive(bar, increment_count=False)
            else:
                for count in gl.static_range(1, 4):
                    mbarrier.expect(bar, W_BYTES + count * 64 * BLOCK_K * 2, pred=groups == count)
                copy_tile(w_desc, [w_row, k], bar, w_tiles.index(stage))
                for group in gl.static_range(3):
                    a_tile = a_tiles.index(stage * 3 + group)
                    copy_tile(a_desc, [a_row + group * 64, k], bar, a_tile, pred=group < groups)
            step += 1
        tile = following
    _post(0, turn, tiles, tile_full, tile_empty)


@gluon.jit
def _accumulate(
    step, own, half, a_tiles, w_tiles, full, empty, steps,
    WARPGROUP: gl.constexpr, GATED: gl.constexpr, WHOLE: gl.constexpr,
):  # fmt: skip
    """A tile's product: of the warpgroup's own 64 rows and, in a WHOLE tile, of half the columns of the last 64."""
    for i in range(steps):
        stage = step % STAGES
        mbarrier.wait(full.index(stage), (step // STAGES) & 1)
        if GATED:
            fence_async_shared()  # rows were copied by threads, and wgmma reads through the async proxy
        w = w_tiles.index(stage)
        a_tile = a_tiles.index(stage * 3 + WARPGROUP)
        own = warpgroup_mma(a_tile, w.permute((1, 0)), own, use_acc=i > 0, is_async=True)
        if WHOLE:
            w = w.slice(WARPGROUP * (BLOCK_N // 2), BLOCK_N // 2).permute((1, 0))
            half = warpgroup_mma(a_tiles.index(stage * 3 + 2), w, half, use_acc=i > 0, is_async=True)
            own, half = warpgroup_mma_wait(2, deps=[own, half])
        else:
            own = warpgroup_mma_wait(1, deps=[own])
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1, pred=i > 0)
        step += 1
    if WHOLE:
        own, half = warpgroup_mma_wait(0, deps=[own, half])
    else:
        own = warpgroup_mma_wait(0, deps=[own])
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), count=1)
    return step, own, half


@gluon.jit
def _store(
    acc, assignment, position, out, n, num_assignments, N, LINES: gl.constexpr, GATED: gl.constexpr,
    ALPHA: gl.constexpr, LIMIT: gl.constexpr,
):  # fmt: skip
    dtype: gl.constexpr = out.dtype.element_ty
    if GATED:
        gate, up = gl.split(acc.reshape([64, acc.shape[1] // 2, 2]))
        result = gated_activation(gate, up, ALPHA, LIMIT).to(dtype)
        column, width = n // 2, N // 2
    else:
        result = acc.to(dtype)
        column, width = n, N
    column += gl.arange(0, result.shape[1], gl.SliceLayout(0, LINES))
    mask = (assignment < num_assignments)[:, None] & (column < width)[None, :]
    pointers = out + position[:, None].to(gl.int64) * width + column[None, :]
    gl.store(pointers, gl.convert_layout(result, LINES), mask=mask)


@gluon.jit
def _multiply(
    WARPGROUP: gl.constexpr, out, a_tiles, w_tiles, shared, GATED: gl.constexpr, ALPHA: gl.constexpr,
    LIMIT: gl.constexpr,
):  # fmt: skip
    """A consumer. It stores while the other one still multiplies and the producer brings the next tile."""
    rows, full, empty, tiles, tile_full, tile_empty, num_assignments, N, K = shared
    OWN: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    HALF: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N // 2, 16])
    OWN_LINES: gl.constexpr = _line_layout(BLOCK_N // 2 if GATED else BLOCK_N)
    HALF_LINES: gl.constexpr = _line_layout(BLOCK_N // 4 if GATED else BLOCK_N // 2)
    n_tiles = (N + BLOCK_N - 1) // BLOCK_N
    steps = K // BLOCK_K
    step = 0
    turn = 0
    value = _receive(turn, tiles, tile_full, tile_empty)
    while value > 0:
        groups = value % 4
        if groups > WARPGROUP:
            n = value // 4 % n_tiles * BLOCK_N
            first = value // 4 // n_tiles * BLOCK_M
            own_position = first + WARPGROUP * 64 + gl.arange(0, 64, gl.SliceLayout(1, OWN_LINES))
            half_position = first + 128 + gl.arange(0, 64, gl.SliceLayout(1, HALF_LINES))
            own_assignment, half_assignment = gl.load(rows + own_position), gl.load(rows + half_position)
            own = gl.zeros([64, BLOCK_N], gl.float32, OWN)
            half = gl.zeros([64, BLOCK_N // 2], gl.float32, HALF)
            if groups == 3:
                step, own, half = _accumulate(
                    step, own, half, a_tiles, w_tiles, full, empty, steps, WARPGROUP, GATED, True
                )
                m = n + WARPGROUP * (BLOCK_N // 2)
                _store(
                    half, half_assignment, half_position, out, m, num_assignments, N, HALF_LINES, GATED, ALPHA, LIMIT
                )
            else:
                step, own, half = _accumulate(
                    step, own, half, a_tiles, w_tiles, full, empty, steps, WARPGROUP, GATED, False
                )
            _store(own, own_assignment, own_position, out, n, num_assignments, N, OWN_LINES, GATED, ALPHA, LIMIT)
        else:  # padding alone
            for _ in range(steps):
                mbarrier.wait(full.index(step % STAGES), (step // STAGES) & 1)
                mbarrier.arrive(empty.index(step % STAGES), count=1)
                step += 1
        turn += 1
        value = _receive(turn, tiles, tile_full, tile_empty)


@gluon.jit(do_not_specialize=["num_assignments"])
def _hopper_kernel(
    a, a_desc, w_desc, out, rows, block_expert, num_blocks, num_assignments, N, K,
    ALPHA: gl.constexpr, LIMIT: gl.constexpr, TOP_K: gl.constexpr, GATED: gl.constexpr, FEEDERS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """What `_grouped_kernel` of triton.py computes, in whose words GATED is explained."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    dtype: gl.constexpr = out.dtype.element_ty
    swizzled: gl.constexpr = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    a_tiles = gl.allocate_shared_memory(dtype, [STAGES * 3, 64, BLOCK_K], swizzled)
    w_tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, BLOCK_K], swizzled)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    tiles = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, order=[0]))
    tile_full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    tile_empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        # Each thread that copies rows arrives when its own have landed.
        mbarrier.init(full.index(i), count=1 + FEEDERS * 32 if GATED else 1)
        mbarrier.init(empty.index(i), count=2)
    for i in gl.static_range(2):
        mbarrier.init(tile_full.index(i), count=1)
        mbarrier.init(tile_empty.index(i), count=2)
    fence_async_shared()
    shared = (rows, full, empty, tiles, tile_full, tile_empty, num_assignments, N, K)
    gl.warp_specialize([
        (_multiply, (gl.constexpr(0), out, a_tiles, w_tiles, shared, GATED, ALPHA, LIMIT)),
        (_multiply, (gl.constexpr(1), out, a_tiles, w_tiles, shared, GATED, ALPHA, LIMIT)),
        (_feed, (a, a_desc, w_desc, block_expert, num_blocks, a_tiles, w_tiles, shared, TOP_K, GATED)),
    ], [4, FEEDERS], [232, 48 if GATED else 40])  # fmt: skip


def grouped_product(
    a: torch.Tensor, w: torch.Tensor, out: torch.Tensor, order: ExpertOrder, topk_ids: torch.Tensor, *, gated: bool,
    swiglu: tuple[float, float] | None = None,
) -> None:  # fmt: skip
    """`triton._grouped_product` of 16-bit numbers, for an order in blocks of BLOCK_M; K is a multiple of BLOCK_K.

    Draws its tiles from the counters behind `order.num_blocks`: an order serves one product of each kind.
    """
    num_experts, n, k = w.shape
    num_tiles = order.block_expert.numel() * triton.cdiv(n, BLOCK_N.value)
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count
    swizzled = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
    _hopper_kernel[(min(programs, num_tiles),)](
        a, TensorDescriptor.from_tensor(a, [64, BLOCK_K.value], swizzled),
        TensorDescriptor.from_tensor(w.view(num_experts * n, k), [BLOCK_N.value, BLOCK_K.value], swizzled),
        out, *order[:3], topk_ids.numel(), n, k, TOP_K=topk_ids.shape[1], GATED=gated, FEEDERS=4 if gated else 1,
        num_warps=4, **swiglu_options(swiglu), **overlap_options(a),
    )  # fmt: skip

"""Triton kernels of the routed MLP: a counting sort by expert, products of the touched experts, their weighted sum.

Grids follow from shapes alone; what only the device knows ends programs early. Sums have a fixed order. A kernel may
start before the end of the one before it (`overlap_options`) and waits for it before it reads or writes.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from gossamer.ops.activation.triton import gated_activation, swiglu_options
from gossamer.ops.dispatch import overlap_options
from gossamer.ops.norm.triton import add_rms_norm
from gossamer.ops.quantize_fp8 import Quantized
from gossamer.ops.quantize_fp8.triton import BLOCK as FP8_BLOCK
from gossamer.ops.quantize_fp8.triton import quantize_rows

GEMV_TOKENS = 2  # up to here products are not grouped: hardly any two tokens share an expert
HOPPER_BLOCK_M = 192  # rows of a tile in hopper.py
HOPPER_ROWS = 400  # per expert, from which it is faster there
SMALL_SORT = 4096  # up to here one kernel sorts: each expert's program reads every assignment
RANKED = 128  # assignments of a program of the sort above


@triton.jit
def _gate_up_gemv_kernel(
    x_ptr, w_ptr, ids_ptr, act_ptr, hidden, inter, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """act[a, n] = silu(gate) * up of assignment a = token * TOP_K + slot, for BLOCK_N of the expert's columns."""
    assignment = tl.program_id(1)
    rows = tl.program_id(0) * 2 * BLOCK_N + tl.arange(0, 2 * BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(ids_ptr + assignment).to(tl.int64)
    if expert < 0:
        return
    w_ptrs = w_ptr + (expert * 2 * inter + rows[:, None]) * hidden + columns[None, :]
    x_ptrs = x_ptr + (assignment // TOP_K) * hidden + columns
    acc = tl.zeros([2 * BLOCK_N, BLOCK_K], tl.float32)
    for k in tl.range(0, hidden, BLOCK_K, num_stages=STAGES):
        inside = columns < hidden - k
        w = tl.load(w_ptrs + k, mask=(rows < 2 * inter)[:, None] & inside[None, :], other=0.0)
        x = tl.load(x_ptrs + k, mask=inside, other=0.0)
        acc += w.to(tl.float32) * x.to(tl.float32)[None, :]
    gate, up = tl.split(tl.reshape(tl.sum(acc, 1), [BLOCK_N, 2]))
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    act = gated_activation(gate, up, ALPHA, LIMIT)
    tl.store(act_ptr + assignment * inter + n, act.to(act_ptr.dtype.element_ty), mask=n < inter)


@triton.jit
def _down_gemv_kernel(
    act_ptr, w_ptr, weights_ptr, ids_ptr, out_ptr, hidden, inter,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[t, n] = the weighted sum over the token's experts, for BLOCK_N columns."""
    token = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    slots = tl.arange(0, SLOTS)
    columns = tl.arange(0, BLOCK_K)
    # The gate-up kernel let this one start after it had waited for whatever wrote the ids: they are final already.
    ids = tl.load(ids_ptr + token * TOP_K + slots, mask=slots < TOP_K, other=-1, cache_modifier=".cg").to(tl.int64)
    w_rows = (ids[None, :] * hidden + rows[:, None])[:, :, None] * inter
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    weights = tl.load(weights_ptr + token * TOP_K + slots, mask=(slots < TOP_K) & (ids >= 0), other=0.0)
    acc = tl.zeros([BLOCK_N, SLOTS, BLOCK_K], tl.float32)
    for start in tl.range(0, inter, BLOCK_K, num_stages=STAGES):
        k = start + columns
        inside = (ids >= 0)[:, None] & (k < inter)[None, :]
        act = tl.load(act_ptr + (token * TOP_K + slots)[:, None] * inter + k[None, :], mask=inside, other=0.0)
        w = tl.load(
            w_ptr + w_rows + k[None, None, :], mask=(rows < hidden)[:, None, None] & inside[None, :, :], other=0.0
        )
        acc += w.to(tl.float32) * (act.to(tl.float32) * weights[:, None])[None, :, :]
    out = tl.sum(tl.sum(acc, 2), 1).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * hidden + rows, out, mask=rows < hidden)


@triton.jit
def _sort_kernel(
    ids_ptr, rows_ptr, block_expert_ptr, num_blocks_ptr, places_ptr, num_assignments,
    BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program e lists the assignments of expert e, padded with `num_assignments` to whole blocks of BLOCK_M."""
    PAD: tl.constexpr = 256 if BLOCK_M > 128 else BLOCK_M  # the next power of two: blocks of 192 exist
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    assignments = tl.arange(0, BLOCK_A)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    ids = tl.load(ids_ptr + assignments, mask=assignments < num_assignments, other=-1)
    counts = tl.histogram(tl.maximum(ids, 0), BLOCK_E, mask=ids >= 0)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(experts < expert, blocks, 0))
    own_blocks = tl.sum(tl.where(experts == expert, blocks, 0))
    own = (ids == expert).to(tl.int32)
    place = first * BLOCK_M + tl.cumsum(own, 0) - 1
    tl.store(rows_ptr + place, assignments, mask=own > 0)
    tl.store(places_ptr + assignments, place, mask=own > 0)
    padding = first * BLOCK_M + tl.sum(own) + tl.arange(0, PAD)
    tl.store(rows_ptr + padding, num_assignments, mask=padding < (first + own_blocks) * BLOCK_M)
    tl.store(block_expert_ptr + first + assignments, expert, mask=assignments < own_blocks)
    if expert == tl.num_programs(0) - 1:
        numbers = tl.arange(0, 4)
        tl.store(num_blocks_ptr + numbers, tl.where(numbers == 0, first + own_blocks, 0))
        tl.store(places_ptr + assignments, -1, mask=(ids < 0) & (assignments < num_assignments))


@triton.jit
def _rank_kernel(
    ids_ptr, counts_ptr, ranks_ptr, num_assignments,
    BLOCK_A: tl.constexpr, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Counts the assignments of each expert, and gives each one its place among those of its expert."""
    start = tl.program_id(0) * BLOCK_A
    experts = tl.arange(0, BLOCK_E)
    own = start + tl.arange(0, BLOCK_A)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    ids = tl.load(ids_ptr + own, mask=own < num_assignments, other=-1)
    counts = tl.histogram(tl.maximum(ids, 0), BLOCK_E, mask=ids >= 0)
    # One addition for each expert and program reserves the places of all its assignments here.
    before = tl.atomic_add(counts_ptr + experts, counts, mask=counts > 0, sem="relaxed")
    rank = tl.gather(before, tl.maximum(ids, 0), 0)
    for part in range(0, BLOCK_A, CHUNK):
        other = start + part + tl.arange(0, CHUNK)
        same = tl.load(ids_ptr + other, mask=other < num_assignments, other=-1)[None, :] == ids[:, None]
        rank += tl.sum((same & (other[None, :] < own[:, None])).to(tl.int32), 1)
    tl.store(ranks_ptr + own, rank, mask=own < num_assignments)


@triton.jit
def _place_kernel(
    ids_ptr, counts_ptr, rows_ptr, block_expert_ptr, num_blocks_ptr, places_ptr, num_assignments, num_experts,
    BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """What `_sort_kernel` writes, for many assignments: their order within an expert is open (no result depends on it).

    counts_ptr: rows per expert; places_ptr holds an assignment's place among those of its expert.
    """
    PAD: tl.constexpr = 256 if BLOCK_M > 128 else BLOCK_M
    program = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    offsets = program * BLOCK_A + tl.arange(0, BLOCK_A)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    counts = tl.load(counts_ptr + experts)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.cumsum(blocks, 0) - blocks
    ids = tl.load(ids_ptr + offsets, mask=offsets < num_assignments, other=-1)
    rank = tl.load(places_ptr + offsets, mask=ids >= 0, other=0)
    place = tl.gather(first, tl.maximum(ids, 0), 0) * BLOCK_M + rank
    tl.store(rows_ptr + place, offsets, mask=ids >= 0)
    tl.store(places_ptr + offsets, tl.where(ids >= 0, place, -1), mask=offsets < num_assignments)
    for expert in range(program, num_experts, tl.num_programs(0)):
        own = experts == expert
        start, count = tl.sum(tl.where(own, first, 0)), tl.sum(tl.where(own, counts, 0))
        end = start + tl.cdiv(count, BLOCK_M)
        padding = start * BLOCK_M + count + tl.arange(0, PAD)
        tl.store(rows_ptr + padding, num_assignments, mask=padding < end * BLOCK_M)
        for block in range(start, end):
            tl.store(block_expert_ptr + block, expert)
        if expert == num_experts - 1:
            numbers = tl.arange(0, 4)
            tl.store(num_blocks_ptr + numbers, tl.where(numbers == 0, end, 0))


@triton.jit
def _grouped_kernel(
    a_ptr, a_desc, w_desc, out_ptr, rows_ptr, block_expert_ptr, num_blocks_ptr, num_assignments, N, K,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr, TOP_K: tl.constexpr, GATED: tl.constexpr, EVEN_K: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, FLATTEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tiles of a @ w[expert].T for the rows of each block of the sorted order.

    GATED: a is x, gathered by token; gate and up columns alternate in w; silu(gate) * up is stored. Else a, as every
    result, is in sorted order.
    """
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    n_tiles = tl.cdiv(N, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tl.load(num_blocks_ptr) * n_tiles, tl.num_programs(0), flatten=FLATTEN):
        block = tile // n_tiles
        n = (tile % n_tiles) * BLOCK_N
        expert = tl.load(block_expert_ptr + block)
        position = block * BLOCK_M + tl.arange(0, BLOCK_M)
        assignment = tl.load(rows_ptr + position)
        inside = assignment < num_assignments
        a_ptrs = a_ptr + (assignment // TOP_K)[:, None].to(tl.int64) * K + columns[None, :]
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, K, BLOCK_K):
            if GATED:
                mask = inside[:, None] if EVEN_K else inside[:, None] & (columns < K - k)[None, :]
                a = tl.load(a_ptrs + k, mask=mask, other=0.0)
            else:
                a = a_desc.load([block * BLOCK_M, k])
            w = w_desc.load([expert * N + n, k])
            acc = tl.dot(a, w.T, acc, input_precision=PRECISION)
        if GATED:
            gate, up = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N // 2, 2]))
            act = gated_activation(gate, up, ALPHA, LIMIT).to(out_ptr.dtype.element_ty)
            half = n // 2 + tl.arange(0, BLOCK_N // 2)
            act_ptrs = out_ptr + position[:, None].to(tl.int64) * (N // 2) + half[None, :]
            tl.store(act_ptrs, act, mask=inside[:, None] & (half < N // 2)[None, :])
        else:
            whole = n + tl.arange(0, BLOCK_N)
            y_ptrs = out_ptr + position[:, None].to(tl.int64) * N + whole[None, :]
            tl.store(y_ptrs, acc.to(out_ptr.dtype.element_ty), mask=inside[:, None] & (whole < N)[None, :])


@triton.jit(do_not_specialize=["row_stride", "group_stride"])
def _combine_kernel(
    y_ptr, weights_ptr, places_ptr, residual_ptr, norm_ptr, out_ptr, q_ptr, scales_ptr, hidden, row_stride,
    group_stride, eps,
    TOP_K: tl.constexpr, NORM: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, EARLY: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A token's weighted sum. NORM: added to the residual, in place, whose norm is stored; BLOCK is a whole row. GROUP:
    0, or how many normed numbers share a scale of the FP8 form that is stored instead. EARLY: all but `y` is there
    before the kernel ahead has ended.
    """
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < hidden
    if NORM:
        scale = tl.load(norm_ptr + columns, mask=inside, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        if not EARLY:
            gdc_wait()
    if NORM:
        residual = tl.load(residual_ptr + token * hidden + columns, inside, 0.0, cache_modifier=".cg").to(tl.float32)
    places, weights = (), ()
    for slot in tl.static_range(TOP_K):
        places += (tl.load(places_ptr + token * TOP_K + slot, cache_modifier=".cg").to(tl.int64),)  # type: ignore[assignment]
        weights += (tl.load(weights_ptr + token * TOP_K + slot, cache_modifier=".cg"),)  # type: ignore[assignment]
    if PDL and EARLY:
        gdc_wait()
    acc = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(TOP_K):
        place = places[slot]  # type: ignore[var-annotated]
        y = tl.load(y_ptr + place * hidden + columns, mask=columns < tl.where(place >= 0, hidden, 0), other=0.0)
        acc += y.to(tl.float32) * tl.where(place >= 0, weights[slot], 0.0)
    out = acc.to(out_ptr.dtype.element_ty)
    if NORM:
        # As the sum and the norm are by themselves: each rounded where it would be stored.
        total = (residual + out.to(tl.float32)).to(residual_ptr.dtype.element_ty)
        tl.store(residual_ptr + token * hidden + columns, total, mask=inside)
        full = total.to(tl.float32)
        out = (full * tl.rsqrt(tl.sum(full * full) / hidden + eps) * scale).to(out_ptr.dtype.element_ty)
    if GROUP:
        groups = tl.reshape(out.to(tl.float32), [BLOCK // GROUP, GROUP])
        code, group_scale = quantize_rows(groups, False, q_ptr.dtype.element_ty)
        tl.store(q_ptr + token * hidden + columns, tl.reshape(code, [BLOCK]), mask=inside)
        group = tl.arange(0, BLOCK // GROUP)
        scale_ptrs = scales_ptr + token * row_stride + group * group_stride
        tl.store(scale_ptrs, group_scale, mask=group < tl.cdiv(hidden, GROUP))
    else:
        tl.store(out_ptr + token * hidden + columns, out, mask=inside)


class GroupedConfig(NamedTuple):
    """Tile of a grouped product; `persistent`: one program per multiprocessor overlaps a tile's end with the next."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    persistent: bool = False


def grouped_configs(num_assignments: int, num_experts: int, element_size: int) -> tuple[GroupedConfig, GroupedConfig]:
    """Tiles of the gate-up and of the down product, by the mean rows per expert (measured on an H100)."""
    rows = num_assignments / num_experts
    if element_size > 2:
        return (GroupedConfig(16, 64, 32, 4, 3),) * 2
    if rows <= 10:
        return (GroupedConfig(16, 32, 256, 4, 3),) * 2
    if rows <= 24:
        return (GroupedConfig(32, 64, 128, 4, 3),) * 2
    if rows <= 48:
        return (GroupedConfig(64, 64, 128, 4, 3),) * 2
    if rows <= 80:
        return (GroupedConfig(64, 128, 64, 4, 3),) * 2
    return GroupedConfig(128, 256, 64, 8, 3, True), GroupedConfig(128, 256, 64, 8, 4, True)


def hopper_serves(x: torch.Tensor, inter: int, rows: float) -> bool:
    """Whether the products of `hopper.py` serve these: 16-bit numbers, many rows per expert, on that device."""
    return (
        rows >= HOPPER_ROWS
        and x.is_cuda
        and torch.version.hip is None
        and torch.cuda.get_device_capability(x.device) == (9, 0)
        and x.element_size() == 2
        and x.shape[1] % 64 == inter % 64 == 0
        and x.numel() < 2**31
    )


class ExpertOrder(NamedTuple):
    """Assignments sorted by expert in whole blocks, `num_assignments` as padding; how many blocks the device knows.

    num_blocks: that number, then three zeros, counters for products that draw their tiles. places: of each assignment
    in `rows`, or -1.
    """

    rows: torch.Tensor
    block_expert: torch.Tensor
    num_blocks: torch.Tensor
    places: torch.Tensor


def sort_by_expert(topk_ids: torch.Tensor, num_experts: int, block_m: int) -> ExpertOrder:
    num_assignments, device = topk_ids.numel(), topk_ids.device
    most_blocks = min(num_assignments, num_assignments // block_m + num_experts)
    buffer = torch.empty(4 + most_blocks * (block_m + 1), dtype=torch.int32, device=device)
    numbers, rows, experts = buffer.split([4, most_blocks * block_m, most_blocks])  # each aligned to 16 bytes
    order = ExpertOrder(rows, experts, numbers, torch.empty_like(topk_ids))
    block_e = triton.next_power_of_2(num_experts)
    options: dict[str, Any] = {**overlap_options(topk_ids), "BLOCK_E": block_e}
    if num_assignments <= SMALL_SORT:
        block_a = triton.next_power_of_2(num_assignments)
        _sort_kernel[(num_experts,)](
            topk_ids, *order, num_assignments, BLOCK_M=block_m, BLOCK_A=block_a,
            num_warps=4 if block_a <= 1024 else 16, **options,
        )  # fmt: skip
        return order
    counts = torch.zeros(block_e, dtype=torch.int32, device=device)
    grid = (triton.cdiv(num_assignments, RANKED),)
    _rank_kernel[grid](
        topk_ids, counts, order.places, num_assignments, BLOCK_A=RANKED, CHUNK=min(32, RANKED), num_warps=4, **options
    )
    _place_kernel[grid](
        topk_ids, counts, *order, num_assignments, num_experts, BLOCK_M=block_m, BLOCK_A=RANKED, num_warps=4,
        **options,
    )  # fmt: skip
    return order


def _grouped_product(
    a: torch.Tensor, w: torch.Tensor, out: torch.Tensor, order: ExpertOrder, topk_ids: torch.Tensor,
    config: GroupedConfig, *, gated: bool, swiglu: tuple[float, float] | None = None,
) -> None:  # fmt: skip
    num_experts, n, k = w.shape
    num_tiles = order.block_expert.numel() * triton.cdiv(n, config.block_n)
    persistent = config.persistent and a.is_cuda
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count if persistent else num_tiles
    _grouped_kernel[(min(programs, num_tiles),)](
        a, TensorDescriptor.from_tensor(a, [config.block_m, config.block_k]),
        TensorDescriptor.from_tensor(w.view(num_experts * n, k), [config.block_n, config.block_k]),
        out, *order[:3], topk_ids.numel(), n, k, TOP_K=topk_ids.shape[1], GATED=gated, EVEN_K=k % config.block_k == 0,
        PRECISION="ieee" if a.dtype == torch.float32 else None, FLATTEN=config.persistent,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, **swiglu_options(swiglu), **overlap_options(a),
    )  # fmt: skip


def combine(
    y: torch.Tensor, weights: torch.Tensor, places: torch.Tensor, out: torch.Tensor,
    residual: torch.Tensor | None = None, norm_weight: torch.Tensor | None = None, eps: float = 0.0,
    fp8: Quantized | None = None, early: bool = False,
) -> torch.Tensor:  # fmt: skip
    """out[t] = the sum over k of weights[t, k] * y[places[t, k]]; places of -1 are left out.

    With a residual, the sum is added to that, in place, and out is its RMSNorm. With `fp8` its FP8 form is stored there
    and out, which still says the dtype, is not written. early: whatever made y lets this start when all else is there.
    """
    fused = residual is not None
    block = triton.next_power_of_2(out.shape[1])
    block = max(block, FP8_BLOCK if fp8 else 1) if fused else min(1024, block)
    q, scales = fp8 or (out, weights)
    _combine_kernel[(out.shape[0], triton.cdiv(out.shape[1], block))](
        y, weights, places, residual, norm_weight, out, q, scales, out.shape[1], *scales.stride(), eps,
        TOP_K=places.shape[1], NORM=fused, GROUP=FP8_BLOCK if fp8 else 0, BLOCK=block, EARLY=early,
        num_warps=min(16, max(4, block // 512)), **overlap_options(out),
    )  # fmt: skip
    return out


def _moe_gemv(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor,
    out: torch.Tensor, swiglu: tuple[float, float] | None,
) -> None:  # fmt: skip
    (num_tokens, hidden), top_k, inter = x.shape, ids.shape[1], w_down.shape[2]
    act = x.new_empty(ids.numel(), inter)
    slots, options = triton.next_power_of_2(top_k), overlap_options(x)
    _gate_up_gemv_kernel[(triton.cdiv(inter, 8), ids.numel())](
        x, w_gate_up, ids, act, hidden, inter, TOP_K=top_k, BLOCK_N=8, BLOCK_K=512, STAGES=3, num_warps=4,
        **swiglu_options(swiglu), **options,
    )  # fmt: skip
    _down_gemv_kernel[(triton.cdiv(hidden, 8), num_tokens)](
        act, w_down, weights, ids, out, hidden, inter, TOP_K=top_k, SLOTS=slots, BLOCK_N=8, BLOCK_K=1024 // slots,
        STAGES=3, num_warps=8, **options,
    )  # fmt: skip


def _expert_products(
    x: torch.Tensor, topk_ids: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor,
    swiglu: tuple[float, float] | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """What each assignment's expert makes of its token, [rows, hidden] in sorted order, and the assignments' places."""
    num_experts, hidden, inter = w_down.shape
    if hopper_serves(x, inter, topk_ids.numel() / num_experts):
        from gossamer.ops.moe import hopper

        order = sort_by_expert(topk_ids, num_experts, HOPPER_BLOCK_M)
        act, y = x.new_empty(order.rows.numel(), inter), x.new_empty(order.rows.numel(), hidden)
        hopper.grouped_product(x, w_gate_up, act, order, topk_ids, gated=True, swiglu=swiglu)
        hopper.grouped_product(act, w_down, y, order, topk_ids, gated=False)
        return y, order.places
    gate_up, down = grouped_configs(topk_ids.numel(), num_experts, x.element_size())
    order = sort_by_expert(topk_ids, num_experts, gate_up.block_m)
    act, y = x.new_empty(order.rows.numel(), inter), x.new_empty(order.rows.numel(), hidden)
    _grouped_product(x, w_gate_up, act, order, topk_ids, gate_up, gated=True, swiglu=swiglu)
    _grouped_product(act, w_down, y, order, topk_ids, down, gated=False)
    return y, order.places


def moe_mlp(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor,
    residual: torch.Tensor | None = None, norm_weight: torch.Tensor | None = None, eps: float = 0.0,
    swiglu: tuple[float, float] | None = None,
) -> torch.Tensor:  # fmt: skip
    out = torch.empty_like(x)
    if x.shape[0] == 0:
        return out
    if x.shape[0] <= GEMV_TOKENS:
        _moe_gemv(x, topk_weights, topk_ids, w_gate_up, w_down, out, swiglu)
        return out if residual is None or norm_weight is None else add_rms_norm(out, residual, norm_weight, eps)
    y, places = _expert_products(x, topk_ids, w_gate_up, w_down, swiglu)
    return combine(y, topk_weights, places, out, residual, norm_weight, eps)

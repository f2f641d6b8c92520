"""Triton kernels of the MoE block: router and top-k, a counting sort by expert, products of the touched experts.

Every grid follows from shapes alone; what only the device knows (rows per expert) ends programs early. Sums have a fixed
order, so results do not depend on timing. Kernels overlap their start with the end of the one before (programmatic
dependent launch): each waits for it before reading what it wrote.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

ROUTER_ROWS = 16
GEMV_TOKENS = 2


@triton.jit
def _store_top_k(
    logits, valid, weights_ptr, ids_ptr, rows, num_experts,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, RENORMALIZE: tl.constexpr, SIGMOID: tl.constexpr,
):  # fmt: skip
    """The best TOP_K of logits [rows, experts padded to a power of two]; of equal logits the lower id wins."""
    experts = tl.arange(0, logits.shape[1])[None, :]
    # A row with NaN has NaN weights, but its ids stay distinct and in range: no number ranks below padding.
    is_nan = (logits != logits) & (experts < num_experts)
    broken = tl.max(is_nan.to(tl.int32), 1)[:, None] > 0
    left = tl.where(is_nan, -3.4e38, tl.maximum(logits, -3.4e38))
    left = tl.where(experts < num_experts, left, -float("inf"))
    top = tl.max(left, 1)[:, None]
    total = tl.sum(tl.exp(left - top), 1)[:, None]
    slots = tl.arange(0, SLOTS)[None, :]
    best = tl.zeros([logits.shape[0], SLOTS], tl.float32)
    ids = tl.zeros([logits.shape[0], SLOTS], tl.int32)
    for slot in tl.static_range(TOP_K):
        value, expert = tl.max(left, 1, return_indices=True, return_indices_tie_break_left=True)
        best = tl.where(slots == slot, value[:, None], best)
        ids = tl.where(slots == slot, expert[:, None], ids)
        left = tl.where(experts == expert[:, None], -float("inf"), left)
    weights = 1.0 / (1.0 + tl.exp(-best)) if SIGMOID else tl.exp(best - top) / total
    weights = tl.where(slots < TOP_K, tl.where(broken, float("nan"), weights), 0.0)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, 1)[:, None]
    offsets = rows[:, None].to(tl.int64) * TOP_K + slots
    mask = (rows >= 0)[:, None] & (slots < TOP_K)
    tl.store(weights_ptr + offsets, tl.where(valid[:, None], weights, 0.0), mask=mask)
    tl.store(ids_ptr + offsets, tl.where(valid[:, None], ids, -1), mask=mask)


@triton.jit
def _route_kernel(
    logits_ptr, slots_ptr, weights_ptr, ids_ptr, num_tokens, num_experts,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, RENORMALIZE: tl.constexpr, SIGMOID: tl.constexpr,
    HAS_SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    experts = tl.arange(0, BLOCK_E)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    inside = rows < num_tokens
    mask = inside[:, None] & (experts < num_experts)[None, :]
    logits = tl.load(logits_ptr + rows[:, None].to(tl.int64) * num_experts + experts[None, :], mask=mask, other=0.0)
    valid = inside
    if HAS_SLOTS:
        valid = tl.load(slots_ptr + rows, mask=inside, other=-1) >= 0
    _store_top_k(
        logits.to(tl.float32), valid, weights_ptr, ids_ptr, tl.where(inside, rows, -1), num_experts,
        TOP_K, SLOTS, RENORMALIZE, SIGMOID,
    )  # fmt: skip


@triton.jit
def _router_kernel(
    x_ptr, weight_ptr, slots_ptr, logits_ptr, arrivals_ptr, weights_ptr, ids_ptr, num_tokens, num_experts, hidden,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, RENORMALIZE: tl.constexpr, SIGMOID: tl.constexpr,
    HAS_SLOTS: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One expert's logits of ROWS tokens; the last expert to arrive chooses for these tokens."""
    expert = tl.program_id(0)
    tile = tl.program_id(1)
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < num_tokens
    columns = tl.arange(0, BLOCK_H)
    # The weights never change: they are on their way while the kernel before still runs.
    weight = tl.load(weight_ptr + expert * hidden + columns, mask=columns < hidden, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    mask = inside[:, None] & (columns < hidden)[None, :]
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * hidden + columns[None, :], mask=mask, other=0.0)
    logit = tl.sum(x.to(tl.float32) * weight[None, :], 1)
    tl.store(logits_ptr + rows * num_experts + expert, logit, mask=inside)
    tl.debug_barrier()
    if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == num_experts - 1:
        experts = tl.arange(0, BLOCK_E)
        known = inside[:, None] & (experts < num_experts)[None, :]
        offsets = rows[:, None] * num_experts + experts[None, :]
        logits = tl.load(logits_ptr + offsets, mask=known, other=0.0, cache_modifier=".cg")
        valid = inside
        if HAS_SLOTS:
            valid = tl.load(slots_ptr + rows, mask=inside, other=-1) >= 0
        _store_top_k(
            logits, valid, weights_ptr, ids_ptr, tl.where(inside, rows, -1), num_experts,
            TOP_K, SLOTS, RENORMALIZE, SIGMOID,
        )  # fmt: skip
        tl.store(arrivals_ptr + tile, 0)


@triton.jit
def _gate_up_gemv_kernel(
    x_ptr, w_ptr, ids_ptr, act_ptr, hidden, inter,
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
    act = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(act_ptr + assignment * inter + n, act.to(act_ptr.dtype.element_ty), mask=n < inter)


@triton.jit
def _down_gemv_kernel(
    act_ptr, w_ptr, weights_ptr, ids_ptr, out_ptr, hidden, inter,
    TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """out[t, n] = the weighted sum over the token's experts, for BLOCK_N columns."""
    token = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    chunks = tl.cdiv(inter, BLOCK_K)
    for step in tl.range(0, TOP_K * chunks, num_stages=STAGES):
        slot = step // chunks
        k = (step % chunks) * BLOCK_K + columns
        expert = tl.load(ids_ptr + token * TOP_K + slot).to(tl.int64)
        weight = tl.load(weights_ptr + token * TOP_K + slot)
        inside = k < tl.where(expert >= 0, inter, 0)
        w = tl.load(
            w_ptr + (expert * hidden + rows[:, None]) * inter + k[None, :],
            mask=(rows < hidden)[:, None] & inside[None, :],
            other=0.0,
        )
        act = tl.load(act_ptr + (token * TOP_K + slot) * inter + k, mask=inside, other=0.0)
        acc += w.to(tl.float32) * (act.to(tl.float32) * tl.where(expert >= 0, weight, 0.0))[None, :]
    out = tl.sum(acc, 1).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + token * hidden + rows, out, mask=rows < hidden)


@triton.jit
def _sort_kernel(
    ids_ptr, rows_ptr, block_expert_ptr, num_blocks_ptr, num_assignments,
    BLOCK_M: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_E: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program e lists the assignments of expert e, padded with `num_assignments` to whole blocks of BLOCK_M."""
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    offsets = tl.arange(0, BLOCK_A)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    counts = tl.zeros([BLOCK_E], tl.int32)
    for start in range(0, num_assignments, BLOCK_A):
        ids = tl.load(ids_ptr + start + offsets, mask=start + offsets < num_assignments, other=-1)
        counts += tl.histogram(tl.maximum(ids, 0), BLOCK_E, mask=ids >= 0)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(experts < expert, blocks, 0))
    own_blocks = tl.sum(tl.where(experts == expert, blocks, 0))
    if expert == tl.num_programs(0) - 1:
        tl.store(num_blocks_ptr, first + own_blocks)
    if own_blocks > 0:
        end = first * BLOCK_M
        for start in range(0, num_assignments, BLOCK_A):
            ids = tl.load(ids_ptr + start + offsets, mask=start + offsets < num_assignments, other=-1)
            match = ids == expert
            tl.store(rows_ptr + end - 1 + tl.cumsum(match.to(tl.int32), 0), start + offsets, mask=match)
            end += tl.sum(match.to(tl.int32))
        padding = end + tl.arange(0, BLOCK_M)
        tl.store(rows_ptr + padding, num_assignments, mask=padding < (first + own_blocks) * BLOCK_M)
        for start in range(0, own_blocks, BLOCK_E):
            block = start + experts
            tl.store(block_expert_ptr + first + block, expert, mask=block < own_blocks)


@triton.jit
def _grouped_kernel(
    a_ptr, w_desc, out_ptr, rows_ptr, block_expert_ptr, num_blocks_ptr, num_assignments, N, K,
    TOP_K: tl.constexpr, GATED: tl.constexpr, EVEN_K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One tile of a @ w[expert].T for the rows of one block of the sorted order.

    GATED: a is x, gathered by token; gate and up columns alternate in w; silu(gate) * up is stored in sorted order.
    Else: a is in sorted order and row i of the result belongs to assignment rows[i].
    """
    n_tiles = tl.cdiv(N, BLOCK_N)
    block = tl.program_id(0) // n_tiles
    n = (tl.program_id(0) % n_tiles) * BLOCK_N
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    if block >= tl.load(num_blocks_ptr):
        return
    expert = tl.load(block_expert_ptr + block)
    position = block * BLOCK_M + tl.arange(0, BLOCK_M)
    assignment = tl.load(rows_ptr + position)
    inside = assignment < num_assignments
    a_row = assignment // TOP_K if GATED else position
    columns = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + a_row[:, None].to(tl.int64) * K + columns[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        mask = inside[:, None] if EVEN_K else inside[:, None] & (columns < K - k)[None, :]
        a = tl.load(a_ptrs + k, mask=mask, other=0.0)
        w = w_desc.load([expert * N + n, k])
        acc = tl.dot(a, w.T, acc, input_precision=PRECISION)
    if GATED:
        gate, up = tl.split(tl.reshape(acc, [BLOCK_M, BLOCK_N // 2, 2]))
        acc = gate / (1.0 + tl.exp(-gate)) * up
        out_columns = n // 2 + tl.arange(0, BLOCK_N // 2)
        out_ptrs = out_ptr + position[:, None].to(tl.int64) * (N // 2) + out_columns[None, :]
        mask = inside[:, None] & (out_columns < N // 2)[None, :]
    else:
        out_columns = n + tl.arange(0, BLOCK_N)
        out_ptrs = out_ptr + assignment[:, None].to(tl.int64) * N + out_columns[None, :]
        mask = inside[:, None] & (out_columns < N)[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _combine_kernel(
    y_ptr, weights_ptr, ids_ptr, out_ptr, hidden, TOP_K: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    acc = tl.zeros([BLOCK], tl.float32)
    for slot in tl.static_range(TOP_K):
        assignment = token.to(tl.int64) * TOP_K + slot
        present = tl.load(ids_ptr + assignment) >= 0
        y = tl.load(y_ptr + assignment * hidden + columns, mask=columns < tl.where(present, hidden, 0), other=0.0)
        acc += y.to(tl.float32) * tl.where(present, tl.load(weights_ptr + assignment), 0.0)
    tl.store(out_ptr + token.to(tl.int64) * hidden + columns, acc.to(out_ptr.dtype.element_ty), mask=columns < hidden)


def _launch_options(x: torch.Tensor) -> dict[str, Any]:
    """Programmatic dependent launch exists since Hopper; the interpreter knows no launch option."""
    pdl = x.is_cuda and torch.cuda.get_device_capability(x.device) >= (9, 0)
    return {"PDL": True, "launch_pdl": True} if pdl else {"PDL": False}


def _choice(num_tokens: int, top_k: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=device)
    return weights, torch.empty(num_tokens, top_k, dtype=torch.int32, device=device)


def route_topk(
    router_logits: torch.Tensor, top_k: int, *, renormalize: bool, score_func: str, token_slots: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_experts = router_logits.shape
    weights, ids = _choice(num_tokens, top_k, router_logits.device)
    if num_tokens:
        block_e = triton.next_power_of_2(num_experts)
        rows = max(1, min(4, 1024 // block_e))
        _route_kernel[(triton.cdiv(num_tokens, rows),)](
            router_logits.contiguous(), token_slots, weights, ids, num_tokens, num_experts,
            TOP_K=top_k, SLOTS=triton.next_power_of_2(top_k), RENORMALIZE=renormalize, SIGMOID=score_func == "sigmoid",
            HAS_SLOTS=token_slots is not None, ROWS=rows, BLOCK_E=block_e, num_warps=4, **_launch_options(weights),
        )  # fmt: skip
    return weights, ids


def router(
    x: torch.Tensor,
    weight: torch.Tensor,
    top_k: int,
    *,
    renormalize: bool,
    score_func: str,
    token_slots: torch.Tensor | None,
    arrivals: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    (num_tokens, hidden), num_experts = x.shape, weight.shape[0]
    if num_tokens > ROUTER_ROWS:
        logits = torch.nn.functional.linear(x.float(), weight.float())
        return route_topk(logits, top_k, renormalize=renormalize, score_func=score_func, token_slots=token_slots)
    weights, ids = _choice(num_tokens, top_k, x.device)
    if num_tokens:
        if arrivals is None:
            arrivals = torch.zeros(1, dtype=torch.int32, device=x.device)
        _router_kernel[(num_experts, 1)](
            x, weight, token_slots, torch.empty(num_tokens, num_experts, device=x.device), arrivals, weights, ids,
            num_tokens, num_experts, hidden,
            TOP_K=top_k, SLOTS=triton.next_power_of_2(top_k), RENORMALIZE=renormalize, SIGMOID=score_func == "sigmoid",
            HAS_SLOTS=token_slots is not None, ROWS=triton.next_power_of_2(num_tokens),
            BLOCK_E=triton.next_power_of_2(num_experts), BLOCK_H=triton.next_power_of_2(hidden),
            num_warps=4 if num_tokens <= 4 else 8, **_launch_options(x),
        )  # fmt: skip
    return weights, ids


class GroupedConfig(NamedTuple):
    """Tile of a grouped product."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


def grouped_configs(num_assignments: int, num_experts: int, element_size: int) -> tuple[GroupedConfig, GroupedConfig]:
    """Tiles of the gate-up and of the down product, by the mean rows per expert (measured on an H100)."""
    rows = num_assignments / num_experts
    if element_size > 2:
        return (GroupedConfig(16, 64, 32, 4, 3),) * 2
    if rows <= 4:
        return (GroupedConfig(16, 64, 128, 4, 4),) * 2
    if rows <= 24:
        return (GroupedConfig(32, 64, 128, 4, 4),) * 2
    if rows <= 64:
        return (GroupedConfig(64, 128, 64, 4, 4),) * 2
    return (GroupedConfig(128, 256, 64, 8, 3),) * 2


def _grouped_product(
    a: torch.Tensor, w: torch.Tensor, out: torch.Tensor, order: tuple[torch.Tensor, ...], num_blocks: int,
    num_assignments: int, top_k: int, gated: bool, config: GroupedConfig,
) -> None:  # fmt: skip
    num_experts, n, k = w.shape
    desc = TensorDescriptor.from_tensor(w.view(num_experts * n, k), [config.block_n, config.block_k])
    _grouped_kernel[(num_blocks * triton.cdiv(n, config.block_n),)](
        a, desc, out, *order, num_assignments, n, k,
        TOP_K=top_k, GATED=gated, EVEN_K=k % config.block_k == 0, PRECISION="ieee" if a.dtype == torch.float32 else None,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.num_warps, num_stages=config.num_stages, **_launch_options(a),
    )  # fmt: skip


def _moe_gemv(
    x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor
) -> torch.Tensor:
    (num_tokens, hidden), top_k, inter = x.shape, ids.shape[1], w_down.shape[2]
    act, out = x.new_empty(ids.numel(), inter), torch.empty_like(x)
    options = _launch_options(x)
    _gate_up_gemv_kernel[(triton.cdiv(inter, 8), ids.numel())](
        x, w_gate_up, ids, act, hidden, inter, TOP_K=top_k, BLOCK_N=8, BLOCK_K=512, STAGES=3, num_warps=4, **options
    )
    _down_gemv_kernel[(triton.cdiv(hidden, 8), num_tokens)](
        act, w_down, weights, ids, out, hidden, inter,
        TOP_K=top_k, BLOCK_N=8, BLOCK_K=256, STAGES=4, num_warps=4, **options,
    )  # fmt: skip
    return out


def moe_mlp(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor
) -> torch.Tensor:
    (num_tokens, hidden), top_k = x.shape, topk_ids.shape[1]
    num_experts, _, inter = w_down.shape
    if num_tokens == 0:
        return torch.empty_like(x)
    if num_tokens <= GEMV_TOKENS:
        return _moe_gemv(x, topk_weights, topk_ids, w_gate_up, w_down)
    num_assignments = num_tokens * top_k
    gate_up, down = grouped_configs(num_assignments, num_experts, x.element_size())
    block_m = gate_up.block_m
    num_blocks = min(num_assignments, num_assignments // block_m + num_experts)
    options = _launch_options(x)
    order = torch.empty(num_blocks * (block_m + 1) + 1, dtype=torch.int32, device=x.device)
    order_parts = (order[: num_blocks * block_m], order[num_blocks * block_m : -1], order[-1:])
    block_a = min(8192, triton.next_power_of_2(num_assignments))
    _sort_kernel[(num_experts,)](
        topk_ids, *order_parts, num_assignments, BLOCK_M=block_m, BLOCK_A=block_a,
        BLOCK_E=triton.next_power_of_2(num_experts), num_warps=4 if block_a <= 1024 else 16, **options,
    )  # fmt: skip
    act = x.new_empty(num_blocks * block_m, inter)
    _grouped_product(x, w_gate_up, act, order_parts, num_blocks, num_assignments, top_k, True, gate_up)
    y = x.new_empty(num_assignments, hidden)
    _grouped_product(act, w_down, y, order_parts, num_blocks, num_assignments, top_k, False, down)
    out = torch.empty_like(x)
    block = min(1024, triton.next_power_of_2(hidden))
    _combine_kernel[(num_tokens, triton.cdiv(hidden, block))](
        y, topk_weights, topk_ids, out, hidden, TOP_K=top_k, BLOCK=block, num_warps=4, **options
    )
    return out

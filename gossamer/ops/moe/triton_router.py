"""Triton kernels of the router: logits in fp32, the best experts of each token. Its rules are those of `triton.py`."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gossamer.ops.dispatch import overlap_options

ROUTER_ROWS = 4  # a warp chooses for one token
ROUTER_TOKENS = 64  # up to here one kernel computes the logits and chooses


@triton.jit
def _choose(
    logits_ptr, slots_ptr, weights_ptr, ids_ptr, rows, num_tokens, num_experts,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, RENORMALIZE: tl.constexpr, SIGMOID: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The best TOP_K experts of each row; of equal logits the lower id wins."""
    experts = tl.arange(0, BLOCK_E)[None, :]
    inside = rows < num_tokens
    logits = tl.load(
        logits_ptr + rows[:, None].to(tl.int64) * num_experts + experts,
        mask=inside[:, None] & (experts < num_experts), other=0.0, cache_modifier=".cg",
    ).to(tl.float32)  # fmt: skip
    # A row with NaN has NaN weights, but its ids stay distinct and in range: no number ranks below padding.
    is_nan = (logits != logits) & (experts < num_experts)
    broken = tl.max(is_nan.to(tl.int32), 1)[:, None] > 0
    left = tl.where(is_nan, -3.4e38, tl.maximum(logits, -3.4e38))
    left = tl.where(experts < num_experts, left, -float("inf"))
    top = tl.max(left, 1)[:, None]
    total = tl.sum(tl.exp(left - top), 1)[:, None]
    slots = tl.arange(0, SLOTS)[None, :]
    best = tl.zeros([rows.shape[0], SLOTS], tl.float32)
    ids = tl.zeros([rows.shape[0], SLOTS], tl.int32)
    for slot in tl.static_range(TOP_K):
        value, expert = tl.max(left, 1, return_indices=True, return_indices_tie_break_left=True)
        best = tl.where(slots == slot, value[:, None], best)
        ids = tl.where(slots == slot, expert[:, None], ids)
        left = tl.where(experts == expert[:, None], -float("inf"), left)
    weights = 1.0 / (1.0 + tl.exp(-best)) if SIGMOID else tl.exp(best - top) / total
    weights = tl.where(slots < TOP_K, tl.where(broken, float("nan"), weights), 0.0)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, 1)[:, None]
    valid = inside
    if slots_ptr is not None:
        valid = tl.load(slots_ptr + rows, mask=inside, other=-1) >= 0
    offsets = rows[:, None].to(tl.int64) * TOP_K + slots
    mask = inside[:, None] & (slots < TOP_K)
    tl.store(weights_ptr + offsets, tl.where(valid[:, None], weights, 0.0), mask=mask)
    tl.store(ids_ptr + offsets, tl.where(valid[:, None], ids, -1), mask=mask)


@triton.jit
def _route_kernel(
    logits_ptr, slots_ptr, weights_ptr, ids_ptr, num_tokens, num_experts,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, RENORMALIZE: tl.constexpr, SIGMOID: tl.constexpr, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    _choose(
        logits_ptr, slots_ptr, weights_ptr, ids_ptr, tl.program_id(0) * ROWS + tl.arange(0, ROWS), num_tokens,
        num_experts, TOP_K, SLOTS, RENORMALIZE, SIGMOID, BLOCK_E,
    )  # fmt: skip


@triton.jit
def _router_kernel(
    x_ptr, weight_ptr, slots_ptr, logits_ptr, arrivals_ptr, weights_ptr, ids_ptr, num_tokens, num_experts, hidden,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, RENORMALIZE: tl.constexpr, SIGMOID: tl.constexpr, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
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
        _choose(
            logits_ptr, slots_ptr, weights_ptr, ids_ptr, rows, num_tokens, num_experts,
            TOP_K, SLOTS, RENORMALIZE, SIGMOID, BLOCK_E,
        )  # fmt: skip
        tl.store(arrivals_ptr + tile, 0)


@triton.jit
def _logits_kernel(
    x_ptr, weight_ptr, logits_ptr, num_tokens, num_experts, hidden,
    BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Logits in fp32 by tensor cores: 16-bit x is exact, an fp32 weight is the sum of three 16-bit parts."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    experts = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    columns = tl.arange(0, BLOCK_K)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
    for k in range(0, hidden, BLOCK_K):
        inside = (columns < hidden - k)[None, :]
        x_ptrs = x_ptr + rows[:, None].to(tl.int64) * hidden + k + columns[None, :]
        x = tl.load(x_ptrs, mask=(rows < num_tokens)[:, None] & inside, other=0.0)
        w_ptrs = weight_ptr + experts[:, None] * hidden + k + columns[None, :]
        w = tl.load(w_ptrs, mask=(experts < num_experts)[:, None] & inside, other=0.0)
        if x.dtype == tl.float32:
            acc = tl.dot(x, w.to(tl.float32).T, acc, input_precision="ieee")
        else:
            part = w.to(x.dtype)
            acc = tl.dot(x, part.T, acc)
            if w.dtype != x.dtype:
                rest = w.to(tl.float32) - part.to(tl.float32)
                part = rest.to(x.dtype)
                acc = tl.dot(x, part.T, acc)
                acc = tl.dot(x, (rest - part.to(tl.float32)).to(x.dtype).T, acc)
    mask = (rows < num_tokens)[:, None] & (experts < num_experts)[None, :]
    tl.store(logits_ptr + rows[:, None].to(tl.int64) * num_experts + experts[None, :], acc, mask=mask)


def _choose_parameters(num_experts: int, top_k: int, renormalize: bool, score_func: str) -> dict[str, Any]:
    return {
        "TOP_K": top_k, "SLOTS": triton.next_power_of_2(top_k), "BLOCK_E": triton.next_power_of_2(num_experts),
        "RENORMALIZE": renormalize, "SIGMOID": score_func == "sigmoid", "ROWS": ROUTER_ROWS,
    }  # fmt: skip


def route_topk(
    router_logits: torch.Tensor, top_k: int, *, renormalize: bool, score_func: str, token_slots: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    num_tokens, num_experts = router_logits.shape
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=router_logits.device)
    ids = torch.empty_like(weights, dtype=torch.int32)
    _route_kernel[(triton.cdiv(num_tokens, ROUTER_ROWS),)](
        router_logits.contiguous(), token_slots, weights, ids, num_tokens, num_experts,
        **_choose_parameters(num_experts, top_k, renormalize, score_func), num_warps=4, **overlap_options(weights),
    )  # fmt: skip
    return weights, ids


def router(
    x: torch.Tensor, weight: torch.Tensor, top_k: int, *, renormalize: bool, score_func: str,
    token_slots: torch.Tensor | None, arrivals: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    (num_tokens, hidden), num_experts, options = x.shape, weight.shape[0], overlap_options(x)
    logits = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=x.device)
    if num_tokens > ROUTER_TOKENS:
        rows, columns, depth, stages = (16, 32, 128, 4) if num_tokens <= 1024 else (128, 64, 64, 3)
        _logits_kernel[(triton.cdiv(num_tokens, rows), triton.cdiv(num_experts, columns))](
            x, weight, logits, num_tokens, num_experts, hidden, BLOCK_M=rows, BLOCK_E=columns, BLOCK_K=depth,
            num_warps=4, num_stages=stages, **options,
        )  # fmt: skip
        return route_topk(logits, top_k, renormalize=renormalize, score_func=score_func, token_slots=token_slots)
    tiles = triton.cdiv(num_tokens, ROUTER_ROWS)
    if arrivals is None:
        arrivals = torch.zeros(tiles, dtype=torch.int32, device=x.device)
    weights = torch.empty(num_tokens, top_k, dtype=torch.float32, device=x.device)
    ids = torch.empty_like(weights, dtype=torch.int32)
    _router_kernel[(num_experts, tiles)](
        x, weight, token_slots, logits, arrivals, weights, ids, num_tokens, num_experts, hidden,
        **_choose_parameters(num_experts, top_k, renormalize, score_func), BLOCK_H=triton.next_power_of_2(hidden),
        num_warps=4 if hidden <= 4096 else 8, **options,
    )  # fmt: skip
    return weights, ids

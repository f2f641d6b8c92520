"""Triton kernels of the router: logits in fp32, the best experts of each token. Its rules are those of `triton.py`."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gossamer.ops.dispatch import overlap_options
from gossamer.ops.norm.triton import add_rms_norm, add_rms_norm_fp8
from gossamer.ops.quantize_fp8 import Quantized
from gossamer.ops.quantize_fp8.triton import BLOCK as FP8_BLOCK
from gossamer.ops.quantize_fp8.triton import fp8_like, quantize_rows

ROUTER_ROWS = 4  # a warp chooses for one token
ROUTER_TOKENS = 64  # up to here each expert has programs of its own, the last of which chooses
SINGLE_TOKENS = 6  # up to here a program has one token
FUSED_NORM_TOKENS = 8  # up to here each of them may as well repeat the norm
WHOLE_TOKENS = 1024  # from here on a program has all experts of its tokens and chooses, if no more than
WHOLE_EXPERTS = 256


@triton.jit
def _best(left, TOP_K: tl.constexpr, SLOTS: tl.constexpr, BLOCK_E: tl.constexpr):
    """The TOP_K largest of each row in order, and where they lie; the lower place wins."""
    places = tl.arange(0, BLOCK_E)
    slots = tl.arange(0, SLOTS)
    best = tl.full([left.shape[0], SLOTS], -float("inf"), tl.float32)
    ids = tl.zeros([left.shape[0], SLOTS], tl.int32)
    for slot in tl.static_range(TOP_K):
        value, place = tl.max(left, 1, return_indices=True, return_indices_tie_break_left=True)
        best = tl.where(slots[None, :] == slot, value[:, None], best)
        ids = tl.where(slots[None, :] == slot, place[:, None], ids)
        left = tl.where(places[None, :] == place[:, None], -float("inf"), left)
    return best, ids


@triton.jit
def _within_groups(ranks, num_experts, GROUPS: tl.constexpr, KEPT: tl.constexpr, TOP: tl.constexpr):
    """Minus infinity outside each row's KEPT groups with the largest sum of their TOP best; the lower group wins."""
    places = tl.arange(0, ranks.shape[1])[None, :]
    group = places // (num_experts // GROUPS)
    numbers = tl.arange(0, triton.next_power_of_2(GROUPS))[None, :]
    sums = tl.zeros([ranks.shape[0], triton.next_power_of_2(GROUPS)], tl.float32) - float("inf")
    for g in tl.static_range(GROUPS):
        own = tl.where(group == g, ranks, -float("inf"))
        total, place = tl.max(own, 1, return_indices=True, return_indices_tie_break_left=True)
        if TOP == 2:
            total += tl.max(tl.where(places == place[:, None], -float("inf"), own), 1)
        sums = tl.where(numbers == g, total[:, None], sums)
    inside = group < 0
    for _ in tl.static_range(KEPT):
        _best_sum, best = tl.max(sums, 1, return_indices=True, return_indices_tie_break_left=True)
        inside = inside | (group == best[:, None])
        sums = tl.where(numbers == best[:, None], -float("inf"), sums)
    return tl.where(inside, ranks, -float("inf"))


@triton.jit
def _choose(
    logits, bias_ptr, slots_ptr, weights_ptr, ids_ptr, rows, num_tokens, num_experts,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, RENORMALIZE: tl.constexpr, SIGMOID: tl.constexpr, SCALE: tl.constexpr,
    SHARED: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, GROUP_TOP: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The best TOP_K experts of each row of logits [rows, BLOCK_E]; of equal logits the lower id wins."""
    experts = tl.arange(0, BLOCK_E)[None, :]
    inside = rows < num_tokens
    # A row with NaN has NaN weights, but its ids stay distinct and in range: no number ranks below padding.
    is_nan = (logits != logits) & (experts < num_experts)
    broken = tl.max(is_nan.to(tl.int32), 1)[:, None] > 0
    left = tl.where(is_nan, -3.4e38, tl.maximum(logits, -3.4e38))
    left = tl.where(experts < num_experts, left, -float("inf"))
    top = tl.max(left, 1)[:, None]
    total = tl.sum(tl.exp(left - top), 1)[:, None]
    slots = tl.arange(0, SLOTS)[None, :]
    # Both functions are monotone: logits do, unless scores meet a bias or each other.
    BY_SCORE: tl.constexpr = bias_ptr is not None or GROUP_TOP > 1
    if BY_SCORE:
        # e^87 is finite in fp32.
        scores = 1.0 / (1.0 + tl.exp(-tl.maximum(left, -87.0))) if SIGMOID else tl.exp(left - top) / total
        left = scores
        if bias_ptr is not None:
            left += tl.load(bias_ptr + experts, mask=experts < num_experts, other=0.0)
        left = tl.where(experts < num_experts, tl.where(is_nan, -1e30, left), -float("inf"))
    if KEPT < GROUPS:
        left = _within_groups(left, num_experts, GROUPS, KEPT, GROUP_TOP)
    best, ids = _best(left, TOP_K, SLOTS, BLOCK_E)
    if BY_SCORE:
        weights = tl.gather(scores, ids, 1)
    else:
        weights = 1.0 / (1.0 + tl.exp(-best)) if SIGMOID else tl.exp(best - top) / total
    weights = tl.where(slots < TOP_K, tl.where(broken, float("nan"), weights), 0.0)
    if RENORMALIZE:
        kept = tl.sum(weights, 1)[:, None]
        if SIGMOID:
            kept = tl.maximum(kept, 1e-20)
        weights = weights / kept
    if SCALE != 1.0:
        weights *= SCALE
    if SHARED:
        weights = tl.where(slots < TOP_K, weights, 1.0)
        ids = tl.where(slots < TOP_K, ids, num_experts + slots - TOP_K)
    valid = inside
    if slots_ptr is not None:
        valid = tl.load(slots_ptr + rows, mask=inside, other=-1) >= 0
    offsets = rows[:, None].to(tl.int64) * (TOP_K + SHARED) + slots
    mask = inside[:, None] & (slots < TOP_K + SHARED)
    tl.store(weights_ptr + offsets, tl.where(valid[:, None], weights, 0.0), mask=mask)
    tl.store(ids_ptr + offsets, tl.where(valid[:, None], ids, -1), mask=mask)


@triton.jit
def _load_logits(logits_ptr, rows, num_tokens, num_experts, BLOCK_E: tl.constexpr, SPLIT_K: tl.constexpr = 1):
    experts = tl.arange(0, BLOCK_E)[None, :]
    mask = (rows < num_tokens)[:, None] & (experts < num_experts)
    at = rows[:, None].to(tl.int64) * num_experts + experts
    logits = tl.load(logits_ptr + at, mask=mask, other=0.0, cache_modifier=".cg").to(tl.float32)
    for split in tl.static_range(1, SPLIT_K):
        logits += tl.load(logits_ptr + split * num_tokens * num_experts + at, mask=mask, other=0.0)
    return logits


@triton.jit
def _route_kernel(
    logits_ptr, bias_ptr, slots_ptr, weights_ptr, ids_ptr, num_tokens, num_experts,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, RENORMALIZE: tl.constexpr, SIGMOID: tl.constexpr, SCALE: tl.constexpr,
    SHARED: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, GROUP_TOP: tl.constexpr, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr, SPLIT_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    _choose(
        _load_logits(logits_ptr, rows, num_tokens, num_experts, BLOCK_E, SPLIT_K), bias_ptr, slots_ptr, weights_ptr,
        ids_ptr, rows, num_tokens, num_experts, TOP_K, SLOTS, RENORMALIZE, SIGMOID, SCALE, SHARED, GROUPS, KEPT,
        GROUP_TOP, BLOCK_E,
    )  # fmt: skip


@triton.jit
def _router_kernel(
    x_ptr, residual_ptr, norm_ptr, weight_ptr, bias_ptr, slots_ptr, logits_ptr, arrivals_ptr, sum_ptr, normed_ptr,
    q_ptr, scales_ptr, weights_ptr, ids_ptr, num_tokens, num_experts, hidden, eps,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, RENORMALIZE: tl.constexpr, SIGMOID: tl.constexpr, SCALE: tl.constexpr,
    SHARED: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, GROUP_TOP: tl.constexpr, BLOCK_E: tl.constexpr,
    ROWS: tl.constexpr, CHOICE_ROWS: tl.constexpr, BLOCK_H: tl.constexpr, NORM: tl.constexpr, QUANTIZE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One expert's logits of ROWS tokens; the last expert to arrive chooses for these tokens.

    NORM: of x + residual, by every program for itself; the first one keeps the sum and the normed rows, the last one
    their FP8 form. QUANTIZE: 0, or how many numbers share its scales.
    """
    expert = tl.program_id(0)
    tile = tl.program_id(1)
    rows = tile * ROWS + tl.arange(0, ROWS)
    inside = rows < num_tokens
    columns = tl.arange(0, BLOCK_H)
    # The weights never change: they are on their way while the kernel before still runs.
    weight = tl.load(weight_ptr + expert * hidden + columns, mask=columns < hidden, other=0.0).to(tl.float32)
    if NORM:
        scale = tl.load(norm_ptr + columns, mask=columns < hidden, other=0.0).to(tl.float32)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    mask = inside[:, None] & (columns < hidden)[None, :]
    at = rows[:, None].to(tl.int64) * hidden + columns[None, :]
    x = tl.load(x_ptr + at, mask=mask, other=0.0)
    if NORM:
        # What is normalised is what is kept: the sum rounded to the residual's dtype.
        total = x.to(tl.float32) + tl.load(residual_ptr + at, mask=mask, other=0.0).to(tl.float32)
        total = total.to(sum_ptr.dtype.element_ty)
        full = total.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(full * full, 1) / hidden + eps)
        x = (full * inverse[:, None] * scale[None, :]).to(normed_ptr.dtype.element_ty)
        if expert == 0:
            tl.store(sum_ptr + at, total, mask=mask)
            tl.store(normed_ptr + at, x, mask=mask)
        if QUANTIZE:  # noqa: SIM102
            if expert == num_experts - 1:
                grouped = tl.reshape(x.to(tl.float32), [ROWS * BLOCK_H // QUANTIZE, QUANTIZE])
                code, code_scale = quantize_rows(grouped, False, q_ptr.dtype.element_ty)
                tl.store(q_ptr + at, tl.reshape(code, [ROWS, BLOCK_H]), mask=mask)
                group = tl.arange(0, BLOCK_H // QUANTIZE)[None, :]
                groups = tl.cdiv(hidden, QUANTIZE)
                scale_at = rows[:, None].to(tl.int64) * groups + group
                code_scale = tl.reshape(code_scale, [ROWS, BLOCK_H // QUANTIZE])
                tl.store(scales_ptr + scale_at, code_scale, mask=inside[:, None] & (group < groups))
    logit = tl.sum(x.to(tl.float32) * weight[None, :], 1)
    tl.store(logits_ptr + rows * num_experts + expert, logit, mask=inside)
    tl.debug_barrier()
    if tl.atomic_add(arrivals_ptr + tile, 1, sem="acq_rel") == num_experts - 1:
        # With a warp to each, rows that do not exist cost nothing.
        chosen = tile * ROWS + tl.arange(0, CHOICE_ROWS)
        last = tl.minimum(num_tokens, tile * ROWS + ROWS)
        _choose(
            _load_logits(logits_ptr, chosen, last, num_experts, BLOCK_E), bias_ptr, slots_ptr, weights_ptr,
            ids_ptr, chosen, last, num_experts, TOP_K, SLOTS, RENORMALIZE, SIGMOID, SCALE, SHARED, GROUPS, KEPT,
            GROUP_TOP, BLOCK_E,
        )  # fmt: skip
        tl.store(arrivals_ptr + tile, 0)


@triton.jit
def _logits_kernel(
    x_ptr, weight_ptr, logits_ptr, bias_ptr, slots_ptr, weights_ptr, ids_ptr, num_tokens, num_experts, hidden,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, RENORMALIZE: tl.constexpr, SIGMOID: tl.constexpr, SCALE: tl.constexpr,
    SHARED: tl.constexpr, GROUPS: tl.constexpr, KEPT: tl.constexpr, GROUP_TOP: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Logits in fp32 by tensor cores: 16-bit x is exact, an fp32 weight is the sum of three 16-bit parts.

    A program that has all experts (BLOCK_N is BLOCK_E) chooses at once; others store logits, or each its part of K.
    """
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    experts = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.arange(0, BLOCK_K)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    span = tl.cdiv(hidden, SPLIT_K * BLOCK_K) * BLOCK_K
    start = tl.program_id(2) * span
    for k in range(start, tl.minimum(start + span, hidden), BLOCK_K):
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
    if BLOCK_N == BLOCK_E:
        _choose(
            acc, bias_ptr, slots_ptr, weights_ptr, ids_ptr, rows, num_tokens, num_experts,
            TOP_K, SLOTS, RENORMALIZE, SIGMOID, SCALE, SHARED, GROUPS, KEPT, GROUP_TOP, BLOCK_E,
        )  # fmt: skip
    else:
        mask = (rows < num_tokens)[:, None] & (experts < num_experts)[None, :]
        logits_ptr += tl.program_id(2) * num_tokens * num_experts
        tl.store(logits_ptr + rows[:, None].to(tl.int64) * num_experts + experts[None, :], acc, mask=mask)


def _choice(
    num_experts: int, top_k: int, *, renormalize: bool, score_func: str, num_groups: int, topk_groups: int,
    group_top: int, scale: float, num_shared: int,
) -> dict[str, Any]:  # fmt: skip
    return {
        "TOP_K": top_k, "SLOTS": triton.next_power_of_2(top_k + num_shared), "RENORMALIZE": renormalize,
        "SIGMOID": score_func == "sigmoid", "SCALE": scale, "SHARED": num_shared, "GROUPS": num_groups,
        "KEPT": topk_groups, "GROUP_TOP": group_top, "BLOCK_E": triton.next_power_of_2(num_experts),
    }  # fmt: skip


def _results(num_tokens: int, choice: dict[str, Any], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    weights = torch.empty(num_tokens, choice["TOP_K"] + choice["SHARED"], dtype=torch.float32, device=device)
    return weights, torch.empty_like(weights, dtype=torch.int32)


def route_topk(
    router_logits: torch.Tensor, top_k: int, *, bias: torch.Tensor | None, token_slots: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    choice = _choice(router_logits.shape[1], top_k, **options)
    return _route(router_logits.contiguous(), bias, choice, token_slots)


def _route(
    logits: torch.Tensor, bias: torch.Tensor | None, choice: dict[str, Any], token_slots: torch.Tensor | None,
    split_k: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    num_tokens, num_experts = logits.shape[-2:]
    weights, ids = _results(num_tokens, choice, logits.device)
    _route_kernel[(triton.cdiv(num_tokens, ROUTER_ROWS),)](
        logits, bias, token_slots, weights, ids, num_tokens, num_experts, **choice, ROWS=ROUTER_ROWS, SPLIT_K=split_k,
        num_warps=4, **overlap_options(weights),
    )  # fmt: skip
    return weights, ids


class LogitsConfig(NamedTuple):
    """Tile of `_logits_kernel`: tokens, experts, columns; `split_k` programs share a tile's columns."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    split_k: int = 1


def logits_config(num_tokens: int, num_experts: int, itemsize: int) -> LogitsConfig:
    """By the size of a router's weight (measured on an H100; up to 1024 tokens on an H200)."""
    block_e = triton.next_power_of_2(num_experts)
    if num_tokens <= WHOLE_TOKENS:
        few = num_tokens <= 128 or block_e == 64  # whose every expert one program would have
        return LogitsConfig(16, 32, 128, 4, 4, 4) if few else LogitsConfig(64, 64, 64, 4, 4, 4)
    if num_experts > WHOLE_EXPERTS or itemsize > 2:
        return LogitsConfig(128, 64, 64, 4, 3)
    return LogitsConfig(32, block_e, 128, 4, 4) if num_tokens <= 4096 else LogitsConfig(64, block_e, 64, 4, 4)


def router(
    x: torch.Tensor, weight: torch.Tensor, top_k: int, *, bias: torch.Tensor | None, token_slots: torch.Tensor | None,
    arrivals: torch.Tensor | None, **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    (num_tokens, hidden), num_experts = x.shape, weight.shape[0]
    choice = _choice(num_experts, top_k, **options)
    if num_tokens <= ROUTER_TOKENS:
        return _route_few(x, None, None, 0.0, weight, bias, choice, token_slots, arrivals, False)[:2]
    weights, ids = _results(num_tokens, choice, x.device)
    config = logits_config(num_tokens, num_experts, weight.element_size())
    whole = config.block_n == choice["BLOCK_E"]
    split_k = 1 if whole else config.split_k
    logits = x if whole else torch.empty(split_k, num_tokens, num_experts, dtype=torch.float32, device=x.device)
    _logits_kernel[(triton.cdiv(num_tokens, config.block_m), triton.cdiv(num_experts, config.block_n), split_k)](
        x, weight, logits, bias, token_slots, weights, ids, num_tokens, num_experts, hidden, **choice,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k, num_warps=config.num_warps,
        num_stages=config.num_stages, SPLIT_K=split_k, **overlap_options(x),
    )  # fmt: skip
    return (weights, ids) if whole else _route(logits, bias, choice, token_slots, split_k)


def add_rms_norm_router(
    x: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float, weight: torch.Tensor, top_k: int,
    *, bias: torch.Tensor | None, token_slots: torch.Tensor | None, arrivals: torch.Tensor | None, quantize: bool,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Quantized | None]:  # fmt: skip
    if x.shape[0] > FUSED_NORM_TOKENS:
        options |= {"bias": bias, "token_slots": token_slots}
        normed, quantized = torch.empty_like(x), None
        if quantize:
            quantized = add_rms_norm_fp8(x, residual, norm_weight, eps, normed=normed)
        else:
            add_rms_norm(x, residual, norm_weight, eps, normed)
        return *router(normed, weight, top_k, arrivals=arrivals, **options), residual, normed, quantized
    choice = _choice(weight.shape[0], top_k, **options)
    return _route_few(x, residual, norm_weight, eps, weight, bias, choice, token_slots, arrivals, quantize)


def _route_few(
    x: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor | None, eps: float, weight: torch.Tensor,
    bias: torch.Tensor | None, choice: dict[str, Any], token_slots: torch.Tensor | None, arrivals: torch.Tensor | None,
    quantize: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Quantized | None]:  # fmt: skip
    """The choice, and with a norm the new residual, normed rows and their FP8 form; what is absent is compiled out."""
    (num_tokens, hidden), num_experts = x.shape, weight.shape[0]
    rows = 1 if num_tokens <= SINGLE_TOKENS else ROUTER_ROWS
    tiles = triton.cdiv(num_tokens, rows)
    if arrivals is None:
        arrivals = torch.zeros(tiles, dtype=torch.int32, device=x.device)
    logits = torch.empty(num_tokens, num_experts, dtype=torch.float32, device=x.device)
    weights, ids = _results(num_tokens, choice, x.device)
    summed, normed = (x, x) if residual is None else (torch.empty_like(residual), torch.empty_like(x))
    quantized = fp8_like(x) if quantize else None
    q, scales = quantized or (x, x)
    _router_kernel[(num_experts, tiles)](
        x, x if residual is None else residual, weight if norm_weight is None else norm_weight, weight, bias,
        token_slots, logits, arrivals, summed, normed, q, scales, weights, ids, num_tokens, num_experts, hidden, eps,
        **choice, ROWS=rows, CHOICE_ROWS=ROUTER_ROWS,
        BLOCK_H=max(FP8_BLOCK if quantize else 1, triton.next_power_of_2(hidden)),
        NORM=residual is not None, QUANTIZE=FP8_BLOCK if quantize else 0, num_warps=4 if hidden <= 4096 else 8,
        **overlap_options(x),
    )  # fmt: skip
    return weights, ids, summed, normed, quantized

"""Torch reference of the MoE block: permute, one product per expert that has tokens, un-permute."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F

from gossamer.ops.activation.reference import gated_activation


def route_topk(
    router_logits: torch.Tensor, top_k: int, *, renormalize: bool, score_func: str, bias: torch.Tensor | None,
    num_groups: int, topk_groups: int, group_top: int, scale: float, num_shared: int,
    token_slots: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    logits = router_logits.float()
    scores = torch.softmax(logits, -1) if score_func == "softmax" else torch.sigmoid(logits)
    # Both functions are monotone: logits tell finer, but know neither biases nor sums.
    ranks = logits if bias is None and group_top == 1 else scores if bias is None else scores + bias
    if topk_groups < num_groups:
        groups = ranks.unflatten(1, (num_groups, -1))
        best = groups.topk(group_top, -1)[0].sum(-1)
        dropped = torch.sort(best, dim=-1, descending=True, stable=True)[1][:, topk_groups:]
        # Minus infinity: a dropped group's zeros would be above negative biases.
        outside = torch.zeros_like(best, dtype=torch.bool).scatter_(1, dropped, True)
        ranks = groups.masked_fill(outside[:, :, None], -torch.inf).flatten(1)
    # topk leaves the order of equals open, a stable sort does not.
    ids = torch.sort(ranks, dim=-1, descending=True, stable=True)[1][:, :top_k]
    weights, ids = scores.gather(1, ids), ids.int()
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
    if scale != 1.0:
        weights = weights * scale
    if num_shared:
        shared = torch.arange(num_shared, dtype=torch.int32, device=ids.device) + logits.shape[1]
        ids = torch.cat((ids, shared.expand(len(ids), -1)), 1)
        weights = torch.cat((weights, weights.new_ones(len(ids), num_shared)), 1)
    if token_slots is not None:
        padding = (token_slots < 0).unsqueeze(1)
        weights, ids = weights.masked_fill(padding, 0.0), ids.masked_fill(padding, -1)
    return weights, ids


def router(x: torch.Tensor, weight: torch.Tensor, top_k: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return route_topk(F.linear(x.float(), weight.float()), top_k, **options)


def moe_mlp(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor,
    swiglu: tuple[float, float] | None = None,
) -> torch.Tensor:  # fmt: skip
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in topk_ids.unique().tolist():
        if expert >= 0:
            tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
            gate_up = F.linear(x[tokens], w_gate_up[expert])
            y = F.linear(gated_activation(gate_up[:, 0::2], gate_up[:, 1::2], swiglu), w_down[expert])
            out.index_add_(0, tokens, y.float() * topk_weights[tokens, slots].unsqueeze(1))
    return out.to(x.dtype)


def grouped_mlp(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    experts: Sequence[Callable[[torch.Tensor], torch.Tensor]],
) -> torch.Tensor:
    num_tokens, top_k = topk_ids.shape
    flat_ids = topk_ids.flatten()
    order = flat_ids.argsort(stable=True)
    permuted = x.index_select(0, order // top_k)
    expert_out = torch.empty_like(permuted)
    start = 0
    for expert, count in zip(experts, torch.bincount(flat_ids, minlength=len(experts)).tolist(), strict=True):
        if count:
            expert_out[start : start + count] = expert(permuted[start : start + count])
            start += count
    unpermuted = torch.empty_like(expert_out).index_copy_(0, order, expert_out)
    unpermuted = unpermuted.view(num_tokens, top_k, x.shape[-1])
    return (unpermuted * topk_weights.unsqueeze(-1)).sum(1).to(x.dtype)

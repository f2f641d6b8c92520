"""Torch reference of the MoE block: permute, one product per expert that has tokens, un-permute."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def route_topk(
    router_logits: torch.Tensor, top_k: int, *, renormalize: bool, score_func: str
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = router_logits.float()
    scores = torch.softmax(logits, -1) if score_func == "softmax" else torch.sigmoid(logits)
    weights, ids = scores.topk(top_k, -1)
    if renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    return weights, ids


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

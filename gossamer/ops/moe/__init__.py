"""The MoE block: routing to top-k experts and the grouped expert MLP (TECHNIQUES 1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from gossamer.ops.dispatch import require_reference
from gossamer.ops.moe import reference


def route_topk(
    router_logits: torch.Tensor, top_k: int, *, renormalize: bool, score_func: str = "softmax", backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """Chooses experts. router_logits [num_tokens, num_experts] -> weights fp32, ids int64 [num_tokens, top_k].

    Scores are softmax or sigmoid of the logits in fp32; `renormalize` makes the kept weights sum to 1.
    """
    require_reference(router_logits, backend, "route_topk")
    return reference.route_topk(router_logits, top_k, renormalize=renormalize, score_func=score_func)


def grouped_mlp(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    experts: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """sum_k topk_weights[t, k] * experts[topk_ids[t, k]](x[t]) for x [num_tokens, hidden].

    Tokens are permuted so that each expert sees its own as one contiguous matrix; experts without tokens cost nothing.
    """
    require_reference(x, backend, "grouped_mlp")
    return reference.grouped_mlp(x, topk_weights, topk_ids, experts)

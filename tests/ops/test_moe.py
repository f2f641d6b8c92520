"""Routing and the grouped expert MLP against a float64 loop over tokens."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from gossamer.ops.moe import grouped_mlp, route_topk


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(0, 4, 2), (1, 4, 4), (37, 60, 8)])
def test_routing_equals_float64(
    score_func: str, renormalize: bool, num_tokens: int, num_experts: int, top_k: int
) -> None:
    logits = torch.randn(num_tokens, num_experts) * 2
    weights, ids = route_topk(logits, top_k, renormalize=renormalize, score_func=score_func)
    scores = logits.double().softmax(-1) if score_func == "softmax" else logits.double().sigmoid()
    expected, expected_ids = scores.topk(top_k, -1)
    if renormalize:
        expected = expected / expected.sum(-1, keepdim=True)
    assert ids.equal(expected_ids)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(weights.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("num_tokens", [1, 50])
@pytest.mark.parametrize("collapsed", [False, True])
def test_grouped_mlp_equals_a_loop_over_tokens(
    dtype: torch.dtype, tolerance: float, num_tokens: int, collapsed: bool
) -> None:
    num_experts, top_k, hidden = 12, 3, 32
    matrices = [torch.randn(hidden, hidden).to(dtype) / hidden**0.5 for _ in range(num_experts)]
    calls: list[int] = []

    def expert(e: int, x: torch.Tensor) -> torch.Tensor:
        calls.append(e)
        return F.linear(x, matrices[e])

    experts = [lambda x, e=e: expert(e, x) for e in range(num_experts)]
    x = torch.randn(num_tokens, hidden).to(dtype)
    weights, ids = route_topk(torch.randn(num_tokens, num_experts), top_k, renormalize=True)
    if collapsed:  # most experts empty
        ids = torch.tensor([[7, 0, 11]]).expand(num_tokens, -1)
    actual = grouped_mlp(x, weights, ids, experts)
    expected = torch.zeros(num_tokens, hidden, dtype=torch.float64)
    for t in range(num_tokens):
        for k in range(top_k):
            expected[t] += float(weights[t, k]) * (matrices[int(ids[t, k])].double() @ x[t].double())
    assert float((actual.double() - expected).norm() / expected.norm()) < tolerance
    assert len(calls) == len(set(calls)) == len(ids.unique()), "each expert with tokens runs once"


def test_grouped_mlp_of_no_tokens() -> None:
    x = torch.empty(0, 8)
    out = grouped_mlp(x, torch.empty(0, 2), torch.empty(0, 2, dtype=torch.int64), [torch.nn.Identity()] * 4)
    assert out.shape == (0, 8)

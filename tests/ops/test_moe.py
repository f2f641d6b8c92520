"""Routing and the grouped expert MLP against a float64 loop over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gossamer.ops.moe import grouped_mlp, route_topk, router


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


def hand_choice(
    scores: list[float], bias: list[float], top_k: int, groups: int, kept: int, group_top: int
) -> list[int]:
    """The definition, expert by expert: who is chosen, best first."""
    ranks = [s + b for s, b in zip(scores, bias, strict=True)]
    size = len(ranks) // groups
    best = [sum(sorted(ranks[g * size : (g + 1) * size])[-group_top:]) for g in range(groups)]
    stay = sorted(range(groups), key=lambda g: -best[g])[:kept]
    allowed = [e for e in range(len(ranks)) if e // size in stay]
    return sorted(allowed, key=lambda e: -ranks[e])[:top_k]


@pytest.mark.parametrize(("groups", "kept", "group_top"), [(1, 1, 2), (8, 3, 2), (4, 1, 1), (4, 4, 2)])
@pytest.mark.parametrize("shift", [0.0, -5.0])
def test_grouped_choice_with_a_bias(groups: int, kept: int, group_top: int, shift: float) -> None:
    """With every bias below zero too: what masked groups hold must not be above it."""
    torch.manual_seed(groups)
    logits, bias = torch.randn(50, 64), torch.randn(64) * 0.3 + shift
    weights, ids = route_topk(
        logits, 6, renormalize=True, score_func="sigmoid", bias=bias, num_groups=groups, topk_groups=kept,
        group_top=group_top, scale=2.5, num_shared=1,
    )  # fmt: skip
    assert ids.shape == weights.shape == (50, 7)
    assert (ids[:, 6] == 64).all()
    assert (weights[:, 6] == 1).all()
    scores = torch.sigmoid(logits)
    for row in range(50):
        assert ids[row, :6].tolist() == hand_choice(scores[row].tolist(), bias.tolist(), 6, groups, kept, group_top)
        chosen = scores[row].double()[ids[row, :6].long()]
        torch.testing.assert_close(weights[row, :6].double(), chosen / chosen.sum() * 2.5, rtol=0, atol=1e-6)


def test_routing_equals_transformers() -> None:
    """DeepSeek-V3's and both of V2's routers, on logits that they compute themselves."""
    transformers = pytest.importorskip("transformers")
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

    torch.manual_seed(0)
    x = torch.randn(200, 48)
    shape = {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "n_routed_experts": 64,
        "num_experts_per_tok": 6,
        "n_group": 8,
        "topk_group": 3,
    }
    v3 = DeepseekV3TopkRouter(transformers.DeepseekV3Config(**shape, routed_scaling_factor=2.5))
    torch.nn.init.normal_(v3.weight)
    v3.e_score_correction_bias.copy_(-1.5 - torch.rand(64))
    options = {"num_groups": 8, "topk_groups": 3, "scale": 2.5}
    cases = [
        (
            v3,
            {
                **options,
                "renormalize": True,
                "score_func": "sigmoid",
                "bias": v3.e_score_correction_bias,
                "group_top": 2,
            },
        )
    ]
    for method, groups in (("greedy", {}), ("group_limited_greedy", options | {"scale": 1.0})):
        v2 = DeepseekV2TopkRouter(transformers.DeepseekV2Config(**shape, topk_method=method))
        torch.nn.init.normal_(v2.weight)
        cases.append((v2, {**groups, "renormalize": False}))
    for module, choice in cases:
        with torch.no_grad():
            _, expected, expected_ids = module(x)
            weights, ids = router(x, module.weight, 6, **choice)
        order, expected_order = ids.argsort(1), expected_ids.argsort(1)
        assert ids.long().gather(1, order).equal(expected_ids.gather(1, expected_order))
        difference = weights.gather(1, order) - expected.gather(1, expected_order)
        assert float(difference.abs().max()) <= 1e-6


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_groups": 3}, "3 groups"),
        ({"num_groups": 4, "topk_groups": 5}, "best 5 of 4"),
        ({"num_groups": 8, "topk_groups": 1}, "best 1 of 8"),
        ({"num_groups": 16, "topk_groups": 16, "group_top": 2}, "groups of 1"),
        ({"group_top": 3}, "best 3"),
        ({"bias": torch.zeros(15)}, "the bias"),
        ({"bias": torch.zeros(16, dtype=torch.float64)}, "the bias"),
        ({"num_shared": 13}, "13 shared"),
    ],
)
def test_impossible_choices_are_refused(options: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        route_topk(torch.zeros(2, 16), 4, renormalize=False, **options)

"""The step's embedding: known ids, ids only the device knows, padding."""

from __future__ import annotations

import pytest
import torch

from gossamer.ops.embedding import embed_tokens


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("hidden", [8, 33])
def test_rows_are_given_sampled_or_zero(backend: str, hidden: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(50, hidden, device=device)
    ids = torch.tensor([3, -1, -1, 49, 7], dtype=torch.int32, device=device)
    slots = torch.tensor([0, 2, 1, 5, -1], dtype=torch.int32, device=device)
    last_token = torch.tensor([9, 11, 13, -1, 0, 0], device=device)
    expected = torch.stack([weight[3], weight[13], weight[11], weight[49], torch.zeros_like(weight[0])])
    assert torch.equal(embed_tokens(ids, slots, last_token, weight, backend=backend), expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_no_tokens_and_a_failed_rows_token(backend: str) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(4, 8, device=device)
    empty = torch.empty(0, dtype=torch.int32, device=device)
    last_token = torch.tensor([-1], device=device)
    assert embed_tokens(empty, empty, last_token, weight, backend=backend).shape == (0, 8)
    one = torch.tensor([-1], dtype=torch.int32, device=device)
    result = embed_tokens(one, torch.zeros_like(one), last_token, weight, backend=backend)
    assert torch.isfinite(result).all()

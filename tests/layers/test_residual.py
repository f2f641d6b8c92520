"""The residual stream: what is added is there at the next norm, whichever way it was added."""

from __future__ import annotations

import pytest
import torch

from gossamer.layers.linear import Linear, WeightFormat
from gossamer.layers.residual import ACCUMULATE_ROWS, ResidualStream


@pytest.mark.parametrize("num_tokens", [1, ACCUMULATE_ROWS - 1, ACCUMULATE_ROWS])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_is_added(num_tokens: int, bias: bool) -> None:
    linear = Linear(["a.o"], bias=bias)
    linear.load("a.o.weight", torch.randn(16, 8), WeightFormat(torch.float32, torch.device("cpu")))
    if bias:
        linear.load("a.o.bias", torch.randn(16), WeightFormat(torch.float32, torch.device("cpu")))
    x, attended, norm = torch.randn(num_tokens, 16), torch.randn(num_tokens, 8), torch.rand(16) + 0.5
    expected = x + linear(attended)
    stream = ResidualStream(x.clone(), 1e-6, "auto")
    stream.add_product(linear, attended)
    for _ in range(2):  # once and no more
        found = stream.normed(norm)
        torch.testing.assert_close(found, torch.nn.functional.rms_norm(expected, (16,), norm, 1e-6))

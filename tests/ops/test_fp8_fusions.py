"""FP8 producers and products that are one launch each, against the ops that they are made of."""

from __future__ import annotations

import pytest
import torch

from gossamer.ops.gemm import add_rms_norm_linear, few_row_linear
from gossamer.ops.gemm_fp8 import (
    fp8_linear,
    fp8_moe_mlp,
    fp8_moe_mlp_add_rms_norm,
    quantize_activation,
    quantize_weight,
)
from gossamer.ops.norm import add_rms_norm

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
gpu = pytest.mark.gpu
CASES = [
    (1, 300, 272, torch.float32),
    (2, 130, 112, torch.float32),
    (2, 64, 128, torch.float16),
    pytest.param(1, 5120, 2048, torch.bfloat16, marks=gpu),
    pytest.param(2, 2048, 4096, torch.bfloat16, marks=gpu),
]
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("ue8m0", [False, True])
@pytest.mark.parametrize(("m", "n", "k", "dtype"), CASES)
def test_products_of_few_rows_quantise_within(m: int, n: int, k: int, dtype: torch.dtype, ue8m0: bool) -> None:
    x, residual = (torch.randn(m, k, device=DEVICE).to(dtype) * 3 for _ in range(2))
    weight, scales = quantize_weight(torch.randn(n, k, device=DEVICE))
    bias, norm = torch.randn(n, device=DEVICE).to(dtype), torch.rand(k, device=DEVICE).to(dtype)
    expected = fp8_linear(
        *quantize_activation(x, ue8m0=ue8m0), weight, scales, bias, out_dtype=torch.float32, backend="reference"
    )
    found = few_row_linear(x, weight, bias, fp8=(scales, ue8m0), backend="triton")
    assert found.dtype == dtype
    assert error(found, expected) < TOLERANCE[dtype]
    found, stream, normed = add_rms_norm_linear(
        x, residual, norm, 1e-6, weight, bias, keep_normed=True, fp8=(scales, ue8m0), backend="triton"
    )
    quantized = quantize_activation(normed, ue8m0=ue8m0)
    expected = fp8_linear(*quantized, weight, scales, bias, out_dtype=torch.float32, backend="reference")
    assert error(found, expected) < TOLERANCE[dtype]
    assert error(normed, add_rms_norm(x, residual, norm, 1e-6)) < TOLERANCE[dtype]
    assert torch.equal(stream, residual)
    with pytest.raises(ValueError, match="at most 2"):
        few_row_linear(torch.zeros(3, k, device=DEVICE).to(dtype), weight, fp8=(scales, ue8m0), backend="triton")


@pytest.mark.parametrize(
    ("num_tokens", "hidden", "inter", "dtype"),
    [
        (0, 144, 160, torch.float32),
        (2, 144, 160, torch.float32),
        (5, 144, 160, torch.float32),
        (9, 144, 160, torch.float32),
        pytest.param(1, 2048, 768, torch.bfloat16, marks=gpu),
        pytest.param(4, 2048, 768, torch.bfloat16, marks=gpu),
        pytest.param(48, 2048, 768, torch.bfloat16, marks=gpu),
        pytest.param(700, 2048, 768, torch.bfloat16, marks=gpu),
    ],
)
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_experts_sum_norm_and_quantisation_in_one(
    num_tokens: int, hidden: int, inter: int, dtype: torch.dtype, backend: str
) -> None:
    num_experts, top_k = 5, 3
    gate_up = quantize_weight(torch.randn(num_experts * 2 * inter, hidden, device=DEVICE))[0]
    down = quantize_weight(torch.randn(num_experts * hidden, inter, device=DEVICE))[0]
    across, deep = -(-inter // 128), -(-hidden // 128)
    experts = (
        gate_up.view(num_experts, 2 * inter, hidden),
        torch.rand(num_experts, 2, across, deep, device=DEVICE) * 1e-3,
        down.view(num_experts, hidden, inter),
        torch.rand(num_experts, deep, across, device=DEVICE) * 1e-3,
    )
    x, residual = torch.randn(2, num_tokens, hidden, device=DEVICE).to(dtype)
    norm, weights = torch.rand(hidden, device=DEVICE).to(dtype), torch.rand(num_tokens, top_k, device=DEVICE)
    ids = torch.rand(num_tokens, num_experts, device=DEVICE).argsort(1)[:, :top_k].int().contiguous()
    ids[1::3] = -1
    total = residual.clone()
    y = fp8_moe_mlp(x, weights, ids, *experts, backend=backend)
    expected = add_rms_norm(y, total, norm, 1e-6, backend=backend)
    for quantize in (False, True):
        stream = residual.clone()
        found = fp8_moe_mlp_add_rms_norm(
            x, weights, ids, *experts, stream, norm, 1e-6, quantize=quantize, backend=backend
        )
        assert torch.equal(stream, total)
        if quantize:
            q, scales = quantize_activation(expected, backend="reference")
            differing = (found[0].float() - q.float()).abs() > 0.13 * q.float().abs() + 1
            assert not bool(differing.any())
            assert torch.allclose(found[1], scales, rtol=2e-2)
        elif num_tokens:
            assert error(found, expected) < TOLERANCE[dtype]

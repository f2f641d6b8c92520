"""int8 and int4 products against float64 of the dequantised weights, and the quantisers' error bounds."""

from __future__ import annotations

import pytest
import torch

from gossamer.ops import gemm_weight_only as wo

SHAPES = [(16, 32), (48, 64), (192, 576), (960, 576)]


def rel_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert not actual.isnan().any()
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_int8_linear(dtype: torch.dtype, tolerance: float, shape: tuple[int, int], rows: int) -> None:
    q, scale = wo.quantize_int8(torch.randn(shape) * torch.rand(shape[0], 1))
    x = torch.randn(rows, shape[1]).to(dtype)
    expected = x.double() @ (q.double() * scale.to(dtype).double()[:, None]).t()
    assert rel_rms(wo.int8_linear(x, q, scale.to(dtype)), expected) < tolerance


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_int4_linear(dtype: torch.dtype, tolerance: float, shape: tuple[int, int], rows: int) -> None:
    q, scale, zero = wo.quantize_int4(torch.randn(shape))
    scale, zero = scale.to(dtype), zero.to(dtype)
    packed, scale_and_zero = wo.pack_int4(q, scale, zero, dtype)
    x = torch.randn(rows, shape[1]).to(dtype)
    expected = x.double() @ wo.dequantize_int4(q, scale, zero, torch.float64).t()
    assert rel_rms(wo.int4_linear(x, packed, scale_and_zero, 32), expected) < tolerance


@pytest.mark.skipif(not wo.int8_exact_supported(16, 16), reason="no VNNI")
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 1e-4)])
@pytest.mark.parametrize("shape", [*SHAPES, (4096, 64)])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_int8_linear_exact(dtype: torch.dtype, tolerance: float, shape: tuple[int, int], rows: int) -> None:
    q, scale = wo.quantize_int8(torch.randn(shape) * torch.rand(shape[0], 1))
    x = (torch.randn(rows, shape[1]) * 10.0 ** torch.arange(rows)[:, None].remainder(5)).to(dtype)
    x[-1] = 0
    actual = wo.int8_linear_exact(x, wo.pack_int8_exact(q), scale)
    assert actual.dtype == torch.float32
    for row, y in zip(x[:-1], actual[:-1], strict=True):
        assert rel_rms(y, (q.double() * scale.double()[:, None]) @ row.double()) < tolerance
    assert actual[-1].eq(0).all()
    x[0, 0] = torch.nan
    assert wo.int8_linear_exact(x, wo.pack_int8_exact(q), scale)[0].isnan().all()


def test_quantisation_error_is_at_most_half_a_step() -> None:
    weight = torch.randn(64, 128)
    q, scale = wo.quantize_int8(weight)
    assert ((wo.dequantize_int8(q, scale, torch.float32) - weight).abs() <= scale[:, None] * 0.5001).all()
    assert (q.abs().amax(1) == 127).all()
    q4, scale4, zero4 = wo.quantize_int4(weight)
    error = (wo.dequantize_int4(q4, scale4, zero4, torch.float32) - weight).abs().unflatten(1, (-1, 32))
    assert (error <= scale4[..., None] * 0.5001 + 1e-6).all()
    assert q4.min() == 0
    assert q4.max() == 15


def test_zero_and_constant_rows_are_exact() -> None:
    weight = torch.zeros(16, 32)
    weight[1] = 0.5
    q, scale = wo.quantize_int8(weight)
    assert wo.dequantize_int8(q, scale, torch.float32)[0].eq(0).all()
    torch.testing.assert_close(wo.dequantize_int4(*wo.quantize_int4(weight), torch.float32), weight)


@pytest.mark.parametrize("shape", [(15, 32), (16, 33), (1, 1)])
def test_shapes_that_the_operators_cannot_take_are_known(shape: tuple[int, int]) -> None:
    assert not wo.int4_supported(*shape)
    assert not wo.int8_supported(*shape)

"""Merged projections, and the formats that weights are held in."""

from __future__ import annotations

import pytest
import torch

from gossamer.layers.linear import (
    DENSE_FROM_ROWS,
    WIDE_DENSE_FROM_ROWS,
    WIDE_FROM_ROWS,
    DenseWeight,
    Int4Weight,
    Int8Weight,
    Linear,
    WeightFormat,
    make_head,
    storage_bytes,
)

CPU = torch.device("cpu")


def load(linear: Linear, tensors: dict[str, torch.Tensor], fmt: WeightFormat) -> None:
    for name, tensor in tensors.items():
        linear.load(name, tensor, fmt)


def test_parts_are_merged_in_order_whatever_order_they_come_in() -> None:
    q, k = torch.randn(4, 8), torch.randn(2, 8)
    bias_q, bias_k = torch.randn(4), torch.randn(2)
    linear = Linear(["a.q", "a.k"], bias=True)
    assert linear.expected_names() == ["a.q.weight", "a.k.weight", "a.q.bias", "a.k.bias"]
    with pytest.raises(RuntimeError, match="before its weights were loaded"):
        linear(torch.zeros(1, 8))
    fmt = WeightFormat(torch.float32, CPU)
    load(linear, {"a.k.bias": bias_k, "a.k.weight": k, "a.q.weight": q, "a.q.bias": bias_q}, fmt)
    x = torch.randn(3, 8)
    torch.testing.assert_close(linear(x), torch.cat((x @ q.t() + bias_q, x @ k.t() + bias_k), 1))


@pytest.mark.parametrize(("quantization", "kind", "tolerance"), [("int8", Int8Weight, 0.02), ("int4", Int4Weight, 0.2)])
@pytest.mark.parametrize("keep_dense", [False, True])
def test_quantised_weights_with_and_without_a_dense_copy(
    quantization: str, kind: type, tolerance: float, keep_dense: bool
) -> None:
    weight, bias = torch.randn(64, 64), torch.randn(64)
    linear = Linear(["p"], bias=True)
    fmt = WeightFormat(torch.float32, CPU, quantization, keep_dense)  # type: ignore[arg-type]
    load(linear, {"p.weight": weight, "p.bias": bias}, fmt)
    assert isinstance(linear.weight, kind)
    assert (linear.weight.dense is not None) == keep_dense
    few, many = torch.randn(1, 64), torch.randn(DENSE_FROM_ROWS, 64)
    for x in (few, many):
        expected = x @ weight.t() + bias
        assert 0 < float((linear(x) - expected).norm() / expected.norm()) < tolerance
    # The two ways of one weight differ by its own rounding at most.
    once = torch.cat([linear(row[None]) for row in many])
    assert float((linear(many) - once).norm() / once.norm()) < tolerance / 2


def test_shapes_that_int4_cannot_take_fall_to_int8_and_dense() -> None:
    for shape, kind in (((16, 48), Int8Weight), ((7, 32), DenseWeight)):
        linear = Linear(["p"])
        load(linear, {"p.weight": torch.randn(shape)}, WeightFormat(torch.float32, CPU, "int4"))
        assert isinstance(linear.weight, kind)


@pytest.mark.parametrize("shape", [(64, 32), (7, 40)])
@pytest.mark.parametrize("bias", [False, True])
def test_bf16_weights_are_packed_once(shape: tuple[int, int], bias: bool) -> None:
    tensors = {"p.weight": torch.randn(shape)} | ({"p.bias": torch.randn(shape[0])} if bias else {})
    linear = Linear(["p"], bias=bias)
    with torch.inference_mode():  # as the engine loads
        load(linear, tensors, WeightFormat(torch.bfloat16, CPU))
        for rows in (1, 5, 70):
            x = torch.randn(rows, shape[1]).bfloat16()
            expected = x.double() @ tensors["p.weight"].bfloat16().double().t() + (tensors["p.bias"] if bias else 0.0)
            torch.testing.assert_close(linear(x).double(), expected, rtol=0.01, atol=0.03)
    assert storage_bytes(linear.weight.tensors()) >= 2 * shape[0] * shape[1]


@pytest.mark.parametrize("bias", [False, True])
def test_bf16_products_on_a_cpu_without_them_are_made_in_fp32(bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.ops.cpu.multiplies_bf16", lambda: False)
    monkeypatch.setattr("gossamer.ops.cpu._PIECE", 40 * 24)  # three pieces, the last one smaller
    linear = Linear(["p"], bias=bias)
    tensors = {"p.weight": torch.randn(100, 40)} | ({"p.bias": torch.randn(100)} if bias else {})
    load(linear, tensors, WeightFormat(torch.bfloat16, CPU))
    assert isinstance(linear.weight, DenseWeight)
    for rows in (1, WIDE_FROM_ROWS - 1, WIDE_FROM_ROWS, 50):
        x = torch.randn(rows, 40).bfloat16()
        y = linear(x)
        wide = [t.bfloat16().double() for t in tensors.values()]
        expected = x.double() @ wide[0].t() + (wide[1] if bias else 0.0)
        assert y.dtype == torch.bfloat16
        # One rounding, of the sum alone.
        torch.testing.assert_close(y.double(), expected, rtol=2**-8, atol=1e-5 if rows >= WIDE_FROM_ROWS else 0.03)


@pytest.mark.parametrize("native", [False, True])
def test_int4_goes_dense_where_that_is_faster(native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = Linear(["p"])
    load(linear, {"p.weight": torch.randn(64, 64)}, WeightFormat(torch.bfloat16, CPU, "int4", keep_dense=True))
    monkeypatch.setattr("gossamer.ops.cpu.multiplies_bf16", lambda: native)
    dense_rows: list[int] = []
    monkeypatch.setattr(type(linear.weight.dense), "__call__", lambda self, x: dense_rows.append(len(x)) or x)
    for rows in (1, DENSE_FROM_ROWS - 1, DENSE_FROM_ROWS, WIDE_DENSE_FROM_ROWS - 1, WIDE_DENSE_FROM_ROWS):
        linear(torch.randn(rows, 64).bfloat16())
    assert dense_rows == ([DENSE_FROM_ROWS, WIDE_DENSE_FROM_ROWS - 1] if native else []) + [WIDE_DENSE_FROM_ROWS]


@pytest.mark.parametrize("keep_dense", [False, True])
def test_the_head_keeps_eight_bits_under_int4(keep_dense: bool) -> None:
    weight = torch.randn(96, 64).bfloat16()
    head = make_head(weight, WeightFormat(torch.bfloat16, CPU, "int4", keep_dense))
    for rows in (1, 2, 20):
        x = torch.randn(rows, 64).bfloat16()
        expected = x.double() @ weight.double().t()
        assert float((head(x).double() - expected).norm() / expected.norm()) < 0.02

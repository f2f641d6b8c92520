"""FP8 quantisation: the definition, the kernels' bits against the reference's, and the producers that quantise."""

from __future__ import annotations

import pytest
import torch

from gossamer.ops.activation import silu_mul, silu_mul_fp8
from gossamer.ops.norm import add_rms_norm, add_rms_norm_fp8, rms_norm
from gossamer.ops.quantize_fp8 import FP8_MAX, quantize_activation, quantize_weight

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
gpu = pytest.mark.gpu


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """NaN equals NaN, whatever its sign."""
    nan = a.float().isnan()
    differs = a.view(torch.uint8) != b.view(torch.uint8)
    return torch.equal(nan, b.float().isnan()) and not bool((differs & ~nan).any())


def awkward(rows: int, width: int, dtype: torch.dtype) -> torch.Tensor:
    """All magnitudes, zero groups, infinities, NaN, denormals, one element alone."""
    x = torch.randn(rows, width, device=DEVICE) * torch.exp(4 * torch.randn(rows, width, device=DEVICE))
    x = x.to(dtype)
    x[0] = 0
    x[1, :128] = 0
    x[2, 5], x[2, -1], x[3, 7] = float("inf"), -float("inf"), float("nan")
    x[4] = 0
    x[4, 9] = -1e-6
    if dtype != torch.bfloat16 or DEVICE == "cuda":  # the interpreter reads bf16's denormals as other numbers
        tiny = torch.finfo(dtype).smallest_normal
        x[5] = torch.randn(width, device=DEVICE).to(dtype) * (tiny / 64)
    return x


SHAPES = [(7, 300), (6, 128), (9, 144), pytest.param((512, 2048), marks=gpu), pytest.param((33, 7168), marks=gpu)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", [E4M3, E5M2])
@pytest.mark.parametrize("options", [{}, {"ue8m0": True}, {"per_token": True}])
def test_the_kernel_gives_the_references_bits(shape, dtype, form, options) -> None:
    x = awkward(*shape, dtype)
    q, scales = quantize_activation(x, dtype=form, backend="triton", **options)
    expected, expected_scales = quantize_activation(x, dtype=form, backend="reference", **options)
    assert q.dtype == form
    assert torch.equal(scales, expected_scales)
    assert same_bits(q, expected)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("form", [E4M3, E5M2])
def test_the_definition(backend: str, form: torch.dtype) -> None:
    x = awkward(7, 300, torch.float32)
    q, scales = quantize_activation(x, dtype=form, backend=backend)
    assert scales.shape == (7, 3)
    assert scales.isfinite().all()
    assert (scales > 0).all()
    finite = x.isfinite()
    assert torch.equal(q.float().isfinite(), finite), "what is not finite is NaN, and nothing else is"
    padded = torch.nn.functional.pad(x.where(finite, 0.0), (0, 84)).view(7, 3, 128)
    largest = torch.nn.functional.pad(q.float().nan_to_num(0.0), (0, 84)).view(7, 3, 128).abs().amax(-1)
    zero = padded.abs().amax(-1) == 0
    assert largest[zero].eq(0).all()
    assert scales[zero].eq(1).all()
    assert largest[~zero].eq(FP8_MAX[form]).all()
    normal = scales > 1e-30
    expected = (padded / scales[..., None])[normal].to(form).float()
    assert torch.equal(torch.nn.functional.pad(q.float().nan_to_num(0.0), (0, 84)).view(7, 3, 128)[normal], expected)


def test_ue8m0_scales_are_the_next_power_of_two() -> None:
    x = torch.randn(5, 256, device=DEVICE)
    x[0, 0] = 448.0 * 4  # the scale is a power of two by itself
    x[0, 1:128] = 0
    for backend in ("reference", "triton"):
        _, plain = quantize_activation(x, backend=backend)
        q, scales = quantize_activation(x, ue8m0=True, backend=backend)
        assert torch.equal(scales, 2.0 ** plain.log2().ceil())
        assert scales[0, 0] == 4
        assert q.float().abs().amax() <= 448


@pytest.mark.parametrize(("kind", "shape"), [("block", (3, 3)), ("channel", (300, 1)), ("tensor", (1, 1))])
@pytest.mark.parametrize("form", [E4M3, E5M2])
def test_weights(kind: str, shape: tuple[int, int], form: torch.dtype) -> None:
    w = torch.randn(300, 272, device=DEVICE) * torch.rand(300, 1, device=DEVICE)
    w[:128, :128] = 0
    q, scales = quantize_weight(w, kind=kind, dtype=form)
    assert scales.shape == shape
    height, width = {"block": (128, 128), "channel": (1, 272), "tensor": (300, 272)}[kind]
    for i in range(shape[0]):
        for j in range(shape[1]):
            place = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            amax = w[place].abs().max()
            assert scales[i, j] == (amax / amax.new_tensor(FP8_MAX[form]) if amax > 0 else 1)
            assert torch.equal(q[place].float(), (w[place] / scales[i, j]).to(form).float())


@pytest.mark.parametrize("options", [{}, {"per_token": True}, {"ue8m0": True}])
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((3, 48), torch.float32),
        ((4, 300), torch.float16),
        pytest.param((65, 2048), torch.bfloat16, marks=gpu),
        pytest.param((300, 7168), torch.bfloat16, marks=gpu),
    ],
)
def test_a_norm_quantises_what_it_gives(shape, dtype, options) -> None:
    x, residual = (torch.randn(shape, device=DEVICE).to(dtype) * 3 for _ in range(2))
    weight = torch.randn(shape[1], device=DEVICE).to(dtype)
    for old in (None, residual):
        mine = None if old is None else old.clone()
        theirs = None if old is None else old.clone()
        q, scales, normed = add_rms_norm_fp8(x, mine, weight, 1e-6, keep_normed=True, backend="triton", **options)
        if theirs is None:
            expected = rms_norm(x, weight, 1e-6, backend="triton")
        else:
            expected = add_rms_norm(x, theirs, weight, 1e-6, backend="triton")
            assert torch.equal(mine, theirs)
        # The two kernels may sum a row in different orders, which a power of two as a scale may double.
        near = 2 * torch.finfo(dtype).eps
        assert torch.allclose(normed, expected, rtol=near, atol=0)
        of_scales = 1.0 if "ue8m0" in options else max(near, 4e-3)
        expected_q, expected_scales = quantize_activation(normed, backend="reference", **options)
        assert torch.equal(scales, expected_scales)
        assert same_bits(q, expected_q)
        again = add_rms_norm_fp8(x, None if old is None else old.clone(), weight, 1e-6, backend="triton", **options)
        assert again[2] is None
        assert torch.allclose(again[1], scales, rtol=of_scales)
        reference = add_rms_norm_fp8(
            x, None if old is None else old.clone(), weight, 1e-6, backend="reference", **options
        )
        assert torch.allclose(reference[1], scales, rtol=of_scales)


@pytest.mark.parametrize("options", [{}, {"per_token": True}, {"ue8m0": True}])
@pytest.mark.parametrize(
    ("rows", "width", "dtype"),
    [
        (0, 16, torch.float32),
        (5, 200, torch.float32),
        (3, 128, torch.float16),
        pytest.param(700, 1536, torch.bfloat16, marks=gpu),
    ],
)
def test_silu_mul_quantises_what_it_gives(rows, width, dtype, options) -> None:
    x = torch.randn(rows, 2 * width, device=DEVICE).to(dtype) * 3
    q, scales = silu_mul_fp8(x, backend="triton", **options)
    expected, expected_scales = quantize_activation(silu_mul(x, backend="triton"), backend="reference", **options)
    assert torch.equal(scales, expected_scales)
    assert same_bits(q, expected)
    assert silu_mul_fp8(x, backend="reference", **options)[1].shape == scales.shape


def test_no_rows_and_bad_input() -> None:
    for backend in ("reference", "triton"):
        q, scales = quantize_activation(torch.empty(0, 200, device=DEVICE), backend=backend)
        assert q.shape == (0, 200)
        assert scales.shape == (0, 2)
    with pytest.raises(ValueError, match="contiguous"):
        quantize_activation(torch.zeros(8, 4, device=DEVICE).T, backend="triton")
    with pytest.raises(ValueError, match="none of"):
        quantize_activation(torch.zeros(8, 4, device=DEVICE), dtype=torch.int8)

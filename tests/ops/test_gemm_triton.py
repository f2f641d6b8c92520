"""Products of few rows against float64, with and without the norm folded in; `gpu` runs the model's shapes in bf16."""

from __future__ import annotations

import pytest
import torch

from gossamer.ops.gemm import add_rms_norm_linear, few_row_linear, use_fused_norm

pytest.importorskip("triton")

from gossamer.ops.gemm import triton as kernels

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Tensor cores add products of half precision with a little less than fp32's precision.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 6e-3}
gpu = pytest.mark.gpu
ROWS, TILES, SPLIT = kernels.Config(4, 0, 2), kernels.Config(16, 16, 1, 2), kernels.Config(16, 16, 1, 2, 3)

SMALL = [
    (1, 21, 40, ROWS, torch.float32),
    (2, 8, 64, ROWS, torch.float16),
    (5, 19, 40, TILES, torch.float16),
    (3, 17, 96, SPLIT, torch.float32),
    (20, 33, 100, SPLIT, torch.float32),
]
LARGE = [
    pytest.param(m, n, k, None, torch.bfloat16, marks=gpu)
    for m, n, k in ((1, 5120, 2048), (2, 1001, 7168), (16, 2048, 4096), (17, 1001, 7168), (64, 128, 2048))
] + [
    pytest.param(m, n, k, None, torch.bfloat16, marks=gpu)
    for m in (1, 2)
    for n, k in ((32768, 512), (6144, 1024), (1001, 1536), (2048, 4096), (10240, 8192), (1000, 12288))
]


def rel_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.isfinite().all()
    return float((actual.double() - expected).norm() / expected.norm())


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fresh tensor is full of NaN, so that what a kernel leaves unwritten shows."""
    for name in ("new_empty", "empty_like"):
        original = getattr(torch.Tensor, name) if name == "new_empty" else torch.empty_like
        owner = torch.Tensor if name == "new_empty" else torch

        def filled(*args: object, original=original, **kwargs: object) -> torch.Tensor:
            tensor = original(*args, **kwargs)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        monkeypatch.setattr(owner, name, filled)


def draw(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize(("m", "n", "k", "config", "dtype"), SMALL + LARGE)
def test_few_row_linear(m: int, n: int, k: int, config: kernels.Config | None, dtype: torch.dtype) -> None:
    x, weight, bias = draw(m, k, dtype=dtype), draw(n, k, dtype=dtype), draw(n, dtype=dtype)
    expected = x.double() @ weight.double().T
    for out_dtype in (dtype, torch.float32):
        tolerance = TOLERANCE[dtype if out_dtype == dtype else torch.float32]
        y = kernels.few_row_linear(x, weight, None, out_dtype, config)
        assert y.dtype == out_dtype
        assert rel_rms(y, expected) < tolerance
        for _ in range(2):  # split products reset their counters
            y = kernels.few_row_linear(x, weight, bias, out_dtype, config)
            assert rel_rms(y, expected + bias.double()) < tolerance


FUSED = [
    (1, 21, 40, torch.float32),
    (2, 8, 64, torch.float16),
    *(
        pytest.param(m, n, k, torch.bfloat16, marks=gpu)
        for m, n, k in ((1, 5120, 2048), (2, 128, 2048), (2, 1001, 7168))
    ),
]


@pytest.mark.parametrize(("m", "n", "k", "dtype"), FUSED)
@pytest.mark.parametrize("add", [True, False])
def test_add_rms_norm_linear(m: int, n: int, k: int, dtype: torch.dtype, add: bool) -> None:
    x, weight, norm = draw(m, k, dtype=dtype), draw(n, k, dtype=dtype), draw(k, dtype=dtype)
    residual = draw(m, k, dtype=dtype) * 3 if add else None
    total = x if residual is None else residual + x
    h = total.double()
    normed = h / (h.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * norm.double()
    before = None if residual is None else residual.clone()
    y, summed, kept = kernels.add_rms_norm_linear(x, residual, norm, 1e-6, weight, None, dtype, True)
    assert summed.equal(total)
    assert kept is not None
    assert residual is None or residual.equal(before)
    assert rel_rms(kept, normed) < TOLERANCE[dtype]
    assert rel_rms(y, normed @ weight.double().T) < TOLERANCE[dtype]
    again = add_rms_norm_linear(x, residual, norm, 1e-6, weight, keep_normed=True, backend="reference")
    assert again[1].equal(total)
    assert rel_rms(again[0], normed @ weight.double().T) < TOLERANCE[dtype]


def test_a_float32_router_of_half_precision_rows() -> None:
    x, weight = draw(3, 32, dtype=torch.float16), draw(9, 32, dtype=torch.float32)
    for backend in ("triton", "reference"):
        y = few_row_linear(x, weight, out_dtype=torch.float32, backend=backend)
        assert rel_rms(y, x.double() @ weight.double().T) < 1e-6


def test_no_rows_and_bad_input() -> None:
    weight = draw(4, 8, dtype=torch.float32)
    assert few_row_linear(draw(0, 8, dtype=torch.float32), weight, backend="triton").shape == (0, 4)
    with pytest.raises(ValueError, match="at most"):
        few_row_linear(draw(65, 8, dtype=torch.float32), weight, backend="triton")
    with pytest.raises(ValueError, match="matching"):
        few_row_linear(draw(1, 7, dtype=torch.float32), weight, backend="triton")


@gpu
def test_split_products_are_deterministic() -> None:
    x, weight = draw(8, 4096, dtype=torch.bfloat16), draw(512, 4096, dtype=torch.bfloat16)
    config = kernels.Config(32, 128, 4, 3, 8)
    first = kernels.few_row_linear(x, weight, None, torch.float32, config)
    for _ in range(50):
        assert kernels.few_row_linear(x, weight, None, torch.float32, config).equal(first)


@pytest.mark.parametrize(
    ("num_rows", "shape", "fp8", "fused"),
    [
        (1, (5120, 2048), True, True),
        (1, (24576, 4096), True, False),
        (1, (24576, 4096), False, True),
        (1, (10240, 8192), False, False),
        (2, (1536, 1024), True, True),
        (2, (5120, 2048), True, False),
        (2, (5120, 2048), False, False),
        (3, (1536, 1024), False, False),
        (1, (4096, 4096), True, False),
        (2, (4096, 1024), True, False),
        (2, (4095, 1024), False, True),
    ],
)
def test_the_norm_is_repeated_where_weights_are_small(
    num_rows: int, shape: tuple[int, int], fp8: bool, fused: bool
) -> None:
    """And quantisation, for FP8: every program does it again."""
    weight = torch.empty(shape, dtype=torch.float8_e4m3fn if fp8 else torch.bfloat16, device="meta")
    assert use_fused_norm(num_rows, weight) == fused


@pytest.mark.parametrize("num_rows", [1, 2])
@pytest.mark.parametrize("width", [512, 1024, 1536, 2048, 4096, 8192, 12288])
def test_programs_of_short_rows_have_several(num_rows: int, width: int) -> None:
    """One row of 1 KB a program took four times as long as the library."""
    config = kernels.choose(num_rows, 32768, width)
    assert config.block_k == 0
    assert 3072 <= config.block_n * width <= 12288
    few = kernels.choose(num_rows, 500, width)
    assert few.block_k or few.block_n <= 2, "or programs are too few"

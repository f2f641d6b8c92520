"""The kernels of norm, activation and rotary embedding against float64; `gpu` runs the model's shapes in bf16."""

from __future__ import annotations

import pytest
import torch

from gossamer.ops.activation import silu_mul
from gossamer.ops.norm import add_rms_norm, rms_norm
from gossamer.ops.rope import rope_write_kv

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
gpu = pytest.mark.gpu


def rel_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.isfinite().all()
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def norm64(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.double()
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight.double()


NORMS = [
    ((1, 48), torch.float32),
    ((3, 2, 33), torch.float32),
    ((5, 64), torch.float16),
    pytest.param((64, 2048), torch.bfloat16, marks=gpu),
    pytest.param((4096, 7168), torch.bfloat16, marks=gpu),
]


@pytest.mark.parametrize(("shape", "dtype"), NORMS)
def test_norms(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, residual = (torch.randn(shape, device=DEVICE).to(dtype) * 3 + 1 for _ in range(2))
    weight = torch.randn(shape[-1], device=DEVICE).to(dtype)
    before = x.clone()
    assert rel_rms(rms_norm(x, weight, 1e-5, backend="triton"), norm64(x, weight, 1e-5)) < TOLERANCE[dtype]
    total = residual + x
    normed = add_rms_norm(x, residual, weight, 1e-5, backend="triton")
    assert residual.equal(total)
    assert x.equal(before)
    assert rel_rms(normed, norm64(total, weight, 1e-5)) < TOLERANCE[dtype]
    again = total.clone()
    normed = add_rms_norm(x, again, weight, 1e-5, backend="reference")
    assert rel_rms(normed, norm64(again, weight, 1e-5)) < TOLERANCE[dtype]


def test_norm_of_zeros_of_no_rows_and_of_bad_input() -> None:
    weight = torch.ones(8, device=DEVICE)
    assert rms_norm(torch.empty(0, 8, device=DEVICE), weight, 1e-6, backend="triton").shape == (0, 8)
    assert rms_norm(torch.zeros(2, 8, device=DEVICE), weight, 1e-6, backend="triton").eq(0).all()
    with pytest.raises(ValueError, match="contiguous"):
        rms_norm(torch.zeros(8, 2, device=DEVICE).T, weight, 1e-6, backend="triton")
    with pytest.raises(ValueError, match="backend"):
        rms_norm(torch.zeros(2, 8), weight, 1e-6, backend="fastest")


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((0, 8), torch.float32),
        ((3, 2 * 37), torch.float32),
        ((2, 2 * 700), torch.float16),
        pytest.param((513, 2 * 768), torch.bfloat16, marks=gpu),
    ],
)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # the interpreter's
def test_silu_mul(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = (torch.randn(shape, device=DEVICE) * 4).to(dtype)
    if x.numel():
        x[0, 0] = -1000.0
    gate, up = x.double().chunk(2, -1)
    assert rel_rms(silu_mul(x, backend="triton"), gate * gate.sigmoid() * up) < TOLERANCE[dtype]


def rope_oracle(
    qkv: torch.Tensor, nq: int, nkv: int, d: int, cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor,
    norms: tuple[torch.Tensor, torch.Tensor] | None, full: bool, clip: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    q, k, v = qkv.double().view(-1, nq + 2 * nkv, d).split((nq, nkv, nkv), 1)
    if norms is not None:
        flat = (lambda x: x.flatten(1)) if full else (lambda x: x)
        q, k = norm64(flat(q), norms[0], 1e-6).view_as(q), norm64(flat(k), norms[1], 1e-6).view_as(k)
    if clip is not None:
        q, k, v = q.clamp(-clip, clip), k.clamp(-clip, clip), v.clamp(-clip, clip)
    half = cos.shape[-1] // 2
    c, s = cos.double()[positions, None, :half], sin.double()[positions, None, half:]

    def rotate(x: torch.Tensor) -> torch.Tensor:
        a, b = x[..., :half], x[..., half : 2 * half]
        return torch.cat((a * c - b * s, b * c + a * s, x[..., 2 * half :]), -1)

    return rotate(q), rotate(k), v


ROPES = [
    (5, 4, 2, 16, 16, "none", None, torch.float32),
    (3, 3, 1, 24, 8, "head", None, torch.float32),
    (4, 4, 4, 16, 16, "full", 0.7, torch.float32),
    (2, 8, 2, 16, 16, "head", None, torch.float16),
    pytest.param(1, 32, 4, 128, 128, "head", None, torch.bfloat16, marks=gpu),
    pytest.param(333, 32, 4, 128, 128, "head", None, torch.bfloat16, marks=gpu),
    pytest.param(65, 16, 16, 128, 128, "full", 2.0, torch.bfloat16, marks=gpu),
    pytest.param(40, 16, 2, 128, 64, "none", None, torch.bfloat16, marks=gpu),
]


@pytest.mark.parametrize("backend", ["triton", "reference"])
@pytest.mark.parametrize(("tokens", "nq", "nkv", "d", "rotary", "norm", "clip", "dtype"), ROPES)
def test_rope_write_kv(
    tokens: int, nq: int, nkv: int, d: int, rotary: int, norm: str, clip: float | None, dtype: torch.dtype, backend: str
) -> None:
    page_size, per_slot, slots = 4, -(-tokens // 4) + 2, 3
    qkv = torch.randn(tokens, (nq + 2 * nkv) * d, device=DEVICE).to(dtype)
    angle = torch.rand(per_slot * page_size, rotary // 2, device=DEVICE) * 6
    cos, sin = torch.cat((angle.cos(), angle.cos()), -1), torch.cat((-angle.sin(), angle.sin()), -1)
    positions = torch.arange(tokens, device=DEVICE, dtype=torch.int32) + 3
    token_slots = torch.full((tokens,), 1, device=DEVICE, dtype=torch.int32)
    token_slots[tokens // 2] = 2
    if tokens > 2:  # padding, with garbage in it
        token_slots[-1] = -1
        qkv[-1] = float("nan")
        positions[-1] = 10**6
    num_pages = per_slot * slots
    page_table = torch.randperm(num_pages, device=DEVICE, dtype=torch.int32).view(slots, per_slot)
    pages = [torch.full((num_pages, nkv, page_size, d), float("nan"), device=DEVICE, dtype=dtype) for _ in range(2)]
    q_out = torch.full((tokens, nq, d), float("nan"), device=DEVICE, dtype=dtype)
    widths = (nq * d, nkv * d) if norm == "full" else (d, d)
    norms = None if norm == "none" else [torch.rand(w, device=DEVICE).to(dtype) + 0.5 for w in widths]
    rope_write_kv(
        qkv, nq, nkv, d, cos, sin, positions, token_slots, page_table, *pages, q_out,
        q_norm=norms and norms[0], k_norm=norms and norms[1], norm_full=norm == "full", clip=clip, backend=backend,
    )  # fmt: skip
    live = token_slots >= 0
    q, k, v = rope_oracle(
        qkv[live], nq, nkv, d, cos, sin, positions[live].long(), norms and tuple(norms), norm == "full", clip
    )
    assert rel_rms(q_out[live], q) < TOLERANCE[dtype]
    assert q_out[~live].eq(0).all()
    at = positions[live].long()
    page = page_table[token_slots[live].long(), at // page_size].long()
    for stored, expected in zip(pages, (k, v), strict=True):
        assert rel_rms(stored[page, :, at % page_size], expected) < TOLERANCE[dtype]
        assert int((~stored.isnan()).sum()) == expected.numel()


def test_rope_write_kv_of_no_tokens_and_of_bad_shapes() -> None:
    table, ints = torch.zeros(8, 4, device=DEVICE), torch.zeros(0, dtype=torch.int32, device=DEVICE)
    page_table, pages = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE), torch.zeros(1, 1, 4, 4, device=DEVICE)
    args = (table, table, ints, ints, page_table, pages, pages.clone())
    empty = torch.empty(0, 2, 4, device=DEVICE)
    rope_write_kv(torch.empty(0, 16, device=DEVICE), 2, 1, 4, *args, empty, backend="triton")
    with pytest.raises(ValueError, match="packed columns"):
        rope_write_kv(torch.empty(0, 12, device=DEVICE), 2, 1, 4, *args, empty)

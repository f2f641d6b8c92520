"""What MiniMax-M3 asks of shared kernels: a clamped SwiGLU, norms finer than their rows, keys without values."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gossamer.ops.activation import silu_mul, silu_mul_fp8
from gossamer.ops.gemm import add_rms_norm_linear
from gossamer.ops.gemm_fp8 import fp8_moe_mlp, quantize_weight
from gossamer.ops.moe import interleave_gate_up, moe_mlp, moe_mlp_add_rms_norm, router
from gossamer.ops.moe import triton as moe_kernels
from gossamer.ops.norm import add_rms_norm, rms_norm
from gossamer.ops.quantize_fp8 import quantize_activation
from gossamer.ops.rope import rope_write_kv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
SWIGLU = (1.702, 1.5)  # many numbers reach the limit
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 6e-3}
BACKENDS = ["reference", "triton"]


@pytest.fixture(autouse=True)
def _seeded_and_poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh tensors hold NaN (floats) or a large number (ints): whatever is not written shows."""
    torch.manual_seed(0)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def gated(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As gpt-oss and MiniMax-M3 define it."""
    alpha, limit = SWIGLU
    gate, up = gate.double().clamp(max=limit), up.double().clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def oracle(x, weights, ids, gate, up, down) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    for t, k in (ids >= 0).nonzero().tolist():
        e, row = int(ids[t, k]), x[t].double()
        act = gated(gate[e].double() @ row, up[e].double() @ row)
        out[t] += float(weights[t, k]) * (down[e].double() @ act)
    return out


def rel_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.isfinite().all()
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def experts(num: int, hidden: int, inter: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    shapes = (inter, hidden), (inter, hidden), (hidden, inter)
    return tuple((2 * torch.randn(num, *shape, device=DEVICE) / shape[1] ** 0.5).to(dtype) for shape in shapes)


def spread(num_tokens: int, num_experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.rand(num_tokens, num_experts, device=DEVICE).argsort(-1)[:, :top_k].int().contiguous()
    return torch.rand(num_tokens, top_k, device=DEVICE), ids


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(0, 8), (3, 74), (2, 1400)])
def test_activation(shape: tuple[int, int], dtype: torch.dtype, backend: str) -> None:
    x = (3 * torch.randn(shape, device=DEVICE)).to(dtype)
    before = x.clone()
    found = silu_mul(x, swiglu=SWIGLU, backend=backend)
    assert rel_rms(found, gated(*x.chunk(2, -1))) < TOLERANCE[dtype]
    assert x.equal(before)
    q, scales = silu_mul_fp8(x, swiglu=SWIGLU, backend=backend)
    expected = quantize_activation(found, backend="reference")
    assert torch.equal(scales, expected[1])
    assert torch.equal(q.view(torch.uint8), expected[0].view(torch.uint8))


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_a_number_stays_so(backend: str) -> None:
    """A clamp must not hide it: whoever looks for it ends the request."""
    x = torch.randn(4, 32, device=DEVICE)
    x[1, 3] = x[2, 20] = NAN
    assert silu_mul(x, swiglu=SWIGLU, backend=backend).isnan().any(1).tolist() == [False, True, True, False]
    gate, up, down = experts(4, 32, 16, torch.float32)
    weights, ids = spread(4, 4, 2)
    for rows in (slice(0, 2), slice(0, 4)):
        given = x[rows], weights[rows], ids[rows], interleave_gate_up(gate, up), down
        found = moe_mlp(*given, swiglu=SWIGLU, backend=backend)
        assert found.isnan().all(1).tolist() == [False, True, True, False][rows]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 21])
def test_experts(num_tokens: int, backend: str) -> None:
    gate, up, down = experts(5, 48, 80, torch.float32)
    x, residual = torch.randn(2, num_tokens, 48, device=DEVICE)
    weights, ids = spread(num_tokens, 5, 3)
    ids[1::3] = -1
    w, expected = interleave_gate_up(gate, up), oracle(x, weights, ids, gate, up, down)
    assert rel_rms(moe_mlp(x, weights, ids, w, down, swiglu=SWIGLU, backend=backend), expected) < 1e-6
    norm, total = torch.rand(48, device=DEVICE), residual.double() + expected
    normed = moe_mlp_add_rms_norm(x, weights, ids, w, down, residual, norm, 1e-6, swiglu=SWIGLU, backend=backend)
    assert rel_rms(normed, total * (total.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm) < 1e-6


@pytest.mark.parametrize("num_tokens", [1, 3, 21])
def test_fp8_experts(num_tokens: int) -> None:
    """The kernels give what the reference does, whose products other tests prove."""
    gate, up, down = experts(5, 160, 144, torch.float32)
    quantised = [[quantize_weight(w) for w in part] for part in (gate, up, down)]
    (g, gs), (u, us), (d, ds) = ([torch.stack(x) for x in zip(*part, strict=True)] for part in quantised)
    w = torch.stack((g.view(torch.uint8), u.view(torch.uint8)), 2).flatten(1, 2).view(torch.float8_e4m3fn)
    tensors = w, torch.stack((gs, us), 1), d, ds
    x, (weights, ids) = torch.randn(num_tokens, 160, device=DEVICE), spread(num_tokens, 5, 3)
    run = [fp8_moe_mlp(x, weights, ids, *tensors, swiglu=SWIGLU, backend=backend) for backend in BACKENDS]
    assert rel_rms(run[1], run[0].double()) < 1e-3
    assert 0.001 < rel_rms(run[0], oracle(x, weights, ids, gate, up, down)) < 0.1
    assert rel_rms(fp8_moe_mlp(x, weights, ids, *tensors, backend="triton"), run[0].double()) > 0.1


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 33, 700])
@pytest.mark.parametrize("hopper", [True, False])
def test_experts_on_the_device(num_tokens: int, hopper: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe_kernels, "HOPPER_ROWS", 0 if hopper else 2**31)
    gate, up, down = experts(8, 512, 384, torch.bfloat16)
    x, (weights, ids) = torch.randn(num_tokens, 512, device=DEVICE).bfloat16(), spread(num_tokens, 8, 4)
    picked = sorted({0, num_tokens // 2, num_tokens - 1})
    expected = oracle(x[picked], weights[picked], ids[picked], gate, up, down)
    found = moe_mlp(x, weights, ids, interleave_gate_up(gate, up), down, swiglu=SWIGLU)
    assert rel_rms(found[picked], expected) < 5e-3
    quantised = [[quantize_weight(w) for w in part] for part in (gate, up, down)]
    (g, gs), (u, us), (d, ds) = ([torch.stack(x) for x in zip(*part, strict=True)] for part in quantised)
    w = torch.stack((g.view(torch.uint8), u.view(torch.uint8)), 2).flatten(1, 2).view(torch.float8_e4m3fn)
    found = fp8_moe_mlp(x, weights, ids, w, torch.stack((gs, us), 1), d, ds, swiglu=SWIGLU)
    assert rel_rms(found[picked], expected) < 0.1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_norms_in_fp32_over_narrower_rows(dtype: torch.dtype, backend: str) -> None:
    """1 + w in fp32: the result is rounded once, as `transformers` does it; in the rows' dtype 1 + w is not 1 + w."""
    x, residual = torch.randn(2, 2, 64, device=DEVICE).to(dtype)
    weight = 1.0 + 0.01 * torch.randn(64, device=DEVICE)

    def norm64(rows: torch.Tensor) -> torch.Tensor:
        rows = rows.double()
        return rows * (rows.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()

    found = rms_norm(x, weight, 1e-6, backend=backend)
    assert found.dtype == dtype
    assert (found.double() - norm64(x)).abs().max() <= norm64(x).abs().max() * torch.finfo(dtype).eps
    total = residual + x
    assert rel_rms(add_rms_norm(x, residual.clone(), weight, 1e-6, backend=backend), norm64(total)) < TOLERANCE[dtype]
    w = torch.randn(48, 64, device=DEVICE).to(dtype)
    product, summed, normed = add_rms_norm_linear(
        x, residual, weight, 1e-6, w, keep_normed=True, backend=backend, out_dtype=torch.float32
    )
    assert summed.equal(total)
    assert normed is not None
    assert rel_rms(normed, norm64(total)) < TOLERANCE[dtype]
    assert rel_rms(product, norm64(total) @ w.double().t()) < TOLERANCE[dtype]
    gates = torch.randn(8, 64, device=DEVICE)
    assert router(normed, gates, 2, renormalize=True, backend=backend)[0].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("num_heads", [1, 4])
def test_keys_without_values_from_columns_of_a_projection(num_heads: int, backend: str) -> None:
    num_tokens, dim, rotary, page = 5, 16, 8, 4
    projected = torch.randn(num_tokens, 7 + (num_heads + 1) * dim, device=DEVICE)
    columns = projected[:, 7:]
    q_norm, k_norm = torch.rand(2, dim, device=DEVICE)
    angle = torch.randn(12, rotary // 2, device=DEVICE)
    cos, sin = torch.cat((angle.cos(), angle.cos()), 1), torch.cat((-angle.sin(), angle.sin()), 1)
    positions = torch.tensor([3, 4, 5, 0, 11], dtype=torch.int32, device=DEVICE)
    slots = torch.tensor([0, 0, 0, -1, 1], dtype=torch.int32, device=DEVICE)
    table = torch.tensor([[5, 2, 0], [1, 3, 4]], dtype=torch.int32, device=DEVICE)
    pages = torch.full((6, 1, page, dim), NAN, device=DEVICE)
    q = torch.full((num_tokens, num_heads, dim), NAN, device=DEVICE)
    rope_write_kv(
        columns, num_heads, 1, dim, cos, sin, positions, slots, table, pages, None, q, q_norm=q_norm, k_norm=k_norm,
        eps=1e-6, backend=backend,
    )  # fmt: skip
    written = torch.zeros(6, page, dtype=torch.bool)
    for t, (slot, position) in enumerate(zip(slots.tolist(), positions.tolist(), strict=True)):
        if slot < 0:
            assert not q[t].any()
            continue
        heads = columns[t].double().view(num_heads + 1, dim)
        heads = heads * (heads.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
        heads = heads * torch.stack([q_norm] * num_heads + [k_norm]).double()
        a, b = heads[:, : rotary // 2].clone(), heads[:, rotary // 2 : rotary].clone()
        c, s = angle[position].double().cos(), angle[position].double().sin()
        heads[:, : rotary // 2], heads[:, rotary // 2 : rotary] = a * c - b * s, b * c + a * s
        at = int(table[slot, position // page]), position % page
        written[at] = True
        torch.testing.assert_close(pages[at[0], 0, at[1]].double(), heads[-1], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(q[t].double(), heads[:-1], rtol=1e-5, atol=1e-5)
    assert pages[:, 0].isnan().all(-1).cpu().equal(~written)

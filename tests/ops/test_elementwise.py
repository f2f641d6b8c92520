"""Norm, rotary embedding, activation and KV write against float64."""

from __future__ import annotations

import pytest
import torch

from gossamer.ops.activation import silu_mul
from gossamer.ops.kv_cache import write_kv
from gossamer.ops.norm import rms_norm
from gossamer.ops.rope import apply_rope

TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 6e-3}


def rel_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert not actual.isnan().any()
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 576), (7, 33), (3, 5, 64), (300, 576)])
def test_rms_norm_equals_float64(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x = (torch.randn(shape) * 3 + 1).to(dtype)
    weight = torch.randn(shape[-1]).to(dtype)
    expected = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    assert rel_rms(rms_norm(x, weight, 1e-5), expected) < TOLERANCE[dtype]


def test_rms_norm_of_no_rows_and_of_zeros() -> None:
    assert rms_norm(torch.empty(0, 8), torch.ones(8), 1e-6).shape == (0, 8)
    assert rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6).eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_tokens", [0, 1, 13])
def test_rope_rotates_pairs_of_the_two_halves(dtype: torch.dtype, num_tokens: int) -> None:
    x = torch.randn(num_tokens, 3, 16).to(dtype)
    angle = torch.randn(num_tokens, 1, 8, dtype=torch.float64)
    cos = torch.cat((angle.cos(), angle.cos()), -1).to(dtype)
    sin = torch.cat((-angle.sin(), angle.sin()), -1).to(dtype)
    first, second = x.double().chunk(2, -1)
    c, s = cos.double()[..., :8], sin.double()[..., 8:]
    expected = torch.cat((first * c - second * s, second * c + first * s), -1)
    assert rel_rms(apply_rope(x, cos, sin), expected) < TOLERANCE[dtype] if num_tokens else True


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0, 8), (1, 2), (9, 130)])
def test_silu_mul_equals_float64_and_keeps_its_input(dtype: torch.dtype, shape: tuple[int, int]) -> None:
    x = torch.randn(shape).to(dtype)
    before = x.clone()
    gate, up = x.double().chunk(2, -1)
    actual = silu_mul(x)
    assert actual.shape == gate.shape
    assert rel_rms(actual, gate * gate.sigmoid() * up) < TOLERANCE[dtype]
    assert x.equal(before)


@pytest.mark.parametrize("heads_first", [False, True])
def test_write_kv_fills_its_slots_and_zeroes_fresh_pages(heads_first: bool) -> None:
    num_pages, heads, page_size, dim = 4, 2, 4, 3
    outer = (heads, num_pages) if heads_first else (num_pages, heads)
    k_pages, v_pages = (torch.full((*outer, page_size, dim), torch.nan) for _ in range(2))
    if heads_first:
        k_pages, v_pages = k_pages.transpose(0, 1), v_pages.transpose(0, 1)
    k, v = torch.randn(3, heads, dim), torch.randn(3, heads, dim)
    where = [(2, 0), (2, 1), (1, 3)]
    slots = torch.tensor([page * page_size + offset for page, offset in where])
    write_kv(k, v, k_pages, v_pages, slots, torch.tensor([2]))
    for t, (page, offset) in enumerate(where):
        assert k_pages[page, :, offset].equal(k[t])
        assert v_pages[page, :, offset].equal(v[t])
    assert k_pages[2, :, 2:].eq(0).all()
    assert v_pages[2, :, 2:].eq(0).all()
    assert k_pages[0].isnan().all()
    assert k_pages[1, :, :3].isnan().all()


def test_an_op_without_a_kernel_refuses_other_devices() -> None:
    x = torch.empty(2, 8, device="meta")
    with pytest.raises(NotImplementedError, match="rms_norm has no kernel for meta"):
        rms_norm(x, x[0], 1e-6)

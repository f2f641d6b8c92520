"""Gated activations on the device: elementwise, bound by memory."""

import torch
import triton
import triton.language as tl

from gossamer.ops.dispatch import overlap_options
from gossamer.ops.quantize_fp8.triton import BLOCK as FP8_BLOCK
from gossamer.ops.quantize_fp8.triton import fp8_like, quantize_rows


@triton.jit
def gated_activation(gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr):
    """silu(gate) * up, or with a LIMIT what `ops.activation.silu_mul` says; fp32. NaN stays NaN."""
    # silu(x) = x sigmoid(x), written so that a large negative gate gives -0 and not 0 * inf.
    if LIMIT > 0.0:
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up)) + 1.0
    return gate / (1.0 + tl.exp(-ALPHA * gate)) * up


@triton.jit
def _silu_mul(gate, up, ALPHA: tl.constexpr, LIMIT: tl.constexpr, dtype: tl.constexpr):
    return gated_activation(gate.to(tl.float32), up.to(tl.float32), ALPHA, LIMIT).to(dtype)


@triton.jit
def _silu_mul_kernel(
    gate_up, out, numel, width, ALPHA: tl.constexpr, LIMIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < numel
    gate_at = at + (at // width) * width
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    gate = tl.load(gate_up + gate_at, valid, 0.0)
    up = tl.load(gate_up + gate_at + width, valid, 0.0)
    tl.store(out + at, _silu_mul(gate, up, ALPHA, LIMIT, out.dtype.element_ty), valid)


@triton.jit(do_not_specialize=["row_stride", "group_stride"])
def _silu_mul_fp8_kernel(
    gate_up, q, scales, num_rows, width, row_stride, group_stride, ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    ROWS: tl.constexpr, GROUP: tl.constexpr, UE8M0: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * GROUP + tl.arange(0, GROUP)
    valid = (row < num_rows)[:, None] & (column < width)[None, :]
    at = row[:, None].to(tl.int64) * width + column[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    gate = tl.load(gate_up + at + row[:, None].to(tl.int64) * width, valid, 0.0)
    up = tl.load(gate_up + at + (row[:, None].to(tl.int64) + 1) * width, valid, 0.0)
    value = _silu_mul(gate, up, ALPHA, LIMIT, gate_up.dtype.element_ty).to(tl.float32)
    code, scale = quantize_rows(value, UE8M0, q.dtype.element_ty)
    tl.store(q + at, code, valid)
    scale_at = row.to(tl.int64) * row_stride + tl.program_id(1) * group_stride
    tl.store(scales + scale_at, scale, row < num_rows)


def _check(gate_up: torch.Tensor) -> None:
    if gate_up.shape[-1] % 2 or not gate_up.is_contiguous():
        raise ValueError("silu_mul needs a contiguous tensor with an even last dimension")


def swiglu_options(swiglu: tuple[float, float] | None) -> dict[str, float]:
    """Keyword arguments of kernels that call `gated_activation`."""
    alpha, limit = swiglu or (1.0, 0.0)
    return {"ALPHA": alpha, "LIMIT": limit}


def silu_mul_fp8(
    gate_up: torch.Tensor, swiglu: tuple[float, float] | None = None, *, per_token: bool, ue8m0: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    _check(gate_up)
    num_rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    q, scales = fp8_like(gate_up[:, :width], per_token)
    if q.numel():
        group = triton.next_power_of_2(width) if per_token else FP8_BLOCK
        rows = max(1, min(4 if num_rows <= 512 else 16, 4096 // group))
        _silu_mul_fp8_kernel[(triton.cdiv(num_rows, rows), scales.shape[1])](
            gate_up, q, scales, num_rows, width, *scales.stride(), ROWS=rows, GROUP=group, UE8M0=ue8m0, num_warps=4,
            **swiglu_options(swiglu), **overlap_options(gate_up),
        )  # fmt: skip
    return q, scales


def silu_mul(gate_up: torch.Tensor, swiglu: tuple[float, float] | None = None) -> torch.Tensor:
    _check(gate_up)
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    if out.numel():
        block = 1024
        _silu_mul_kernel[(triton.cdiv(out.numel(), block),)](
            gate_up, out, out.numel(), width, BLOCK=block, num_warps=4, **swiglu_options(swiglu),
            **overlap_options(gate_up),
        )  # fmt: skip
    return out

"""RMSNorm on the device: one program a row, the row in registers; optionally the residual add before it."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.ops.dispatch import overlap_options


@triton.jit
def _rms_norm_kernel(
    x, residual, weight, out, width, eps, ADD: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    offsets = tl.arange(0, BLOCK)
    valid = offsets < width
    scale = tl.load(weight + offsets, valid, 0.0).to(tl.float32)
    at = tl.program_id(0).to(tl.int64) * width + offsets
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = tl.load(x + at, valid, 0.0).to(tl.float32)
    if ADD:
        # What is normalised is what is kept: the sum rounded to the residual's dtype.
        total = (row + tl.load(residual + at, valid, 0.0).to(tl.float32)).to(residual.dtype.element_ty)
        tl.store(residual + at, total, valid)
        row = total.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(row * row) / width + eps)
    tl.store(out + at, (row * inverse * scale).to(out.dtype.element_ty), valid)


def _launch(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, add: bool) -> torch.Tensor:
    width = x.shape[-1]
    if not (x.is_contiguous() and residual.is_contiguous() and weight.is_contiguous()) or weight.shape != (width,):
        raise ValueError(f"RMSNorm needs contiguous tensors and a weight of {width} elements")
    if residual.shape != x.shape:
        raise ValueError(f"residual {tuple(residual.shape)} is not of x's shape {tuple(x.shape)}")
    out = torch.empty_like(x)
    rows = x.numel() // width if width else 0
    if rows:
        block = triton.next_power_of_2(width)
        warps = min(16, max(1, block // 512))
        _rms_norm_kernel[(rows,)](
            x, residual, weight, out, width, eps, ADD=add, BLOCK=block, num_warps=warps, **overlap_options(x)
        )
    return out


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _launch(x, x, weight, eps, False)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return _launch(x, residual, weight, eps, True)

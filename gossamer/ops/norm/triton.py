"""RMSNorm on the device: one program a row, the row in registers; optionally the residual add before it."""

import torch
import triton
import triton.language as tl

from gossamer.ops.dispatch import overlap_options
from gossamer.ops.quantize_fp8.triton import BLOCK as FP8_BLOCK
from gossamer.ops.quantize_fp8.triton import fp8_like, quantize_rows


@triton.jit(do_not_specialize=["row_stride", "group_stride"])
def _rms_norm_kernel(
    x, residual, weight, out, q, scales, width, eps, groups, row_stride, group_stride,
    ADD: tl.constexpr, KEEP: tl.constexpr, GROUP: tl.constexpr, UE8M0: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """GROUP: 0, or how many normed numbers share an FP8 scale. KEEP: store the normed row."""
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
    normed = (row * inverse * scale).to(out.dtype.element_ty)
    if KEEP:
        tl.store(out + at, normed, valid)
    if GROUP:
        groups_of_row = tl.reshape(normed.to(tl.float32), [BLOCK // GROUP, GROUP])
        code, group_scale = quantize_rows(groups_of_row, UE8M0, q.dtype.element_ty)
        tl.store(q + at, tl.reshape(code, [BLOCK]), valid)
        group = tl.arange(0, BLOCK // GROUP)
        scale_at = tl.program_id(0).to(tl.int64) * row_stride + group * group_stride
        tl.store(scales + scale_at, group_scale, group < groups)


def _launch(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, out: torch.Tensor | None,
    quantized: tuple[torch.Tensor, torch.Tensor] | None = None, ue8m0: bool = False,
) -> None:  # fmt: skip
    """Writes what is given of the normed rows `out` and their FP8 form; what is absent is compiled out."""
    width = x.shape[-1]
    tensors = (x, weight) if residual is None else (x, weight, residual)
    if not all(t.is_contiguous() for t in tensors) or weight.shape != (width,):
        raise ValueError(f"RMSNorm needs contiguous tensors and a weight of {width} elements")
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual {tuple(residual.shape)} is not of x's shape {tuple(x.shape)}")
    if not x.numel():
        return
    block, group, groups = triton.next_power_of_2(width), 0, 0
    q, scales = quantized or (x, x)
    if quantized:
        groups, block = scales.shape[1], max(block, FP8_BLOCK)
        group = block if groups == 1 else FP8_BLOCK
    warps = min(16, max(1, block // 512))
    _rms_norm_kernel[(x.numel() // width,)](
        x, x if residual is None else residual, weight, x if out is None else out, q, scales, width, eps, groups,
        *(scales.stride() if quantized else (0, 0)), ADD=residual is not None, KEEP=out is not None, GROUP=group,
        UE8M0=ue8m0, BLOCK=block, num_warps=warps, **overlap_options(x),
    )  # fmt: skip


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    out = torch.empty_like(x)
    _launch(x, None, weight, eps, out)
    return out


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor | None = None
) -> torch.Tensor:
    out = torch.empty_like(x) if out is None else out
    _launch(x, residual, weight, eps, out)
    return out


def add_rms_norm_fp8(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, *,
    normed: torch.Tensor | None = None, per_token: bool = False, ue8m0: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """The FP8 form of the normed rows; they themselves go to `normed` if that is given."""
    q, scales = fp8_like(x, per_token)
    _launch(x, residual, weight, eps, normed, (q, scales), ue8m0)
    return q, scales

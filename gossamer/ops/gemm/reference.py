"""Torch reference of the products of few rows."""

import torch
import torch.nn.functional as F

from gossamer.ops.gemm_fp8 import reference as gemm_fp8
from gossamer.ops.norm.reference import add_rms_norm, rms_norm
from gossamer.ops.quantize_fp8 import reference as quantize_fp8


def few_row_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype,
    fp8: tuple[torch.Tensor, bool] | None = None,
) -> torch.Tensor:  # fmt: skip
    if fp8 is not None:
        q, scales = quantize_fp8.quantize_activation(x, ue8m0=fp8[1])
        return gemm_fp8.fp8_linear(q, scales, weight, fp8[0], bias, out_dtype=out_dtype, kind="block")
    if x.dtype == weight.dtype == out_dtype:
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(out_dtype)


def add_rms_norm_linear(
    x: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor, eps: float, weight: torch.Tensor,
    bias: torch.Tensor | None, out_dtype: torch.dtype, keep_normed: bool, fp8: tuple[torch.Tensor, bool] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    if residual is None:
        summed, normed = x, rms_norm(x, norm_weight, eps)
    else:
        summed = residual.clone()
        normed = add_rms_norm(x, summed, norm_weight, eps)
    return few_row_linear(normed, weight, bias, out_dtype, fp8), summed, normed if keep_normed else None

"""Torch reference of the products of few rows."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gossamer.ops.norm.reference import add_rms_norm, rms_norm


def few_row_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype
) -> torch.Tensor:
    if x.dtype == weight.dtype == out_dtype:
        return F.linear(x, weight, bias)
    return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(out_dtype)


def add_rms_norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    keep_normed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    if residual is None:
        summed, normed = x, rms_norm(x, norm_weight, eps)
    else:
        summed = residual.clone()
        normed = add_rms_norm(x, summed, norm_weight, eps)
    return few_row_linear(normed, weight, bias, out_dtype), summed, normed if keep_normed else None

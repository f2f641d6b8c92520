"""RMSNorm (Zhang and Sennrich 2019): y = x / sqrt(mean(x^2) + eps) * weight, computed in fp32."""

from __future__ import annotations

import torch

from gossamer.ops.dispatch import use_kernel
from gossamer.ops.norm import reference


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str = "auto") -> torch.Tensor:
    """Normalises the last dimension of `x` [..., D] by its root mean square and scales by `weight` [D]."""
    if use_kernel(x, backend, "rms_norm"):
        from gossamer.ops.norm import triton

        return triton.rms_norm(x, weight, eps)
    return reference.rms_norm(x, weight, eps)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str = "auto"
) -> torch.Tensor:
    """residual += x in place, then `rms_norm` of the sum.

    x, residual: [..., D], the residual stream in its own dtype: what is normalised is the rounded sum that it keeps.
    weight: [D]. Returns the normed rows in x's dtype.
    """
    if use_kernel(x, backend, "add_rms_norm"):
        from gossamer.ops.norm import triton

        return triton.add_rms_norm(x, residual, weight, eps)
    return reference.add_rms_norm(x, residual, weight, eps)

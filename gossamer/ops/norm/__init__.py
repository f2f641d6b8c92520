"""RMSNorm (Zhang and Sennrich 2019): y = x / sqrt(mean(x^2) + eps) * weight, computed in fp32."""

import torch

from gossamer.ops.dispatch import use_kernel
from gossamer.ops.norm import reference
from gossamer.ops.quantize_fp8 import quantize_activation


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


def add_rms_norm_fp8(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, *, keep_normed: bool = False,
    per_token: bool = False, ue8m0: bool = False, backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """`add_rms_norm` (`rms_norm` without a residual) and `quantize_activation` of its result in one launch.

    x, residual: [M, D]. Returns q E4M3 [M, D], scales fp32 [M, ceil(D / 128)] ([M, 1] with `per_token`), and, with
    `keep_normed`, the normed rows, which a router takes.
    """
    if use_kernel(x, backend, "add_rms_norm_fp8"):
        from gossamer.ops.norm import triton

        out = torch.empty_like(x) if keep_normed else None
        return *triton.add_rms_norm_fp8(x, residual, weight, eps, normed=out, per_token=per_token, ue8m0=ue8m0), out
    normed = (
        reference.rms_norm(x, weight, eps) if residual is None else reference.add_rms_norm(x, residual, weight, eps)
    )
    q, scales = quantize_activation(normed, per_token=per_token, ue8m0=ue8m0, backend=backend)
    return q, scales, normed if keep_normed else None

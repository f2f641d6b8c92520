"""Torch reference of RMSNorm."""

from __future__ import annotations

import torch
import torch.nn.functional as F

# Up to this many elements the CPU is bound by op launches: torch decomposes rms_norm into six of them.
_SMALL = 4096


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    if x.is_cpu and x.numel() <= _SMALL:
        # layer_norm has one fused CPU kernel, and [x, -x] has mean 0 and variance mean(x^2).
        both = torch.cat((x, -x), -1)
        return F.layer_norm(both, (both.shape[-1],), None, None, eps)[..., : x.shape[-1]] * weight
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return rms_norm(residual.add_(x), weight, eps).to(x.dtype)

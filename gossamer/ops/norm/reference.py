"""Torch reference of RMSNorm."""

import functools
import math

import torch
import torch.nn.functional as F

# Up to this many elements the CPU is bound by op launches: torch decomposes rms_norm into six of them.
_SMALL = 32768


@functools.cache
def _zero(dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(1, dtype=dtype)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    width = x.shape[-1]
    if weight.itemsize > x.itemsize:  # a finer weight: the product is rounded once
        return rms_norm(x.to(weight.dtype), weight, eps).to(x.dtype)
    if x.is_cpu and x.numel() == width:
        norm = torch.linalg.vector_norm(x, dtype=torch.promote_types(x.dtype, torch.float32)).item()
        return torch.addcmul(_zero(x.dtype), x, weight, value=1.0 / math.sqrt(norm * norm / width + eps))
    if x.is_cpu and x.numel() <= _SMALL:
        # layer_norm has one fused CPU kernel, and [x, -x] has mean 0 and variance mean(x^2).
        both = torch.cat((x, -x), -1)
        return F.layer_norm(both, (2 * width,), None, None, eps)[..., :width] * weight
    return F.rms_norm(x, (width,), weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    return rms_norm(residual.add_(x), weight, eps).to(x.dtype)

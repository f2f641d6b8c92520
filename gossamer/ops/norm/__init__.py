"""RMSNorm (Zhang and Sennrich 2019): y = x / sqrt(mean(x^2) + eps) * weight, computed in fp32."""

from __future__ import annotations

import torch

from gossamer.ops.dispatch import require_reference
from gossamer.ops.norm import reference


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str = "auto") -> torch.Tensor:
    """Normalises the last dimension of `x` [..., D] by its root mean square and scales by `weight` [D]."""
    require_reference(x, backend, "rms_norm")
    return reference.rms_norm(x, weight, eps)

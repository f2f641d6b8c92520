"""Matrix products with weight-only quantised weights: int8 per output channel, int4 per group of input channels."""

from __future__ import annotations

import torch

from gossamer.ops.dispatch import require_reference
from gossamer.ops.gemm_weight_only import reference
from gossamer.ops.gemm_weight_only.reference import (
    dequantize_int4,
    dequantize_int8,
    int4_supported,
    int8_supported,
    pack_int4,
    quantize_int4,
    quantize_int8,
)

__all__ = [
    "dequantize_int4",
    "dequantize_int8",
    "int4_linear",
    "int4_supported",
    "int8_linear",
    "int8_supported",
    "pack_int4",
    "quantize_int4",
    "quantize_int8",
]


def int8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """x W^T with W[n, k] = weight[n, k] * scale[n]; x [M, K], weight int8 [N, K], scale [N] of x's dtype."""
    require_reference(x, backend, "int8_linear")
    return reference.int8_linear(x, weight, scale)


def int4_linear(
    x: torch.Tensor, packed: torch.Tensor, scale_and_zero: torch.Tensor, group_size: int, *, backend: str = "auto"
) -> torch.Tensor:
    """x W^T with W[n, k] = (q[n, k] - 8) * scale[n, k // group] + zero[n, k // group].

    x [M, K]; `packed` from `pack_int4`; `scale_and_zero` [K / group_size, N, 2] of x's dtype.
    """
    require_reference(x, backend, "int4_linear")
    return reference.int4_linear(x, packed, scale_and_zero, group_size)

"""Matrix products with weight-only quantised weights: int8 per output channel, int4 per group of input channels."""

import torch

from gossamer.ops.dispatch import require_reference
from gossamer.ops.gemm_weight_only import reference
from gossamer.ops.gemm_weight_only.reference import (
    dequantize_int4,
    dequantize_int8,
    int4_supported,
    int8_exact_supported,
    int8_supported,
    pack_int4,
    pack_int8_exact,
    quantize_int4,
    quantize_int8,
)

__all__ = [
    "dequantize_int4",
    "dequantize_int8",
    "int4_linear",
    "int4_supported",
    "int8_exact_supported",
    "int8_linear",
    "int8_linear_exact",
    "int8_supported",
    "pack_int4",
    "pack_int8_exact",
    "quantize_int4",
    "quantize_int8",
]


def int8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """x W^T with W[n, k] = weight[n, k] * scale[n]; x [M, K], weight int8 [N, K], scale [N] of x's dtype."""
    require_reference(x, backend, "int8_linear")
    return reference.int8_linear(x, weight, scale)


def int8_linear_exact(
    x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor, *, backend: str = "auto"
) -> torch.Tensor:
    """`int8_linear` as products of integers, in fp32: x [M, K] is written as two 8-bit digits per row's largest value.

    `packed` from `pack_int8_exact`, scale fp32 [N]. What x loses is at most 2^-16 of its row's largest value, less
    than bf16 loses; the sums are exact. 1.7x as fast as `int8_linear` at one row of a vocabulary-sized weight.
    """
    require_reference(x, backend, "int8_linear_exact")
    return reference.int8_linear_exact(x, packed, scale)


def int4_linear(
    x: torch.Tensor, packed: torch.Tensor, scale_and_zero: torch.Tensor, group_size: int, *, backend: str = "auto"
) -> torch.Tensor:
    """x W^T with W[n, k] = (q[n, k] - 8) * scale[n, k // group] + zero[n, k // group].

    x [M, K]; `packed` from `pack_int4`; `scale_and_zero` [K / group_size, N, 2] of x's dtype.
    """
    require_reference(x, backend, "int4_linear")
    return reference.int4_linear(x, packed, scale_and_zero, group_size)

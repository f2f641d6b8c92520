"""What the CPU's own products are good for."""

import functools

import torch
import torch.nn.functional as F

# A wide copy of a weight is made in pieces of at most so many elements: they stay in memory that malloc keeps.
_PIECE = 1 << 22


@functools.cache
def multiplies_bf16() -> bool:
    """Whether oneDNN multiplies bf16 here (AVX-512, AMX, Arm's BF16).

    Elsewhere its bf16 products of more than some ten rows are 2 to 17 times slower than fp32 ones, the operands'
    conversion included.
    """
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def wide_products(x: torch.Tensor) -> bool:
    """Whether large products with x are better made in fp32: x is bf16, on a CPU that cannot multiply it."""
    return x.dtype == torch.bfloat16 and x.is_cpu and not multiplies_bf16()


def wide_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K] times the transpose of weight [N, K], plus bias [N], in fp32: [M, N] in x's dtype."""
    wide, rows = x.float(), max(1, _PIECE // weight.shape[1])
    out = x.new_empty(len(x), len(weight))
    for start in range(0, len(weight), rows):
        part = slice(start, start + rows)
        out[:, part] = F.linear(wide, weight[part].float(), None if bias is None else bias[part].float())
    return out

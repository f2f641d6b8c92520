"""Dense bf16 products on a CPU with the weight in oneDNN's blocked layout.

F.linear lays the weight out anew in every call: up to some 32 rows it takes 1.5 to 2 times as long.
"""

import torch

from gossamer.ops import cpu

# oneDNN may choose the layout by the number of rows; it is the same from 1 to 512 on the CPUs we measured.
_ROWS_HINT = 16


def packing_supported(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether products of `dtype` gain by packing here: bf16 on a CPU whose oneDNN computes in it."""
    return dtype == torch.bfloat16 and device.type == "cpu" and cpu.multiplies_bf16()


def pack_weight(weight: torch.Tensor) -> torch.Tensor:
    """The [N, K] weight as an opaque tensor for `packed_linear`: as many bytes, plus padding to whole blocks."""
    # oneDNN's tensors cannot be inference tensors.
    with torch.inference_mode(False), torch.no_grad():
        packed: torch.Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.clone(), _ROWS_HINT)
    return packed


def packed_linear(x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """x [M, K] times the transpose of the packed [N, K] weight, plus bias [N]: [M, N] in bf16, accumulated in fp32."""
    out: torch.Tensor = _linear(x, packed, bias, "none", [], "")
    return out


_linear = torch.ops.mkldnn._linear_pointwise.default

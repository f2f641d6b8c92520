"""Dynamic FP8 quantisation: q = round(x / scale), scale = amax / FP8's largest, of the numbers that share it.

The kernels round as the reference does, to the bit. Norm, activation and experts quantise in their own kernels.
"""

from typing import Literal

import torch

from gossamer.ops.dispatch import use_kernel
from gossamer.ops.quantize_fp8 import reference

FP8_BLOCK = 128
E4M3_MAX = 448.0
FP8_MAX = {torch.float8_e4m3fn: E4M3_MAX, torch.float8_e5m2: 57344.0}
Fp8Kind = Literal["block", "channel", "tensor"]
Quantized = tuple[torch.Tensor, torch.Tensor]


def quantize_activation(
    x: torch.Tensor, *, per_token: bool = False, ue8m0: bool = False, dtype: torch.dtype = torch.float8_e4m3fn,
    backend: str = "auto",
) -> Quantized:  # fmt: skip
    """x [M, K] -> q [M, K] of an FP8 `dtype` and fp32 scales [M, ceil(K / 128)], or [M, 1] with `per_token`.

    The largest number of a group becomes the largest of `dtype` (448 or 57344). A group of zeros has scale 1. What is
    NaN or infinite becomes NaN and has no part in its group's scale. ue8m0: scales are rounded up to powers of two.
    """
    _check_dtype(dtype)
    if use_kernel(x, backend, "quantize_activation"):
        from gossamer.ops.quantize_fp8 import triton

        return triton.quantize_activation(x, per_token=per_token, ue8m0=ue8m0, dtype=dtype)
    return reference.quantize_activation(x, per_token=per_token, ue8m0=ue8m0, dtype=dtype)


def quantize_weight(
    weight: torch.Tensor, *, kind: Fp8Kind = "block", ue8m0: bool = False, dtype: torch.dtype = torch.float8_e4m3fn,
    backend: str = "auto",
) -> Quantized:  # fmt: skip
    """weight [N, K] -> q [N, K] and the fp32 scales of what `kind` says shares one.

    "block": 128 x 128, scales [ceil(N / 128), ceil(K / 128)]; "channel": a row, [N, 1]; "tensor": all of it, [1, 1].
    Weights are quantised once, while they load: torch does it on every device.
    """
    _check_dtype(dtype)
    return reference.quantize_weight(weight, kind=kind, ue8m0=ue8m0, dtype=dtype)


def _check_dtype(dtype: torch.dtype) -> None:
    if dtype not in FP8_MAX:
        raise ValueError(f"{dtype} is none of {', '.join(map(str, FP8_MAX))}")

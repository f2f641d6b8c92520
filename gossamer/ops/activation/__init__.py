"""Gated activations of the MLP."""

import torch

from gossamer.ops.activation import reference
from gossamer.ops.dispatch import use_kernel
from gossamer.ops.quantize_fp8 import Quantized, quantize_activation


def silu_mul(
    gate_up: torch.Tensor, *, swiglu: tuple[float, float] | None = None, backend: str = "auto"
) -> torch.Tensor:
    """silu(gate) * up for `gate_up` [num_tokens, 2 * D] = gate || up; returns [num_tokens, D].

    swiglu: with (alpha, limit) it is gate * sigmoid(alpha * gate) * (up + 1), after gate was bounded by limit from
    above and up from both sides (gpt-oss, MiniMax-M3).
    """
    if use_kernel(gate_up, backend, "silu_mul"):
        from gossamer.ops.activation import triton

        return triton.silu_mul(gate_up, swiglu)
    return reference.silu_mul(gate_up, swiglu)


def silu_mul_fp8(
    gate_up: torch.Tensor, *, swiglu: tuple[float, float] | None = None, per_token: bool = False, ue8m0: bool = False,
    backend: str = "auto",
) -> Quantized:  # fmt: skip
    """`silu_mul` of gate_up [M, 2 * D] and `quantize_activation` of its result in one launch.

    Returns q E4M3 [M, D] and scales fp32 [M, ceil(D / 128)], or [M, 1] with `per_token`.
    """
    if use_kernel(gate_up, backend, "silu_mul_fp8"):
        from gossamer.ops.activation import triton

        return triton.silu_mul_fp8(gate_up, swiglu, per_token=per_token, ue8m0=ue8m0)
    return quantize_activation(reference.silu_mul(gate_up, swiglu), per_token=per_token, ue8m0=ue8m0, backend=backend)

"""FP8 (E4M3) products: quantisers, a linear layer and the routed MLP, accumulated in fp32 and promoted every 128 of K.

w ~ q * scale with scale = amax / 448 of the numbers that share it. See docs/techniques/fp8.md.
"""

from __future__ import annotations

import torch

from gossamer.ops.dispatch import require_reference
from gossamer.ops.gemm_fp8 import reference
from gossamer.ops.gemm_fp8.reference import E4M3_MAX, FP8_BLOCK, Fp8Kind

__all__ = [
    "E4M3_MAX",
    "FP8_BLOCK",
    "Fp8Kind",
    "fp8_linear",
    "fp8_moe_mlp",
    "quantize_activation",
    "quantize_weight",
]


def quantize_activation(
    x: torch.Tensor, *, per_token: bool = False, ue8m0: bool = False, backend: str = "auto"
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> q e4m3 [M, K] and fp32 scales [M, ceil(K / 128)], or [M, 1] with `per_token`.

    A group of zeros has scale 1; one with NaN or infinity becomes NaN where it was not finite and leaves other groups
    alone. ue8m0: scales are rounded up to powers of two.
    """
    require_reference(x, backend, "quantize_activation")
    return reference.quantize_activation(x, per_token=per_token, ue8m0=ue8m0)


def quantize_weight(weight: torch.Tensor, *, backend: str = "auto") -> tuple[torch.Tensor, torch.Tensor]:
    """weight [N, K] -> q e4m3 [N, K] and fp32 scales [ceil(N / 128), ceil(K / 128)] of 128 x 128 blocks."""
    return reference.quantize_weight(weight)


def fp8_linear(
    q: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    kind: Fp8Kind = "block",
    backend: str = "auto",
) -> torch.Tensor:
    """Quantised x [M, K] by weight [N, K]^T, plus bias [N] -> [M, N] of `out_dtype`.

    `kind` says what shares a scale: "block": scales [M, ceil(K / 128)] and weight_scales [ceil(N / 128),
    ceil(K / 128)]; "channel": [M, 1] and [N, 1]; "tensor": [M, 1] and [1, 1].
    """
    require_reference(q, backend, "fp8_linear")
    return reference.fp8_linear(q, scales, weight, weight_scales, bias, out_dtype=out_dtype, kind=kind)


def fp8_moe_mlp(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w_gate_up: torch.Tensor,
    gate_up_scales: torch.Tensor,
    w_down: torch.Tensor,
    down_scales: torch.Tensor,
    *,
    backend: str = "auto",
) -> torch.Tensor:
    """`ops.moe.moe_mlp` with E4M3 experts and activations: inputs of both products are quantised 1 x 128.

    x [num_tokens, hidden]; w_gate_up e4m3 [num_experts, 2 * inter, hidden], rows of gate and up in turn, with scales
    [num_experts, 2, ceil(inter / 128), ceil(hidden / 128)] of gate's blocks and up's; w_down e4m3 [num_experts, hidden,
    inter] with scales [num_experts, ceil(hidden / 128), ceil(inter / 128)]. Returns [num_tokens, hidden].
    """
    require_reference(x, backend, "fp8_moe_mlp")
    return reference.fp8_moe_mlp(x, topk_weights, topk_ids, w_gate_up, gate_up_scales, w_down, down_scales)

"""FP8 (E4M3) products: a linear layer and the routed MLP, accumulated in fp32 and promoted every 128 of K.

w ~ q * scale with scale = amax / 448 of the numbers that share it. See docs/techniques/fp8.md.
"""

from typing import cast

import torch

from gossamer.ops.dispatch import use_kernel
from gossamer.ops.gemm_fp8 import reference
from gossamer.ops.moe import MAX_EXPERTS, MAX_TOP_K
from gossamer.ops.norm.reference import add_rms_norm
from gossamer.ops.quantize_fp8 import (
    E4M3_MAX,
    FP8_BLOCK,
    FP8_MAX,
    Fp8Kind,
    Quantized,
    quantize_activation,
    quantize_weight,
)

__all__ = [
    "E4M3_MAX", "FP8_BLOCK", "Fp8Kind", "Quantized", "fp8_linear", "fp8_moe_mlp", "fp8_moe_mlp_add_rms_norm",
    "quantize_activation", "quantize_weight",
]  # fmt: skip


def fp8_linear(
    q: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor,
    bias: torch.Tensor | None = None, *, out_dtype: torch.dtype, kind: Fp8Kind = "block", backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """Quantised x [M, K] by weight [N, K]^T, plus bias [N] -> [M, N] of `out_dtype`.

    fp32 results keep all of fp32; for others FP8 tensor cores add, on Hopper in 14 bits within groups of 128.

    weight_scales, by `kind`: "block" [ceil(N / 128), ceil(K / 128)], "channel" [N, 1], "tensor" [1, 1]. scales:
    [M, ceil(K / 128)], or [M, 1] for whole rows. On a device K is a multiple of 16.
    """
    if not use_kernel(q, backend, "fp8_linear"):
        return reference.fp8_linear(q, scales, weight, weight_scales, bias, out_dtype=out_dtype, kind=kind)
    (num_rows, width), num_out = q.shape, weight.shape[0]
    groups = -(-width // FP8_BLOCK)
    expected = {"block": (-(-num_out // FP8_BLOCK), groups), "channel": (num_out, 1), "tensor": (1, 1)}[kind]
    _check_tensors("fp8_linear", (q, weight), (scales, weight_scales), bias)
    if weight.shape[1] != width or weight_scales.shape != expected or width % 16:
        raise ValueError(
            f"fp8_linear: q {tuple(q.shape)}, weight {tuple(weight.shape)} and its {kind} scales "
            f"{tuple(weight_scales.shape)} do not fit, or K is no multiple of 16"
        )
    if scales.shape not in ((num_rows, groups), (num_rows, 1)) or (bias is not None and bias.shape != (num_out,)):
        raise ValueError(f"fp8_linear: scales {tuple(scales.shape)} or the bias do not fit q {tuple(q.shape)}")
    from gossamer.ops.gemm_fp8 import triton

    return triton.fp8_linear(q, scales, weight, weight_scales, bias, out_dtype=out_dtype, kind=kind)


def fp8_moe_mlp(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, w_gate_up: torch.Tensor,
    gate_up_scales: torch.Tensor, w_down: torch.Tensor, down_scales: torch.Tensor, *,
    quantized: Quantized | None = None, swiglu: tuple[float, float] | None = None, backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """`ops.moe.moe_mlp` with FP8 experts and activations: inputs of both products are quantised 1 x 128.

    x [num_tokens, hidden]; w_gate_up FP8 [num_experts, 2 * inter, hidden], rows of gate and up in turn, with scales
    [num_experts, 2, ceil(inter / 128), ceil(hidden / 128)] of gate's blocks and up's; w_down FP8 [num_experts, hidden,
    inter] with scales [num_experts, ceil(hidden / 128), ceil(inter / 128)]. Returns [num_tokens, hidden].
    quantized: x as `quantize_activation` or a fused producer gives it; what lies between the products stays fp32.
    """
    tensors = (x, topk_weights, topk_ids, w_gate_up, gate_up_scales, w_down, down_scales)
    if not use_kernel(x, backend, "fp8_moe_mlp"):
        return reference.fp8_moe_mlp(*tensors, quantized, swiglu)
    _check_mlp(tensors, quantized)
    from gossamer.ops.gemm_fp8 import triton

    return cast("torch.Tensor", triton.fp8_moe_mlp(*tensors, quantized, swiglu=swiglu))


def fp8_moe_mlp_add_rms_norm(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, w_gate_up: torch.Tensor,
    gate_up_scales: torch.Tensor, w_down: torch.Tensor, down_scales: torch.Tensor, residual: torch.Tensor,
    norm_weight: torch.Tensor, eps: float, *, quantized: Quantized | None = None, quantize: bool = False,
    swiglu: tuple[float, float] | None = None, backend: str = "auto",
) -> torch.Tensor | Quantized:  # fmt: skip
    """`fp8_moe_mlp` and `ops.norm.add_rms_norm` of its result: residual += it in place, then the norm.

    Returns the normed rows or, to `quantize`, what `quantize_activation` makes of them.
    """
    tensors = (x, topk_weights, topk_ids, w_gate_up, gate_up_scales, w_down, down_scales)
    if not use_kernel(x, backend, "fp8_moe_mlp_add_rms_norm"):
        normed = add_rms_norm(reference.fp8_moe_mlp(*tensors, quantized, swiglu), residual, norm_weight, eps)
        return quantize_activation(normed, backend="reference") if quantize else normed
    _check_mlp(tensors, quantized)
    if not residual.is_contiguous() or residual.shape != x.shape or norm_weight.shape != x.shape[1:]:
        raise ValueError(f"residual {tuple(residual.shape)} or norm {tuple(norm_weight.shape)} for x {tuple(x.shape)}")
    from gossamer.ops.gemm_fp8 import triton

    return triton.fp8_moe_mlp(*tensors, quantized, residual, norm_weight, eps, quantize, swiglu)


def _check_mlp(tensors: tuple[torch.Tensor, ...], quantized: Quantized | None) -> None:
    x, topk_weights, topk_ids, w_gate_up, gate_up_scales, w_down, down_scales = tensors
    num_experts, hidden, inter = w_down.shape
    across, down = -(-inter // FP8_BLOCK), -(-hidden // FP8_BLOCK)
    values = (w_gate_up, w_down, *((quantized[0],) if quantized else ()))
    scales = (quantized[1] if quantized else topk_weights, gate_up_scales, down_scales, topk_weights)
    _check_tensors("fp8_moe_mlp", values, scales, x)
    if (
        w_gate_up.shape != (num_experts, 2 * inter, hidden)
        or gate_up_scales.shape != (num_experts, 2, across, down)
        or down_scales.shape != (num_experts, down, across)
        or x.shape[1] != hidden
        or (quantized is not None and (quantized[0].shape, quantized[1].shape) != (x.shape, (x.shape[0], down)))
    ):
        raise ValueError(f"fp8_moe_mlp: shapes {', '.join(str(tuple(t.shape)) for t in tensors)} do not fit")
    if topk_ids.dtype != torch.int32 or not topk_ids.is_contiguous():
        raise ValueError(f"fp8_moe_mlp: topk_ids are {topk_ids.dtype}, not contiguous int32")
    if hidden % 16 or inter % 16 or num_experts > MAX_EXPERTS or topk_ids.shape[1] > MAX_TOP_K:
        raise ValueError(
            f"fp8_moe_mlp: hidden {hidden} and inter {inter} must be multiples of 16, experts {num_experts} at most "
            f"{MAX_EXPERTS}, top-k {topk_ids.shape[1]} at most {MAX_TOP_K}"
        )


def _check_tensors(
    op: str, values: tuple[torch.Tensor, ...], scales: tuple[torch.Tensor, ...], dense: torch.Tensor | None
) -> None:
    if not all(t.is_contiguous() for t in (*values, *scales[1:], *(() if dense is None else (dense,)))):
        raise ValueError(f"{op}: all tensors must be contiguous")
    if scales[0].dim() != 2 or 1 not in scales[0].stride():
        raise ValueError(f"{op}: the scales of rows must be contiguous, or their transpose")
    if any(t.dtype not in FP8_MAX for t in values) or any(t.dtype != torch.float32 for t in scales):
        raise ValueError(f"{op}: FP8 values with fp32 scales, not {[t.dtype for t in (*values, *scales)]}")

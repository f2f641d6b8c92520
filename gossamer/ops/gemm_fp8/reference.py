"""Torch reference of the FP8 products: fp32 partial sums of 128 with their scales, in order."""

import torch

from gossamer.ops.activation.reference import gated_activation
from gossamer.ops.quantize_fp8.reference import quantize_activation

_BLOCK = 128


def fp8_linear(
    q: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor,
    bias: torch.Tensor | None = None, *, out_dtype: torch.dtype, kind: str,
) -> torch.Tensor:  # fmt: skip
    out = torch.zeros(q.shape[0], weight.shape[0], dtype=torch.float32, device=q.device)
    if kind == "block":
        row_scales = weight_scales.repeat_interleave(_BLOCK, 0)[: weight.shape[0]]
    for block, start in enumerate(range(0, q.shape[1], _BLOCK)):
        part = slice(start, start + _BLOCK)
        product = q[:, part].float() @ weight[:, part].float().t()
        product *= scales[:, min(block, scales.shape[1] - 1), None]
        if kind == "block":
            product *= row_scales[:, block]
        out += product
    if kind != "block":
        out *= weight_scales.view(1, -1)
    if bias is not None:
        out += bias.float()
    return out.to(out_dtype)


def fp8_moe_mlp(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, w_gate_up: torch.Tensor,
    gate_up_scales: torch.Tensor, w_down: torch.Tensor, down_scales: torch.Tensor,
    quantized: tuple[torch.Tensor, torch.Tensor] | None = None, swiglu: tuple[float, float] | None = None,
) -> torch.Tensor:  # fmt: skip
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    q, scales = quantized or quantize_activation(x)
    for expert in topk_ids.unique().tolist():
        if expert < 0:
            continue
        tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = (
            fp8_linear(q[tokens], scales[tokens], w, s, out_dtype=torch.float32, kind="block")
            for w, s in zip((w_gate_up[expert, 0::2], w_gate_up[expert, 1::2]), gate_up_scales[expert], strict=True)
        )
        inner = quantize_activation(gated_activation(gate, up, swiglu))
        y = fp8_linear(*inner, w_down[expert], down_scales[expert], out_dtype=torch.float32, kind="block")
        out.index_add_(0, tokens, y * topk_weights[tokens, slots].unsqueeze(1))
    return out.to(x.dtype)

"""Torch reference of the FP8 products: the same quantisation to the bit, fp32 partial sums of 128 with their scales."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F

Fp8Kind = Literal["block", "channel", "tensor"]

E4M3_MAX = 448.0
FP8_BLOCK = 128
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
"""A group so small that its scale were no normal number would divide by zero where denormals are flushed."""


def _scale(amax: torch.Tensor, ue8m0: bool) -> torch.Tensor:
    scale = torch.where(amax > 0, (amax / E4M3_MAX).clamp_min(_SMALLEST_SCALE), 1.0)
    if not ue8m0:
        return scale
    mantissa, exponent = torch.frexp(scale)
    # frexp's mantissa is in [0.5, 1): a power of two has 0.5 and is kept.
    return torch.where(scale.isfinite(), torch.ldexp(torch.ones_like(scale), exponent - (mantissa == 0.5).int()), scale)


def _round(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    # Clamped first: the conversion makes NaN of what rounds beyond 448, and keeps a NaN.
    return (x / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantize_activation(
    x: torch.Tensor, *, per_token: bool = False, ue8m0: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    (num_rows, width), x = x.shape, x.float()
    if per_token or not num_rows:
        amax = x.abs().amax(1, keepdim=True) if num_rows else x.new_empty(0, 1)
        if not per_token:
            amax = amax.expand(0, -(-width // FP8_BLOCK))
        scale = _scale(amax, ue8m0)
        return _round(x, scale[:, :1]), scale
    groups = F.pad(x, (0, -width % FP8_BLOCK)).view(num_rows, -1, FP8_BLOCK)
    scale = _scale(groups.abs().amax(2), ue8m0)
    q = _round(groups, scale.unsqueeze(2)).view(num_rows, -1)
    return q[:, :width].contiguous(), scale


def quantize_weight(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    num_out, width = weight.shape
    padded = F.pad(weight.float(), (0, -width % FP8_BLOCK, 0, -num_out % FP8_BLOCK))
    blocks = padded.unflatten(0, (-1, FP8_BLOCK)).unflatten(2, (-1, FP8_BLOCK))
    scale = _scale(blocks.abs().amax((1, 3)), False)
    q = _round(blocks, scale[:, None, :, None]).flatten(2, 3).flatten(0, 1)
    return q[:num_out, :width].contiguous(), scale


def fp8_linear(
    q: torch.Tensor,
    scales: torch.Tensor,
    weight: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_dtype: torch.dtype,
    kind: Fp8Kind,
) -> torch.Tensor:
    out = torch.zeros(q.shape[0], weight.shape[0], dtype=torch.float32, device=q.device)
    row_scales = weight_scales
    if kind == "block":
        row_scales = weight_scales.repeat_interleave(FP8_BLOCK, 0)[: weight.shape[0]]
    for block, start in enumerate(range(0, q.shape[1], FP8_BLOCK)):
        part = slice(start, start + FP8_BLOCK)
        product = q[:, part].float() @ weight[:, part].float().t()
        if kind == "block":
            product *= scales[:, block, None]
            product *= row_scales[:, block]
        out += product
    if kind != "block":
        out *= scales * row_scales.view(1, -1)
    if bias is not None:
        out += bias.float()
    return out.to(out_dtype)


def fp8_moe_mlp(
    x: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w_gate_up: torch.Tensor,
    gate_up_scales: torch.Tensor,
    w_down: torch.Tensor,
    down_scales: torch.Tensor,
) -> torch.Tensor:
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    q, scales = quantize_activation(x)
    for expert in topk_ids.unique().tolist():
        if expert < 0:
            continue
        tokens, slots = (topk_ids == expert).nonzero(as_tuple=True)
        gate, up = (
            fp8_linear(q[tokens], scales[tokens], w, s, out_dtype=x.dtype, kind="block")
            for w, s in zip((w_gate_up[expert, 0::2], w_gate_up[expert, 1::2]), gate_up_scales[expert], strict=True)
        )
        inner = quantize_activation(F.silu(gate) * up)
        y = fp8_linear(*inner, w_down[expert], down_scales[expert], out_dtype=x.dtype, kind="block")
        out.index_add_(0, tokens, y.float() * topk_weights[tokens, slots].unsqueeze(1))
    return out.to(x.dtype)

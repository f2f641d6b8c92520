"""Weight-only int8 and int4 on the CPU through torch's packed operators, and the quantisers that feed them."""

from __future__ import annotations

import torch

INT4_GROUP_SIZES = (32, 64, 128, 256)


def int8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    out: torch.Tensor = torch.ops.aten._weight_int8pack_mm(x, weight, scale)
    return out


def int4_linear(x: torch.Tensor, packed: torch.Tensor, scale_and_zero: torch.Tensor, group_size: int) -> torch.Tensor:
    out: torch.Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, group_size, scale_and_zero)
    return out


def int8_supported(out_features: int, in_features: int) -> bool:
    """Shapes that torch's int8 operator takes."""
    return out_features % 16 == 0 and in_features % 16 == 0


def int4_supported(out_features: int, in_features: int, group_size: int = 32) -> bool:
    """Shapes that torch's int4 operator takes."""
    return group_size in INT4_GROUP_SIZES and out_features % 16 == 0 and in_features % group_size == 0


def quantize_int8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric rounding per output channel. weight [N, K] -> int8 [N, K], fp32 scale [N]; a zero row is exact."""
    scale = weight.abs().amax(dim=1).float() / 127.0
    inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    q = (weight * inverse[:, None].to(weight.dtype)).round_().clamp_(-127, 127)
    return q.to(torch.int8), scale


def quantize_int4(weight: torch.Tensor, group_size: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Asymmetric round-to-nearest per group of `group_size` input channels.

    weight [N, K] -> q uint8 [N, K] in 0..15, scale and zero fp32 [N, K / group_size], in `int4_linear`'s convention.
    """
    groups = weight.float().unflatten(1, (-1, group_size))
    low, high = groups.aminmax(dim=2)
    scale = (high - low) / 15.0
    inverse = torch.where(scale > 0, 1.0 / scale, torch.zeros_like(scale))
    q = ((groups - low[..., None]) * inverse[..., None]).round_().clamp_(0, 15).to(torch.uint8)
    return q.flatten(1), scale, low + 8.0 * scale


def pack_int4(
    q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Packs q [N, K] (0..15) for `int4_linear`; returns packed, scale_and_zero [K / group_size, N, 2] of `dtype`."""
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(q.to(torch.int32), 1)
    return packed, torch.stack((scale.t(), zero.t()), dim=-1).to(dtype).contiguous()


def dequantize_int8(weight: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) * scale[:, None].to(dtype)


def dequantize_int4(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The [N, K] weights that unpacked q, scale, zero stand for."""
    group_size = q.shape[1] // scale.shape[1]
    groups = q.unflatten(1, (-1, group_size)).to(torch.float32) - 8.0
    return torch.addcmul(zero.float()[..., None], groups, scale.float()[..., None]).flatten(1).to(dtype)

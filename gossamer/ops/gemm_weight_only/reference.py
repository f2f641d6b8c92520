"""Weight-only int8 and int4 on the CPU through torch's packed operators, and the quantisers that feed them."""

import functools

import torch

INT4_GROUP_SIZES = (32, 64, 128, 256)


def int8_linear(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return torch._weight_int8pack_mm(x, weight, scale)


def int4_linear(x: torch.Tensor, packed: torch.Tensor, scale_and_zero: torch.Tensor, group_size: int) -> torch.Tensor:
    return torch._weight_int4pack_mm_for_cpu(x, packed, group_size, scale_and_zero)


def int8_linear_exact(x: torch.Tensor, packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    x = x.float()
    step = x.abs().amax(-1, keepdim=True).clamp_min_(1e-30).div_(127.0)
    scaled = x / step
    high = scaled.round()
    low = (scaled - high).mul_(_LOW).round_()
    digits = torch.cat((high, low)).add_(128.0).to(torch.uint8)
    product: torch.Tensor = _qlinear(
        digits, 1.0, 128, packed, scale, _zero_points(len(scale)), None, 1.0, 0, torch.float32, "none", [], ""
    )
    high, low = product.chunk(2)
    return high.add_(low, alpha=1.0 / _LOW).mul_(step)


# The second digit counts 254ths of a step of the first, which is off by half a step at most: both fit 8 bits.
_LOW = 254.0
_qlinear = torch.ops.onednn.qlinear_pointwise.default


@functools.cache
def _zero_points(size: int) -> torch.Tensor:
    with torch.inference_mode(False):
        return torch.zeros(size, dtype=torch.int64)


def pack_int8_exact(weight: torch.Tensor) -> torch.Tensor:
    """The int8 [N, K] weight in oneDNN's blocked layout, for `int8_linear_exact`."""
    with torch.inference_mode(False), torch.no_grad():
        packed: torch.Tensor = torch.ops.onednn.qlinear_prepack(weight.clone(), None)
    return packed


def int8_exact_supported(out_features: int, in_features: int) -> bool:
    """Without VNNI oneDNN adds pairs of products in 16 bits, which overflow."""
    return bool(torch.cpu._is_vnni_supported()) and out_features % 16 == 0 and in_features % 16 == 0


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
    return (weight * scale.float()[:, None]).to(dtype)


def dequantize_int4(q: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The [N, K] weights that unpacked q, scale, zero stand for."""
    group_size = q.shape[1] // scale.shape[1]
    groups = q.unflatten(1, (-1, group_size)).to(torch.float32) - 8.0
    return torch.addcmul(zero.float()[..., None], groups, scale.float()[..., None]).flatten(1).to(dtype)

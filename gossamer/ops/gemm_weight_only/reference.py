"""Weight-only int8 and int4 on the CPU through torch's packed operators."""

import functools

import torch


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

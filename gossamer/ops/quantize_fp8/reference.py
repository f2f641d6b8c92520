"""Torch reference of FP8 quantisation; the kernels give the same bits."""

import torch
import torch.nn.functional as F

_BLOCK = 128
_EXPONENT = 0x7F800000


def _quantize(
    x: torch.Tensor, dims: tuple[int, ...], ue8m0: bool, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """x fp32 in groups that `dims` span -> q in x's shape, scales with `dims` kept as 1."""
    limit = torch.finfo(dtype).max
    finite = x.isfinite()
    known = x.abs().where(finite, 0.0)
    amax = known.amax(dims, keepdim=True) if x.numel() else x.new_zeros([1 if d in dims else n for d, n in _dims(x)])
    # A power of two keeps tiny groups away from denormals and from infinite reciprocals.
    lift = torch.where(amax < 2.0**-100, 2.0**100, 1.0)
    # By a tensor: on a GPU torch divides by a number as a product with its reciprocal, which rounds twice.
    scale = amax * lift / amax.new_full((), limit)
    if ue8m0:
        scale = ((scale.view(torch.int32) + (_EXPONENT ^ 0x7FFFFFFF)) & _EXPONENT).view(torch.float32)
    scale = scale.where(amax > 0, 1.0)
    # The kernels' quotient has no negative zero.
    q = (x * lift / scale + 0.0).where(finite, float("nan")).to(dtype)
    # At least the smallest number: the scale itself may be too small for any.
    lowered = (scale / lift).view(torch.int32).clamp_min(1).view(torch.float32)
    return q, lowered.where(amax > 0, 1.0)


def _dims(x: torch.Tensor) -> list[tuple[int, int]]:
    """Dimensions counted from the end, with their sizes."""
    return [(d - x.ndim, n) for d, n in enumerate(x.shape)]


def quantize_activation(
    x: torch.Tensor, *, per_token: bool = False, ue8m0: bool = False, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    (num_rows, width), x = x.shape, x.float()
    if per_token:
        return _quantize(x, (-1,), ue8m0, dtype)
    groups = F.pad(x, (0, -width % _BLOCK)).view(num_rows, -(-width // _BLOCK), _BLOCK)
    q, scales = _quantize(groups, (-1,), ue8m0, dtype)
    return q.flatten(1)[:, :width].contiguous(), scales.squeeze(-1)


def quantize_weight(
    weight: torch.Tensor, *, kind: str = "block", ue8m0: bool = False, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    if kind != "block":
        return _quantize(weight.float(), (-1,) if kind == "channel" else (-2, -1), ue8m0, dtype)
    num_out, width = weight.shape
    padded = F.pad(weight.float(), (0, -width % _BLOCK, 0, -num_out % _BLOCK))
    blocks = padded.unflatten(0, (-1, _BLOCK)).unflatten(2, (-1, _BLOCK))
    q, scales = _quantize(blocks, (-3, -1), ue8m0, dtype)
    return q.flatten(2, 3).flatten(0, 1)[:num_out, :width].contiguous(), scales[:, 0, :, 0].contiguous()

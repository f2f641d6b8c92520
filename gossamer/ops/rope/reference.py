"""Torch reference of the rotary embedding."""

import torch

from gossamer.ops.kv_cache.reference import write_scaled
from gossamer.ops.norm.reference import rms_norm


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    rotary_dim = cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        return torch.cat((apply_rope(x[..., :rotary_dim], cos, sin), x[..., rotary_dim:]), -1)
    return x.roll(rotary_dim // 2, -1).mul_(sin).addcmul_(x, cos)


def rope_write_kv(
    qkv: torch.Tensor, num_q_heads: int, num_kv_heads: int, head_dim: int, cos: torch.Tensor, sin: torch.Tensor,
    positions: torch.Tensor, token_slots: torch.Tensor, page_table: torch.Tensor, k_pages: torch.Tensor,
    v_pages: torch.Tensor | None, q_out: torch.Tensor, *, k_scales: torch.Tensor | None, v_scales: torch.Tensor | None,
    q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float, norm_full: bool, clip: float | None,
    single: bool,
) -> None:  # fmt: skip
    live = token_slots >= 0
    heads = qkv.unflatten(1, (-1, head_dim))[live]
    q, k, v = heads.tensor_split((num_q_heads, num_q_heads + num_kv_heads), 1)
    if q_norm is not None and k_norm is not None:
        if norm_full:
            pairs = ((q, q_norm), (k, k_norm))
            q, k = (rms_norm(x.flatten(1), w, eps).view_as(x) if x.shape[1] else x for x, w in pairs)
        else:
            q, k = rms_norm(q, q_norm, eps), rms_norm(k, k_norm, eps)
    if clip is not None:
        q, k, v = (x.clamp(-clip, clip) for x in (q, k, v))
    slots, at = token_slots[live].long(), positions[live].long()
    cos, sin = (table[live] if table.ndim == 3 else table[at, None].to(qkv.dtype) for table in (cos, sin))
    q, k = (apply_rope(x, cos, sin) for x in (q, k))
    page_size = k_pages.shape[2]
    page = page_table[slots, at // page_size].long()
    for new, pages, scales in ((k, k_pages, k_scales), (v, v_pages, v_scales)):
        if pages is not None and scales is not None:
            write_scaled(new, pages, scales, page, at % page_size)
        elif pages is not None:
            pages[page, :, at % page_size] = new.to(pages.dtype)
    q_out.zero_()
    q_out[live] = q

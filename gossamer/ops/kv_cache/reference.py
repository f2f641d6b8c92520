"""Torch reference of the paged KV write."""

import torch

_SMALLEST_SCALE = 2.0**-40


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor,
    fresh_pages: torch.Tensor | None, k_scales: torch.Tensor | None = None, v_scales: torch.Tensor | None = None,
) -> None:  # fmt: skip
    page_size = k_pages.shape[2]
    for new, pages, scales in ((k, k_pages, k_scales), (v, v_pages, v_scales)):
        if scales is not None:
            write_scaled(new, pages, scales, slots // page_size, slots % page_size)
            continue
        if fresh_pages is not None:
            pages.index_fill_(0, fresh_pages, 0)
        by_head = pages.transpose(0, 1)
        if by_head.is_contiguous():
            by_head.flatten(1, 2).index_copy_(1, slots, new.transpose(0, 1))
        else:
            pages[slots // page_size, :, slots % page_size] = new


def write_kv_fp8(
    kv: torch.Tensor, positions: torch.Tensor, token_slots: torch.Tensor, page_table: torch.Tensor,
    k_pages: torch.Tensor, v_pages: torch.Tensor, k_scales: torch.Tensor, v_scales: torch.Tensor,
) -> None:  # fmt: skip
    live = token_slots >= 0
    at, page_size = positions[live].long(), k_pages.shape[2]
    page = page_table[token_slots[live].long(), at // page_size].long()
    for i, pages, scales in ((0, k_pages, k_scales), (1, v_pages, v_scales)):
        write_scaled(kv[live, i], pages, scales, page, at % page_size)


def page_scale(amax: torch.Tensor) -> torch.Tensor:
    """The smallest power of two, from 2^-40 on, with amax <= 448 * scale; fp32, for finite fp32 `amax`."""
    # 448 = 1.75 * 2^8: the exponent rises by one where the mantissa exceeds 0.75.
    bits = ((amax.view(torch.int32) + 0x1FFFFF) & 0x7F800000) - (8 << 23)
    return bits.view(torch.float32).clamp_min(_SMALLEST_SCALE)


def write_scaled(
    new: torch.Tensor, pages: torch.Tensor, scales: torch.Tensor, page: torch.Tensor, offset: torch.Tensor
) -> None:
    """Writes new [num_tokens, heads, head_dim] to these pages and offsets; whole pages are rewritten."""
    touched, index = torch.unique(page, return_inverse=True)
    num, (heads, page_size) = len(touched), pages.shape[1:3]
    new = new.float()
    magnitude = torch.where(new.isfinite(), new.abs(), 0.0).amax(-1)
    amax = torch.zeros(num, heads, device=new.device)
    amax.scatter_reduce_(0, index[:, None].expand(-1, heads), magnitude, "amax")
    first = torch.full((num,), page_size, device=new.device).scatter_reduce_(0, index, offset, "amin")
    # A page whose first token comes now owes nothing to its former owner.
    old = torch.where((first > 0)[:, None], scales[touched], 0.0)
    scale = torch.maximum(page_scale(amax), old)
    held = pages[touched].float() * (old / scale)[..., None, None]
    held.masked_fill_((torch.arange(page_size, device=new.device) >= first[:, None])[:, None, :, None], 0.0)
    held[index, :, offset] = torch.where(new.isfinite(), new / scale[index][..., None], torch.nan)
    pages[touched] = held.to(pages.dtype)
    scales[touched] = scale

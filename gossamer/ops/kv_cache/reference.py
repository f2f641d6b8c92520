"""Torch reference of the paged KV write."""

from __future__ import annotations

import torch


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    fresh_pages: torch.Tensor | None,
) -> None:
    page_size = k_pages.shape[2]
    for new, pages in ((k, k_pages), (v, v_pages)):
        if fresh_pages is not None:
            pages.index_fill_(0, fresh_pages, 0)
        by_head = pages.transpose(0, 1)
        if by_head.is_contiguous():
            by_head.flatten(1, 2).index_copy_(1, slots, new.transpose(0, 1))
        else:
            pages[slots // page_size, :, slots % page_size] = new

"""Torch reference of the paged KV write."""

from __future__ import annotations

import torch


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slot_rows: torch.Tensor,
    fresh_pages: torch.Tensor | None,
) -> None:
    if fresh_pages is not None:
        k_pages.index_fill_(0, fresh_pages, 0)
        v_pages.index_fill_(0, fresh_pages, 0)
    head_dim = k.shape[-1]
    k_pages.view(-1, head_dim).index_copy_(0, slot_rows, k.reshape(-1, head_dim))
    v_pages.view(-1, head_dim).index_copy_(0, slot_rows, v.reshape(-1, head_dim))

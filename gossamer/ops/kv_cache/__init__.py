"""Writing keys and values into the paged cache."""

from __future__ import annotations

import torch

from gossamer.ops.dispatch import require_reference
from gossamer.ops.kv_cache import reference


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    slots: torch.Tensor,
    fresh_pages: torch.Tensor | None = None,
    *,
    backend: str = "auto",
) -> None:
    """Stores new tokens' keys and values in place.

    k, v: [num_tokens, num_kv_heads, head_dim].
    k_pages, v_pages: [num_pages, num_kv_heads, page_size, head_dim], best with the heads outermost in memory.
    slots: int64 [num_tokens], page * page_size + offset of each token.
    fresh_pages: int64, the pages whose first token is among these; they are zeroed first, so that nothing a former
    owner left there (a NaN, say) ever meets a masked product.
    """
    require_reference(k, backend, "write_kv")
    reference.write_kv(k, v, k_pages, v_pages, slots, fresh_pages)

"""Sparse attention token by token (DeepSeek-V3.2): an indexer scores the past, each token attends to the best latents.

Index keys lie beside the latents: key_pages [num_pages, 1, page_size, index_dim]. A token's list `chosen` [top_k]
holds rows of the cache, page * page_size + offset, by rising position and -1 behind them: it serves every layer.
"""

import torch

from gossamer.ops.attention import DecodeWorkspace
from gossamer.ops.dispatch import use_kernel
from gossamer.ops.dsa import reference
from gossamer.ops.kv_cache import require_scales

__all__ = ["attend_chosen", "choose_tokens", "rope_write_index"]

Norm = tuple[torch.Tensor, torch.Tensor]
"""Weight and bias of a LayerNorm."""


def rope_write_index(
    q: torch.Tensor, key: torch.Tensor, weights: torch.Tensor, norm: Norm, eps: float, cos: torch.Tensor,
    sin: torch.Tensor, positions: torch.Tensor, token_slots: torch.Tensor, page_table: torch.Tensor,
    key_pages: torch.Tensor, q_out: torch.Tensor, weights_out: torch.Tensor, *, interleaved: bool,
    backend: str = "auto",
) -> None:  # fmt: skip
    """Rotated index queries into q_out, normed (LayerNorm) and rotated keys into their pages, weights copied.

    q [num_tokens, num_heads * index_dim], key [num_tokens, index_dim] and weights [num_tokens, num_heads] may be
    columns of projections: rows strided, each contiguous. The first rope_dim dimensions turn: cos, sin [max_position,
    rope_dim] by position, or for the reference also [num_tokens, 1, rope_dim]; interleaved: as for
    `ops.mla.rope_latents`. Padding (slot -1) writes no page and leaves zeros.
    """
    num_tokens, num_heads, dim = q_out.shape
    shapes = (num_tokens, num_heads * dim), (num_tokens, dim), (num_tokens, num_heads), (1, dim)
    if (q.shape, key.shape, weights.shape, key_pages.shape[1::2]) != shapes or cos.shape[-1] > dim:
        raise ValueError(f"q {[*q.shape]}, key {[*key.shape]}, pages {[*key_pages.shape]} differ from {[*q_out.shape]}")
    fixed = (*norm, cos, sin, positions, token_slots, page_table, key_pages, q_out, weights_out)
    if not all(t.is_contiguous() for t in fixed) or any(t.stride(1) != 1 for t in (q, key, weights)):
        raise ValueError("rope_write_index needs contiguous tensors, and of projections contiguous rows")
    run = reference.rope_write_index
    if use_kernel(q, backend, "rope_write_index"):
        from gossamer.ops.dsa import triton

        run = triton.rope_write_index
    run(
        q, key, weights, norm, eps, cos, sin, positions, token_slots, page_table, key_pages, q_out, weights_out,
        interleaved,
    )  # fmt: skip


def choose_tokens(
    q: torch.Tensor, weights: torch.Tensor, key_pages: torch.Tensor, page_table: torch.Tensor,
    token_slots: torch.Tensor, positions: torch.Tensor, chosen: torch.Tensor, *, max_seq_len: int,
    backend: str = "auto",
) -> None:  # fmt: skip
    """Fills `chosen` int32 [num_tokens, top_k] with the rows of the tokens up to each token's own that score best.

    Token s scores sum_h weights_h relu(q_h . k_s); a positive factor would change no choice. Equal scores: the earlier
    token. q [num_tokens, num_heads, index_dim], weights [num_tokens, num_heads]; no position reaches `max_seq_len`,
    which bounds the launches. Scores exist for a bounded number of tokens at a time; no host sync on a device.
    """
    run = reference.choose_tokens
    if use_kernel(q, backend, "choose_tokens"):
        from gossamer.ops.dsa import triton

        run = triton.choose_tokens
    run(q, weights, key_pages, page_table, token_slots, positions, chosen, max_seq_len)


def attend_chosen(
    q_latent: torch.Tensor, q_rope: torch.Tensor, pages: torch.Tensor, chosen: torch.Tensor,
    token_slots: torch.Tensor, positions: torch.Tensor, scale: float, out: torch.Tensor, *,
    scales: torch.Tensor | None = None, workspace: DecodeWorkspace | None, backend: str = "auto",
) -> None:  # fmt: skip
    """Absorbed attention (`ops.mla.latent_decode`) of every token to its list; tokens of padding get zeros."""
    require_scales(pages, pages, scales, scales)
    run = reference.attend_chosen
    if use_kernel(q_latent, backend, "attend_chosen"):
        from gossamer.ops.dsa import triton

        run = triton.attend_chosen
    run(q_latent, q_rope, pages, chosen, token_slots, positions, scale, out, scales, workspace)

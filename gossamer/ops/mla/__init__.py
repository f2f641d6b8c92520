"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434) over a paged cache of latents.

pages [num_pages, 1, page_size, kv_lora_rank + rope_dim]: a token's normed latent, then its rotated key. They are of the
queries' dtype, or FP8 (e4m3) with scales, fp32 [num_pages, 1]: what is stored times its page's scale. kv_b [num_heads,
nope_dim + v_dim, kv_lora_rank] makes a head's key and value of a latent.
"""

import torch

from gossamer.ops.attention import DecodeWorkspace, PrefillSequence
from gossamer.ops.dispatch import require_reference, use_kernel
from gossamer.ops.kv_cache import require_scales
from gossamer.ops.mla import reference

__all__ = ["latent_decode", "latent_prefill", "rope_latents", "rope_write_latents", "sequence_prefill", "write_latents"]


def rope_latents(
    q: torch.Tensor, kv: torch.Tensor, norm: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor, *,
    interleaved: bool, backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Queries with their last rope_dim dimensions rotated, and what the cache is to hold, [num_tokens, width].

    q [num_tokens, num_heads, nope_dim + rope_dim]; kv [num_tokens, kv_lora_rank + rope_dim], whose latent `norm`
    [kv_lora_rank] normalises (RMSNorm). cos, sin as for `ops.rope.apply_rope`. interleaved: neighbours rotate together;
    they leave as halves, in queries and keys alike, so that products stay the same.
    """
    require_reference(q, backend, "rope_latents")
    return reference.rope_latents(q, kv, norm, eps, cos, sin, interleaved)


def write_latents(
    latents: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, fresh_pages: torch.Tensor | None, *,
    scales: torch.Tensor | None = None, backend: str = "auto",
) -> None:  # fmt: skip
    """Stores new tokens' rows [num_tokens, width]; slots, fresh_pages and scales as for `ops.kv_cache.write_kv`."""
    require_reference(latents, backend, "write_latents")
    require_scales(pages, pages, scales, scales)
    reference.write_latents(latents, pages, slots, fresh_pages, scales)


def sequence_prefill(
    q: torch.Tensor, kv_b: torch.Tensor, pages: torch.Tensor, sequences: list[PrefillSequence], scale: float,
    out: torch.Tensor, *, scales: torch.Tensor | None = None, backend: str = "auto",
) -> None:  # fmt: skip
    """Causal attention of each sequence's new tokens to its pages, their own (already written) latents included.

    q [num_tokens, num_heads, nope_dim + rope_dim], out [num_tokens, num_heads, v_dim], packed; the rest stays as it is.
    """
    require_reference(q, backend, "sequence_prefill")
    require_scales(pages, pages, scales, scales)
    reference.sequence_prefill(q, kv_b, pages, sequences, scale, out, scales)


def rope_write_latents(
    q: torch.Tensor, kv: torch.Tensor, norm: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor,
    positions: torch.Tensor, token_slots: torch.Tensor, page_table: torch.Tensor, pages: torch.Tensor,
    q_out: torch.Tensor, *, interleaved: bool, scales: torch.Tensor | None = None, backend: str = "auto",
) -> None:  # fmt: skip
    """`rope_latents` into q_out, and its latents into their pages, in one pass.

    q and kv may be columns of one projection: rows strided, each contiguous. cos, sin: tables by position; positions,
    token_slots, page_table, padding and FP8 pages as for `ops.rope.rope_write_kv`.
    """
    require_scales(pages, pages, scales, scales)
    (num_tokens, num_heads, head_dim), width = q_out.shape, kv.shape[1]
    if q.shape != (num_tokens, num_heads * head_dim) or pages.shape[1] != 1 or pages.shape[3] != width:
        raise ValueError(f"q {[*q.shape]}, q_out {[*q_out.shape]}, kv {[*kv.shape]}, pages {[*pages.shape]} differ")
    if (
        cos.shape != sin.shape
        or cos.shape[-1] % 2
        or norm.shape[0] + cos.shape[-1] != width
        or q.stride(1) + kv.stride(1) != 2
    ):
        raise ValueError(f"a latent of {norm.shape[0]} and {cos.shape[-1]} rotated are not the {width} of a page")
    if not all(t.is_contiguous() for t in (norm, cos, sin, positions, token_slots, page_table, pages, q_out)):
        raise ValueError("rope_write_latents needs contiguous tensors")
    run = reference.rope_write_latents
    if use_kernel(q, backend, "rope_write_latents"):
        from gossamer.ops.mla import triton

        run = triton.rope_write_latents
    run(
        q, kv, norm, eps, cos, sin, positions, token_slots, page_table, pages, q_out, interleaved=interleaved,
        scales=scales,
    )  # fmt: skip


def latent_decode(
    q_latent: torch.Tensor, q_rope: torch.Tensor, pages: torch.Tensor, page_table: torch.Tensor, slots: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, out: torch.Tensor, *, scales: torch.Tensor | None = None,
    workspace: DecodeWorkspace | None, max_seq_len: int, backend: str = "auto",
) -> None:  # fmt: skip
    """Absorbed attention of one new token a row: scores over a page's whole width, values its latents; no host sync.

    q_latent (queries times their head's key weights), out [num_rows, num_heads, kv_lora_rank]; q_rope [num_rows,
    num_heads, rope_dim], rows and heads strided. The rest, padding and errors as for `ops.attention.paged_decode`.
    """
    require_scales(pages, pages, scales, scales)
    run = reference.latent_decode
    if use_kernel(q_latent, backend, "latent_decode"):
        from gossamer.ops.mla import triton

        run = triton.latent_decode
    run(
        q_latent, q_rope, pages, page_table, slots, seq_lens, scale, out, scales=scales, workspace=workspace,
        max_seq_len=max_seq_len,
    )  # fmt: skip


def latent_prefill(
    q: torch.Tensor, kv_b: torch.Tensor, pages: torch.Tensor, page_table: torch.Tensor, slots: torch.Tensor,
    cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor, num_context: int, max_q_len: int, scale: float,
    out: torch.Tensor, *, scales: torch.Tensor | None = None, backend: str = "auto",
) -> None:  # fmt: skip
    """Expanded attention of each row's new tokens to all of its pages, where their latents already are; no host sync.

    q [num_tokens, num_heads, nope_dim + rope_dim]; out [num_tokens, num_heads, v_dim]. `num_context` is at least the
    sum of seq_lens: the rows' latents are gathered and expanded in pieces of bounded size. The rest, padding and errors
    as for `ops.attention.paged_prefill`.
    """
    require_scales(pages, pages, scales, scales)
    run = reference.latent_prefill
    if use_kernel(q, backend, "latent_prefill"):
        from gossamer.ops.mla import triton_prefill

        run = triton_prefill.latent_prefill
    run(q, kv_b, pages, page_table, slots, cu_seqlens_q, seq_lens, num_context, max_q_len, scale, out, scales=scales)

"""Rotary position embedding (Su et al. 2021) in the rotate-half layout of Hugging Face checkpoints."""

import torch

from gossamer.ops.dispatch import require_reference, use_kernel
from gossamer.ops.kv_cache import require_scales
from gossamer.ops.rope import reference


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Rotates the first rotary_dim dimensions of `x` [num_tokens, num_heads, head_dim] by per-token angles.

    `cos`, `sin`: [num_tokens, 1, rotary_dim] with both halves filled; the first half of `sin` carries the minus sign of
    rotate-half, so that y = x * cos + roll(x, rotary_dim / 2) * sin.
    """
    require_reference(x, backend, "apply_rope")
    return reference.apply_rope(x, cos, sin)


def rope_write_kv(
    qkv: torch.Tensor, num_q_heads: int, num_kv_heads: int, head_dim: int, cos: torch.Tensor, sin: torch.Tensor,
    positions: torch.Tensor, token_slots: torch.Tensor, page_table: torch.Tensor, k_pages: torch.Tensor,
    v_pages: torch.Tensor | None, q_out: torch.Tensor, *, k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None, q_norm: torch.Tensor | None = None, k_norm: torch.Tensor | None = None,
    eps: float = 1e-6, norm_full: bool = False, clip: float | None = None, single: bool = False, backend: str = "auto",
) -> None:  # fmt: skip
    """From the packed projection to rotated queries and to keys and values in their pages, in one pass.

    In this order: RMSNorm of queries and keys, clamp of all three to [-clip, clip], rotation of queries and keys.

    Args:
        qkv: [num_tokens, (num_q_heads + 2 * num_kv_heads) * head_dim], queries || keys || values: each row contiguous.
        cos, sin: tables [max_position, rotary_dim] in `apply_rope`'s layout, for the reference also the tokens' own
            [num_tokens, 1, rotary_dim]; dimensions from rotary_dim on pass unrotated.
        positions, token_slots: int [num_tokens]. A token of slot -1 is padding: no page changes, its queries are zero.
        page_table: int [num_slots, max_pages].
        k_pages, v_pages: [num_pages, num_kv_heads, page_size, head_dim], written in place. Without `v_pages` there are
            no values, as of an indexer.
        q_out: [num_tokens, num_q_heads, head_dim], written. There may be no queries.
        k_scales, v_scales: of FP8 pages, which are written as `ops.kv_cache.write_kv_fp8` says.
        q_norm, k_norm: norm weights, both or neither: [head_dim], applied per head; with `norm_full` of q's and k's
            whole width, normalised over all heads at once (OLMoE).
        single: no two of the tokens share a page, which FP8 pages are then written in one launch for.
    """
    num_tokens, num_heads = qkv.shape[0], num_q_heads + num_kv_heads * (1 if v_pages is None else 2)
    width = num_heads * head_dim
    if qkv.shape[-1] != width or q_out.shape != (num_tokens, num_q_heads, head_dim):
        raise ValueError(f"qkv {tuple(qkv.shape)} or q_out {tuple(q_out.shape)} does not match {width} packed columns")
    values = k_pages if v_pages is None else v_pages
    if k_pages.shape != values.shape or k_pages.shape[1] != num_kv_heads or k_pages.shape[3] != head_dim:
        raise ValueError(f"pages {[*k_pages.shape]}, {[*values.shape]} do not hold {num_kv_heads} x {head_dim}")
    if (q_norm is None) != (k_norm is None) or cos.shape != sin.shape or cos.shape[-1] > head_dim or cos.shape[-1] % 2:
        raise ValueError("q_norm and k_norm come together; cos and sin have one even width of at most head_dim")
    require_scales(k_pages, values, k_scales, v_scales)
    tensors = (cos, sin, positions, token_slots, page_table, k_pages, values, q_out)
    if not all(t.is_contiguous() for t in tensors) or qkv.stride(1) != 1:
        raise ValueError("rope_write_kv needs contiguous tensors, and rows of qkv")
    run = reference.rope_write_kv
    if use_kernel(qkv, backend, "rope_write_kv"):
        from gossamer.ops.rope import triton

        run = triton.rope_write_kv
    run(
        qkv, num_q_heads, num_kv_heads, head_dim, cos, sin, positions, token_slots, page_table, k_pages, v_pages, q_out,
        k_scales=k_scales, v_scales=v_scales, q_norm=q_norm, k_norm=k_norm, eps=eps, norm_full=norm_full, clip=clip,
        single=single,
    )  # fmt: skip

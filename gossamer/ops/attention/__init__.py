"""MHA/GQA/MQA over the paged KV cache: variable-length chunked prefill, and batched decode.

One page holds `page_size` tokens: k_pages, v_pages [num_pages, num_kv_heads, page_size, head_dim].
"""

from __future__ import annotations

import torch

from gossamer.ops.attention import reference
from gossamer.ops.attention.reference import DecodeGroup, PrefillSequence, plan_decode, plan_prefill
from gossamer.ops.dispatch import require_reference

__all__ = ["DecodeGroup", "PrefillSequence", "decode_attention", "plan_decode", "plan_prefill", "prefill_attention"]


def prefill_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    sequences: list[PrefillSequence],
    scale: float,
    out: torch.Tensor,
    *,
    backend: str = "auto",
) -> None:
    """Causal attention of each sequence's new tokens to its cached prefix and to themselves; no padding.

    q [num_tokens, num_q_heads, head_dim]; k, v [num_tokens, num_kv_heads, head_dim] of the same packed tokens; `out`
    like q. Rows outside the sequences are left alone.
    """
    require_reference(q, backend, "prefill_attention")
    reference.prefill_attention(q, k, v, k_pages, v_pages, sequences, scale, out)


def decode_attention(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    groups: list[DecodeGroup],
    scale: float,
    out: torch.Tensor,
    *,
    backend: str = "auto",
) -> None:
    """One new token per sequence attends to its pages, its own (already written) key included.

    q, out: [batch, num_q_heads, head_dim]. Each group is a set of rows with about as many pages each.
    """
    require_reference(q, backend, "decode_attention")
    reference.decode_attention(q, k_pages, v_pages, groups, scale, out)

"""MHA/GQA/MQA over the paged KV cache: variable-length chunked prefill, and batched decode.

One page holds `page_size` tokens: k_pages, v_pages [num_pages, num_kv_heads, page_size, head_dim], of q's dtype or of
FP8 (e4m3) with k_scales, v_scales, fp32 [num_pages, num_kv_heads]: a key is its stored number times its page's scale.
"""

import torch

from gossamer.ops.attention import reference
from gossamer.ops.attention.reference import DecodeGroup, PrefillSequence, plan_decode, plan_prefill
from gossamer.ops.attention.workspace import DecodeWorkspace
from gossamer.ops.dispatch import require_reference, use_kernel
from gossamer.ops.kv_cache import require_scales

__all__ = [
    "DecodeGroup", "DecodeWorkspace", "PrefillSequence", "decode_attention", "paged_decode", "paged_prefill",
    "plan_decode", "plan_prefill", "prefill_attention",
]  # fmt: skip


def prefill_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, sequences: list[PrefillSequence], scale: float,
    out: torch.Tensor, *, k_scales: torch.Tensor | None = None, v_scales: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:  # fmt: skip
    """Causal attention of each sequence's new tokens to its pages, their own (already written) keys included.

    q, out: contiguous [num_tokens, num_q_heads, head_dim], sequences packed without padding. Rows outside them are
    left alone.
    """
    require_reference(q, backend, "prefill_attention")
    require_scales(k_pages, v_pages, k_scales, v_scales)
    reference.prefill_attention(q, k_pages, v_pages, sequences, scale, out, k_scales, v_scales)


def decode_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, groups: list[DecodeGroup], scale: float,
    out: torch.Tensor, *, k_scales: torch.Tensor | None = None, v_scales: torch.Tensor | None = None,
    backend: str = "auto",
) -> None:  # fmt: skip
    """One new token per sequence attends to its pages, its own (already written) key included.

    q, out: [batch, num_q_heads, head_dim]. Each group is a set of rows with about as many pages each.
    """
    require_reference(q, backend, "decode_attention")
    require_scales(k_pages, v_pages, k_scales, v_scales)
    reference.decode_attention(q, k_pages, v_pages, groups, scale, out, k_scales, v_scales)


def paged_decode(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, page_table: torch.Tensor, slots: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, out: torch.Tensor, *, out_scales: torch.Tensor | None = None,
    window: int | None = None, sinks: torch.Tensor | None = None, k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None, workspace: DecodeWorkspace | None = None, max_seq_len: int,
    backend: str = "auto",
) -> None:  # fmt: skip
    """One new token per row attends to its pages, its own (already written) key included; no host sync.

    q, out [num_rows, num_q_heads, head_dim]; k_pages, v_pages [num_pages, num_kv_heads, page_size, head_dim];
    int32: page_table [num_slots, max_pages], slots and seq_lens [num_rows] (slot -1 or length 0: padding, out is 0).
    A token sees `window` tokens, itself included. sinks [num_q_heads]: a further logit of each head's softmax, without
    a value. out_scales: fp32 [num_rows, num_q_heads], given where out is to be E4M3: what `quantize_activation` makes
    of the result in q's dtype; head_dim is 128. No seq_len exceeds `max_seq_len`, which bounds the launch. On a
    device the metadata must not come from a kernel that lets its successor start early. The kernel needs a
    workspace; its results do not depend on the order in which programs finish. Raises ValueError for shapes, dtypes
    or layouts it does not serve.
    """
    require_scales(k_pages, v_pages, k_scales, v_scales)
    if not use_kernel(q, backend):
        implementation = reference.paged_decode
    else:
        from gossamer.ops.attention import triton_decode

        implementation = triton_decode.paged_decode
    implementation(
        q, k_pages, v_pages, page_table, slots, seq_lens, scale, out, out_scales=out_scales,
        window=window, sinks=sinks, k_scales=k_scales, v_scales=v_scales, workspace=workspace, max_seq_len=max_seq_len,
    )  # fmt: skip


def paged_prefill(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, page_table: torch.Tensor, slots: torch.Tensor,
    cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor, max_q_len: int, scale: float, out: torch.Tensor, *,
    out_scales: torch.Tensor | None = None, window: int | None = None, sinks: torch.Tensor | None = None,
    k_scales: torch.Tensor | None = None, v_scales: torch.Tensor | None = None, num_context: int | None = None,
    backend: str = "auto",
) -> None:  # fmt: skip
    """Causal attention of each row's new tokens to all of its pages, where their keys already are; no host sync.

    q, out [num_tokens, num_q_heads, head_dim], rows packed: row r holds tokens cu_seqlens_q[r] .. cu_seqlens_q[r + 1]
    - 1 (int32 [num_rows + 1]), the last of which has position seq_lens[r] - 1. Rows may be empty or of one token;
    tokens beyond cu_seqlens_q[num_rows] are padding, for which out is 0. `max_q_len` bounds a row's tokens. With a
    `num_context` of at least the sum of seq_lens, of rows with tokens, FP8 pages may be widened to q's dtype, once and
    exactly, for a kernel that wants them so. The rest (out_scales are [num_tokens, num_q_heads]), and the errors, as
    for `paged_decode`.
    """
    require_scales(k_pages, v_pages, k_scales, v_scales)
    if not use_kernel(q, backend):
        implementation = reference.paged_prefill
    else:
        from gossamer.ops.attention import triton

        implementation = triton.paged_prefill
    implementation(
        q, k_pages, v_pages, page_table, slots, cu_seqlens_q, seq_lens, max_q_len, scale, out,
        out_scales=out_scales, window=window, sinks=sinks, k_scales=k_scales, v_scales=v_scales,
        num_context=num_context,
    )  # fmt: skip

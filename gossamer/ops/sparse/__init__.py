"""Block-sparse attention over the paged KV cache: compress -> score -> select -> attend -> merge.

A block is a page, or some. Compressed entries lie beside the pages: planes [num_pages, num_kv_heads, entries,
head_dim], an entry with the page of its last token, so that whoever shares a page shares what was made of it.
"""

import torch

from gossamer.ops.attention import DecodeWorkspace
from gossamer.ops.dispatch import use_kernel
from gossamer.ops.kv_cache import require_scales
from gossamer.ops.sparse import reference
from gossamer.ops.sparse.selection import Entries, Selection, nsa_entries, page_entries

__all__ = [
    "Entries", "Selection", "entry_spans", "mix_branches", "nsa_entries", "page_entries", "sparse_attention",
    "sparse_decode", "write_entries", "write_summaries",
]  # fmt: skip


def write_summaries(
    k_pages: torch.Tensor, summaries: tuple[torch.Tensor, ...], page_table: torch.Tensor, token_slots: torch.Tensor,
    positions: torch.Tensor, *, k_scales: torch.Tensor | None = None, backend: str = "auto",
) -> None:  # fmt: skip
    """Summaries of the pages that these (already written) tokens complete: they depend on the page's keys alone.

    summaries: one plane of means, or two of the least and the largest of each dimension (Quest, arXiv:2406.10774),
    [num_pages, num_kv_heads, 1, head_dim]. int32: page_table [num_slots, max_pages], token_slots (-1: padding) and
    positions [num_tokens].
    """
    run = reference.write_summaries
    if use_kernel(k_pages, backend, "write_summaries"):
        from gossamer.ops.sparse import triton

        run = triton.write_summaries
    run(k_pages, summaries, page_table, token_slots, positions, k_scales)


def sparse_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, summaries: tuple[torch.Tensor, ...],
    page_table: torch.Tensor, token_slots: torch.Tensor, positions: torch.Tensor, rule: Selection, entries: Entries,
    scale: float, out: torch.Tensor, *, k_scales: torch.Tensor | None = None, v_scales: torch.Tensor | None = None,
    values: torch.Tensor | None = None, compressed: torch.Tensor | None = None, index_q: torch.Tensor | None = None,
    max_seq_len: int, backend: str = "auto",
) -> None:  # fmt: skip
    """Attention of many new tokens, each to the blocks that `rule` gives it and each KV head; no host sync on a device.

    q, out [num_tokens, num_q_heads, head_dim], tokens of a sequence one after another; k_pages, v_pages and scales as
    for `ops.attention`; the rest as for `write_summaries`. Rows of padding (slot -1) are zeroed, those of tokens at
    positions below `rule.dense_below` left alone. No position reaches `max_seq_len`, which bounds the launches.
    With `values`, compressed ones beside the compressed keys that `summaries` are, `compressed` gets the attention to
    the entries that score, zeros where a token sees none yet. With `index_q` [num_tokens, num_kv_heads, index_dim] a
    block scores what the largest product of that query with one of its tokens' keys does, which `summaries` then is:
    one plane [num_pages, 1, page_size, index_dim]. Temporaries do not grow with the number of tokens.
    Raises ValueError for what the kernels do not serve.
    """
    require_scales(k_pages, v_pages, k_scales, v_scales)
    if q.shape[0] == 0 or max_seq_len <= rule.dense_below:
        return
    run = reference.sparse_attention
    if use_kernel(q, backend):
        from gossamer.ops.sparse.triton_prefill import sparse_attention as run
    run(
        q, k_pages, v_pages, summaries, page_table, token_slots, positions, rule, entries, scale, out,
        k_scales=k_scales, v_scales=v_scales, values=values, compressed=compressed, index_q=index_q,
        max_seq_len=max_seq_len,
    )  # fmt: skip


def sparse_decode(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, summaries: tuple[torch.Tensor, ...],
    page_table: torch.Tensor, slots: torch.Tensor, seq_lens: torch.Tensor, rule: Selection, entries: Entries,
    scale: float, out: torch.Tensor, *, out_scales: torch.Tensor | None = None, k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None, values: torch.Tensor | None = None, compressed: torch.Tensor | None = None,
    index_q: torch.Tensor | None = None, workspace: DecodeWorkspace | None = None, max_seq_len: int,
    summarise: bool = False, backend: str = "auto",
) -> None:  # fmt: skip
    """As `ops.attention.paged_decode`, each row to the blocks that `rule` gives it, a short one to all.

    summarise: does the work of `write_summaries` for these tokens too.
    """
    require_scales(k_pages, v_pages, k_scales, v_scales)
    run = reference.sparse_decode
    if use_kernel(q, backend):
        from gossamer.ops.sparse.triton_decode import sparse_decode as run
    run(
        q, k_pages, v_pages, summaries, page_table, slots, seq_lens, rule, entries, scale, out,
        out_scales=out_scales, k_scales=k_scales, v_scales=v_scales, values=values, compressed=compressed,
        index_q=index_q, workspace=workspace, max_seq_len=max_seq_len, summarise=summarise,
    )  # fmt: skip


def entry_spans(
    pages: tuple[torch.Tensor, torch.Tensor], embeddings: tuple[torch.Tensor, torch.Tensor],
    where: tuple[torch.Tensor, torch.Tensor, torch.Tensor], per_page: int, *,
    scales: tuple[torch.Tensor, torch.Tensor] | None = None, backend: str = "auto",
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:  # fmt: skip
    """What NSA compresses: the last 2 / per_page of a page's tokens, wherever a token completes an entry.

    pages: keys and values, these tokens' already written; embeddings [span * head_dim] of the positions in a span;
    where: page table, token slots and positions as for `write_summaries`, a slot's tokens one after another. Returns
    indices of the completing tokens, and for keys and values [num, num_kv_heads, span * head_dim] of the embeddings'
    dtype. On a device their number depends on shapes alone: behind the others are indices -1.
    """
    require_scales(*pages, *(scales or (None, None)))
    run = reference.entry_spans
    if use_kernel(pages[0], backend, "entry_spans"):
        from gossamer.ops.sparse import triton_nsa

        run = triton_nsa.entry_spans
    return run(pages, embeddings, where, per_page, scales)


def write_entries(
    entries: tuple[torch.Tensor, torch.Tensor], keys: torch.Tensor, values: torch.Tensor, tokens: torch.Tensor,
    where: tuple[torch.Tensor, torch.Tensor, torch.Tensor], page_size: int, *, backend: str = "auto",
) -> None:  # fmt: skip
    """Stores what was made of `entry_spans`, [num, num_kv_heads, head_dim], with the pages of the spans' last tokens.

    entries: planes [num_pages, num_kv_heads, per page, head_dim].
    """
    run = reference.write_entries
    if use_kernel(keys, backend, "write_entries"):
        from gossamer.ops.sparse import triton_nsa

        run = triton_nsa.write_entries
    run(entries, keys, values, tokens, where, page_size)


def mix_branches(
    out: torch.Tensor, gates: torch.Tensor, compressed: torch.Tensor, selected: torch.Tensor, *, backend: str = "auto"
) -> None:
    """out, the window branch [num_tokens, heads, head_dim], becomes the sum of the branches, each times its gate.

    gates [num_tokens, 3 * heads], before the sigmoid: of the compressed, the selected and the window branch.
    NSA (arXiv:2502.11089), equation 5.
    """
    run = reference.mix_branches
    if use_kernel(out, backend, "mix_branches"):
        from gossamer.ops.sparse import triton_nsa

        run = triton_nsa.mix_branches
    run(out, gates, compressed, selected)

"""Kernels of what NSA adds to the core: spans of tokens to compress, where their entries go, and the gated sum."""

import torch
import triton
import triton.language as tl

from gossamer.ops.attention.triton import LOW
from gossamer.ops.dispatch import overlap_options
from gossamer.ops.sparse.triton import overlap

_BLOCK = 1024
# Splits that a program merges for all heads of a group: of more, each head has a program of its own; and the elements
# that it holds at once.
_FEW_SPLITS, _MERGED = 4, 8192

Where = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@triton.jit(do_not_specialize=["num_tokens", "most"], do_not_specialize_on_alignment=["token_slots", "positions"])
def _completing_kernel(
    token_slots, positions, tokens, num_tokens, most, STRIDE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """One program: the tokens that complete an entry, in order; -1 behind them."""
    i = tl.arange(0, BLOCK)
    overlap(PDL)
    count = 0
    for low in range(0, num_tokens, BLOCK):
        token = low + i
        slot = tl.load(token_slots + token, mask=token < num_tokens, other=-1)
        position = tl.load(positions + token, mask=token < num_tokens, other=0)
        ends = (slot >= 0) & ((position + 1) % STRIDE == 0) & (position >= 2 * STRIDE - 1)
        tl.store(tokens + count + tl.cumsum(ends.to(tl.int32), 0) - 1, token, mask=ends)
        count += tl.sum(ends.to(tl.int32), 0)
    for low in range(count, most, BLOCK):
        tl.store(tokens + low + i, tl.full([BLOCK], -1, tl.int32), mask=low + i < most)


@triton.jit
def _spans_kernel(
    k_pages, v_pages, k_scales, v_scales, k_position, v_position, page_table, token_slots, positions, tokens, spans,
    table_stride, values_offset, NUM_KV_HEADS: tl.constexpr, PAGE: tl.constexpr, SPAN: tl.constexpr,
    HEAD_DIM: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the last SPAN keys and values of a KV head up to a token, positions added; none for -1."""
    head = tl.program_id(1)
    overlap(PDL)
    token = tl.load(tokens + tl.program_id(0))
    if token >= 0:
        n = tl.arange(0, SPAN)
        inside = n[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
        at = tl.load(positions + token) - SPAN + 1 + n
        table = page_table + tl.load(token_slots + token).to(tl.int64) * table_stride
        owner = tl.load(table + at // PAGE).to(tl.int64) * NUM_KV_HEADS + head
        rows = ((owner * PAGE + at % PAGE) * HEAD_DIM)[:, None] + tl.arange(0, HEAD_DIM)[None, :]
        k = tl.load(k_pages + rows).to(tl.float32)
        v = tl.load(v_pages + rows).to(tl.float32)
        if SCALED:
            k *= tl.load(k_scales + owner)[:, None]
            v *= tl.load(v_scales + owner)[:, None]
        k += tl.load(k_position + inside).to(tl.float32)
        v += tl.load(v_position + inside).to(tl.float32)
        out = spans + (tl.program_id(0).to(tl.int64) * NUM_KV_HEADS + head) * (SPAN * HEAD_DIM) + inside
        tl.store(out, k.to(spans.dtype.element_ty))
        tl.store(out + values_offset, v.to(spans.dtype.element_ty))


@triton.jit
def _write_kernel(
    keys, values, k_entries, v_entries, page_table, token_slots, positions, tokens, table_stride,
    NUM_KV_HEADS: tl.constexpr, PAGE: tl.constexpr, PER: tl.constexpr, HEAD_DIM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: a compressed key and value of a KV head, to the page of the token that completed them."""
    head = tl.program_id(1)
    overlap(PDL)
    token = tl.load(tokens + tl.program_id(0))
    if token >= 0:
        d = tl.arange(0, HEAD_DIM)
        position = tl.load(positions + token)
        table = page_table + tl.load(token_slots + token).to(tl.int64) * table_stride
        owner = tl.load(table + position // PAGE).to(tl.int64) * NUM_KV_HEADS + head
        at = (owner * PER + position % PAGE // (PAGE // PER)) * HEAD_DIM + d
        row = (tl.program_id(0) * NUM_KV_HEADS + head) * HEAD_DIM + d
        tl.store(k_entries + at, tl.load(keys + row).to(k_entries.dtype.element_ty))
        tl.store(v_entries + at, tl.load(values + row).to(v_entries.dtype.element_ty))


@triton.jit
def _merge_splits_kernel(
    peaks, sums, partials, out, SPLITS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, HEADS: tl.constexpr,
    CHUNK: tl.constexpr, HEAD_DIM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: some heads of a token. Parts whose sum is 0 were perhaps never written; without any, zeros."""
    row = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, HEAD_DIM)
    overlap(PDL)
    s = tl.arange(0, triton.next_power_of_2(SPLITS))
    at = (row * SPLITS + s[:, None]) * GROUP_P + g[None, :]
    total = tl.load(sums + at, mask=(s < SPLITS)[:, None], other=0.0)
    peak = tl.load(peaks + at, mask=total > 0, other=LOW)
    highest = tl.max(peak, 0)
    whole = tl.maximum(tl.sum(total * tl.exp2(peak - highest[None, :]), 0), 1e-30)
    mixed = tl.zeros([HEADS, HEAD_DIM], tl.float32)
    for low in range(0, SPLITS, CHUNK):
        split = low + tl.arange(0, CHUNK)
        own = (row * SPLITS + split[:, None]) * GROUP_P + g[None, :]
        weight = tl.load(sums + own, mask=(split < SPLITS)[:, None], other=0.0)
        present = weight > 0
        weight *= tl.exp2(tl.load(peaks + own, mask=present, other=LOW) - highest[None, :]) / whole[None, :]
        part = tl.load(partials + own[:, :, None] * HEAD_DIM + d[None, None, :], mask=present[:, :, None], other=0.0)
        mixed += tl.sum(part * weight[:, :, None], 0)
    rows = out + (row * GROUP + g)[:, None] * HEAD_DIM + d[None, :]
    tl.store(rows, mixed.to(out.dtype.element_ty), mask=(g < GROUP)[:, None])


@triton.jit
def _mix_kernel(
    out, gates, compressed, selected, NUM_HEADS: tl.constexpr, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: some heads of a token."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    inside = head < NUM_HEADS
    overlap(PDL)
    at = ((token * NUM_HEADS + head) * HEAD_DIM)[:, None] + tl.arange(0, HEAD_DIM)[None, :]
    gate = gates + token * (3 * NUM_HEADS) + head
    total = tl.zeros([HEADS, HEAD_DIM], tl.float32)
    for branch in tl.static_range(3):
        opened = tl.sigmoid(tl.load(gate + branch * NUM_HEADS, mask=inside, other=0.0).to(tl.float32))
        plane = compressed if branch == 0 else selected if branch == 1 else out
        total += tl.load(plane + at, mask=inside[:, None], other=0.0).to(tl.float32) * opened[:, None]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside[:, None])


def entry_spans(
    pages: tuple[torch.Tensor, torch.Tensor], embeddings: tuple[torch.Tensor, torch.Tensor], where: Where,
    per_page: int, scales: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:  # fmt: skip
    _, num_kv_heads, page_size, head_dim = pages[0].shape
    page_table, token_slots, positions = where
    num_tokens, stride = len(token_slots), page_size // per_page
    most = min(num_tokens, num_tokens // stride + len(page_table))
    tokens = token_slots.new_empty(most)
    spans = embeddings[0].new_empty(2, most, num_kv_heads, 2 * stride * head_dim)
    if not all(t.is_contiguous() for t in (*pages, *embeddings)) or page_table.stride(1) != 1:
        raise ValueError("entry_spans needs contiguous pages and embeddings")
    if most:
        options = overlap_options(spans)
        _completing_kernel[(1,)](
            token_slots, positions, tokens, num_tokens, most, STRIDE=stride, BLOCK=_BLOCK, num_warps=8, **options
        )
        _spans_kernel[(most, num_kv_heads)](
            *pages, *(scales or (None, None)), *embeddings, page_table, token_slots, positions, tokens, spans,
            page_table.stride(0), spans.stride(0), NUM_KV_HEADS=num_kv_heads, PAGE=page_size, SPAN=2 * stride,
            HEAD_DIM=head_dim, SCALED=scales is not None, num_warps=4, **options,
        )  # fmt: skip
    return tokens, spans.unbind(0)


def write_entries(
    entries: tuple[torch.Tensor, torch.Tensor], keys: torch.Tensor, values: torch.Tensor, tokens: torch.Tensor,
    where: Where, page_size: int,
) -> None:  # fmt: skip
    _, num_kv_heads, per_page, head_dim = entries[0].shape
    if not all(t.is_contiguous() for t in (*entries, keys, values)):
        raise ValueError("write_entries needs contiguous entries")
    if len(tokens):
        _write_kernel[(len(tokens), num_kv_heads)](
            keys, values, *entries, *where, tokens, where[0].stride(0), NUM_KV_HEADS=num_kv_heads, PAGE=page_size,
            PER=per_page, HEAD_DIM=head_dim, num_warps=1, **overlap_options(keys),
        )  # fmt: skip


def merge_splits(state: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], out: torch.Tensor) -> None:
    """out [tokens, query heads, dim] from `entry_pass`'s peaks, sums (0 where nothing was seen) and partial results."""
    num_kv_heads, splits, group_p = state[0].shape[1:]
    group, head_dim = out.shape[1] // num_kv_heads, out.shape[2]
    heads = group_p if splits <= _FEW_SPLITS else 1
    _merge_splits_kernel[(len(out) * num_kv_heads, triton.cdiv(group, heads))](
        *state, out, SPLITS=splits, GROUP=group, GROUP_P=group_p, HEADS=heads,
        CHUNK=max(1, min(32, triton.next_power_of_2(splits), _MERGED // (heads * head_dim))), HEAD_DIM=head_dim,
        num_warps=4, **overlap_options(out),
    )  # fmt: skip


def mix_branches(out: torch.Tensor, gates: torch.Tensor, compressed: torch.Tensor, selected: torch.Tensor) -> None:
    num_tokens, num_heads, head_dim = out.shape
    if not all(t.is_contiguous() for t in (out, gates, compressed, selected)):
        raise ValueError("mix_branches needs contiguous tensors")
    if num_tokens:
        heads = min(16, triton.next_power_of_2(num_heads))
        _mix_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
            out, gates, compressed, selected, NUM_HEADS=num_heads, HEADS=heads, HEAD_DIM=head_dim, num_warps=4,
            **overlap_options(out),
        )  # fmt: skip

"""Torch reference of paged attention, laid out so that a CPU spends its time in large products.

The queries of a KV head are the rows of a product with its keys: [group, head_dim] times [head_dim, tokens]. Prefill,
in blocks of queries, and many decode rows go by products and a softmax, a few rows through flash attention, on views
where pages are consecutive. Without bf16 products (`ops.cpu`) prefill widens to fp32, and flash decodes any rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

from gossamer.ops.attention.workspace import DecodeWorkspace
from gossamer.ops.cpu import wide_products
from gossamer.ops.quantize_fp8.reference import quantize_activation

_Plane = tuple[torch.Tensor, torch.Tensor | None]
"""Pages of keys or values, and their scales where they are FP8."""

# Splitting a decode batch costs about as much as reading this many padding pages.
_GROUP_COST_PAGES = 24
# From this many tokens on, two products and a softmax beat flash attention for one row (CPU).
_PRODUCTS_FROM_TOKENS = 2048
# Up to this many rows flash attention, which takes views, beats copies and products (CPU).
_FLASH_ROWS = 8
# Queries of a prefill block: large enough for the products, small enough that few masked scores are computed.
_QUERY_BLOCK = 128


@dataclass(slots=True)
class DecodeGroup:
    """Rows of a decode batch that are computed together, padded to `num_pages` pages each."""

    rows: torch.Tensor | slice
    """The rows of q: int64 [batch], or all of them, or one."""
    batch: int
    num_pages: int
    pages: torch.Tensor | slice
    """The page ids [batch * num_pages], or a slice where they are consecutive (then one row copies nothing)."""
    mask: torch.Tensor | None
    """Additive, [batch, 1, num_pages * page_size]: 0 or -inf. None for one row, which attends to `tokens`."""
    tokens: slice
    """Of one row: what it attends to of its pages' tokens."""


@dataclass(slots=True)
class PrefillSequence:
    """One sequence's new tokens: rows start .. start + length - 1 of the batch, after `prefix_len` cached ones."""

    start: int
    length: int
    prefix_len: int
    pages: torch.Tensor | slice
    """Pages of all that is attended to; `prefix_skip` tokens of the prefix lie before them, out of the window."""
    prefix_skip: int
    window: int | None


def _page_index(page_ids: Sequence[int]) -> torch.Tensor | slice:
    first, n = page_ids[0], len(page_ids)
    if page_ids[-1] - first == n - 1 and all(b - a == 1 for a, b in pairwise(page_ids)):
        return slice(first, first + n)
    return torch.tensor(page_ids, dtype=torch.int64)


def _tokens(plane: _Plane, index: torch.Tensor | slice, dtype: torch.dtype) -> torch.Tensor:
    """The pages' tokens [num_kv_heads, tokens, head_dim]: a view of a slice of pages with the heads outermost.

    FP8 pages become `dtype`: exactly, for scales are powers of two.
    """
    pages, scales = plane
    by_head = pages.transpose(0, 1)
    if isinstance(index, slice) or not by_head.is_contiguous():
        taken = by_head[:, index]
    else:  # a page of a head is one row: rows are copied whole, and by all threads
        rows = torch.arange(0, len(by_head) * len(pages), len(pages), device=index.device)[:, None] + index
        taken = by_head.flatten(0, 1).flatten(1).index_select(0, rows.view(-1)).view(len(by_head), -1, *pages.shape[2:])
    if scales is not None:
        taken = taken.to(dtype) * scales[index].t()[:, :, None, None].to(dtype)
    return taken.flatten(1, 2)


def plan_decode(
    page_tables: Sequence[Sequence[int]], seq_lens: Sequence[int], page_size: int, window: int | None,
    dtype: torch.dtype,
) -> list[DecodeGroup]:  # fmt: skip
    """Groups decode rows by page count so that padding stays small.

    `page_tables[i]` holds at least ceil(seq_lens[i] / page_size) pages; `seq_lens[i]` counts the new token. With a
    `window` only its pages are read.
    """
    firsts = [0 if window is None else max(0, seq_len - window) // page_size for seq_len in seq_lens]
    spans = [(first, -(-seq_len // page_size)) for first, seq_len in zip(firsts, seq_lens, strict=True)]
    order = sorted(range(len(spans)), key=lambda i: spans[i][1] - spans[i][0])
    bounds, start, padding = [], 0, 0
    for i in range(1, len(order)):
        growth = _num_pages(spans, order[i]) - _num_pages(spans, order[i - 1])
        padding += growth * (i - start)
        if padding > _GROUP_COST_PAGES:
            bounds.append((start, i))
            start, padding = i, 0
    bounds.append((start, len(order)))
    groups = []
    for low, high in bounds:
        rows = sorted(order[low:high])
        if len(rows) == 1:
            row = rows[0]
            groups.append(_decode_row(row, *spans[row], page_tables[row], seq_lens[row], page_size, window))
            continue
        groups.append(_decode_group(rows, len(spans), spans, page_tables, seq_lens, page_size, window, dtype))
    return groups


def _num_pages(spans: list[tuple[int, int]], row: int) -> int:
    return spans[row][1] - spans[row][0]


def _decode_row(
    row: int, first: int, last: int, page_table: Sequence[int], seq_len: int, page_size: int, window: int | None
) -> DecodeGroup:
    start = 0 if window is None else max(0, seq_len - window)
    tokens = slice(start - first * page_size, seq_len - first * page_size)
    return DecodeGroup(slice(row, row + 1), 1, last - first, _page_index(page_table[first:last]), None, tokens)


def _decode_group(
    rows: list[int], batch: int, spans: list[tuple[int, int]], page_tables: Sequence[Sequence[int]],
    seq_lens: Sequence[int], page_size: int, window: int | None, dtype: torch.dtype,
) -> DecodeGroup:  # fmt: skip
    width = max(_num_pages(spans, r) for r in rows)
    page_ids: list[int] = []
    starts, ends = [], []
    for r in rows:
        first, last = spans[r]
        page_ids += page_tables[r][first:last]
        # Padding repeats a page the row owns; the mask hides it.
        page_ids += [page_tables[r][first]] * (width - (last - first))
        starts.append(0 if window is None else max(0, seq_lens[r] - window) - first * page_size)
        ends.append(seq_lens[r] - first * page_size)
    positions = torch.arange(width * page_size)
    hidden = positions >= torch.tensor(ends)[:, None]
    if window is not None:
        hidden |= positions < torch.tensor(starts)[:, None]
    mask = torch.zeros(len(rows), 1, width * page_size, dtype=dtype).masked_fill_(hidden[:, None], -torch.inf)
    index = slice(None) if len(rows) == batch else torch.tensor(rows)
    return DecodeGroup(index, len(rows), width, _page_index(page_ids), mask, slice(None))


def plan_prefill(
    start: int, length: int, prefix_len: int, page_table: Sequence[int], page_size: int, window: int | None
) -> PrefillSequence:
    """Plans one sequence: which pages its `length` new tokens attend to, their own included."""
    first = 0 if window is None else max(0, prefix_len - window + 1) // page_size
    pages = _page_index(page_table[first : -(-(prefix_len + length) // page_size)])
    return PrefillSequence(start, length, prefix_len, pages, first * page_size, window)


def decode_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, groups: list[DecodeGroup], scale: float,
    out: torch.Tensor, k_scales: torch.Tensor | None = None, v_scales: torch.Tensor | None = None,
) -> None:  # fmt: skip
    planes = (k_pages, k_scales), (v_pages, v_scales)
    for group in groups:
        if group.mask is None:
            out[group.rows] = _decode_one(q[group.rows], planes, group, scale)
        else:
            out[group.rows] = _decode_batch(q[group.rows], planes, group, group.mask, scale)


def _decode_one(q: torch.Tensor, planes: tuple[_Plane, _Plane], group: DecodeGroup, scale: float) -> torch.Tensor:
    k, v = (_tokens(plane, group.pages, q.dtype)[:, group.tokens] for plane in planes)
    heads = q.view(len(k), -1, q.shape[-1])
    if k.shape[1] < _PRODUCTS_FROM_TOKENS or wide_products(q):
        return F.scaled_dot_product_attention(heads[None], k[None], v[None], scale=scale).reshape(q.shape)
    scores = torch.bmm(heads * scale, k.transpose(1, 2))
    return torch.bmm(torch.softmax(scores, -1), v).view(q.shape)


def _by_row(tokens: torch.Tensor, batch: int) -> torch.Tensor:
    """[num_kv_heads, batch * tokens, head_dim] -> [batch, num_kv_heads, tokens, head_dim], a view."""
    return tokens.view(len(tokens), batch, -1, tokens.shape[-1]).transpose(0, 1)


def _decode_batch(
    q: torch.Tensor, planes: tuple[_Plane, _Plane], group: DecodeGroup, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    k, v = (_tokens(plane, group.pages, q.dtype) for plane in planes)
    batch, num_kv_heads, head_dim = group.batch, len(k), q.shape[-1]
    if q.is_cpu and (batch <= _FLASH_ROWS or wide_products(q)):
        heads, k, v = q.view(batch, num_kv_heads, -1, head_dim), *(_by_row(x, batch) for x in (k, v))
        return F.scaled_dot_product_attention(heads, k, v, mask[:, None], scale=scale).reshape(q.shape)
    k, v = (x.reshape(num_kv_heads * batch, -1, head_dim) for x in (k, v))
    heads = (q * scale).view(batch, num_kv_heads, -1, head_dim).transpose(0, 1)
    scores = torch.bmm(heads.reshape(len(k), -1, head_dim), k.transpose(1, 2))
    scores.view(num_kv_heads, batch, -1, k.shape[1]).add_(mask)
    mixed = torch.bmm(torch.softmax(scores, -1), v)
    return mixed.view(num_kv_heads, batch, -1, head_dim).transpose(0, 1).reshape(q.shape)


def prefill_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, sequences: list[PrefillSequence], scale: float,
    out: torch.Tensor, k_scales: torch.Tensor | None = None, v_scales: torch.Tensor | None = None,
) -> None:  # fmt: skip
    num_kv_heads, head_dim = k_pages.shape[1], q.shape[-1]
    compute = torch.float32 if wide_products(q) else q.dtype
    q = (q * scale).to(compute).view(len(q), num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    out = out.view(len(out), num_kv_heads, -1, head_dim).permute(1, 2, 0, 3)
    future = torch.full((_QUERY_BLOCK, _QUERY_BLOCK), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    for seq in sequences:
        k, v = (_tokens(plane, seq.pages, compute).to(compute) for plane in ((k_pages, k_scales), (v_pages, v_scales)))
        for first in range(0, seq.length, _QUERY_BLOCK):
            num = min(_QUERY_BLOCK, seq.length - first)
            rows = slice(seq.start + first, seq.start + first + num)
            position = seq.prefix_len - seq.prefix_skip + first
            low = 0 if seq.window is None else max(0, position - seq.window + 1)
            keys = slice(low, position + num)
            scores = torch.bmm(q[:, :, rows].reshape(num_kv_heads, -1, head_dim), k[:, keys].transpose(1, 2))
            by_query = scores.view(num_kv_heads, -1, num, scores.shape[-1])
            by_query[..., -num:].add_(future[:num, :num])
            if seq.window is not None and position + num > seq.window:
                distance = torch.arange(num)[:, None] + (position - low) - torch.arange(scores.shape[-1])
                by_query.masked_fill_((distance >= seq.window).to(q.device), -torch.inf)
            mixed = torch.bmm(torch.softmax(scores, -1), v[:, keys])
            out[:, :, rows] = mixed.view(num_kv_heads, -1, num, head_dim)


def _visible_pages(
    plane: _Plane, page_ids: torch.Tensor, first_token: int, seq_len: int, dtype: torch.dtype
) -> tuple[torch.Tensor, int]:
    """What those pages hold, up to seq_len, as [num_kv_heads, tokens, head_dim], and the first token's position."""
    pages, scales = plane
    page_size = pages.shape[2]
    first_page = first_token // page_size
    index = page_ids[first_page : -(-seq_len // page_size)].long()
    taken = pages[index].to(dtype)
    if scales is not None:
        taken *= scales[index][..., None, None]
    return taken.transpose(0, 1).flatten(1, 2)[:, : seq_len - first_page * page_size], first_page * page_size


def paged_prefill(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, page_table: torch.Tensor, slots: torch.Tensor,
    cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor, max_q_len: int, scale: float, out: torch.Tensor, *,
    out_scales: torch.Tensor | None, window: int | None, sinks: torch.Tensor | None, k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None, num_context: int | None = None,
) -> None:  # fmt: skip
    """The definition, row by row and in float64 where q is, else in fp32; waits for the device."""
    dense = out if out_scales is None else torch.empty_like(q)
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    group = q.shape[1] // k_pages.shape[1]
    bounds = cu_seqlens_q.tolist()
    dense.zero_()
    for slot, seq_len, start, stop in zip(slots.tolist(), seq_lens.tolist(), bounds[:-1], bounds[1:], strict=True):
        if slot < 0 or stop == start:
            continue
        first_token = 0 if window is None else max(0, seq_len - (stop - start) - window + 1)
        k, first = _visible_pages((k_pages, k_scales), page_table[slot], first_token, seq_len, compute)
        v, _ = _visible_pages((v_pages, v_scales), page_table[slot], first_token, seq_len, compute)
        k, v = (x.repeat_interleave(group, 0) for x in (k, v))
        scores = q[start:stop].to(compute).transpose(0, 1) @ k.transpose(1, 2) * scale
        position = torch.arange(seq_len - (stop - start), seq_len, device=q.device)[:, None]
        token = torch.arange(first, seq_len, device=q.device)
        hidden = (token > position) if window is None else (token > position) | (token <= position - window)
        scores.masked_fill_(hidden, -torch.inf)
        normaliser = torch.logsumexp(scores, -1, keepdim=True)
        if sinks is not None:
            normaliser = torch.logaddexp(normaliser, sinks.to(compute)[:, None, None])
        dense[start:stop] = (torch.exp(scores - normaliser) @ v).transpose(0, 1).to(q.dtype)
    if out_scales is not None:
        quantized, scales = quantize_activation(dense.flatten(1))
        out.copy_(quantized.view_as(out))
        out_scales.copy_(scales)


def paged_decode(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, page_table: torch.Tensor, slots: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, out: torch.Tensor, *, out_scales: torch.Tensor | None, window: int | None,
    sinks: torch.Tensor | None, k_scales: torch.Tensor | None, v_scales: torch.Tensor | None,
    workspace: DecodeWorkspace | None, max_seq_len: int,
) -> None:  # fmt: skip
    """Prefill of one token a row; rows of length 0 are padding."""
    present = torch.where(seq_lens > 0, slots, -1)
    cu_seqlens_q = torch.arange(q.shape[0] + 1, dtype=torch.int32)
    paged_prefill(
        q, k_pages, v_pages, page_table, present, cu_seqlens_q, seq_lens, 1, scale, out, out_scales=out_scales,
        window=window, sinks=sinks, k_scales=k_scales, v_scales=v_scales,
    )  # fmt: skip

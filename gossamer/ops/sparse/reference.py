"""Torch reference of block-sparse attention: compress, score, select, attend to the selected pages, merge.

Never more than the selected pages is read: few tokens gather their own, many are taken page by page, each page with
all tokens that chose it.
"""

import torch
import torch.nn.functional as F

from gossamer.ops.attention.reference import paged_decode
from gossamer.ops.attention.workspace import DecodeWorkspace
from gossamer.ops.quantize_fp8.reference import quantize_activation
from gossamer.ops.sparse.selection import Entries, Selection

# From this many tokens on a page is multiplied with all who chose it, instead of copied for each.
_BY_PAGE_FROM = 64
# Elements of gathered keys, or of scores, at a time.
_TILE_ELEMENTS = 1 << 23


def _compute(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def write_summaries(
    k_pages: torch.Tensor, summaries: tuple[torch.Tensor, ...], page_table: torch.Tensor, token_slots: torch.Tensor,
    positions: torch.Tensor, k_scales: torch.Tensor | None,
) -> None:  # fmt: skip
    page_size = k_pages.shape[2]
    ends = (token_slots >= 0) & (positions % page_size == page_size - 1)
    if not ends.any():
        return
    pages = page_table[token_slots[ends].long(), positions[ends].long() // page_size].long()
    keys = k_pages[pages].to(torch.float64 if k_pages.dtype == torch.float64 else torch.float32)
    if k_scales is not None:
        keys *= k_scales[pages][..., None, None]
    found = (keys.mean(2),) if len(summaries) == 1 else (keys.amin(2), keys.amax(2))
    for plane, value in zip(summaries, found, strict=True):
        plane[pages] = value[:, :, None].to(plane.dtype)


def entry_logits(
    q: torch.Tensor, planes: tuple[torch.Tensor, ...], page_table: torch.Tensor, token_slots: torch.Tensor,
    num_pages: int, scale: float,
) -> torch.Tensor:  # fmt: skip
    """q [T, num_kv_heads, group, dim] against the first pages' entries: [T, num_kv_heads, group, num_pages * per page].

    One plane: entries; two: the least and the largest of each dimension, whose logit bounds that of any key between.
    """
    compute = _compute(q)
    num_tokens, num_kv_heads, group, dim = q.shape
    same = bool((token_slots == token_slots[0]).all())
    slots = token_slots[:1] if same else token_slots
    pages = page_table[slots.long(), :num_pages].long().clamp(0, planes[0].shape[0] - 1)
    entries = [p[pages].to(compute).permute(0, 2, 1, 3, 4).flatten(2, 3).transpose(2, 3) for p in planes]
    rows = q.to(compute)
    rows = rows.transpose(0, 1).reshape(1, num_kv_heads, -1, dim) if same else rows
    if len(planes) == 1:
        logits = rows @ entries[0]
    else:
        logits = rows.clamp_min(0) @ entries[1] + rows.clamp_max(0) @ entries[0]
    logits = logits * scale
    return logits.view(num_kv_heads, num_tokens, group, -1).transpose(0, 1) if same else logits


def block_scores(logits: torch.Tensor, positions: torch.Tensor, entries: Entries, page_size: int) -> torch.Tensor:
    """Probabilities of the visible entries, weighted over each block's and summed over the group: [T, heads, blocks].

    NSA (arXiv:2502.11089), equations 8 to 10.
    """
    visible = visible_entries(positions, logits.shape[-1], entries, page_size)[:, None, None]
    p = torch.softmax(logits.masked_fill(~visible, -torch.inf), -1).nan_to_num(0.0).sum(2)
    *own, following = entries.weights
    blocks = p.unflatten(-1, (-1, entries.per_block))
    scores: torch.Tensor = (blocks * torch.tensor(own, dtype=p.dtype, device=p.device)).sum(-1)
    scores[..., :-1] += following * blocks[..., 1:, 0]
    return scores


def attend_entries(
    logits: torch.Tensor, values: torch.Tensor, page_table: torch.Tensor, token_slots: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """Attention to the compressed values of the entries `seen` [T, num_entries]: [T, num_kv_heads, group, dim]."""
    same = bool((token_slots == token_slots[0]).all())
    slots, known = (token_slots[:1], seen.any(0, keepdim=True)) if same else (token_slots, seen)
    pages = page_table[slots.long(), : seen.shape[1] // values.shape[2]].long().clamp(0, values.shape[0] - 1)
    v = values[pages].to(logits.dtype).permute(0, 2, 1, 3, 4).flatten(2, 3)
    v = v.masked_fill(~known[:, None, :, None], 0.0)
    weights = torch.softmax(logits.masked_fill(~seen[:, None, None], -torch.inf), -1).nan_to_num_(0.0)
    if not same:
        return weights @ v
    rows = weights.transpose(0, 1).reshape(1, v.shape[1], -1, v.shape[2]) @ v
    return rows.view(v.shape[1], len(logits), -1, v.shape[3]).transpose(0, 1)


def index_scores(
    q: torch.Tensor, key_pages: torch.Tensor, page_table: torch.Tensor, token_slots: torch.Tensor,
    positions: torch.Tensor, block_size: int,
) -> torch.Tensor:  # fmt: skip
    """The largest product of q [T, heads, dim] with a visible key of each block: [T, heads, blocks] (MiniMax-M3)."""
    page_size, last = key_pages.shape[2], int(positions.max())
    logits = entry_logits(q[:, None], (key_pages,), page_table, token_slots, last // page_size + 1, 1.0)[:, 0]
    hidden = torch.arange(logits.shape[-1], device=q.device) > positions[:, None]
    logits = logits.masked_fill(hidden[:, None], -torch.inf)
    missing = -logits.shape[-1] % block_size
    best: torch.Tensor = F.pad(logits, (0, missing), value=-torch.inf).unflatten(-1, (-1, block_size)).amax(-1)
    return best


def visible_entries(positions: torch.Tensor, num_entries: int, entries: Entries, page_size: int) -> torch.Tensor:
    """Bool [T, num_entries]."""
    end = (positions + 1 - entries.tail).clamp_min(0) // (page_size // entries.per_block)
    index = torch.arange(num_entries, device=positions.device)
    seen: torch.Tensor = (index >= entries.begin) & (index < end[:, None])
    return seen


def select(scores: torch.Tensor, positions: torch.Tensor, rule: Selection, page_size: int) -> torch.Tensor:
    """int64 [T, heads, num_blocks], the blocks of each token and head in rising order, -1 before them where fewer are.

    Equal scores: the earlier block.
    """
    last = (positions // page_size)[:, None, None]
    block = torch.arange(scores.shape[-1], device=scores.device)
    forced = (block < rule.first) | (block > last - rule.local)
    ranked = scores.masked_fill(forced, torch.inf).masked_fill(block > last, -torch.inf)
    best, chosen = torch.sort(ranked, dim=-1, descending=True, stable=True)
    chosen = torch.where(best > -torch.inf, chosen, -1)[..., : rule.num_blocks]
    return torch.sort(chosen, -1).values


def attend(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, blocks: torch.Tensor, page_table: torch.Tensor,
    token_slots: torch.Tensor, positions: torch.Tensor, scale: float, k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
) -> torch.Tensor:  # fmt: skip
    """Attention of q [T, num_kv_heads, group, dim] to the tokens up to its own in `blocks` [T, num_kv_heads, n]."""
    num_tokens, num_kv_heads, n = blocks.shape
    # A block's last pages may not be there yet.
    there = blocks.clamp(0, page_table.shape[1] - 1)
    pages = page_table[token_slots.long()[:, None, None], there].long().clamp(0, len(k_pages) - 1)
    counts = (positions[:, None, None] + 1 - blocks * k_pages.shape[2]).clamp(0, k_pages.shape[2])
    counts = torch.where(blocks >= 0, counts, 0)
    planes = (k_pages, k_scales), (v_pages, v_scales)
    if num_tokens >= _BY_PAGE_FROM:
        return _attend_by_page(q, planes, pages, counts, scale)
    step = max(1, _TILE_ELEMENTS // (num_kv_heads * n * k_pages.shape[2] * q.shape[-1]))
    tiles = [slice(i, i + step) for i in range(0, num_tokens, step)]
    return torch.cat([_attend_gathered(q[t], planes, pages[t], counts[t], scale) for t in tiles])


_Planes = tuple[tuple[torch.Tensor, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor | None]]


def _attend_gathered(
    q: torch.Tensor, planes: _Planes, pages: torch.Tensor, counts: torch.Tensor, scale: float
) -> torch.Tensor:
    compute = _compute(q)
    heads = torch.arange(pages.shape[1], device=pages.device)[:, None]
    keys, values = ((p[pages, heads].to(compute), s) for p, s in planes)
    k, v = (x if s is None else x.mul_(s[pages, heads][..., None, None]) for x, s in (keys, values))
    visible = (torch.arange(k.shape[3], device=q.device) < counts[..., None]).flatten(2)
    scores = (q.to(compute) @ k.flatten(2, 3).transpose(2, 3) * scale).masked_fill_(~visible[:, :, None], -torch.inf)
    weights = torch.softmax(scores, -1).nan_to_num_(0.0)  # a token without blocks
    return weights @ v.flatten(2, 3).masked_fill_(~visible[..., None], 0.0)


def _attend_by_page(
    q: torch.Tensor, planes: _Planes, pages: torch.Tensor, counts: torch.Tensor, scale: float
) -> torch.Tensor:
    """Partial results of every (token, head, block), page by page; then their merge by the sums of exponentials."""
    compute, page_size = _compute(q), planes[0][0].shape[2]
    num_kv_heads, n = pages.shape[1:]
    parts = q.new_zeros(*pages.shape, *q.shape[2:], dtype=compute)
    sizes = torch.full((*pages.shape, q.shape[2]), -torch.inf, dtype=compute, device=q.device)
    flat_q, flat_parts, flat_sizes = (x.flatten(0, -3) for x in (q, parts, sizes[..., None]))
    heads = torch.arange(num_kv_heads, device=q.device)[:, None]
    key = torch.where(counts > 0, pages * num_kv_heads + heads, -1).flatten()
    order = torch.argsort(key, stable=True)
    owners, lengths = torch.unique_consecutive(key[order], return_counts=True)
    counts, begin = counts.flatten(), 0
    for owner, length in zip(owners.tolist(), lengths.tolist(), strict=True):
        chosen = order[begin : begin + length]
        begin += length
        if owner < 0:
            continue
        page, head = divmod(owner, num_kv_heads)
        k, v = (_page(plane, page, head, compute) for plane in planes)
        rows = flat_q[chosen // n].to(compute)
        scores = (rows.flatten(0, 1) @ k.t()).view(*rows.shape[:2], page_size) * scale
        seen = counts[chosen]
        if int(seen.min()) < page_size:
            hidden = torch.arange(page_size, device=q.device) >= seen[:, None]
            scores.masked_fill_(hidden[:, None], -torch.inf)
            v = v.masked_fill((torch.arange(page_size, device=q.device) >= seen.max())[:, None], 0.0)
        flat_sizes[chosen, :, 0] = torch.logsumexp(scores, -1)
        flat_parts[chosen] = torch.softmax(scores, -1) @ v
    weights = torch.softmax(sizes, 2).nan_to_num_(0.0)
    return (parts * weights[..., None]).sum(2)


def _page(plane: tuple[torch.Tensor, torch.Tensor | None], page: int, head: int, dtype: torch.dtype) -> torch.Tensor:
    pages, scales = plane
    held = pages[page, head].to(dtype)
    return held if scales is None else held * scales[page, head]


def sparse_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, summaries: tuple[torch.Tensor, ...],
    page_table: torch.Tensor, token_slots: torch.Tensor, positions: torch.Tensor, rule: Selection, entries: Entries,
    scale: float, out: torch.Tensor, *, k_scales: torch.Tensor | None, v_scales: torch.Tensor | None,
    values: torch.Tensor | None = None, compressed: torch.Tensor | None = None, index_q: torch.Tensor | None = None,
    max_seq_len: int,
) -> None:  # fmt: skip
    page_size, num_kv_heads = k_pages.shape[2], k_pages.shape[1]
    out[token_slots < 0] = 0.0
    if compressed is not None:
        compressed.zero_()
    live = ((token_slots >= 0) & (positions >= rule.dense_below)).nonzero()[:, 0]
    slots = token_slots[live]
    # Tokens of one sequence at a time where they follow one another: their entries are read once.
    _, runs = torch.unique_consecutive(slots, return_counts=True)
    bounds = runs.tolist() if len(runs) < len(slots) else [len(slots)]
    heads = q.view(q.shape[0], num_kv_heads, -1, q.shape[2])
    block_size = page_size * rule.pages
    blocks_at_most = -(-max_seq_len // page_size)
    per_page = q.shape[1] * entries.per_block if index_q is None else num_kv_heads * page_size
    step = max(1, _TILE_ELEMENTS // (per_page * max(1, blocks_at_most)))
    begin = 0
    for length in bounds:
        for low in range(begin, begin + length, step):
            tile = live[low : min(low + step, begin + length)]
            at, slot, rows = positions[tile].long(), token_slots[tile], heads[tile]
            if index_q is None:
                num_pages = int(at.max()) // page_size + 1
                logits = entry_logits(rows, summaries, page_table, slot, num_pages, scale)
                scores = block_scores(logits, at, entries, page_size)
            else:
                scores = index_scores(index_q[tile], summaries[0], page_table, slot, at, block_size)
            blocks = select(scores, at, rule, block_size)
            if rule.pages > 1:
                pages = blocks[..., None] * rule.pages + torch.arange(rule.pages, device=q.device)
                blocks = pages.masked_fill(blocks[..., None] < 0, -1).flatten(-2)
            if values is not None and compressed is not None:
                seen = visible_entries(at, logits.shape[-1], entries, page_size)
                mixed = attend_entries(logits, values, page_table, slot, seen)
                compressed[tile] = mixed.reshape(len(tile), *out.shape[1:]).to(out.dtype)
            found = attend(rows, k_pages, v_pages, blocks, page_table, slot, at, scale, k_scales, v_scales)
            out[tile] = found.reshape(len(tile), *out.shape[1:]).to(out.dtype)
        begin += length


def sparse_decode(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, summaries: tuple[torch.Tensor, ...],
    page_table: torch.Tensor, slots: torch.Tensor, seq_lens: torch.Tensor, rule: Selection, entries: Entries,
    scale: float, out: torch.Tensor, *, out_scales: torch.Tensor | None, k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None, values: torch.Tensor | None = None, compressed: torch.Tensor | None = None,
    index_q: torch.Tensor | None = None, workspace: DecodeWorkspace | None, max_seq_len: int, summarise: bool = False,
) -> None:  # fmt: skip
    present = torch.where(seq_lens > 0, slots, -1)
    if summarise:
        write_summaries(k_pages, summaries, page_table, present, seq_lens - 1, k_scales)
    dense = out if out_scales is None else torch.empty_like(q)
    pages = q, k_pages, v_pages
    short = torch.where(seq_lens <= rule.dense_below, seq_lens, 0)
    paged_decode(
        *pages, page_table, slots, short, scale, dense, out_scales=None, window=None, sinks=None, workspace=None,
        max_seq_len=max_seq_len, k_scales=k_scales, v_scales=v_scales,
    )  # fmt: skip
    sparse_attention(
        *pages, summaries, page_table, present, seq_lens - 1, rule, entries, scale, dense, max_seq_len=max_seq_len,
        k_scales=k_scales, v_scales=v_scales, values=values, compressed=compressed, index_q=index_q,
    )  # fmt: skip
    if out_scales is not None:
        quantized, found = quantize_activation(dense.flatten(1))
        out.copy_(quantized.view_as(out))
        out_scales.copy_(found)


_Pair = tuple[torch.Tensor, torch.Tensor]
_Where = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def entry_spans(
    pages: _Pair, embeddings: _Pair, where: _Where, per_page: int, scales: _Pair | None
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    page_table, token_slots, positions = where
    page_size = pages[0].shape[2]
    stride = page_size // per_page
    ends = (token_slots >= 0) & ((positions + 1) % stride == 0) & (positions >= 2 * stride - 1)
    tokens = ends.nonzero()[:, 0]
    at = positions[tokens].long()[:, None] + torch.arange(1 - 2 * stride, 1, device=positions.device)
    page = page_table[token_slots[tokens].long()[:, None], at // page_size].long()
    spans = []
    for plane, scale, embedding in zip(pages, scales or (None, None), embeddings, strict=True):
        span = plane[page, :, at % page_size].to(_compute(embedding))
        span = span if scale is None else span * scale[page][..., None]
        spans.append((span.transpose(1, 2).flatten(2) + embedding).to(embedding.dtype))
    return tokens, tuple(spans)


def write_entries(
    entries: _Pair, keys: torch.Tensor, values: torch.Tensor, tokens: torch.Tensor, where: _Where, page_size: int
) -> None:
    page_table, token_slots, positions = where
    at = positions[tokens].long()
    page = page_table[token_slots[tokens].long(), at // page_size].long()
    for plane, new in zip(entries, (keys, values), strict=True):
        plane[page, :, at % page_size // (page_size // plane.shape[2])] = new.to(plane.dtype)


def mix_branches(out: torch.Tensor, gates: torch.Tensor, compressed: torch.Tensor, selected: torch.Tensor) -> None:
    opened = torch.sigmoid(gates.to(_compute(out))).view(len(out), 3, -1, 1)
    out.copy_((opened * torch.stack((compressed, selected, out), 1)).sum(1))

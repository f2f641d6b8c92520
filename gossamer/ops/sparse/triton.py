"""Kernels that score and select blocks, for decode and prefill alike, and decode over what they selected.

A program has the query heads of one KV head as rows of its products; scores exist for a bounded number of tokens, one
number for each block and KV head.
"""

import torch
import triton
import triton.language as tl

from gossamer.ops.attention import triton_decode
from gossamer.ops.attention.triton import LOG2E, LOW, PRECISION
from gossamer.ops.attention.workspace import DecodeWorkspace
from gossamer.ops.dispatch import overlap_options
from gossamer.ops.sparse.selection import Entries, Selection
from gossamer.ops.sparse.triton_index import index_scores
from gossamer.ops.sparse.triton_nsa import merge_splits

_BLOCK_N = 64
# Scores that a selecting program holds at once, and those that it then reads once only.
_SELECT_BLOCK, _SELECT_WHOLE = 1024, 4096


@triton.jit
def _summary_kernel(
    k_pages, k_scales, means, maxima, page_table, token_slots, positions, table_stride,
    NUM_KV_HEADS: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BOUNDS: tl.constexpr,
    SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: a token and KV head; of a page's last token, the page's summary."""
    token, head = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(token_slots + token)
    position = tl.load(positions + token)
    if (slot >= 0) & (position % PAGE == PAGE - 1):
        at = tl.load(page_table + slot.to(tl.int64) * table_stride + position // PAGE).to(tl.int64) * NUM_KV_HEADS
        at += head
        d = tl.arange(0, HEAD_DIM)
        k = tl.load(k_pages + at * (PAGE * HEAD_DIM) + tl.arange(0, PAGE)[:, None] * HEAD_DIM + d[None, :])
        k = k.to(tl.float32)
        if SCALED:
            k *= tl.load(k_scales + at)
        if BOUNDS:
            tl.store(means + at * HEAD_DIM + d, tl.min(k, 0).to(means.dtype.element_ty))
            tl.store(maxima + at * HEAD_DIM + d, tl.max(k, 0).to(means.dtype.element_ty))
        else:
            tl.store(means + at * HEAD_DIM + d, (tl.sum(k, 0) / PAGE).to(means.dtype.element_ty))


def write_summaries(
    k_pages: torch.Tensor, summaries: tuple[torch.Tensor, ...], page_table: torch.Tensor, token_slots: torch.Tensor,
    positions: torch.Tensor, k_scales: torch.Tensor | None,
) -> None:  # fmt: skip
    num_kv_heads, page_size, head_dim = k_pages.shape[1:]
    if not all(t.is_contiguous() for t in (k_pages, *summaries)):
        raise ValueError("write_summaries needs contiguous pages and summaries")
    if not len(token_slots):
        return
    _summary_kernel[(len(token_slots), num_kv_heads)](
        k_pages, k_scales, summaries[0], summaries[-1], page_table, token_slots, positions, page_table.stride(0),
        NUM_KV_HEADS=num_kv_heads, PAGE=page_size, HEAD_DIM=head_dim, BOUNDS=len(summaries) > 1,
        SCALED=k_scales is not None, num_warps=4, **overlap_options(k_pages),
    )  # fmt: skip


@triton.jit
def _entry_rows(plane, table, head, index, end, NUM_KV_HEADS: tl.constexpr, PER: tl.constexpr, DIM: tl.constexpr):
    """Entries `index` of a sequence as columns [DIM, len(index)]; zeros from `end` on."""
    inside = index < end
    page = tl.load(table + index // PER, mask=inside, other=0).to(tl.int64)
    at = ((page * NUM_KV_HEADS + head) * PER + index % PER) * DIM
    return tl.load(plane + at[None, :] + tl.arange(0, DIM)[:, None], mask=inside[None, :], other=0.0)


@triton.jit
def _entry_logits(
    queries, first, second, table, head, index, end, scale_log2,
    NUM_KV_HEADS: tl.constexpr, PER: tl.constexpr, DIM: tl.constexpr, BOUNDS: tl.constexpr,
):  # fmt: skip
    low = _entry_rows(first, table, head, index, end, NUM_KV_HEADS, PER, DIM).to(queries.dtype)
    if BOUNDS:
        zero = tl.zeros_like(queries)
        high = _entry_rows(second, table, head, index, end, NUM_KV_HEADS, PER, DIM).to(queries.dtype)
        logits = tl.dot(tl.maximum(queries, zero).to(queries.dtype), high, input_precision=PRECISION)
        logits = tl.dot(tl.minimum(queries, zero).to(queries.dtype), low, logits, input_precision=PRECISION)
    else:
        logits = tl.dot(queries, low, input_precision=PRECISION)
    return logits * scale_log2


@triton.jit(
    do_not_specialize=["num_tokens", "dense_below"], do_not_specialize_on_alignment=["token_slots", "positions"]
)
def _entries_kernel(
    q, first, second, values, page_table, token_slots, positions, peaks, sums, partials, scores,
    num_tokens, table_stride, score_stride, scale_log2, dense_below,
    BEGIN: tl.constexpr, TAIL: tl.constexpr, PER: tl.constexpr, OFFSET: tl.constexpr, NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr, GROUP_P: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, SPLITS_P: tl.constexpr, SCORE: tl.constexpr, BOUNDS: tl.constexpr,
    ATTEND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: some tokens and a KV head against the entries they see; with SPLITS > 1 a token and a part of them.

    Without SCORE: each row's maximum and sum of exponentials (ATTEND: and its attention to `values`). With it: the
    probabilities' sums over the group, weighted over a block's entries (TECHNIQUES 4).
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP_P
    BLOCKS: tl.constexpr = BLOCK_N // PER
    STRIDE: tl.constexpr = PAGE // PER
    tile, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    head = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    token, g = tile * TOKENS + m // GROUP_P, m % GROUP_P
    inside = token < num_tokens
    slot = tl.load(token_slots + token, mask=inside, other=-1)
    position = tl.load(positions + token, mask=inside, other=0) - OFFSET
    todo = (slot >= 0) & (position >= dense_below)
    end = tl.where(todo, tl.maximum(position + 1 - TAIL, 0) // STRIDE, 0)
    longest = tl.max(end, 0)
    if longest <= BEGIN:
        return
    START: tl.constexpr = BEGIN // PER * PER
    share = tl.cdiv(tl.cdiv(longest - START, SPLITS), BLOCK_N) * BLOCK_N
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = (token * NUM_KV_HEADS + head).to(tl.int64)
    real = inside & (g < GROUP)
    d = tl.arange(0, HEAD_DIM)
    queries = tl.load(q + ((row * GROUP + g) * HEAD_DIM)[:, None] + d[None, :], mask=real[:, None], other=0.0)
    peak = tl.full([BLOCK_M], LOW, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, HEAD_DIM if ATTEND else 16], tl.float32)
    n = tl.arange(0, BLOCK_N)
    if SCORE:
        s = tl.arange(0, SPLITS_P)
        parts = (row[:, None] * SPLITS + s[None, :]) * GROUP_P + g[:, None]
        known = real[:, None] & (s < SPLITS)[None, :]
        all_peaks = tl.load(peaks + parts, mask=known, other=LOW)
        peak = tl.max(all_peaks, 1)
        total = tl.sum(tl.load(sums + parts, mask=known, other=0.0) * tl.exp2(all_peaks - peak[:, None]), 1)
        inverse = 1.0 / tl.maximum(total, 1e-30)
        t = tile * TOKENS + tl.arange(0, TOKENS)
        t_slot = tl.load(token_slots + t, mask=t < num_tokens, other=-1)
        t_row = (t * NUM_KV_HEADS + head).to(tl.int64) * score_stride
    current = tl.max(tl.where(todo, slot, -1), 0)
    while current >= 0:
        mine = todo & (slot == current)
        stop = tl.minimum(tl.max(tl.where(mine, end, 0), 0), START + (split + 1) * share)
        table = page_table + current.to(tl.int64) * table_stride
        for low in range(START + split * share, stop, BLOCK_N):
            index = low + n
            logits = _entry_logits(
                queries, first, second, table, head, index, stop, scale_log2, NUM_KV_HEADS, PER, HEAD_DIM, BOUNDS
            )
            seen = mine[:, None] & (index >= BEGIN)[None, :] & (index[None, :] < end[:, None])
            if SCORE:
                logits = tl.where(seen & real[:, None], logits, float("-inf"))
                p = tl.exp2(logits - peak[:, None]) * inverse[:, None]
                entry = tl.sum(tl.reshape(p, [TOKENS, GROUP_P, BLOCK_N]), 1)
                block = low // PER + tl.arange(0, BLOCKS)
                if PER > 1:
                    weight = tl.where(n % PER == 0, 1.0, 2.0)
                    entry = tl.sum(tl.reshape(entry * weight[None, :], [TOKENS, BLOCKS, PER]), 2)
                    following = (block + 1) * PER
                    last = tl.max(tl.where(mine, end, 0), 0)
                    logits = _entry_logits(
                        queries, first, second, table, head, following, last, scale_log2, NUM_KV_HEADS, PER,
                        HEAD_DIM, BOUNDS,
                    )  # fmt: skip
                    seen = mine[:, None] & (following[None, :] < end[:, None])
                    logits = tl.where(seen & real[:, None], logits, float("-inf"))
                    p = tl.exp2(logits - peak[:, None]) * inverse[:, None]
                    entry += tl.sum(tl.reshape(p, [TOKENS, GROUP_P, BLOCKS]), 1)
                kept = (t_slot == current)[:, None] & (block * PER < stop)[None, :]
                tl.store(scores + t_row[:, None] + block[None, :], entry, mask=kept)
            else:
                logits = tl.where(seen, logits, float("-inf"))
                highest = tl.maximum(peak, tl.max(logits, 1))
                fade = tl.exp2(peak - highest)
                p = tl.exp2(logits - highest[:, None])
                total = total * fade + tl.sum(p, 1)
                peak = highest
                if ATTEND:
                    v = tl.trans(_entry_rows(values, table, head, index, stop, NUM_KV_HEADS, PER, HEAD_DIM))
                    v = tl.where((index >= BEGIN)[:, None], v, 0.0)  # a NaN would pass a weight of zero
                    p = p.to(queries.dtype)
                    mixed = tl.dot(p, v.to(queries.dtype), mixed * fade[:, None], input_precision=PRECISION)
        todo = todo & (slot != current)
        current = tl.max(tl.where(todo, slot, -1), 0)
    if not SCORE:
        at = (row * SPLITS + split) * GROUP_P + g
        tl.store(peaks + at, peak, mask=real)
        tl.store(sums + at, total, mask=real)
        if ATTEND:
            mixed = mixed / tl.maximum(total, 1e-30)[:, None]
            tl.store(partials + at[:, None] * HEAD_DIM + d[None, :], mixed, mask=real[:, None])


@triton.jit
def ordered_keys(scores, low, end, BLOCK: tl.constexpr):
    """Scores low .. low + BLOCK - 1 as unsigned integers of the same order; from `end` on: 0, below all."""
    i = low + tl.arange(0, BLOCK)
    x = tl.load(scores + i, mask=i < end, other=0.0)
    x = tl.where(x == x, x, float("inf")).to(tl.int32, bitcast=True)  # a NaN's successor could be 0
    ordered = tl.where(x < 0, ~x, x ^ -2147483648).to(tl.uint32, bitcast=True)
    return i, tl.where(i < end, ordered, 0)


@triton.jit
def num_at_least(bound, held, scores, begin, end, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """How many keys are at least each of `bound`; all of them are `held` where they are WHOLE."""
    if WHOLE:
        many = tl.sum((held[None, :] >= bound[:, None]).to(tl.int32), 1)
    else:
        many = tl.zeros_like(bound).to(tl.int32)
        for low in range(begin, end, BLOCK):
            _, key = ordered_keys(scores, low, end, BLOCK)
            many += tl.sum((key[None, :] >= bound[:, None]).to(tl.int32), 1)
    return many


@triton.jit(do_not_specialize=["dense_below"], do_not_specialize_on_alignment=["token_slots", "positions"])
def _select_kernel(
    scores, page_table, token_slots, positions, pages, table_stride, score_stride, dense_below,
    OFFSET: tl.constexpr, FIRST: tl.constexpr, LOCAL: tl.constexpr, TOP: tl.constexpr, FORCED: tl.constexpr,
    LIST: tl.constexpr, LIST_P: tl.constexpr, NUM_KV_HEADS: tl.constexpr, PAGE: tl.constexpr, PAGES: tl.constexpr,
    BITS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: a token and KV head. The TOP best blocks in rising order, by a search for the bits of the least of
    them; equal ones from the earliest on. FORCED: the first ones stand before them, the local ones behind. A block is
    PAGES pages; LIST counts pages."""
    row = tl.program_id(0)
    token = row // NUM_KV_HEADS
    slot = tl.load(token_slots + token)
    position = tl.load(positions + token) - OFFSET
    i = tl.arange(0, LIST_P)
    out = row.to(tl.int64) * LIST
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if (slot < 0) | (position < dense_below):
        if not FORCED:
            tl.store(pages + out + i, tl.full([LIST_P], -1, tl.int32), mask=i < LIST)
        return
    table = page_table + slot.to(tl.int64) * table_stride
    last = position // (PAGE * PAGES)
    end = tl.maximum(last - LOCAL + 1, FIRST)
    count = end - FIRST
    num = tl.minimum(count, TOP)
    found = scores + row.to(tl.int64) * score_stride
    least = tl.zeros([1], tl.uint32)
    room = TOP
    if count > TOP:
        _, held = ordered_keys(found, FIRST, end, BLOCK)
        digit = tl.arange(0, 1 << BITS)
        for step in range(32 // BITS):
            shift = 32 - BITS - step * BITS
            many = num_at_least(least + (digit.to(tl.uint32) << shift), held, found, FIRST, end, BLOCK, WHOLE)
            least += tl.max(tl.where(many >= TOP, digit, 0), 0).to(tl.uint32) << shift
        room = TOP - tl.sum(num_at_least(least + 1, held, found, FIRST, end, BLOCK, WHOLE), 0)
    before = 0
    equals = 0
    if FORCED:
        before = FIRST
    for low in range(FIRST, end, BLOCK):
        block, key = ordered_keys(found, low, end, BLOCK)
        equal = (key == least) & (block < end)
        rank = equals + tl.cumsum(equal.to(tl.int32), 0)
        taken = (key > least) | (equal & (rank <= room))
        at = before + tl.cumsum(taken.to(tl.int32), 0) - 1
        for j in tl.static_range(PAGES):
            page = tl.load(table + block * PAGES + j, mask=taken, other=0)
            tl.store(pages + out + at * PAGES + j, page, mask=taken)
        equals += tl.sum(equal.to(tl.int32), 0)
        before += tl.sum(taken.to(tl.int32), 0)
    if FORCED:
        place = i // PAGES
        page = tl.where(place < FIRST, place, end + place - FIRST - num) * PAGES + i % PAGES
        forced = ((place < FIRST) | (place >= FIRST + num)) & (i < LIST) & (page <= position // PAGE)
        tl.store(pages + out + i, tl.load(table + page, mask=forced, other=0), mask=forced)
    else:
        tl.store(pages + out + i, tl.full([LIST_P], -1, tl.int32), mask=(i >= num * PAGES) & (i < LIST))


def entry_pass(
    q: torch.Tensor, planes: tuple[torch.Tensor, ...], values: torch.Tensor | None, page_table: torch.Tensor,
    token_slots: torch.Tensor, positions: torch.Tensor, rule: Selection, entries: Entries, scale: float,
    page_size: int, state: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], scores: torch.Tensor | None,
    *, decode: bool,
) -> None:  # fmt: skip
    """One pass over the entries; `state`: peaks, sums [tokens, kv heads, splits, padded group] and partial results.

    decode: every token is a row of its own, and `positions` are lengths.
    """
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, splits, group_p = state[0].shape[1:]
    rows, block_n, warps, stages = entry_cut(q, decode)
    block_m = group_p if decode else max(rows, group_p)
    tiles = triton.cdiv(num_tokens, block_m // group_p)
    _entries_kernel[(tiles * splits, num_kv_heads)](
        q, planes[0], planes[-1], values, page_table, token_slots, positions, *state, scores,
        num_tokens, page_table.stride(0), 0 if scores is None else scores.stride(1), scale * LOG2E, rule.dense_below,
        BEGIN=entries.begin, TAIL=entries.tail, PER=entries.per_block, OFFSET=int(decode), NUM_KV_HEADS=num_kv_heads,
        GROUP=num_q_heads // num_kv_heads, GROUP_P=group_p, BLOCK_M=block_m, HEAD_DIM=head_dim, PAGE=page_size,
        BLOCK_N=block_n, SPLITS=splits, SPLITS_P=triton.next_power_of_2(splits), SCORE=scores is not None,
        BOUNDS=len(planes) > 1, ATTEND=values is not None, num_warps=warps, num_stages=stages, **overlap_options(q),
    )  # fmt: skip


def entry_state(
    q: torch.Tensor, num_tokens: int, num_kv_heads: int, splits: int, group_p: int, attend: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Room for peaks, sums and, to `attend`, partial results; whose tokens see nothing keep sums of zero then."""
    shape = num_tokens, num_kv_heads, splits, group_p
    peaks = q.new_empty(shape, dtype=torch.float32)
    if not attend:
        return peaks, torch.empty_like(peaks), None
    return peaks, torch.zeros_like(peaks), q.new_empty(*shape, q.shape[2], dtype=torch.float32)


def entry_cut(q: torch.Tensor, decode: bool) -> tuple[int, int, int, int]:
    """Rows (of prefill), entries, warps and stages of a program's products."""
    if q.element_size() == 4:
        return 64, _BLOCK_N, 4, 1
    return (16, _BLOCK_N, 4, 3) if decode else (128, _BLOCK_N, 8, 3)


def select(
    scores: torch.Tensor, page_table: torch.Tensor, token_slots: torch.Tensor, positions: torch.Tensor,
    rule: Selection, page_size: int, pages: torch.Tensor, *, decode: bool,
) -> None:  # fmt: skip
    """pages [tokens, kv heads, list]: of those chosen by score; in decode with the forced ones, by their place."""
    num_tokens, num_kv_heads, num_listed = pages.shape
    num_blocks = triton.next_power_of_2(scores.shape[2])
    whole = num_blocks <= _SELECT_WHOLE
    block = max(64, num_blocks) if whole else _SELECT_BLOCK
    bits, warps = select_cut(block, decode)
    _select_kernel[(num_tokens * num_kv_heads,)](
        scores, page_table, token_slots, positions, pages, page_table.stride(0), scores.stride(1),
        rule.dense_below, OFFSET=int(decode), FIRST=rule.first, LOCAL=rule.local, TOP=rule.num_scored, FORCED=decode,
        LIST=num_listed, LIST_P=triton.next_power_of_2(num_listed), NUM_KV_HEADS=num_kv_heads, PAGE=page_size,
        PAGES=rule.pages, BITS=bits, BLOCK=block, WHOLE=whole, num_warps=warps, **overlap_options(scores),
    )  # fmt: skip


def select_cut(block: int, decode: bool) -> tuple[int, int]:
    """Bits found at a time and warps, to select among `block` scores: few programs hurry, many share the device."""
    return (4, 8) if decode else (2, max(1, min(8, block // 512)))


def num_splits(num_rows: int, num_kv_heads: int, num_entries: int, device: torch.device) -> int:
    """Programs that share a row's entries: enough to fill the device, each with a block at least."""
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    wanted = triton.cdiv(4 * num_sms, num_rows * num_kv_heads)
    return max(1, min(wanted, triton.cdiv(num_entries, _BLOCK_N), 64))


def sparse_decode(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, summaries: tuple[torch.Tensor, ...],
    page_table: torch.Tensor, slots: torch.Tensor, seq_lens: torch.Tensor, rule: Selection, entries: Entries,
    scale: float, out: torch.Tensor, *, out_scales: torch.Tensor | None, k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None, values: torch.Tensor | None = None, compressed: torch.Tensor | None = None,
    index_q: torch.Tensor | None = None, workspace: DecodeWorkspace | None, max_seq_len: int,
) -> None:  # fmt: skip
    selected = None
    if len(q) and max_seq_len > rule.dense_below:
        num_rows, num_q_heads, _ = q.shape
        num_kv_heads, page_size = k_pages.shape[1:3]
        num_blocks = triton.cdiv(max_seq_len, page_size * rule.pages)
        where = page_table, slots, seq_lens
        scores = q.new_empty(num_rows, num_kv_heads, num_blocks, dtype=torch.float32)
        pages = slots.new_empty(num_rows, num_kv_heads, rule.num_blocks * rule.pages)
        if index_q is not None:
            index_scores(index_q, summaries[0], *where, rule, scores, decode=True)
        else:
            group_p = max(16, triton.next_power_of_2(num_q_heads // num_kv_heads))
            splits = num_splits(num_rows, num_kv_heads, num_blocks * entries.per_block, q.device)
            state = entry_state(q, num_rows, num_kv_heads, splits, group_p, values is not None)
            for kept, mixed in ((None, values), (scores, None)):
                entry_pass(q, summaries, mixed, *where, rule, entries, scale, page_size, state, kept, decode=True)
            if compressed is not None:
                merge_splits(state, compressed)
        select(scores, *where, rule, page_size, pages, decode=True)
        selected = pages, rule.dense_below, rule.pages
    triton_decode.paged_decode(
        q, k_pages, v_pages, page_table, slots, seq_lens, scale, out, out_scales=out_scales, window=None, sinks=None,
        k_scales=k_scales, v_scales=v_scales, workspace=workspace, max_seq_len=max_seq_len, selected=selected,
    )  # fmt: skip

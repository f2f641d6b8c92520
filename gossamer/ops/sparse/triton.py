"""Kernels that summarise pages, score blocks of many tokens, and select blocks, for decode and prefill alike.

A program has the query heads of one KV head as rows of its products; scores exist for a bounded number of tokens, one
number for each block and KV head.
"""

import torch
import triton
import triton.language as tl

from gossamer.ops.attention.triton import LOG2E, LOW, PRECISION
from gossamer.ops.dispatch import overlap_options
from gossamer.ops.sparse.selection import Entries, Selection

_BLOCK_N = 64
# Scores that a selecting program holds; it reads others again for every few bits.
_SELECT_MOST = 16384


@triton.jit
def summarise(
    k_pages, k_scales, means, maxima, page, head, NUM_KV_HEADS: tl.constexpr, PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BOUNDS: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    at = page.to(tl.int64) * NUM_KV_HEADS + head
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


@triton.jit
def _summary_kernel(
    k_pages, k_scales, means, maxima, page_table, token_slots, positions, table_stride,
    NUM_KV_HEADS: tl.constexpr, PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BOUNDS: tl.constexpr,
    SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: a token and KV head; of a page's last token, the page's summary."""
    token = tl.program_id(0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(token_slots + token)
    position = tl.load(positions + token)
    if (slot >= 0) & (position >= 0) & (position % PAGE == PAGE - 1):
        page = tl.load(page_table + slot.to(tl.int64) * table_stride + position // PAGE)
        summarise(
            k_pages, k_scales, means, maxima, page, tl.program_id(1), NUM_KV_HEADS, PAGE, HEAD_DIM, BOUNDS, SCALED
        )


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
def entry_rows(plane, table, head, index, end, NUM_KV_HEADS: tl.constexpr, PER: tl.constexpr, DIM: tl.constexpr):
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
    low = entry_rows(first, table, head, index, end, NUM_KV_HEADS, PER, DIM)
    high = low
    if BOUNDS:
        high = entry_rows(second, table, head, index, end, NUM_KV_HEADS, PER, DIM)
    return logits_of(queries, low, high, BOUNDS) * scale_log2


@triton.jit
def logits_of(queries, low, high, BOUNDS: tl.constexpr):
    """Products with the entries `low`; BOUNDS: the largest that anything between `low` and `high` could have."""
    low = low.to(queries.dtype)
    if BOUNDS:
        zero = tl.zeros_like(queries)
        positive, negative = tl.maximum(queries, zero).to(queries.dtype), tl.minimum(queries, zero).to(queries.dtype)
        logits = tl.dot(positive, high.to(queries.dtype), input_precision=PRECISION)
        logits = tl.dot(negative, low, logits, input_precision=PRECISION)
    else:
        logits = tl.dot(queries, low, input_precision=PRECISION)
    return logits


@triton.jit(
    do_not_specialize=["num_tokens", "dense_below"], do_not_specialize_on_alignment=["token_slots", "positions"]
)
def _entries_kernel(
    q, first, second, values, page_table, token_slots, positions, peaks, sums, partials, scores,
    num_tokens, table_stride, score_stride, scale_log2, dense_below,
    BEGIN: tl.constexpr, TAIL: tl.constexpr, PER: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_P: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    SCORE: tl.constexpr, BOUNDS: tl.constexpr, ATTEND: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: some tokens and a KV head against the entries they see.

    Without SCORE: each row's maximum and sum of exponentials (ATTEND: and its attention to `values`). With it: the
    probabilities' sums over the group, weighted over a block's entries (TECHNIQUES 4).
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP_P
    BLOCKS: tl.constexpr = BLOCK_N // PER
    STRIDE: tl.constexpr = PAGE // PER
    START: tl.constexpr = BEGIN // PER * PER
    tile, head = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    m = tl.arange(0, BLOCK_M)
    token, g = tile * TOKENS + m // GROUP_P, m % GROUP_P
    inside = token < num_tokens
    slot = tl.load(token_slots + token, mask=inside, other=-1)
    position = tl.load(positions + token, mask=inside, other=0)
    todo = (slot >= 0) & (position >= dense_below)
    end = tl.where(todo, tl.maximum(position + 1 - TAIL, 0) // STRIDE, 0)
    if tl.max(end, 0) <= BEGIN:
        return
    row = (token * NUM_KV_HEADS + head).to(tl.int64)
    real = inside & (g < GROUP)
    d = tl.arange(0, HEAD_DIM)
    queries = tl.load(q + ((row * GROUP + g) * HEAD_DIM)[:, None] + d[None, :], mask=real[:, None], other=0.0)
    peak = tl.full([BLOCK_M], LOW, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, HEAD_DIM if ATTEND else 16], tl.float32)
    n = tl.arange(0, BLOCK_N)
    if SCORE:
        peak = tl.load(peaks + row * GROUP_P + g, mask=real, other=LOW)
        inverse = 1.0 / tl.maximum(tl.load(sums + row * GROUP_P + g, mask=real, other=0.0), 1e-30)
        t = tile * TOKENS + tl.arange(0, TOKENS)
        t_slot = tl.load(token_slots + t, mask=t < num_tokens, other=-1)
        t_row = (t * NUM_KV_HEADS + head).to(tl.int64) * score_stride
    current = tl.max(tl.where(todo, slot, -1), 0)
    while current >= 0:
        mine = todo & (slot == current)
        stop = tl.max(tl.where(mine, end, 0), 0)
        table = page_table + current.to(tl.int64) * table_stride
        for low in range(START, stop, BLOCK_N):
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
                    logits = _entry_logits(
                        queries, first, second, table, head, following, stop, scale_log2, NUM_KV_HEADS, PER,
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
                    v = tl.trans(entry_rows(values, table, head, index, stop, NUM_KV_HEADS, PER, HEAD_DIM))
                    v = tl.where((index >= BEGIN)[:, None], v, 0.0)  # a NaN would pass a weight of zero
                    p = p.to(queries.dtype)
                    mixed = tl.dot(p, v.to(queries.dtype), mixed * fade[:, None], input_precision=PRECISION)
        todo = todo & (slot != current)
        current = tl.max(tl.where(todo, slot, -1), 0)
    if not SCORE:
        at = row * GROUP_P + g
        tl.store(peaks + at, peak, mask=real)
        tl.store(sums + at, total, mask=real)
        if ATTEND:
            mixed = mixed / tl.maximum(total, 1e-30)[:, None]
            tl.store(partials + at[:, None] * HEAD_DIM + d[None, :], mixed, mask=real[:, None])


@triton.jit
def to_keys(scores, inside, SIGNED: tl.constexpr = False):
    """Scores, of which only SIGNED ones may be negative, as integers of the same order; below all if not `inside`.

    A NaN is as good as infinity: above 0x7F800000 the search's bounds would wrap around.
    """
    bits = scores.to(tl.int32, bitcast=True)
    if SIGNED:
        bits = tl.where(scores == scores, bits, 0x7F800000)
        return tl.where(inside, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), -2147483648)
    return tl.where(inside, tl.minimum(bits & 0x7FFFFFFF, 0x7F800000), -1)


@triton.jit
def load_keys(scores, block, count, SIGNED: tl.constexpr = False):
    return to_keys(tl.load(scores + block, mask=block < count, other=0.0), block < count, SIGNED)


@triton.jit
def _num_at_least(one, two, three, key, BLOCK: tl.constexpr):
    """How many of BLOCK keys reach each of three bounds. As far as ten bits hold them they are one sum: a warp adds 32
    bits in an instruction."""
    packed = (key >= one).to(tl.int32) + ((key >= two).to(tl.int32) << 10) + ((key >= three).to(tl.int32) << 20)
    if BLOCK > 1024:
        packed = tl.sum(tl.reshape(packed, [BLOCK // 512, 512]), 1)
        return tl.sum(packed & 1023, 0), tl.sum((packed >> 10) & 1023, 0), tl.sum(packed >> 20, 0)
    packed = tl.sum(packed, 0)
    return packed & 1023, (packed >> 10) & 1023, packed >> 20


@triton.jit
def select_row(
    held, scores, count, of, table, pages, last_page, kept, FIRST: tl.constexpr, LOCAL: tl.constexpr,
    TOP: tl.constexpr, FORCED: tl.constexpr, LIST: tl.constexpr, BLOCK: tl.constexpr, PAGES: tl.constexpr = 1,
    SIGNED: tl.constexpr = False,
):  # fmt: skip
    """The TOP best of `count` blocks, whose pages `of` has, in rising order to `pages`; equal ones from the earliest
    on, -1 behind them.

    A search between two bounds: TOP keys or more (`many`) reach `least`, fewer (`above`) reach `over`. It ends where a
    bound leaves TOP. `held`: the keys of the first BLOCK of `scores`, and of a BLOCK of 1024 or fewer one is none.
    FORCED: the first blocks stand before them, the local ones behind; else their keys go to `kept`, if that is not
    None. A block is PAGES pages; LIST counts pages.
    """
    i = tl.arange(0, triton.next_power_of_2(LIST))
    many, above, before = count, 0, 0
    num = tl.minimum(many, TOP)
    best = tl.max(held, 0)
    for low in range(BLOCK, count, BLOCK):
        best = tl.maximum(best, tl.max(load_keys(scores, low + tl.arange(0, BLOCK), count, SIGNED), 0))
    over = best.to(tl.int64) + 1  # in 64 bits: the distance of two keys may not fit 32
    least = tl.full([], -2147483647 if SIGNED else 0, tl.int64)  # above the key of what is not there
    # The best of many scores are within some octaves of the largest; an octave is 2^23.
    one, two, three = over - (1 << 25), over - (1 << 23), over - (1 << 21)
    while (many > TOP) & (over - least > 1):
        one, two, three = tl.maximum(one, least), tl.maximum(two, least), tl.maximum(three, least)
        lower, middle, upper = one.to(tl.int32), two.to(tl.int32), three.to(tl.int32)
        x, y, z = _num_at_least(lower, middle, upper, held, BLOCK)
        for low in range(BLOCK, count, BLOCK):
            others = load_keys(scores, low + tl.arange(0, BLOCK), count, SIGNED)
            more, most, all_three = _num_at_least(lower, middle, upper, others, BLOCK)
            x, y, z = x + more, y + most, z + all_three
        if z >= TOP:
            least, many = three, z
        elif y >= TOP:
            least, many, over, above = two, y, three, z
        elif x >= TOP:
            least, many, over, above = one, x, two, y
        else:
            over, above = one, x
        step = tl.maximum((over - least) >> 2, 1)
        one, two, three = least + step, least + 2 * step, least + 3 * step
    least, equals = least.to(tl.int32), TOP - above
    if FORCED:
        before = FIRST
    key = held
    for low in range(0, count, BLOCK):
        block = low + tl.arange(0, BLOCK)
        if low > 0:
            key = load_keys(scores, block, count, SIGNED)
        taken = key >= least
        if many > TOP:
            equal = key == least
            taken = (key > least) | (equal & (tl.cumsum(equal.to(tl.int32), 0) <= equals))
            equals -= tl.sum(equal.to(tl.int32), 0)
        at = before + tl.cumsum(taken.to(tl.int32), 0) - 1
        for j in tl.static_range(PAGES):
            page = tl.load(of + block * PAGES + j, mask=taken, other=0)
            tl.store(pages + at * PAGES + j, page, mask=taken)
        if kept is not None:
            tl.store(kept + at, key.to(tl.float32, bitcast=True), mask=taken)
        before += tl.sum(taken.to(tl.int32), 0)
    if FORCED:
        place = i // PAGES
        end = tl.maximum(last_page // PAGES - LOCAL + 1, FIRST)
        page = tl.where(place < FIRST, place, end + place - FIRST - num) * PAGES + i % PAGES
        forced = ((place < FIRST) | (place >= FIRST + num)) & (i < LIST) & (page <= last_page)
        tl.store(pages + i, tl.load(table + page, mask=forced, other=0), mask=forced)
    else:
        tl.store(pages + i, i * 0 - 1, mask=(i >= num * PAGES) & (i < LIST))


@triton.jit(do_not_specialize=["dense_below"], do_not_specialize_on_alignment=["token_slots", "positions"])
def _select_kernel(
    scores, page_table, token_slots, positions, pages, table_stride, score_stride, dense_below,
    OFFSET: tl.constexpr, FIRST: tl.constexpr, LOCAL: tl.constexpr, TOP: tl.constexpr, FORCED: tl.constexpr,
    LIST: tl.constexpr, NUM_KV_HEADS: tl.constexpr, PAGE: tl.constexpr, PAGES: tl.constexpr, SIGNED: tl.constexpr,
    BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: a token and KV head. What attends to everything has no list: -1."""
    row = tl.program_id(0)
    token = row // NUM_KV_HEADS
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(token_slots + token)
    position = tl.load(positions + token) - OFFSET
    out = pages + row.to(tl.int64) * LIST
    if (slot < 0) | (position < dense_below):
        i = tl.arange(0, triton.next_power_of_2(LIST))
        tl.store(out + i, i * 0 - 1, mask=i < LIST)
        return
    found = scores + row.to(tl.int64) * score_stride + FIRST
    last_page = position // PAGE
    count = tl.maximum(last_page // PAGES - LOCAL + 1 - FIRST, 0)
    held = load_keys(found, tl.arange(0, BLOCK), count, SIGNED)
    table = page_table + slot.to(tl.int64) * table_stride
    select_row(
        held, found, count, table + FIRST * PAGES, table, out, last_page, None, FIRST, LOCAL, TOP, FORCED, LIST, BLOCK,
        PAGES, SIGNED,
    )  # fmt: skip


def entry_pass(
    q: torch.Tensor, planes: tuple[torch.Tensor, ...], values: torch.Tensor | None, page_table: torch.Tensor,
    token_slots: torch.Tensor, positions: torch.Tensor, rule: Selection, entries: Entries, scale: float,
    page_size: int, state: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], scores: torch.Tensor | None,
) -> None:  # fmt: skip
    """One pass over the entries; `state`: of `entry_state`."""
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, _, group_p = state[0].shape[1:]
    rows, block_n, warps, stages = entry_cut(q)
    block_m = max(rows, group_p)
    _entries_kernel[(triton.cdiv(num_tokens, block_m // group_p), num_kv_heads)](
        q, planes[0], planes[-1], values, page_table, token_slots, positions, *state, scores,
        num_tokens, page_table.stride(0), 0 if scores is None else scores.stride(1), scale * LOG2E, rule.dense_below,
        BEGIN=entries.begin, TAIL=entries.tail, PER=entries.per_block, NUM_KV_HEADS=num_kv_heads,
        GROUP=num_q_heads // num_kv_heads, GROUP_P=group_p, BLOCK_M=block_m, HEAD_DIM=head_dim, PAGE=page_size,
        BLOCK_N=block_n, SCORE=scores is not None, BOUNDS=len(planes) > 1, ATTEND=values is not None, num_warps=warps,
        num_stages=stages, **overlap_options(q),
    )  # fmt: skip


def entry_state(
    q: torch.Tensor, num_tokens: int, num_kv_heads: int, splits: int, group_p: int, attend: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Room for peaks, sums [tokens, kv heads, splits, padded group] and, to `attend`, partial results.

    The sums of whose tokens see nothing stay zero then.
    """
    shape = num_tokens, num_kv_heads, splits, group_p
    peaks = q.new_empty(shape, dtype=torch.float32)
    if not attend:
        return peaks, torch.empty_like(peaks), None
    return peaks, torch.zeros_like(peaks), q.new_empty(*shape, q.shape[2], dtype=torch.float32)


def entry_cut(q: torch.Tensor) -> tuple[int, int, int, int]:
    """Rows, entries, warps and stages of a program's products."""
    return (64, _BLOCK_N, 4, 1) if q.element_size() == 4 else (128, _BLOCK_N, 8, 3)


def select(
    scores: torch.Tensor, page_table: torch.Tensor, token_slots: torch.Tensor, positions: torch.Tensor,
    rule: Selection, page_size: int, pages: torch.Tensor, *, decode: bool, signed: bool = False,
) -> None:  # fmt: skip
    """pages [tokens, kv heads, list]: those chosen by score; in decode, where `positions` are lengths, with the forced
    ones, by their place. signed: scores may be negative."""
    num_tokens, num_kv_heads, num_listed = pages.shape
    block = min(_SELECT_MOST, triton.next_power_of_2(max(63, scores.shape[2] - rule.first - rule.local) + 1))
    _select_kernel[(num_tokens * num_kv_heads,)](
        scores, page_table, token_slots, positions, pages, page_table.stride(0), scores.stride(1), rule.dense_below,
        OFFSET=int(decode), FIRST=rule.first, LOCAL=rule.local, TOP=rule.num_scored, FORCED=decode, LIST=num_listed,
        NUM_KV_HEADS=num_kv_heads, PAGE=page_size, PAGES=rule.pages, SIGNED=signed, BLOCK=block,
        num_warps=select_warps(block), **overlap_options(scores),
    )  # fmt: skip


def select_warps(block: int) -> int:
    """To select among `block` scores."""
    return max(1, min(16, block // 512))

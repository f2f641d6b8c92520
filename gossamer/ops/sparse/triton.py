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

# Entries of a program, the same ones whatever tokens it has.
SHARE = 1024
# Scores that a selecting program holds; it reads others again for every few bits.
_SELECT_MOST = 16384


@triton.jit
def overlap(PDL: tl.constexpr):
    """Lets the launch behind this one start, and waits for the one ahead (`overlap_options`)."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


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
    overlap(PDL)
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
def _product(queries, columns, added, TURNED: tl.constexpr):
    if TURNED:
        product = tl.dot(tl.trans(columns), tl.trans(queries), added, input_precision=PRECISION)
    else:
        product = tl.dot(queries, columns, added, input_precision=PRECISION)
    return product


@triton.jit
def logits_of(queries, low, high, BOUNDS: tl.constexpr, TURNED: tl.constexpr = False):
    """Products with the entries `low`, which TURNED are the rows; BOUNDS: the largest that anything between `low` and
    `high` could have."""
    logits = None
    if BOUNDS:
        zero, columns = tl.zeros_like(queries), high.to(queries.dtype)
        logits = _product(tl.maximum(queries, zero).to(queries.dtype), columns, None, TURNED)
        queries = tl.minimum(queries, zero).to(queries.dtype)
    return _product(queries, low.to(queries.dtype), logits, TURNED)


@triton.jit(
    do_not_specialize=["num_tokens", "dense_below"], do_not_specialize_on_alignment=["token_slots", "positions"]
)
def _entries_kernel(
    q, first, second, values, page_table, token_slots, positions, peaks, sums, partials, scores,
    num_tokens, table_stride, score_stride, scale_log2, dense_below,
    BEGIN: tl.constexpr, TAIL: tl.constexpr, PER: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_P: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr,
    SHARE: tl.constexpr, SPLITS: tl.constexpr, SCORE: tl.constexpr, BOUNDS: tl.constexpr, ATTEND: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: some tokens and a KV head against SHARE of the entries they see.

    Without SCORE: each row's maximum and sum of exponentials (ATTEND: and its attention to `values`). With it: the
    probabilities' sums over the group, weighted over a block's entries (TECHNIQUES 4). What a reduction adds up lies in
    a thread, as far as it can: columns of a product do, 2 of every 8, and rows hardly.
    """
    TOKENS: tl.constexpr = BLOCK_M // GROUP_P
    BLOCKS: tl.constexpr = BLOCK_N // PER
    STEP: tl.constexpr = BLOCK_N - PER if SCORE and PER > 1 else BLOCK_N  # a block needs the next one's first entry
    STRIDE: tl.constexpr = PAGE // PER
    LANES: tl.constexpr = 1 if ATTEND else 4  # partial maxima and sums of a row: the threads that share it
    PAIR: tl.constexpr = min(GROUP_P, 2)
    tile, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    overlap(PDL)
    m = tl.arange(0, BLOCK_M)
    token = tile * TOKENS + m // (4 * GROUP_P) * 4 + m % (4 * PAIR) // PAIR
    g = m % (4 * GROUP_P) // (4 * PAIR) * PAIR + m % PAIR
    inside = token < num_tokens
    slot = tl.load(token_slots + token, mask=inside, other=-1)
    position = tl.load(positions + token, mask=inside, other=0)
    todo = (slot >= 0) & (position >= dense_below)
    end = tl.where(todo, tl.maximum(position + 1 - TAIL, 0) // STRIDE, 0)
    begin = (BEGIN // PER * PER if SCORE else BEGIN) + split * SHARE
    if tl.max(end, 0) <= tl.maximum(begin, BEGIN):
        return
    row = (token * NUM_KV_HEADS + head).to(tl.int64)
    real = todo & (g < GROUP)
    d = tl.arange(0, HEAD_DIM)
    queries = tl.load(q + ((row * GROUP + g) * HEAD_DIM)[:, None] + d[None, :], mask=real[:, None], other=0.0)
    peak = tl.full([BLOCK_M, LANES], LOW, tl.float32)
    total = tl.zeros([BLOCK_M, LANES], tl.float32)
    mixed = tl.zeros([BLOCK_M, HEAD_DIM if ATTEND else 16], tl.float32)
    n, b = tl.arange(0, BLOCK_N), tl.arange(0, BLOCKS)
    if SCORE:
        s = tl.arange(0, SPLITS)
        at = ((row * SPLITS)[:, None] + s[None, :]) * GROUP_P + g[:, None]
        known = real[:, None] & (BEGIN + s[None, :] * SHARE < end[:, None])
        highest = tl.load(peaks + at, mask=known, other=LOW)
        part = tl.load(sums + at, mask=known, other=0.0)
        whole = tl.max(highest, 1)
        part = tl.sum(part * tl.exp2(highest - whole[:, None]), 1)
        whole = tl.where(part > 0, whole + tl.log2(tl.maximum(part, 1e-30)), float("inf"))
        t = tile * TOKENS + tl.arange(0, TOKENS)
        t_slot = tl.load(token_slots + t, mask=t < num_tokens, other=-1)
        t_row = (t * NUM_KV_HEADS + head).to(tl.int64) * score_stride
    current = tl.max(tl.where(todo, slot, -1), 0)
    while current >= 0:
        mine = todo & (slot == current)
        stop = tl.minimum(tl.max(tl.where(mine, end, 0), 0), begin + SHARE)
        table = page_table + current.to(tl.int64) * table_stride
        all_see = tl.min(tl.where(mine, end, tl.where(todo, 0, stop)), 0)
        for low in range(begin, stop, STEP):
            index = low + n
            columns = entry_rows(first, table, head, index, stop, NUM_KV_HEADS, PER, HEAD_DIM)
            high = entry_rows(second, table, head, index, stop, NUM_KV_HEADS, PER, HEAD_DIM) if BOUNDS else columns
            logits = logits_of(queries, columns, high, BOUNDS, SCORE)
            if SCORE:
                p = logits * scale_log2 - whole[None, :]
                if PER > 1:
                    seen = mine[None, :] & (index >= BEGIN)[:, None] & (index[:, None] < end[None, :])
                    p = tl.where(seen, p, float("-inf"))
                entry = tl.exp2(p)
                if GROUP_P > 1:
                    entry = tl.reshape(entry, [BLOCK_N, TOKENS // 4, GROUP_P // 2, 4, 2])
                    entry = tl.reshape(tl.sum(tl.sum(entry, 4), 2), [BLOCK_N, TOKENS])
                block = low // PER + b
                kept = (t_slot == current)[None, :] & (block * PER < stop)[:, None]
                if PER > 1:
                    weight = tl.where(n % PER == 0, 1.0, 2.0)
                    after = tl.broadcast_to((tl.minimum(b + 1, BLOCKS - 1) * PER)[:, None], [BLOCKS, TOKENS])
                    following = tl.gather(entry, after, 0)
                    entry = tl.sum(tl.reshape(entry * weight[:, None], [BLOCKS, PER, TOKENS]), 1) + following
                    kept = kept & (b < BLOCKS - 1)[:, None]
                tl.store(scores + t_row[None, :] + block[:, None], entry, mask=kept)
            else:
                if low + BLOCK_N > all_see:
                    logits = tl.where(mine[:, None] & (index[None, :] < end[:, None]), logits, float("-inf"))
                logits = tl.reshape(logits, [BLOCK_M, BLOCK_N // (2 * LANES), LANES, 2])
                highest = tl.maximum(peak, tl.max(tl.max(logits, 3), 1) * scale_log2)
                fade = tl.exp2(peak - highest)
                p = tl.exp2(logits * scale_log2 - highest[:, None, :, None])
                total = total * fade + tl.sum(tl.sum(p, 3), 1)
                peak = highest
                if ATTEND:
                    v = tl.trans(entry_rows(values, table, head, index, stop, NUM_KV_HEADS, PER, HEAD_DIM))
                    p = tl.reshape(p, [BLOCK_M, BLOCK_N]).to(queries.dtype)
                    mixed = tl.dot(p, v.to(queries.dtype), mixed * fade, input_precision=PRECISION)
        current = tl.max(tl.where(todo & (slot < current), slot, -1), 0)
    if not SCORE:
        at = (row * SPLITS + split) * GROUP_P + g
        highest = tl.max(peak, 1)
        whole = tl.sum(total * tl.exp2(peak - highest[:, None]), 1)
        tl.store(peaks + at, highest, mask=real)
        tl.store(sums + at, whole, mask=real)
        if ATTEND:
            mixed = mixed / tl.maximum(whole, 1e-30)[:, None]
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
    SIGNED: tl.constexpr = False, number=None,
):  # fmt: skip
    """The TOP best of `count` blocks, whose pages `of` has, in rising order to `pages`; equal ones from the earliest
    on, -1 behind them. `number`: of each key that is held, its block, rising; without `of`, that is what is listed.

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
        block = block if number is None else number  # all are held then
        for j in tl.static_range(PAGES):
            page = block
            if of is not None:
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
    WIDTH: tl.constexpr, RUNS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: a token and KV head. What attends to everything has no list: -1."""
    row = tl.program_id(0)
    token = row // NUM_KV_HEADS
    overlap(PDL)
    slot = tl.load(token_slots + token)
    position = tl.load(positions + token) - OFFSET
    out = pages + row.to(tl.int64) * LIST
    if (slot < 0) | (position < dense_below):
        i = tl.arange(0, triton.next_power_of_2(LIST))
        tl.store(out + i, i * 0 - 1, mask=i < LIST)
        return
    scores += row.to(tl.int64) * score_stride
    last_page = position // PAGE
    end = tl.maximum(last_page // PAGES - LOCAL + 1, FIRST)
    table = page_table + slot.to(tl.int64) * table_stride
    i = tl.arange(0, BLOCK)
    number = None
    if WIDTH == 1:
        count = end - FIRST
        held = load_keys(scores + FIRST, i, count, SIGNED)
    else:
        # What is among the best lies in one of the best TOP runs, by their largest: others have TOP before them.
        NONE: tl.constexpr = -2147483648 if SIGNED else -1
        run = tl.arange(0, RUNS)
        best = tl.full([RUNS], NONE, tl.int32)
        for low in tl.static_range(0, WIDTH, 8):
            block = run[:, None] * WIDTH + low + tl.arange(0, 8)[None, :]
            found = tl.load(scores + block, mask=(run * WIDTH + low < end)[:, None], other=0.0)
            best = tl.maximum(best, tl.max(to_keys(found, (block >= FIRST) & (block < end), SIGNED), 1))
        count = tl.sum((best > NONE).to(tl.int32), 0)
        select_row(best, scores, count, None, table, out, 0, None, FIRST, LOCAL, TOP, False, TOP, RUNS, 1, SIGNED)
        tl.debug_barrier()
        inside = i < tl.minimum(count, TOP) * WIDTH
        number = tl.load(out + i // WIDTH, mask=inside, other=0) * WIDTH + i % WIDTH - FIRST
        inside = inside & (number >= 0) & (number < end - FIRST)
        tl.debug_barrier()
        count = tl.sum(inside.to(tl.int32), 0)
        held = to_keys(tl.load(scores + FIRST + number, mask=inside, other=0.0), inside, SIGNED)
    select_row(
        held, scores + FIRST, count, table + FIRST * PAGES, table, out, last_page, None, FIRST, LOCAL, TOP, FORCED,
        LIST, BLOCK, PAGES, SIGNED, number,
    )  # fmt: skip


def entry_pass(
    q: torch.Tensor, planes: tuple[torch.Tensor, ...], values: torch.Tensor | None, page_table: torch.Tensor,
    token_slots: torch.Tensor, positions: torch.Tensor, rule: Selection, entries: Entries, scale: float,
    page_size: int, state: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None], scores: torch.Tensor | None,
) -> None:  # fmt: skip
    """One pass over the entries; `state`: of `entry_state`."""
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, splits, group_p = state[0].shape[1:]
    kind = entries.per_block, len(planes) > 1, scores is not None
    rows, block_n, warps, stages, registers = entry_cut(q, group_p, *kind)
    block_m = max(rows, 4 * group_p)
    _entries_kernel[(triton.cdiv(num_tokens, block_m // group_p), num_kv_heads, splits)](
        q, planes[0], planes[-1], values, page_table, token_slots, positions, *state, scores,
        num_tokens, page_table.stride(0), 0 if scores is None else scores.stride(1), scale * LOG2E, rule.dense_below,
        BEGIN=entries.begin, TAIL=entries.tail, PER=entries.per_block, NUM_KV_HEADS=num_kv_heads,
        GROUP=num_q_heads // num_kv_heads, GROUP_P=group_p, BLOCK_M=block_m, HEAD_DIM=head_dim, PAGE=page_size,
        BLOCK_N=block_n, SHARE=SHARE if splits > 1 else 1 << 30, SPLITS=splits, SCORE=kind[2], BOUNDS=kind[1],
        ATTEND=values is not None, num_warps=warps, num_stages=stages,
        **({"maxnreg": registers} if registers else {}), **overlap_options(q),
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


def entry_cut(
    q: torch.Tensor, group_p: int, per_block: int, bounds: bool, score: bool
) -> tuple[int, int, int, int, int]:
    """Rows, entries, warps, stages and registers (0: as many as it likes) of a program's products."""
    if q.element_size() == 4:
        return 64, 64, 4, 1, 0
    if per_block > 1 or q.shape[2] > 128 or (score and group_p < 4):
        block_n = 32 if bounds and q.shape[2] > 128 else 64  # what fits a multiprocessor
        return 128, block_n, 8, 3, 128 if score and per_block > 1 else 0
    if bounds:
        return (128, 64, 4, 2, 0) if score else (256, 64, 8, 2, 0)
    return (128, 64, 4, 3, 168) if score else (256, 64, 8, 3, 128)


def select(
    scores: torch.Tensor, page_table: torch.Tensor, token_slots: torch.Tensor, positions: torch.Tensor,
    rule: Selection, page_size: int, pages: torch.Tensor, *, decode: bool, signed: bool = False,
) -> None:  # fmt: skip
    """pages [tokens, kv heads, list]: those chosen by score; in decode, where `positions` are lengths, with the forced
    ones, by their place. signed: scores may be negative."""
    num_tokens, num_kv_heads, num_listed = pages.shape
    width, runs, block = select_cut(scores.shape[2], rule, decode)
    warps = max(1, min(16, block // 512) if width == 1 else min(4, width * runs // 2048))
    _select_kernel[(num_tokens * num_kv_heads,)](
        scores, page_table, token_slots, positions, pages, page_table.stride(0), scores.stride(1), rule.dense_below,
        OFFSET=int(decode), FIRST=rule.first, LOCAL=rule.local, TOP=rule.num_scored, FORCED=decode, LIST=num_listed,
        NUM_KV_HEADS=num_kv_heads, PAGE=page_size, PAGES=rule.pages, SIGNED=signed, WIDTH=width, RUNS=runs,
        BLOCK=block, num_warps=warps, **overlap_options(scores),
    )  # fmt: skip


def select_cut(num_blocks: int, rule: Selection, decode: bool) -> tuple[int, int, int]:
    """Blocks of a run, runs, and keys to select among at last; no runs where they would not be few."""
    whole = 1, 1, min(_SELECT_MOST, _keys(num_blocks - rule.first - rule.local))
    cuts = [(w, _keys(triton.cdiv(num_blocks, w)), _keys(rule.num_scored * w)) for w in (64, 32, 16, 8)]
    cut = min(cuts, key=lambda cut: cut[1] + cut[2])
    return cut if not decode and num_blocks % 8 == 0 and 2 * (cut[1] + cut[2]) <= whole[2] else whole


def _keys(num: int) -> int:
    """A power of two with one to spare where ten bits would not hold the count of them all."""
    return max(64, triton.next_power_of_2(num + (num > 512)))

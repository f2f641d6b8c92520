"""Decode: a launch scores, one selects, and one attends to what was selected."""

import torch
import triton
import triton.language as tl

from gossamer.ops.attention import triton_decode
from gossamer.ops.attention.triton import LOG2E, LOW, PRECISION
from gossamer.ops.attention.workspace import DecodeWorkspace
from gossamer.ops.dispatch import overlap_options
from gossamer.ops.sparse import triton as core
from gossamer.ops.sparse.selection import Entries, Selection
from gossamer.ops.sparse.triton_index import index_scores
from gossamer.ops.sparse.triton_nsa import merge_splits

_MOST_SPLITS = 128
# Scores that a choosing program holds, one more than it has; and that which chooses among the others' best, which reads
# what it cannot hold again in every step of its search.
_SHORT, _LONG = 1024, 4096
# Bytes of logits at a time: what rows of a step exceed it follow in another launch.
_LOGITS_BYTES = 128 << 20


@triton.jit
def _choose(
    logits, num_entries, peaks, sums, scores, table, pages, last, kept, row_head, end, active, low, high,
    BEGIN: tl.constexpr, PER: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, SPLITS: tl.constexpr,
    FIRST: tl.constexpr, LOCAL: tl.constexpr, TOP: tl.constexpr, FORCED: tl.constexpr, LIST: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Selects among the blocks low .. high - 1 from FIRST on, fewer than BLOCK, whose scores are made of their entries'
    logits and what `active` programs found the maxima and sums to be.

    A thread has the logits of all heads of its blocks, four neighbours where a load takes four: their sum crosses no
    threads, and a block's score is in one thread alone.
    """
    START: tl.constexpr = BEGIN // PER * PER
    g, s = tl.arange(0, triton.next_power_of_2(GROUP)), tl.arange(0, triton.next_power_of_2(SPLITS))
    n = tl.arange(0, BLOCK)
    # Of one entry a block all is on its way at once, whole loads at a time.
    index = (FIRST + low + n) * PER
    rows = logits + (row_head * GROUP + g)[:, None] * num_entries
    inside = (low + n < (tl.cdiv(high, 16) * 16 if PER == 1 else low))[None, :] & (g < GROUP)[:, None]
    x = tl.load(rows + (index - BEGIN)[None, :], mask=inside, other=float("-inf"))
    x = tl.where((low + n < high)[None, :], x, float("-inf"))
    known = (s < active)[:, None] & (g < GROUP)[None, :]
    part = (row_head * SPLITS + s[:, None]) * GROUP_P + g[None, :]
    highest = tl.load(peaks + part, mask=known, other=LOW)
    total = tl.load(sums + part, mask=known, other=0.0)
    peak = tl.max(highest, 0)
    whole = peak + tl.log2(tl.maximum(tl.sum(total * tl.exp2(highest - peak[None, :]), 0), 1e-30))
    score = tl.sum(tl.exp2(x - whole[:, None]), 0)
    if PER > 1:  # probabilities of entries go by way of memory, for a block's lie in several threads
        stop = tl.minimum(end, (FIRST + high) * PER + 1)
        for entry in range((FIRST + low) * PER, stop, BLOCK):
            inside = ((entry + n >= BEGIN) & (entry + n < stop))[None, :] & (g < GROUP)[:, None]
            x = tl.load(rows + (entry + n - BEGIN)[None, :], mask=inside, other=float("-inf"))
            tl.store(scores + entry - START + n, tl.sum(tl.exp2(x - whole[:, None]), 0), mask=entry + n < stop)
        tl.debug_barrier()
        score = tl.load(scores + index + PER - START, mask=index + PER < stop, other=0.0)
        for i in tl.static_range(PER):
            weight = 1.0 if i == 0 else 2.0
            score += tl.load(scores + index + i - START, mask=index + i < stop, other=0.0) * weight
    core.select_row(
        core.to_keys(score, low + n < high), scores, high - low, table + FIRST + low, table, pages, last, kept, FIRST,
        LOCAL, TOP, FORCED, LIST, BLOCK,
    )  # fmt: skip


@triton.jit
def _row(
    slots, seq_lens, row, dense_below, BEGIN: tl.constexpr, TAIL: tl.constexpr, PER: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Slot and position of a row, whether it is scored, the end of the entries it sees, and their cut: how many of them
    a program takes, and how many programs take some."""
    START: tl.constexpr = BEGIN // PER * PER
    STRIDE: tl.constexpr = PAGE // PER
    slot = tl.load(slots + row)
    position = tl.load(seq_lens + row) - 1
    todo = (slot >= 0) & (position >= tl.maximum(dense_below, 0))
    end = tl.where(todo, tl.maximum(position + 1 - TAIL, 0) // STRIDE, 0)
    share = tl.maximum(tl.cdiv(tl.cdiv(end - START, SPLITS), BLOCK_N), 1) * BLOCK_N
    return slot, position, todo, end, share, tl.maximum(tl.cdiv(end - START, share), 1)


@triton.jit(do_not_specialize=["dense_below"], do_not_specialize_on_alignment=["slots", "seq_lens"])
def _score_kernel(
    q, k_pages, k_scales, first, second, values, page_table, slots, seq_lens, peaks, sums, partials, logits,
    table_stride, num_entries, scale_log2, dense_below,
    BEGIN: tl.constexpr, TAIL: tl.constexpr, PER: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_P: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, HEAD_DIM: tl.constexpr,
    BOUNDS: tl.constexpr, ATTEND: tl.constexpr, EARLY: tl.constexpr, SUMMARISE: tl.constexpr, SCALED: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: a row's query heads of a KV head against a part of the entries that it sees.

    It leaves their logits, each head's maximum and sum of exponentials (ATTEND: and its attention to `values`).
    SUMMARISE: and of a page's last token, the page's summary. EARLY: no kernel ahead in this step wrote an entry that
    a row sees; the first ones are read before the wait.
    """
    START: tl.constexpr = BEGIN // PER * PER
    row, split = tl.program_id(0) // SPLITS, tl.program_id(0) % SPLITS
    head = tl.program_id(1)
    slot, position, todo, end, share, active = _row(
        slots, seq_lens, row, dense_below, BEGIN, TAIL, PER, PAGE, BLOCK_N, SPLITS
    )
    table = page_table + slot.to(tl.int64) * table_stride
    begin = START + split * share
    stop = tl.minimum(end, begin + share)
    n = tl.arange(0, BLOCK_N)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        if not EARLY:
            tl.extra.cuda.gdc_wait()
    low_rows = core.entry_rows(first, table, head, begin + n, stop, NUM_KV_HEADS, PER, HEAD_DIM)
    if BOUNDS:
        high_rows = core.entry_rows(second, table, head, begin + n, stop, NUM_KV_HEADS, PER, HEAD_DIM)
    if ATTEND:
        value_rows = core.entry_rows(values, table, head, begin + n, stop, NUM_KV_HEADS, PER, HEAD_DIM)
    if PDL and EARLY:
        tl.extra.cuda.gdc_wait()
    if SUMMARISE:  # noqa: SIM102 - known when compiling
        if (split == 0) & (slot >= 0) & (position > 0) & (position % PAGE == PAGE - 1):
            page = tl.load(table + position // PAGE)
            core.summarise(k_pages, k_scales, first, second, page, head, NUM_KV_HEADS, PAGE, HEAD_DIM, BOUNDS, SCALED)
    if todo & (split < active):
        row_head = (row * NUM_KV_HEADS + head).to(tl.int64)
        g = tl.arange(0, GROUP_P)
        d = tl.arange(0, HEAD_DIM)
        real = g < GROUP
        q_rows = q + ((row_head * GROUP + g) * HEAD_DIM)[:, None] + d[None, :]
        queries = tl.load(q_rows, mask=real[:, None], other=0.0)
        logits += row_head * GROUP * num_entries
        peak = tl.full([GROUP_P], LOW, tl.float32)
        total = tl.zeros([GROUP_P], tl.float32)
        mixed = tl.zeros([GROUP_P, HEAD_DIM if ATTEND else 16], tl.float32)
        for low in range(begin, stop, BLOCK_N):
            index = low + n
            x = core.logits_of(queries, low_rows, high_rows if BOUNDS else low_rows, BOUNDS) * scale_log2
            following = index + BLOCK_N
            low_rows = core.entry_rows(first, table, head, following, stop, NUM_KV_HEADS, PER, HEAD_DIM)
            if BOUNDS:
                high_rows = core.entry_rows(second, table, head, following, stop, NUM_KV_HEADS, PER, HEAD_DIM)
            seen = ((index >= BEGIN) & (index < stop))[None, :]
            x = tl.where(seen, x, float("-inf"))
            tl.store(logits + g[:, None] * num_entries + (index - BEGIN)[None, :], x, mask=real[:, None] & seen)
            highest = tl.maximum(peak, tl.max(x, 1))
            fade = tl.exp2(peak - highest)
            p = tl.exp2(x - highest[:, None])
            total = total * fade + tl.sum(p, 1)
            peak = highest
            if ATTEND:
                v = tl.where((index >= BEGIN)[:, None], tl.trans(value_rows), 0.0)  # NaN would pass a weight of zero
                value_rows = core.entry_rows(values, table, head, following, stop, NUM_KV_HEADS, PER, HEAD_DIM)
                p = p.to(queries.dtype)
                mixed = tl.dot(p, v.to(queries.dtype), mixed * fade[:, None], input_precision=PRECISION)
        at = (row_head * SPLITS + split) * GROUP_P + g
        tl.store(peaks + at, peak, mask=real)
        tl.store(sums + at, total, mask=real)
        if ATTEND:
            mixed = mixed / tl.maximum(total, 1e-30)[:, None]
            tl.store(partials + at[:, None] * HEAD_DIM + d[None, :], mixed, mask=real[:, None])


@triton.jit(do_not_specialize=["dense_below"], do_not_specialize_on_alignment=["slots", "seq_lens"])
def _choose_kernel(
    page_table, slots, seq_lens, peaks, sums, logits, scores, arrivals, pages, best, best_ids, table_stride,
    num_entries, score_stride, dense_below,
    BEGIN: tl.constexpr, TAIL: tl.constexpr, PER: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_P: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr, FIRST: tl.constexpr,
    LOCAL: tl.constexpr, TOP: tl.constexpr, LIST: tl.constexpr, PARTS: tl.constexpr, MOST: tl.constexpr,
    SHORT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the TOP best of a row's blocks, or of a share of fewer than SHORT, for a KV head.

    Of a row with more than that the last program to arrive chooses among what all have found, MOST each.
    """
    SHARE: tl.constexpr = SHORT - 1
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    slot, position, todo, end, _, active = _row(
        slots, seq_lens, row, dense_below, BEGIN, TAIL, PER, PAGE, BLOCK_N, SPLITS
    )
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    last = position // PAGE
    count = tl.maximum(last - LOCAL + 1 - FIRST, 0)
    row_head = (row * NUM_KV_HEADS + head).to(tl.int64)
    scores += row_head * score_stride
    table = page_table + slot.to(tl.int64) * table_stride
    pages += row_head * LIST
    if todo & (part == 0) & (count <= SHARE):
        _choose(
            logits, num_entries, peaks, sums, scores, table, pages, last, None, row_head, end, active, 0, count,
            BEGIN, PER, GROUP, GROUP_P, SPLITS, FIRST, LOCAL, TOP, True, LIST, SHORT,
        )  # fmt: skip
    if PARTS > 1:  # noqa: SIM102 - known when compiling
        if todo & (count > SHARE) & (part * SHARE < count):
            best += row_head * (PARTS * MOST)
            best_ids += row_head * (PARTS * MOST)
            _choose(
                logits, num_entries, peaks, sums, scores, table, best_ids + part * MOST, last, best + part * MOST,
                row_head, end, active, part * SHARE, tl.minimum(count, (part + 1) * SHARE), BEGIN, PER, GROUP, GROUP_P,
                SPLITS, FIRST, LOCAL, MOST, False, MOST, SHORT,
            )  # fmt: skip
            tl.debug_barrier()
            num = tl.cdiv(count, SHARE)
            if tl.atomic_add(arrivals + row_head, 1, sem="acq_rel", scope="gpu") == num - 1:
                tl.store(arrivals + row_head, 0)
                num = (num - 1) * MOST + tl.minimum(count - (num - 1) * SHARE, MOST)
                x = core.load_keys(best, tl.arange(0, BLOCK), num)
                core.select_row(x, best, num, best_ids, table, pages, last, None, FIRST, LOCAL, TOP, True, LIST, BLOCK)


def score_cut(
    num_rows: int, num_kv_heads: int, num_entries: int, device: torch.device, attend: bool
) -> tuple[int, int]:
    """Programs that share a row's entries, enough to fill the device, and entries of a product.

    With parts of the attention to merge, half as many, and no more than are resident together.
    """
    num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    full = 2 * num_sms // (num_rows * num_kv_heads) if attend else triton.cdiv(4 * num_sms, num_rows * num_kv_heads)
    wanted = min(full, _MOST_SPLITS)
    block_n = 32 if triton.cdiv(num_entries, 32) <= wanted else 64
    return max(1, min(wanted, triton.cdiv(num_entries, block_n))), block_n


def choose_pages(
    q: torch.Tensor, keys: tuple[torch.Tensor, torch.Tensor | None], planes: tuple[torch.Tensor, ...],
    values: torch.Tensor | None, where: tuple[torch.Tensor, torch.Tensor, torch.Tensor], rule: Selection,
    entries: Entries, scale: float, compressed: torch.Tensor | None, arrivals: torch.Tensor, pages: torch.Tensor,
    max_seq_len: int, summarise: bool,
) -> None:  # fmt: skip
    """Fills pages [num_rows, num_kv_heads, list] of the rows longer than `rule.dense_below`, the last page last."""
    num_rows, num_q_heads, head_dim = q.shape
    num_kv_heads, page_size = keys[0].shape[1:3]
    group = num_q_heads // num_kv_heads
    group_p = max(16, triton.next_power_of_2(group))
    num_pages = triton.cdiv(max_seq_len, page_size)
    num_entries = triton.cdiv(num_pages * entries.per_block, 16) * 16
    splits, block_n = score_cut(num_rows, num_kv_heads, num_entries, q.device, values is not None)
    state = core.entry_state(q, num_rows, num_kv_heads, splits, group_p, values is not None)
    logits = q.new_empty(num_rows, num_kv_heads, group, num_entries, dtype=torch.float32)
    # With several entries a block: their probabilities.
    scores = logits if entries.per_block == 1 else torch.empty_like(logits[:, :, 0])
    parts = triton.cdiv(max(1, num_pages - rule.first - rule.local), _SHORT - 1)
    best = logits.new_empty(num_rows, num_kv_heads, parts, most := min(rule.num_scored, _SHORT - 1))
    shape = {
        "BEGIN": entries.begin, "TAIL": entries.tail, "PER": entries.per_block, "NUM_KV_HEADS": num_kv_heads,
        "GROUP": group, "GROUP_P": group_p, "PAGE": page_size, "BLOCK_N": block_n, "SPLITS": splits,
    }  # fmt: skip
    options = overlap_options(q)
    _score_kernel[(num_rows * splits, num_kv_heads)](
        q, *keys, planes[0], planes[-1], values, *where, *state, logits, where[0].stride(0), num_entries,
        scale * LOG2E, rule.dense_below, **shape, HEAD_DIM=head_dim, BOUNDS=len(planes) > 1, ATTEND=values is not None,
        EARLY=entries.tail > page_size, SUMMARISE=summarise, SCALED=keys[1] is not None, num_warps=4, **options,
    )  # fmt: skip
    _choose_kernel[(num_rows, num_kv_heads, parts)](
        *where, *state[:2], logits, scores, arrivals, pages, best, torch.empty_like(best, dtype=torch.int32),
        where[0].stride(0), num_entries, scores.stride(1), rule.dense_below, **shape, FIRST=rule.first,
        LOCAL=rule.local, TOP=rule.num_scored, LIST=pages.shape[2], PARTS=parts, MOST=most, SHORT=_SHORT,
        BLOCK=min(_LONG, triton.next_power_of_2(parts * most + 1)),
        num_warps=16 if entries.per_block > 1 else 8 if group > 8 else 4, **options,
    )  # fmt: skip
    if compressed is not None:
        merge_splits(state, compressed)


def sparse_decode(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, summaries: tuple[torch.Tensor, ...],
    page_table: torch.Tensor, slots: torch.Tensor, seq_lens: torch.Tensor, rule: Selection, entries: Entries,
    scale: float, out: torch.Tensor, *, out_scales: torch.Tensor | None, k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None, values: torch.Tensor | None = None, compressed: torch.Tensor | None = None,
    index_q: torch.Tensor | None = None, workspace: DecodeWorkspace | None, max_seq_len: int, summarise: bool = False,
) -> None:  # fmt: skip
    num_rows, num_q_heads, _ = q.shape
    num_kv_heads, page_size = k_pages.shape[1:3]
    scored = num_rows > 0 and max_seq_len > rule.dense_below
    # A row of a step may see what another of the same step completes, unless that is a page away.
    within = summarise and scored and entries.tail > page_size
    if summarise and not within:
        core.write_summaries(k_pages, summaries, page_table, slots, seq_lens - 1, k_scales)
    pages = slots.new_empty(num_rows * scored, num_kv_heads, rule.num_blocks * rule.pages)
    selected = (pages, rule.dense_below, rule.pages) if scored else None
    if scored and index_q is not None:
        where = page_table, slots, seq_lens
        num_blocks = triton.cdiv(max_seq_len, page_size * rule.pages)
        scores = q.new_empty(num_rows, num_kv_heads, num_blocks, dtype=torch.float32)
        index_scores(index_q, summaries[0], *where, rule, scores, decode=True)
        core.select(scores, *where, rule, page_size, pages, decode=True, signed=True)
    elif scored:
        if workspace is None or workspace.arrivals.numel() < num_rows * num_kv_heads:
            raise ValueError(f"sparse_decode needs a DecodeWorkspace of {num_rows} rows")
        per_row = 4 * triton.cdiv(max_seq_len, page_size) * entries.per_block * num_q_heads
        step = max(1, _LOGITS_BYTES // per_row)
        for rows in (slice(low, low + step) for low in range(0, num_rows, step)):
            choose_pages(
                q[rows], (k_pages, k_scales), summaries, values, (page_table, slots[rows], seq_lens[rows]), rule,
                entries, scale, None if compressed is None else compressed[rows], workspace.arrivals, pages[rows],
                max_seq_len, within,
            )  # fmt: skip
    triton_decode.paged_decode(
        q, k_pages, v_pages, page_table, slots, seq_lens, scale, out, out_scales=out_scales, window=None, sinks=None,
        k_scales=k_scales, v_scales=v_scales, workspace=workspace, max_seq_len=max_seq_len, selected=selected,
    )  # fmt: skip

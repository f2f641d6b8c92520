"""Prefill of block-sparse attention, page by page: a page is multiplied with all tokens that chose it.

Lists of single tokens would read a page once for each; here its reads are shared, and tiles are full however few heads
a group has. Partial results lie in a workspace of bounded size, merged by their sums of exponentials.
"""

import torch
import triton
import triton.language as tl

from gossamer.ops.attention.triton import LOG2E, LOW, PRECISION, check
from gossamer.ops.dispatch import overlap_options
from gossamer.ops.sparse.selection import Entries, Selection
from gossamer.ops.sparse.triton import SHARE, entry_pass, entry_state, overlap, select
from gossamer.ops.sparse.triton_index import index_scores
from gossamer.ops.sparse.triton_nsa import merge_splits

# Bytes of partial results and scores at a time, and tokens that share one load of a page.
_WORKSPACE_BYTES = 640 << 20
_UNIT = 64
_LAYOUT_BLOCK = 1024


@triton.jit(do_not_specialize=["num_listed"])
def _count_kernel(
    pages, counts, ranks, num_listed, TOP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """How often each (page, head) was chosen, and the number of each choice among its own, in any order."""
    overlap(PDL)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    page = tl.load(pages + e, mask=e < num_listed, other=-1)
    chosen = page >= 0
    owner = page * NUM_KV_HEADS + e // TOP % NUM_KV_HEADS
    rank = tl.atomic_add(counts + tl.where(chosen, owner, 0), 1, mask=chosen, sem="relaxed")
    tl.store(ranks + e, rank, mask=chosen)


@triton.jit(do_not_specialize=["num_owners", "max_units"])
def _units_kernel(
    counts, totals, starts, units, num_owners, max_units, UNIT: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Places for everyone's choices, in one list, and units of up to UNIT of them: owner, start and number."""
    overlap(PDL)
    owner = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    count = tl.load(counts + owner, mask=owner < num_owners, other=0)
    if tl.sum(count, 0) > 0:
        start = tl.atomic_add(totals, tl.sum(count, 0), sem="relaxed") + tl.cumsum(count, 0) - count
        tl.store(starts + owner, start, mask=owner < num_owners)
        num = tl.cdiv(count, UNIT)
        first = tl.atomic_add(totals + 1, tl.sum(num, 0), sem="relaxed") + tl.cumsum(num, 0) - num
        for i in range(tl.max(num, 0)):
            at = units + first + i
            tl.store(at, owner, mask=i < num)
            tl.store(at + max_units, start + i * UNIT, mask=i < num)
            tl.store(at + 2 * max_units, tl.minimum(count - i * UNIT, UNIT), mask=i < num)


@triton.jit(do_not_specialize=["num_listed"])
def _scatter_kernel(
    pages, starts, ranks, order, num_listed, TOP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    overlap(PDL)
    e = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    page = tl.load(pages + e, mask=e < num_listed, other=-1)
    chosen = page >= 0
    owner = tl.where(chosen, page * NUM_KV_HEADS + e // TOP % NUM_KV_HEADS, 0)
    at = tl.load(starts + owner, mask=chosen, other=0) + tl.load(ranks + e, mask=chosen, other=0)
    tl.store(order + at, e, mask=chosen)


@triton.jit(do_not_specialize=["max_units"])
def _page_kernel(
    q, k_pages, v_pages, k_scales, v_scales, totals, units, order, parts, lse, max_units, scale_log2,
    TOP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr, BLOCK_M: tl.constexpr,
    HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, SCALED: tl.constexpr, STAGES: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Every program takes units in turn: one page of one head against the queries of up to UNIT tokens."""
    TOKENS: tl.constexpr = BLOCK_M // GROUP_P
    overlap(PDL)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, HEAD_DIM)
    n = tl.arange(0, PAGE)
    g = m % GROUP_P
    for u in range(tl.program_id(0), tl.load(totals + 1), tl.num_programs(0)):
        owner = tl.load(units + u).to(tl.int64)
        start = tl.load(units + max_units + u)
        count = tl.load(units + 2 * max_units + u)
        base = owner * (PAGE * HEAD_DIM)
        k = tl.load(k_pages + base + n[None, :] * HEAD_DIM + d[:, None]).to(q.dtype.element_ty)
        v = tl.load(v_pages + base + n[:, None] * HEAD_DIM + d[None, :]).to(q.dtype.element_ty)
        to_log2 = scale_log2
        v_scale = 1.0
        if SCALED:
            to_log2 *= tl.load(k_scales + owner)
            v_scale = tl.load(v_scales + owner)
        for low in tl.range(0, count, TOKENS, num_stages=STAGES):
            inside = (low + m // GROUP_P < count) & (g < GROUP)
            e = tl.load(order + start + low + m // GROUP_P, mask=inside, other=0)
            row = (e // TOP).to(tl.int64)
            queries = tl.load(q + ((row * GROUP + g) * HEAD_DIM)[:, None] + d[None, :], mask=inside[:, None], other=0.0)
            scores = tl.dot(queries, k, input_precision=PRECISION) * to_log2
            peak = tl.max(scores, 1)
            weights = tl.exp2(scores - peak[:, None])
            weight = tl.sum(weights, 1)
            mixed = tl.dot(weights.to(v.dtype), v, input_precision=PRECISION) * (v_scale / weight)[:, None]
            part = (row * (TOP + 1) + e % TOP) * GROUP + g
            tl.store(lse + part, peak + tl.log2(weight), mask=inside)
            tl.store(parts + part[:, None] * HEAD_DIM + d[None, :], mixed.to(parts.dtype.element_ty), inside[:, None])


@triton.jit(
    do_not_specialize=["num_tokens", "dense_below"], do_not_specialize_on_alignment=["token_slots", "positions"]
)
def _span_kernel(
    q, k_pages, v_pages, k_scales, v_scales, page_table, token_slots, positions, parts, lse,
    num_tokens, table_stride, dense_below, scale_log2,
    FIRST: tl.constexpr, LOCAL: tl.constexpr, TOP: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    GROUP_P: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, PAGES: tl.constexpr,
    SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: some tokens and a KV head against the first blocks and the last, which its tokens nearly share."""
    TOKENS: tl.constexpr = BLOCK_M // GROUP_P
    SIZE: tl.constexpr = PAGE * PAGES
    head = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, HEAD_DIM)
    n = tl.arange(0, PAGE)
    token, g = tl.program_id(0) * TOKENS + m // GROUP_P, m % GROUP_P
    slot = tl.load(token_slots + token, mask=token < num_tokens, other=-1)
    position = tl.load(positions + token, mask=token < num_tokens, other=0)
    todo = (slot >= 0) & (position >= dense_below)
    overlap(PDL)
    real = todo & (g < GROUP)
    row = (token * NUM_KV_HEADS + head).to(tl.int64)
    queries = tl.load(q + ((row * GROUP + g) * HEAD_DIM)[:, None] + d[None, :], mask=real[:, None], other=0.0)
    peak = tl.full([BLOCK_M], LOW, tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    mixed = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    current = tl.max(tl.where(todo, slot, -1), 0)
    while current >= 0:
        mine = todo & (slot == current)
        highest = tl.max(tl.where(mine, position, 0), 0)
        lowest = tl.min(tl.where(mine, position, 2147483647), 0)
        num_first = tl.minimum(highest // PAGE + 1, FIRST * PAGES)
        low = tl.maximum((lowest // SIZE - LOCAL + 1) * PAGES, num_first)
        table = page_table + current.to(tl.int64) * table_stride
        for i in range(num_first + highest // PAGE + 1 - low):
            page = tl.where(i < num_first, i, low + i - num_first)
            at = tl.load(table + page).to(tl.int64) * NUM_KV_HEADS + head
            base = at * (PAGE * HEAD_DIM)
            key = page * PAGE + n
            written = key <= highest
            k = tl.load(k_pages + base + n[None, :] * HEAD_DIM + d[:, None], mask=written[None, :], other=0.0)
            v = tl.load(v_pages + base + n[:, None] * HEAD_DIM + d[None, :], mask=written[:, None], other=0.0)
            scores = tl.dot(queries, k.to(queries.dtype), input_precision=PRECISION) * scale_log2
            if SCALED:
                scores *= tl.load(k_scales + at)
            near = (page < FIRST * PAGES) | (page // PAGES > position // SIZE - LOCAL)
            seen = (mine & near)[:, None] & (key[None, :] <= position[:, None])
            scores = tl.where(seen, scores, float("-inf"))
            above = tl.maximum(peak, tl.max(scores, 1))
            fade = tl.exp2(peak - above)
            weights = tl.exp2(scores - above[:, None])
            total = total * fade + tl.sum(weights, 1)
            peak = above
            if SCALED:
                weights *= tl.load(v_scales + at)
            mixed = tl.dot(
                weights.to(queries.dtype), v.to(queries.dtype), mixed * fade[:, None], input_precision=PRECISION
            )
        todo = todo & (slot != current)
        current = tl.max(tl.where(todo, slot, -1), 0)
    part = (row * (TOP + 1) + TOP) * GROUP + g
    mixed = mixed / tl.maximum(total, 1e-30)[:, None]
    tl.store(lse + part, peak + tl.log2(tl.maximum(total, 1e-30)), mask=real)
    tl.store(parts + part[:, None] * HEAD_DIM + d[None, :], mixed.to(parts.dtype.element_ty), mask=real[:, None])


@triton.jit(do_not_specialize=["dense_below"], do_not_specialize_on_alignment=["token_slots", "positions"])
def _merge_kernel(
    pages, parts, lse, token_slots, positions, out, dense_below,
    TOP: tl.constexpr, PARTS_P: tl.constexpr, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, GROUP_P: tl.constexpr,
    HEAD_DIM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: a token and KV head. Padding becomes zero."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(token_slots + row // NUM_KV_HEADS)
    position = tl.load(positions + row // NUM_KV_HEADS)
    overlap(PDL)
    if (slot >= 0) & (position < dense_below):
        return
    g = tl.arange(0, GROUP_P)
    d = tl.arange(0, HEAD_DIM)
    k = tl.arange(0, PARTS_P)
    total = tl.zeros([GROUP_P, HEAD_DIM], tl.float32)
    if slot >= 0:
        present = (k == TOP) | ((k < TOP) & (tl.load(pages + row * TOP + k, mask=k < TOP, other=-1) >= 0))
        first = row * (TOP + 1) * GROUP + g
        known = present[None, :] & (g < GROUP)[:, None]
        sizes = tl.load(lse + first[:, None] + k[None, :] * GROUP, mask=known, other=float("-inf"))
        peak = tl.max(sizes, 1)
        peak = tl.where(peak > LOW, peak, 0.0)
        weight = tl.sum(tl.exp2(sizes - peak[:, None]), 1)
        lse_all = peak + tl.log2(tl.maximum(weight, 1e-30))
        num = tl.sum((present & (k < TOP)).to(tl.int32), 0)
        for i in range(num + 1):
            j = tl.where(i < num, i, TOP)
            size = tl.load(lse + first + j * GROUP, mask=g < GROUP, other=float("-inf"))
            at = (first + j * GROUP)[:, None] * HEAD_DIM + d[None, :]
            part = tl.load(parts + at, mask=(g < GROUP)[:, None], other=0.0).to(tl.float32)
            total += part * tl.exp2(size - lse_all)[:, None]
    rows = out + (row * GROUP + g)[:, None] * HEAD_DIM + d[None, :]
    tl.store(rows, total.to(out.dtype.element_ty), mask=(g < GROUP)[:, None])


def _attend_listed(
    q: torch.Tensor, cache: tuple[torch.Tensor | None, ...], pages: torch.Tensor, parts: torch.Tensor,
    lse: torch.Tensor, scale: float, group_p: int,
) -> None:  # fmt: skip
    """Partial results of every choice in `pages` [tokens, kv heads, TOP], by page."""
    k_pages, v_pages, k_scales, v_scales = cache
    num_pages, num_kv_heads, page_size, head_dim = k_pages.shape  # type: ignore[union-attr]
    num_listed, top = pages.numel(), pages.shape[2]
    num_owners = num_pages * num_kv_heads
    max_units = min(num_listed, num_owners) + num_listed // _UNIT + 1
    counts = pages.new_zeros(num_owners + 2)
    totals = counts[num_owners:]
    ranks, order, starts = pages.new_empty(num_listed), pages.new_empty(num_listed), pages.new_empty(num_owners)
    units = pages.new_empty(3, max_units)
    options = overlap_options(q)
    shape = {"TOP": top, "NUM_KV_HEADS": num_kv_heads}
    grid = (triton.cdiv(num_listed, _LAYOUT_BLOCK),)
    _count_kernel[grid](pages, counts, ranks, num_listed, **shape, BLOCK=_LAYOUT_BLOCK, **options)
    _units_kernel[(triton.cdiv(num_owners, _LAYOUT_BLOCK),)](
        counts, totals, starts, units, num_owners, max_units, UNIT=_UNIT, BLOCK=_LAYOUT_BLOCK, **options
    )
    _scatter_kernel[grid](pages, starts, ranks, order, num_listed, **shape, BLOCK=_LAYOUT_BLOCK, **options)
    block_m, warps, stages, per_sm = page_cut(q)
    num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 2
    _page_kernel[(min(per_sm * num_sms, max_units),)](
        q, k_pages, v_pages, k_scales, v_scales, totals, units, order, parts, lse, max_units, scale * LOG2E, **shape,
        GROUP=q.shape[1] // num_kv_heads, GROUP_P=group_p, BLOCK_M=max(block_m, group_p), HEAD_DIM=head_dim,
        PAGE=page_size, SCALED=k_scales is not None, STAGES=stages, num_warps=warps, **options,
    )  # fmt: skip


def page_cut(q: torch.Tensor) -> tuple[int, int, int, int]:
    """Rows, warps, stages and programs of a multiprocessor, of the kernel that goes page by page."""
    return (32, 4, 1, 2) if q.element_size() == 4 else (64, 4, 1, 4)


def span_cut(q: torch.Tensor) -> tuple[int, int, int]:
    """Rows, warps and stages of the kernel of first and last pages."""
    return (32, 4, 1) if q.element_size() == 4 else (64, 4, 3)


def sparse_attention(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, summaries: tuple[torch.Tensor, ...],
    page_table: torch.Tensor, token_slots: torch.Tensor, positions: torch.Tensor, rule: Selection, entries: Entries,
    scale: float, out: torch.Tensor, *, k_scales: torch.Tensor | None, v_scales: torch.Tensor | None,
    values: torch.Tensor | None = None, compressed: torch.Tensor | None = None, index_q: torch.Tensor | None = None,
    max_seq_len: int,
) -> None:  # fmt: skip
    indices = {"page_table": page_table, "seq_lens": positions, "slots": token_slots}
    check(q, k_pages, v_pages, out, None, None, indices)
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1:3]
    group, top = num_q_heads // num_kv_heads, rule.num_scored * rule.pages
    group_p = triton.next_power_of_2(group)
    num_blocks = triton.cdiv(max_seq_len, page_size * rule.pages * 16) * 16  # rows begin where vectors may
    # What is scored at a time gets a quarter of the workspace where it would take more: the more tokens attend at a
    # time, the more of them share a page.
    per_part = num_kv_heads * (top + 1) * group * head_dim * q.element_size()
    per_score = num_kv_heads * (4 * num_blocks + (0 if values is None else group_p * head_dim * 4))
    step = min(num_tokens, max(64, _WORKSPACE_BYTES // (per_part + min(per_score, per_part // 3)) // 64 * 64))
    scored = min(step, max(64, (_WORKSPACE_BYTES - step * per_part) // per_score // 64 * 64))
    scores = q.new_empty(scored, num_kv_heads, num_blocks, dtype=torch.float32)
    splits = 1 if entries.per_block > 1 else triton.next_power_of_2(triton.cdiv(num_blocks, SHARE))
    state = entry_state(q, scored, num_kv_heads, splits, group_p, values is not None)
    pages = page_table.new_empty(step, num_kv_heads, top)
    parts = q.new_empty(step, num_kv_heads, top + 1, group, head_dim)
    lse = q.new_empty(step, num_kv_heads, top + 1, group, dtype=torch.float32)
    cache = (k_pages, v_pages, k_scales, v_scales)
    rows, warps, stages = span_cut(q)
    block_m = max(rows, group_p)
    for begin in range(0, num_tokens, step):
        end = min(begin + step, num_tokens)
        for low in range(begin, end, scored):
            few = slice(low, min(low + scored, end))
            where = (page_table, token_slots[few], positions[few], rule)
            if compressed is not None and low:
                state[1].zero_()
            if index_q is not None:
                index_scores(index_q[few], summaries[0], *where, scores, decode=False)
            for kept, mixed in ((None, values), (scores, None)) if index_q is None else ():
                entry_pass(q[few], summaries, mixed, *where, entries, scale, page_size, state, kept)
            if compressed is not None:
                merge_splits(state, compressed[few])
            listed = pages[low - begin : few.stop - begin]
            select(scores, *where, page_size, listed, decode=False, signed=index_q is not None)
        part, slots, at, listed = q[begin:end], token_slots[begin:end], positions[begin:end], pages[: end - begin]
        _attend_listed(part, cache, listed, parts, lse, scale, group_p)
        shape = {"TOP": top, "NUM_KV_HEADS": num_kv_heads, "GROUP": group, "GROUP_P": group_p, "HEAD_DIM": head_dim}
        _span_kernel[(triton.cdiv(len(part), block_m // group_p), num_kv_heads)](
            part, *cache, page_table, slots, at, parts, lse, len(part), page_table.stride(0), rule.dense_below,
            scale * LOG2E, FIRST=rule.first, LOCAL=rule.local, **shape, BLOCK_M=block_m, PAGE=page_size,
            PAGES=rule.pages, SCALED=k_scales is not None, num_warps=warps, num_stages=stages, **overlap_options(q),
        )  # fmt: skip
        _merge_kernel[(len(part) * num_kv_heads,)](
            listed, parts, lse, slots, at, out[begin:end], rule.dense_below, **shape,
            PARTS_P=triton.next_power_of_2(top + 1), num_warps=4, **overlap_options(q),
        )  # fmt: skip

"""Kernels of token-sparse latent attention: keys and queries of the indexer, scores, choice, attention to the chosen.

A decode row and a token of a chunk are served alike, each with a list of its own; few rows are split over programs.
"""

import torch
import triton
import triton.language as tl

from gossamer.ops.attention.triton import PRECISION
from gossamer.ops.attention.workspace import DecodeWorkspace
from gossamer.ops.dispatch import overlap_options
from gossamer.ops.mla.triton import latent_decode

_SCORE_BYTES = 1 << 28  # of scores and candidates at a time
_BLOCK_N = 64  # keys, or chosen tokens, of a product
# Scores that a choosing program holds at once, at least, and how many of a longer row tell which those are.
_HELD, _SAMPLE = 8192, 4096
_GATHER = 2048  # scores that a gathering program looks at at a time
_SCORED = 2048  # keys of a scoring program, at most
_SCORERS, _GATHERERS = 4, 2  # programs for each multiprocessor, at least
_MAX_PARTS = tl.constexpr(32)


@triton.jit
def _turned(a, b, cos, sin, angle, inside):
    c = tl.load(cos + angle, inside, 0.0).to(tl.float32)
    s = tl.load(sin + angle, inside, 0.0).to(tl.float32)
    return a * c - b * s, b * c + a * s


@triton.jit
def _index_write_kernel(
    q, key, weights, norm, bias, cos, sin, positions, token_slots, page_table, key_pages, q_out, weights_out,
    q_stride, key_stride, weights_stride, max_pages, eps,
    NUM_HEADS: tl.constexpr, DIM: tl.constexpr, ROPE: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_H: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A token's key and head weights (program 0 of its axis), or HEADS of its queries."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    pair = tl.arange(0, HALF)
    first, second = pair, pair + ROPE // 2
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(token_slots + token)
    live = slot >= 0
    position = tl.where(live, tl.load(positions + token), 0).to(tl.int64)
    wide = pair < ROPE // 2
    angle = position * ROPE + ROPE // 2 + pair  # the second half of the tables has no minus sign
    if part == 0:
        h = tl.arange(0, BLOCK_H)
        given = tl.load(weights + token * weights_stride + h, h < NUM_HEADS, 0.0)
        tl.store(weights_out + token * NUM_HEADS + h, tl.where(live, given, 0.0), h < NUM_HEADS)
        if live:
            page = tl.load(page_table + slot.to(tl.int64) * max_pages + position // PAGE).to(tl.int64)
            out = key_pages + (page * PAGE + position % PAGE) * DIM
            row = key + token * key_stride
            x = tl.load(row + d, d < DIM, 0.0).to(tl.float32)
            mean = tl.sum(x) / DIM
            centred = tl.where(d < DIM, x - mean, 0.0)
            factor = tl.rsqrt(tl.sum(centred * centred) / DIM + eps)
            y = centred * factor * tl.load(norm + d, d < DIM, 0.0) + tl.load(bias + d, d < DIM, 0.0)
            tl.store(out + d, y.to(key_pages.dtype.element_ty), (d >= ROPE) & (d < DIM))
            a = (tl.load(row + first, wide, 0.0).to(tl.float32) - mean) * factor
            a = a * tl.load(norm + first, wide, 0.0) + tl.load(bias + first, wide, 0.0)
            b = (tl.load(row + second, wide, 0.0).to(tl.float32) - mean) * factor
            b = b * tl.load(norm + second, wide, 0.0) + tl.load(bias + second, wide, 0.0)
            x, y = _turned(a, b, cos, sin, angle, wide)
            tl.store(out + pair, x.to(key_pages.dtype.element_ty), wide)
            tl.store(out + ROPE // 2 + pair, y.to(key_pages.dtype.element_ty), wide)
    else:
        head = (part - 1) * HEADS + tl.arange(0, HEADS)[:, None]
        row = q + token * q_stride + head * DIM
        out = q_out + (token * NUM_HEADS + head) * DIM
        rest = (head < NUM_HEADS) & ((d >= ROPE) & (d < DIM))[None, :]
        # A padded token leaves zeros, whatever its row holds.
        tl.store(out + d[None, :], tl.where(live, tl.load(row + d[None, :], rest, 0.0), 0.0), rest)
        inside = (head < NUM_HEADS) & wide[None, :]
        a = tl.load(row + first[None, :], inside, 0.0).to(tl.float32)
        b = tl.load(row + second[None, :], inside, 0.0).to(tl.float32)
        x, y = _turned(a, b, cos, sin, angle[None, :], wide[None, :])
        tl.store(out + pair[None, :], tl.where(live, x, 0.0).to(q_out.dtype.element_ty), inside)
        tl.store(out + ROPE // 2 + pair[None, :], tl.where(live, y, 0.0).to(q_out.dtype.element_ty), inside)


def rope_write_index(
    q: torch.Tensor, key: torch.Tensor, weights: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor], eps: float,
    cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, token_slots: torch.Tensor,
    page_table: torch.Tensor, key_pages: torch.Tensor, q_out: torch.Tensor, weights_out: torch.Tensor,
    interleaved: bool,
) -> None:  # fmt: skip
    (num_tokens, num_heads, dim), rope_dim = q_out.shape, cos.shape[-1]
    if num_tokens == 0:
        return
    heads = min(4 if num_tokens <= 64 else 16, triton.next_power_of_2(num_heads))
    _index_write_kernel[(num_tokens, 1 + triton.cdiv(num_heads, heads))](
        q, key, weights, *norm, cos, sin, positions, token_slots, page_table, key_pages, q_out, weights_out,
        q.stride(0), key.stride(0), weights.stride(0), page_table.shape[1], eps, NUM_HEADS=num_heads, DIM=dim,
        ROPE=rope_dim, PAGE=key_pages.shape[2], HEADS=heads, BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_H=triton.next_power_of_2(num_heads), HALF=triton.next_power_of_2(rope_dim // 2),
        INTERLEAVED=interleaved, num_warps=2 if heads > 4 else 1, **overlap_options(q),
    )  # fmt: skip


# What follows from a step's tokens and contexts is no constant: no compilation for each.
@triton.jit(
    do_not_specialize=["num_tokens", "score_stride", "splits"],
    do_not_specialize_on_alignment=["token_slots", "positions"],
)
def _score_kernel(
    q, weights, key_pages, page_table, token_slots, positions, scores, num_tokens, table_stride, score_stride, splits,
    NUM_HEADS: tl.constexpr, HEADS_P: tl.constexpr, TOKENS: tl.constexpr, DIM: tl.constexpr, PAGE: tl.constexpr,
    BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: all index heads of TOKENS tokens against a part of the keys they see, a sequence after the other."""
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    t = tile * TOKENS + tl.arange(0, TOKENS)
    slot = tl.load(token_slots + t, mask=t < num_tokens, other=-1)
    position = tl.load(positions + t, mask=t < num_tokens, other=0)
    todo = slot >= 0
    length = tl.max(tl.where(todo, position + 1, 0), 0)
    share = tl.cdiv(tl.cdiv(length, splits), BLOCK_N) * BLOCK_N
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    m = tl.arange(0, TOKENS * HEADS_P)
    row = (tile * TOKENS + m // HEADS_P).to(tl.int64) * NUM_HEADS + m % HEADS_P
    real = (tile * TOKENS + m // HEADS_P < num_tokens) & (m % HEADS_P < NUM_HEADS)
    d = tl.arange(0, DIM)
    queries = tl.load(q + row[:, None] * DIM + d[None, :], mask=real[:, None], other=0.0)
    weight = tl.load(weights + row, mask=real, other=0.0).to(tl.float32)
    current = tl.max(tl.where(todo, slot, -1), 0)
    while current >= 0:
        mine = todo & (slot == current)
        end = tl.minimum(tl.max(tl.where(mine, position + 1, 0), 0), (split + 1) * share)
        table = page_table + current.to(tl.int64) * table_stride
        for low in range(split * share, end, BLOCK_N):
            index = low + tl.arange(0, BLOCK_N)
            page = tl.load(table + index // PAGE, mask=index < end, other=0).to(tl.int64)
            at = (page * PAGE + index % PAGE) * DIM
            keys = tl.load(key_pages + at[:, None] + d[None, :], mask=(index < end)[:, None], other=0.0)
            # Keys are the rows: the sum over heads stays within a warp.
            logits = tl.dot(keys.to(queries.dtype), queries.T, input_precision=PRECISION)
            logits = tl.maximum(logits, 0.0) * weight[None, :]
            score = tl.sum(tl.reshape(logits, [BLOCK_N, TOKENS, HEADS_P]), 2)
            score = tl.where(score == 0.0, 0.0, score)  # no zero below zero
            kept = mine[None, :] & (index[:, None] <= position[None, :]) & (index < end)[:, None]
            tl.store(scores + t.to(tl.int64)[None, :] * score_stride + index[:, None], score, mask=kept)
        todo = todo & (slot != current)
        current = tl.max(tl.where(todo, slot, -1), 0)


@triton.jit
def _keys(scores, i, present):
    """Scores i as unsigned integers of the same order, and 0, below all, for those that are not there.

    A NaN is as good as infinity: the largest integer would have no successor.
    """
    x = tl.load(scores + i, mask=present, other=0.0).to(tl.int32, bitcast=True)
    x = tl.where((x & 0x7FFFFFFF) > 0x7F800000, 0x7F800000, x)
    ordered = tl.where(x < 0, ~x, x ^ -2147483648).to(tl.uint32, bitcast=True)
    return tl.where(present, ordered, 0)


@triton.jit
def _num_at_least(bound, held, scores, end, WHOLE: tl.constexpr):
    """How many keys are at least `bound`: of those held, which are all if WHOLE, or of scores 0 .. end - 1."""
    many = (held >= bound).to(tl.int32)
    if not WHOLE:
        many = tl.zeros_like(held).to(tl.int32)
        for low in range(0, end, held.shape[0]):
            i = low + tl.arange(0, held.shape[0])
            many += (_keys(scores, i, i < end) >= bound).to(tl.int32)
    return tl.sum(many, 0)


@triton.jit
def _bound(held, scores, end, wanted, most, WHOLE: tl.constexpr):
    """A number that at least `wanted` keys reach and at most `most`, or else the largest that so many reach.

    If held keys are not all, the least of them is tried first: where many are equal, that is it.
    """
    least, largest = tl.min(tl.where(held == 0, 0xFF800000, held), 0), tl.max(held, 0)
    middle, first, count = largest - (largest - least) // 2, least - 1, most + 1
    if not WHOLE:
        middle, first = least, least
        least, largest = tl.full([], 1, tl.uint32), tl.full([], 0xFF800000, tl.uint32)
    while (least < largest) & (count > most):
        many = _num_at_least(middle, held, scores, end, WHOLE)
        reached = many >= wanted
        least, largest = tl.where(reached, middle, least), tl.where(reached, largest, middle - 1)
        count = tl.where(reached, many, count)
        middle = tl.where(reached & (middle == first), middle + 1, largest - (largest - least) // 2)
    return least


@triton.jit
def _rows(i, present, table, PAGE: tl.constexpr):
    return tl.load(table + i // PAGE, mask=present, other=0) * PAGE + i % PAGE


@triton.jit
def _list(key, row, present, least, room, above, equal, chosen):
    """Lists keys above `least` and the first `room` that equal it, after as many; returns how many with these."""
    more, same = present & (key > least), present & (key == least)
    seen = more.to(tl.int32) + (same.to(tl.int32) << 16)
    until, many = tl.cumsum(seen, 0), tl.sum(seen, 0)
    rank = equal + (until >> 16)
    at = above + (until & 0xFFFF) + tl.minimum(rank, room) - 1
    tl.store(chosen + at, row, mask=more | (same & (rank <= room)))
    return above + (many & 0xFFFF), equal + (many >> 16)


@triton.jit(do_not_specialize=["score_stride", "parts"], do_not_specialize_on_alignment=["token_slots", "positions"])
def _gather_kernel(
    scores, candidates, counts, page_table, token_slots, positions, table_stride, score_stride, parts,
    TOP: tl.constexpr, PAGE: tl.constexpr, HELD: tl.constexpr, SAMPLE: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One program: a part of a token's scores. Lists key and row of those that a sample holds for the 7/4 TOP best.

    Or of all, if the row has no more than HELD.
    """
    token, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    slot = tl.load(token_slots + token)
    end = tl.where(slot >= 0, tl.load(positions + token) + 1, 0)
    scores += token * score_stride
    candidates += (token * parts + part) * 2 * HELD
    table = page_table + slot.to(tl.int64) * table_stride
    share = tl.cdiv(tl.cdiv(end, parts), BLOCK) * BLOCK
    stride = tl.cdiv(end, SAMPLE)
    wanted = tl.maximum(7 * TOP // (4 * tl.maximum(stride, 1)), 1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    bound = tl.full([], 1, tl.uint32)
    if end > HELD:
        at = tl.arange(0, SAMPLE) * stride
        bound = _bound(_keys(scores, at, at < end), scores, end, wanted, wanted + wanted // 16, True)
    count = 0
    for low in range(part * share, tl.minimum(part * share + share, end), BLOCK):
        i = low + tl.arange(0, BLOCK)
        key, row = _keys(scores, i, i < end), _rows(i, i < end, table, PAGE)
        hit = key >= bound
        to = count + tl.cumsum(hit.to(tl.int32), 0) - 1
        tl.store(candidates + to, key.to(tl.int32, bitcast=True), mask=hit & (to < HELD))
        tl.store(candidates + HELD + to, row, mask=hit & (to < HELD))
        count += tl.sum(hit.to(tl.int32), 0)
    tl.store(counts + token * parts + part, count)


@triton.jit
def _candidate(j, count, first, candidates, HELD: tl.constexpr):
    """Key and row of candidates j of `count`: those of all parts laid end to end, which begin at `first`."""
    part = tl.zeros_like(j)
    for bit in tl.static_range(5):
        later = part + (_MAX_PARTS // 2 >> bit)
        part = tl.where(tl.gather(first, later, 0) <= j, later, part)
    at = candidates + part * 2 * HELD + j - tl.gather(first, part, 0)
    key = tl.load(at, mask=j < count, other=0).to(tl.uint32, bitcast=True)
    return key, tl.load(at + HELD, mask=j < count, other=0)


@triton.jit
def _choose_among(j, count, first, candidates, chosen, end, TOP: tl.constexpr, HELD: tl.constexpr):
    key, row = _candidate(j, count, first, candidates, HELD)
    least, room = tl.full([], 0, tl.uint32), TOP
    if end > TOP:
        least = _bound(key, chosen, end, TOP, TOP, True)
        room = TOP - _num_at_least(least + 1, key, chosen, end, True)
    _list(key, row, j < count, least, room, 0, 0, chosen)


@triton.jit(
    do_not_specialize=["score_stride", "parts"], do_not_specialize_on_alignment=["token_slots", "positions", "chosen"]
)
def _choose_kernel(
    scores, candidates, counts, page_table, token_slots, positions, chosen, table_stride, score_stride, parts,
    TOP: tl.constexpr, PAGE: tl.constexpr, HELD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: a token. The least key that is chosen is searched among candidates; equal ones from the earliest on.

    Where they are too few, for the sample misled, or too many, it is searched among all.
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(token_slots + token)
    end = tl.where(slot >= 0, tl.load(positions + token) + 1, 0)
    scores += token * score_stride
    chosen += token * TOP
    table = page_table + slot.to(tl.int64) * table_stride
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    j, p = tl.arange(0, HELD), tl.arange(0, _MAX_PARTS)
    candidates += token * parts * 2 * HELD
    many = tl.load(counts + token * parts + p, mask=p < parts, other=0)
    first, count = tl.cumsum(many, 0) - many, tl.sum(many, 0)
    if (count > HELD) | (count < tl.minimum(TOP, end)):
        key, row = _candidate(j, count, first, candidates, HELD)
        least = _bound(key, scores, end, TOP, TOP, False)
        room = TOP - _num_at_least(least + 1, key, scores, end, False)
        above, equal = 0, 0
        for low in range(0, end, HELD):
            inside = low + j < end
            key, row = _keys(scores, low + j, inside), _rows(low + j, inside, table, PAGE)
            above, equal = _list(key, row, inside, least, room, above, equal, chosen)
    elif count > HELD // 2:
        _choose_among(j, count, first, candidates, chosen, end, TOP, HELD)
    else:  # as most often: half the work
        _choose_among(tl.arange(0, HELD // 2), count, first, candidates, chosen, end, TOP, HELD)
    for low in range(0, TOP, HELD):
        tl.store(chosen + low + j, tl.full([HELD], -1, tl.int32), mask=(low + j >= end) & (low + j < TOP))


def choose_tokens(
    q: torch.Tensor, weights: torch.Tensor, key_pages: torch.Tensor, page_table: torch.Tensor,
    token_slots: torch.Tensor, positions: torch.Tensor, chosen: torch.Tensor, max_seq_len: int,
) -> None:  # fmt: skip
    (num_tokens, num_heads, dim), page_size, top_k = q.shape, key_pages.shape[2], chosen.shape[1]
    if dim < 16 or dim & (dim - 1):
        raise ValueError(f"index keys {[*key_pages.shape]}: as wide as a power of two from 16 on")
    if not all(t.is_contiguous() for t in (q, weights, key_pages, chosen)) or page_table.stride(1) != 1:
        raise ValueError("choose_tokens needs contiguous tensors")
    if top_k > _HELD:  # lists are counted in 16 bits
        raise ValueError(f"index_topk must be at most {_HELD} on a GPU; got {top_k}")
    heads_p, half = max(16, triton.next_power_of_2(num_heads)), q.element_size() == 2
    sms = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    # Many tokens are those of chunks, whose neighbours share keys.
    tokens = max(1, 256 // heads_p) if half and num_tokens > 2 * sms else 1
    stages, held, options = 1 + half, max(_HELD, triton.next_power_of_2(2 * top_k)), overlap_options(q)
    sample = max(_SAMPLE, min(4 * _SAMPLE, triton.next_power_of_2(max_seq_len // 32)))
    step = min(num_tokens, max(tokens, _SCORE_BYTES // (4 * max_seq_len + 8 * held)))
    parts = min(triton.cdiv(_GATHERERS * sms, max(1, step)), triton.cdiv(max_seq_len, _GATHER), _MAX_PARTS.value)
    scores = q.new_empty(step, max_seq_len, dtype=torch.float32)
    buffers = scores, chosen.new_empty(step, parts, 2, held), chosen.new_empty(step, parts)
    strides, shape = (page_table.stride(0), max_seq_len), {"TOP": top_k, "PAGE": page_size, "HELD": held, **options}
    for low in range(0, num_tokens, step or 1):
        rows = slice(low, low + step)
        where, num = (page_table, token_slots[rows], positions[rows]), min(step, num_tokens - low)
        tiles = triton.cdiv(num, tokens)
        splits = max(triton.cdiv(_SCORERS * sms, tiles), triton.cdiv(max_seq_len, _SCORED))
        splits = min(splits, triton.cdiv(max_seq_len, _BLOCK_N))
        _score_kernel[(tiles * splits,)](
            q[rows], weights[rows], key_pages, *where, scores, num, *strides, splits, NUM_HEADS=num_heads, DIM=dim,
            HEADS_P=heads_p, TOKENS=tokens, PAGE=page_size, BLOCK_N=_BLOCK_N, num_warps=4, num_stages=stages, **options,
        )  # fmt: skip
        _gather_kernel[(num * parts,)](
            *buffers, *where, *strides, parts, SAMPLE=sample, BLOCK=_GATHER, num_warps=16, **shape
        )
        _choose_kernel[(num,)](*buffers, *where, chosen[rows], *strides, parts, num_warps=8, **shape)


def attend_chosen(
    q_latent: torch.Tensor, q_rope: torch.Tensor, pages: torch.Tensor, chosen: torch.Tensor,
    token_slots: torch.Tensor, positions: torch.Tensor, scale: float, out: torch.Tensor,
    scales: torch.Tensor | None, workspace: DecodeWorkspace | None,
) -> None:  # fmt: skip
    latent_decode(
        q_latent, q_rope, pages, chosen, token_slots, positions, scale, out, scales=scales, workspace=workspace,
        max_seq_len=chosen.shape[1], listed=True,
    )  # fmt: skip

"""Kernels of token-sparse latent attention: keys and queries of the indexer, scores, choice, attention to the chosen.

A decode row and a token of a chunk are served alike, each with a list of its own; few rows are split over programs.
"""

import torch
import triton
import triton.language as tl

from gossamer.ops.attention.triton import LOG2E, LOW, PRECISION
from gossamer.ops.attention.workspace import DecodeWorkspace
from gossamer.ops.dispatch import overlap_options
from gossamer.ops.mla.triton import check_pages, decode_cut

_SCORE_BYTES = 1 << 28  # of scores and candidates at a time
_BLOCK_N = 64  # keys, or chosen tokens, of a product
# Scores that a choosing program holds at once, at least, and how many of a longer row tell which those are.
_HELD, _SAMPLE = 4096, 4096
_GATHER = 2048  # scores that a gathering program looks at at a time
_SCORERS, _GATHERERS = 4, 2  # programs for each multiprocessor, where rows are few
_MAX_SPLITS = 32


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
    """How many keys are at least each of `bound`: of those held, which are all if WHOLE, or of scores 0 .. end - 1."""
    if WHOLE:
        many = tl.sum((held[None, :] >= bound[:, None]).to(tl.int32), 1)
    else:
        many = tl.zeros_like(bound).to(tl.int32)
        for low in range(0, end, held.shape[0]):
            i = low + tl.arange(0, held.shape[0])
            many += tl.sum((_keys(scores, i, i < end)[None, :] >= bound[:, None]).to(tl.int32), 1)
    return many


@triton.jit
def _bound(held, scores, end, wanted, most, BITS: tl.constexpr, WHOLE: tl.constexpr):
    """A number that at least `wanted` keys reach, found from its leading bits on: `most` at most, or it is the largest."""
    digit = tl.arange(0, 1 << BITS)
    least = tl.zeros([1], tl.uint32)
    count, shift = most + 1, 32 - BITS
    while (shift >= 0) & (count > most):
        many = _num_at_least(least + (digit.to(tl.uint32) << shift), held, scores, end, WHOLE)
        least += tl.max(tl.where(many >= wanted, digit, 0), 0).to(tl.uint32) << shift
        count = tl.min(tl.where(many >= wanted, many, 2147483647), 0)
        shift -= BITS
    return least


@triton.jit
def _rows(i, present, table, PAGE: tl.constexpr):
    return tl.load(table + i // PAGE, mask=present, other=0) * PAGE + i % PAGE


@triton.jit
def _list(key, row, present, least, room, before, equals, chosen):
    """Lists those above `least`, and the first `room` that equal it; returns how many are listed, and equals seen."""
    equal = present & (key == least)
    rank = equals + tl.cumsum(equal.to(tl.int32), 0)
    taken = present & ((key > least) | (equal & (rank <= room)))
    at = before + tl.cumsum(taken.to(tl.int32), 0) - 1
    tl.store(chosen + at, row, mask=taken)
    return before + tl.sum(taken.to(tl.int32), 0), equals + tl.sum(equal.to(tl.int32), 0)


@triton.jit(
    do_not_specialize=["score_stride", "parts"], do_not_specialize_on_alignment=["scores", "token_slots", "positions"]
)
def _gather_kernel(
    scores, candidates, counts, token_slots, positions, score_stride, parts,
    TOP: tl.constexpr, HELD: tl.constexpr, SAMPLE: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: a part of one token's scores. Lists those among, by a sample of the row, its 1.5 TOP best."""
    token, part = (tl.program_id(0) // parts).to(tl.int64), tl.program_id(0) % parts
    slot = tl.load(token_slots + token)
    end = tl.where(slot >= 0, tl.load(positions + token) + 1, 0)
    scores += token * score_stride
    candidates += (token * parts + part) * HELD
    share = tl.cdiv(tl.cdiv(end, parts), BLOCK) * BLOCK
    stride = tl.cdiv(end, SAMPLE)
    wanted = tl.maximum(3 * TOP // (2 * stride), 1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    if end > HELD:
        at = tl.arange(0, SAMPLE) * stride
        bound = _bound(_keys(scores, at, at < end), scores, end, wanted, wanted + wanted // 16, 2, True)
        count = 0
        for low in range(part * share, tl.minimum(part * share + share, end), BLOCK):
            i = low + tl.arange(0, BLOCK)
            hit = (i < end) & (_keys(scores, i, i < end) >= bound)
            to = count + tl.cumsum(hit.to(tl.int32), 0) - 1
            tl.store(candidates + to, i, mask=hit & (to < HELD))
            count += tl.sum(hit.to(tl.int32), 0)
        tl.store(counts + token * parts + part, count)


@triton.jit
def _candidate(j, candidates, counts, parts, HELD: tl.constexpr, PARTS: tl.constexpr):
    """Candidates j of all parts laid end to end, and how many there are."""
    p = tl.arange(0, PARTS)
    many = tl.load(counts + p, mask=p < parts, other=0)
    first = tl.cumsum(many, 0) - many
    part = tl.zeros_like(j)
    half: tl.constexpr = PARTS // 2
    for bit in tl.static_range(5):
        later = part + (half >> bit)
        part = tl.where(tl.gather(first, later, 0) <= j, later, part)
    count = tl.sum(many, 0)
    return tl.load(candidates + part * HELD + j - tl.gather(first, part, 0), mask=j < count, other=0), count


@triton.jit(
    do_not_specialize=["score_stride", "parts"],
    do_not_specialize_on_alignment=["scores", "token_slots", "positions", "chosen"],
)
def _choose_kernel(
    scores, candidates, counts, page_table, token_slots, positions, chosen, table_stride, score_stride, parts,
    TOP: tl.constexpr, PAGE: tl.constexpr, HELD: tl.constexpr, LONG: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: a token. The least score that is chosen is found by its bits; equal ones from the earliest on.

    Of rows that are LONG it is looked for among candidates, or where those are too few or too many among all.
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
    j = tl.arange(0, HELD)
    i, count = j, end
    if LONG:  # noqa: SIM102 - a constant
        if end > HELD:
            i, count = _candidate(j, candidates + token * parts * HELD, counts + token * parts, parts, HELD, 32)
    least = tl.zeros([1], tl.uint32)
    room = TOP
    before, equals = 0, 0
    if (count <= HELD) & ((count >= TOP) | (end <= TOP)):
        key, row = _keys(scores, i, j < count), _rows(i, j < count, table, PAGE)
        if end > TOP:
            least = _bound(key, scores, end, TOP, TOP, 2, True)
            room = TOP - tl.sum((key > least).to(tl.int32), 0)
        before, equals = _list(key, row, j < count, least, room, before, equals, chosen)
    else:
        least = _bound(j, scores, end, TOP, TOP, 4, False)
        room = TOP - tl.sum(_num_at_least(least + 1, j, scores, end, False), 0)
        for low in range(0, end, HELD):
            inside = low + j < end
            key, row = _keys(scores, low + j, inside), _rows(low + j, inside, table, PAGE)
            before, equals = _list(key, row, inside, least, room, before, equals, chosen)
    for low in range(0, TOP, HELD):
        tl.store(chosen + low + j, tl.full([HELD], -1, tl.int32), mask=(low + j >= before) & (low + j < TOP))


def _num_sms(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def score_cut(q: torch.Tensor, num_tokens: int) -> tuple[int, int, int]:
    """Tokens, warps and stages of a scoring program: many tokens are those of chunks, whose neighbours share keys."""
    heads_p = max(16, triton.next_power_of_2(q.shape[1]))
    if q.element_size() == 4:
        return 1, 4, 1
    return (1, 4, 3) if num_tokens <= 2 * _num_sms(q.device) else (max(1, 128 // heads_p), 8, 3)


def choose_tokens(
    q: torch.Tensor, weights: torch.Tensor, key_pages: torch.Tensor, page_table: torch.Tensor,
    token_slots: torch.Tensor, positions: torch.Tensor, chosen: torch.Tensor, max_seq_len: int,
) -> None:  # fmt: skip
    (num_tokens, num_heads, dim), page_size, top_k = q.shape, key_pages.shape[2], chosen.shape[1]
    if dim < 16 or dim & (dim - 1):
        raise ValueError(f"index keys {[*key_pages.shape]}: as wide as a power of two from 16 on")
    if not all(t.is_contiguous() for t in (q, weights, key_pages, chosen)) or page_table.stride(1) != 1:
        raise ValueError("choose_tokens needs contiguous tensors")
    tokens, warps, stages = score_cut(q, num_tokens)
    held, sms = max(_HELD, triton.next_power_of_2(2 * top_k)), _num_sms(q.device)
    long, options = max_seq_len > held, overlap_options(q)
    step = min(num_tokens, max(tokens, _SCORE_BYTES // (4 * max(1, max_seq_len + held * long))))
    parts = min(triton.cdiv(_GATHERERS * sms, max(1, step)), triton.cdiv(max_seq_len, _GATHER), _MAX_SPLITS)
    scores = q.new_empty(step, max_seq_len, dtype=torch.float32)
    candidates, counts = chosen.new_empty(step * long, parts, held), chosen.new_empty(step * long, parts)
    for low in range(0, num_tokens, step or 1):
        rows = slice(low, low + step)
        where, num = (token_slots[rows], positions[rows]), min(step, num_tokens - low)
        tiles = triton.cdiv(num, tokens)
        splits = min(triton.cdiv(_SCORERS * sms, tiles), triton.cdiv(max_seq_len, _BLOCK_N))
        _score_kernel[(tiles * splits,)](
            q[rows], weights[rows], key_pages, page_table, *where, scores, num, page_table.stride(0), max_seq_len,
            splits, NUM_HEADS=num_heads, HEADS_P=max(16, triton.next_power_of_2(num_heads)), TOKENS=tokens, DIM=dim,
            PAGE=page_size, BLOCK_N=_BLOCK_N, num_warps=warps, num_stages=stages, **options,
        )  # fmt: skip
        if long:
            _gather_kernel[(num * parts,)](
                scores, candidates, counts, *where, max_seq_len, parts, TOP=top_k, HELD=held, SAMPLE=_SAMPLE,
                BLOCK=_GATHER, num_warps=8, **options,
            )  # fmt: skip
        _choose_kernel[(num,)](
            scores, candidates, counts, page_table, *where, chosen[rows], page_table.stride(0), max_seq_len, parts,
            TOP=top_k, PAGE=page_size, HELD=held, LONG=long, num_warps=16, **options,
        )  # fmt: skip


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["chosen", "token_slots", "positions"])
def _attend_kernel(
    latent_q, rope_q, pages, scales, chosen, token_slots, positions, out, partials, lse,
    row_stride, head_stride, splits, scale_log2,
    TOP: tl.constexpr, NUM_BLOCKS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, RANK: tl.constexpr,
    ROPE: tl.constexpr, PAGE: tl.constexpr, BLOCK_N: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: a block of GROUP heads of one token against a part of its list. Blocks of a token are neighbours."""
    block, unit = tl.program_id(0) % NUM_BLOCKS, tl.program_id(0) // NUM_BLOCKS
    row, split = unit // splits, unit % splits
    slot = tl.load(token_slots + row)
    count = tl.where(slot >= 0, tl.minimum(tl.load(positions + row) + 1, TOP), 0)
    share = tl.cdiv(tl.cdiv(TOP, splits), BLOCK_N) * BLOCK_N
    low, high = split * share, tl.minimum(split * share + share, count)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    g = tl.arange(0, BLOCK_G)
    r = tl.arange(0, RANK)
    e = tl.arange(0, ROPE)
    head = block * GROUP + g
    inside = (g < GROUP)[:, None]
    to = ((row * NUM_BLOCKS * GROUP + head).to(tl.int64) * RANK)[:, None] + r[None, :]
    queries = tl.load(latent_q + to, mask=inside, other=0.0)
    rotated = tl.load(rope_q + row.to(tl.int64) * row_stride + head[:, None] * head_stride + e[None, :], inside, 0.0)
    peak = tl.full([BLOCK_G], LOW, tl.float32)
    weight = tl.zeros([BLOCK_G], tl.float32)
    total = tl.zeros([BLOCK_G, RANK], tl.float32)
    for start in tl.range(low, high, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        listed = n < high
        at = tl.load(chosen + row.to(tl.int64) * TOP + n, mask=listed, other=-1).to(tl.int64)
        listed = at >= 0
        base = (at * (RANK + ROPE))[:, None]
        latent = tl.load(pages + base + r[None, :], mask=listed[:, None], other=0.0)
        key = tl.load(pages + base + RANK + e[None, :], mask=listed[:, None], other=0.0)
        if SCALED:  # a power of two: exact
            scale = tl.load(scales + at // PAGE, mask=listed, other=0.0)[:, None]
            latent = (latent.to(tl.float32) * scale).to(queries.dtype)
            key = (key.to(tl.float32) * scale).to(queries.dtype)
        scores = tl.dot(queries, latent.T, input_precision=PRECISION)
        scores = tl.dot(rotated, key.T, scores, input_precision=PRECISION) * scale_log2
        scores = tl.where(listed[None, :], scores, float("-inf"))
        highest = tl.maximum(peak, tl.max(scores, 1))
        fade = tl.exp2(peak - highest)
        weights = tl.exp2(scores - highest[:, None])
        weight = weight * fade + tl.sum(weights, 1)
        total = tl.dot(weights.to(latent.dtype), latent, total * fade[:, None], input_precision=PRECISION)
        peak = highest
    result = total / tl.maximum(weight, 1e-30)[:, None]
    if splits == 1:
        tl.store(out + to, result.to(out.dtype.element_ty), mask=inside)
    elif low < high:
        part = (unit * NUM_BLOCKS * GROUP + head).to(tl.int64)
        tl.store(lse + part, peak + tl.log2(weight), mask=g < GROUP)
        tl.store(partials + part[:, None] * RANK + r[None, :], result, mask=inside)


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["token_slots", "positions"])
def _merge_kernel(
    token_slots, positions, out, partials, lse, splits,
    TOP: tl.constexpr, HEADS: tl.constexpr, RANK: tl.constexpr, BLOCK_N: tl.constexpr, PARTS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One head of one token: the sum over its parts; zeros for padding."""
    row, head = tl.program_id(0), tl.program_id(1)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(token_slots + row)
    count = tl.where(slot >= 0, tl.minimum(tl.load(positions + row) + 1, TOP), 0)
    share = tl.cdiv(tl.cdiv(TOP, splits), BLOCK_N) * BLOCK_N
    r = tl.arange(0, RANK)
    split = tl.arange(0, PARTS)
    used = split * share < count
    part = ((row * splits + split) * HEADS + head).to(tl.int64)
    sizes = tl.load(lse + part, mask=used, other=LOW)
    weight = tl.exp2(sizes - tl.max(sizes, 0)) * used.to(tl.float32)
    values = tl.load(partials + part[:, None] * RANK + r[None, :], mask=used[:, None], other=0.0)
    total = tl.sum(values * weight[:, None], 0) / tl.maximum(tl.sum(weight, 0), 1e-30)
    tl.store(out + (row * HEADS + head).to(tl.int64) * RANK + r, total.to(out.dtype.element_ty))


def attend_chosen(
    q_latent: torch.Tensor, q_rope: torch.Tensor, pages: torch.Tensor, chosen: torch.Tensor,
    token_slots: torch.Tensor, positions: torch.Tensor, scale: float, out: torch.Tensor,
    scales: torch.Tensor | None, workspace: DecodeWorkspace | None,
) -> None:  # fmt: skip
    (num_tokens, num_heads, rank), top_k = q_latent.shape, chosen.shape[1]
    check_pages(q_latent, pages, rank, {"chosen": chosen, "token_slots": token_slots, "positions": positions})
    if q_rope.shape != (num_tokens, num_heads, pages.shape[3] - rank) or q_rope.stride(2) != 1:
        raise ValueError(f"q_latent {[*q_latent.shape]} and q_rope {[*q_rope.shape]} do not fit {[*pages.shape]}")
    if not all(t.is_contiguous() for t in (q_latent, out, chosen)) or out.shape != q_latent.shape:
        raise ValueError("q_latent, out and chosen must be contiguous, the first two of one shape")
    if workspace is None or workspace.partials.shape[1] * workspace.partials.shape[3] != num_heads:
        raise ValueError(f"the kernel of attend_chosen needs a DecodeWorkspace of {num_heads} heads")
    if num_tokens == 0:
        return
    max_programs, num_blocks, _, group, _ = workspace.partials.shape
    if q_latent.element_size() == 4 and group % 16 == 0:  # more heads do not fit into shared memory
        num_blocks, group = num_heads // 16, 16
    cut = decode_cut(group, q_latent.element_size())
    block_n = 32 if q_latent.element_size() == 4 else _BLOCK_N
    splits = max(1, min(max_programs // num_tokens, triton.cdiv(top_k, block_n), _MAX_SPLITS))
    parts = workspace.partials, workspace.lse
    shape = {"TOP": top_k, "RANK": rank, "BLOCK_N": block_n}
    options = overlap_options(q_latent)
    _attend_kernel[(num_tokens * splits * num_blocks,)](
        q_latent, q_rope, pages, scales, chosen, token_slots, positions, out, *parts, *q_rope.stride()[:2],
        splits, scale * LOG2E, **shape, NUM_BLOCKS=num_blocks, GROUP=group, BLOCK_G=cut.block_g, ROPE=q_rope.shape[2],
        PAGE=pages.shape[2], SCALED=scales is not None, num_warps=cut.num_warps, num_stages=cut.num_stages, **options,
    )  # fmt: skip
    if splits > 1:
        _merge_kernel[(num_tokens, num_heads)](
            token_slots, positions, out, *parts, splits, **shape, HEADS=num_heads, PARTS=_MAX_SPLITS, num_warps=4,
            **options,
        )  # fmt: skip

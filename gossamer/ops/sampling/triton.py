"""Sampling kernels: a step's draw inside a CUDA graph, decided on the device row by row.

Launch one reads the logits once, all rows spread over the chip: per block of 128 tokens the maximum and the sum of
weights. Launch two, one program a row, has only to pick a block and a token, or to search a few candidates first.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from gossamer.ops.sampling.reference import GREEDY_TEMPERATURE

BLOCK = tl.constexpr(128)
_CAPACITY = 512
_LOG2E = tl.constexpr(1.4426950408889634)
# Items order by (value falling, id rising): the order key of the float32 above 20 bits that hold the id's complement.
_ID_BITS = tl.constexpr(20)
_ID_MASK = tl.constexpr((1 << 20) - 1)
_LOWEST = tl.constexpr(-(1 << 62))
# Masses of the search are integers, so sums are exact in any order: a weight of 1, the largest, is 2**44.
_ONE = tl.constexpr(float(1 << 44))
# As the reference: a nucleus of at most this many tokens is drawn in falling order, a wider one by rising id.
_PROBE = tl.constexpr(128)


@triton.jit
def _mix(x):
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    return x ^ (x >> 31)


@triton.jit
def _uniform(seed, index):
    """reference.uniform for one row."""
    step = (index.to(tl.uint64) + 1) * 0x9E3779B97F4A7C15
    bits = _mix(_mix(seed.to(tl.uint64) + 0x9E3779B97F4A7C15) + step) >> 11
    return bits.to(tl.int64).to(tl.float64) * (1.0 / (1 << 53))


@triton.jit
def _key(x):
    """Order key of float32 as int64; adding zero makes -0.0 equal to 0.0."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@triton.jit
def _value(item):
    """The float32 of an item."""
    key = (item >> _ID_BITS).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _fixed(weight):
    """A float32 weight in [0, 1] as an integer, cut off after 44 bits; no unit of low throughput is used."""
    bits = weight.to(tl.int32, bitcast=True)
    mantissa = ((bits & 0x7FFFFF) | 0x800000).to(tl.int64) << 21
    return mantissa >> tl.minimum(127 - (bits >> 23), 63).to(tl.int64)


@triton.jit
def _load_blocks(logits, block, vocab):
    """Float32 values [len(block), 128] and their items; NaN becomes +inf, which makes a row as invalid."""
    ids = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    x = tl.load(logits + ids, mask=ids < vocab, other=float("-inf")).to(tl.float32)
    x = tl.where(x != x, float("inf"), x)
    return x, (_key(x) << _ID_BITS) + (ids ^ _ID_MASK)


@triton.jit(do_not_specialize=["num_blocks"])
def _block_stats(
    logits, slots, temperature, top_k, maxima, sums, vocab, stride, num_blocks, GREEDY: tl.constexpr, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    if slot >= 0:
        block = tl.program_id(1) * TILE + tl.arange(0, TILE)
        x, _ = _load_blocks(logits + row * stride, block, vocab)
        largest = tl.max(x, axis=1)
        tl.store(maxima + row * num_blocks + block, largest, mask=block < num_blocks)
        t, k = tl.load(temperature + slot), tl.load(top_k + slot)
        if (t >= GREEDY) & ((k < 1) | (k >= vocab)):
            scale = (1.0 / t * _LOG2E).to(tl.float32)
            base = tl.where(tl.abs(largest) < float("inf"), largest, 0.0)
            weights = tl.exp2((x - base[:, None]) * scale)
            tl.store(sums + row * num_blocks + block, tl.sum(weights, axis=1), mask=block < num_blocks)


@triton.jit
def _list_blocks(blocks, keys, lowest):
    """Lists the blocks that hold an item of at least `lowest`; returns how many."""
    index = tl.arange(0, keys.shape[0])
    chosen = keys >= (lowest >> _ID_BITS)
    position = tl.cumsum(chosen.to(tl.int32)) - 1
    tl.debug_barrier()
    tl.store(blocks + position, index, mask=chosen)
    tl.debug_barrier()
    return tl.sum(chosen.to(tl.int32))


@triton.jit
def _measure(logits, blocks, num, t0, t1, t2, largest, scale, vocab, TILE: tl.constexpr):
    """Counts and masses of the listed blocks' items that are at least t0, t1 and t2."""
    n0, n1, n2 = (tl.zeros([TILE, BLOCK], tl.int32),) * 3
    m0, m1, m2 = (tl.zeros([TILE, BLOCK], tl.int64),) * 3
    for start in range(0, num, TILE):
        at = start + tl.arange(0, TILE)
        x, item = _load_blocks(logits, tl.load(blocks + at, mask=at < num, other=vocab), vocab)
        weight = _fixed(tl.exp2((x - largest) * scale))
        n0 += (item >= t0).to(tl.int32)
        n1 += (item >= t1).to(tl.int32)
        n2 += (item >= t2).to(tl.int32)
        m0 += tl.where(item >= t0, weight, 0)
        m1 += tl.where(item >= t1, weight, 0)
        m2 += tl.where(item >= t2, weight, 0)
    return tl.sum(n0), tl.sum(n1), tl.sum(n2), tl.sum(m0), tl.sum(m1), tl.sum(m2)


@triton.jit
def _gather(logits, blocks, num, lo, hi, items, counter, vocab, CAPACITY: tl.constexpr, TILE: tl.constexpr):
    """Stores the listed blocks' items of [lo, hi), in any order, as far as there is room; returns their number."""
    tl.store(counter, 0)
    tl.debug_barrier()
    for start in range(0, num, TILE):
        at = start + tl.arange(0, TILE)
        _, item = _load_blocks(logits, tl.load(blocks + at, mask=at < num, other=vocab), vocab)
        inside = (item >= lo) & (item < hi)
        position = tl.atomic_add(counter + tl.zeros([TILE, BLOCK], tl.int32), 1, mask=inside, sem="relaxed")
        tl.store(items + position, item, mask=inside & (position < CAPACITY))
    tl.debug_barrier()
    return tl.atomic_add(counter, 0)


@triton.jit
def _rank(items, n, n_above, m_above, largest, scale, CAPACITY: tl.constexpr):
    """The list, and for each of its items the count and mass of all items of the row from it upwards."""
    at = tl.arange(0, CAPACITY)
    mine = tl.load(items + at, mask=at < n, other=_LOWEST)
    count = tl.zeros([CAPACITY], tl.int32) + n_above
    mass = tl.zeros([CAPACITY], tl.int64) + m_above
    for start in range(0, n, 16):
        near = start + tl.arange(0, 16)
        other = tl.load(items + near, mask=near < n, other=_LOWEST)
        weight = tl.where(near < n, _fixed(tl.exp2((_value(other) - largest) * scale)), 0)
        from_here = (other[:, None] >= mine[None, :]) & (near < n)[:, None]
        count += tl.sum(from_here.to(tl.int32), axis=0)
        mass += tl.sum(tl.where(from_here, weight[:, None], 0), axis=0)
    return mine, count, mass


@triton.jit
def _first_bound(keys, rank, num_blocks):
    """An item that at least `rank` blocks, and not many more, exceed: the k largest items are not below it."""
    real = tl.arange(0, keys.shape[0]) < num_blocks
    lo, hi = tl.min(tl.where(real, keys, 1 << 31)), tl.max(keys) + 1
    n = num_blocks
    while (hi - lo > 1) & (n > rank + (rank >> 2)):
        middle = lo + ((hi - lo) >> 1)
        above = tl.sum((keys >= middle).to(tl.int32))
        if above >= rank:
            lo, n = middle, above
        else:
            hi = middle
    return lo << _ID_BITS


@triton.jit
def _split(lo, hi, scale, part):
    """An item inside (lo, hi): `part` of the way between their values, or between the items where values are close."""
    low, high = _value(lo), _value(hi - 1)
    by_value = _key(low * (1 - part) + high * part) << _ID_BITS
    by_item = lo + ((hi - lo).to(tl.float64) * part).to(tl.int64)
    apart = (high - low) * scale > 1e-3
    return tl.minimum(tl.maximum(tl.where(apart, by_value, by_item), lo + 1), hi - 1)


@triton.jit
def _search(
    logits, keys, blocks, items, counter, largest, scale, floor, cut, total, k, p, u, limited, vocab, num_blocks,
    CAPACITY: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Cuts the row, in falling order, after the k-th item, then where the mass reaches `p` of what is left.

    Each of these, and the draw itself, is the first item up to which the count or mass is at least `need`. It is
    looked up in a list of a few hundred candidates, all items of [lo, hi); where it lies elsewhere, passes over the row
    narrow the range to one that fits the list. Returns the cut, and the token if the draw is in falling order, else -1.
    """
    top = (_key(largest) + 1) << _ID_BITS
    lo, hi = _first_bound(keys, tl.where(limited, tl.minimum(k, 256), 128), num_blocks), top
    lo = tl.maximum(lo, floor)
    n_above, m_above, token = 0, tl.full((), 0, tl.int64), tl.full((), -1, tl.int64)
    n = _gather(logits, blocks, _list_blocks(blocks, keys, lo), lo, hi, items, counter, vocab, CAPACITY, TILE)
    if n > CAPACITY:
        n, lo = 0, hi
    item, count, mass = _rank(items, n, n_above, m_above, largest, scale, CAPACITY)
    falling = limited
    for stage in range(3):
        wanted = tl.where(stage == 0, limited, tl.where(stage == 1, p < 1.0, falling))
        if wanted:
            need = k.to(tl.int64)
            if stage == 1:
                share = p * total.to(tl.float64)
                need = share.to(tl.int64)
                need = tl.maximum(need + (need.to(tl.float64) < share).to(tl.int64), 1)
            if stage == 2:
                need = tl.minimum((u * total.to(tl.float64)).to(tl.int64) + 1, total)
            valid = tl.arange(0, CAPACITY) < n
            n_reach, m_reach = tl.max(tl.where(valid, count, n_above)), tl.max(tl.where(valid, mass, m_above))
            before, reach = tl.where(stage == 0, n_above, m_above), tl.where(stage == 0, n_reach, m_reach)
            higher = need <= before
            least = tl.maximum(floor, cut)
            if (higher & (hi < top)) | ((need > reach) & (least < lo)):
                if higher:
                    lo, hi, n_above, m_above = hi, top, 0, m_above * 0
                else:
                    lo, hi, n_above, m_above = least, lo, n_reach, m_reach
                num = _list_blocks(blocks, keys, lo)
                n = CAPACITY + 1
                while n > CAPACITY:
                    t1, t2 = _split(lo, hi, scale, 1 / 3), _split(lo, hi, scale, 2 / 3)
                    n0, n1, n2, _, m1, m2 = _measure(logits, blocks, num, lo, t1, t2, largest, scale, vocab, TILE)
                    if tl.where(stage == 0, n2, m2) >= need:
                        lo, n = t2, n2 - n_above
                    elif tl.where(stage == 0, n1, m1) >= need:
                        n, lo, hi, n_above, m_above = n1 - n2, t1, t2, n2, m2
                    else:
                        n, hi, n_above, m_above = n0 - n1, t1, n1, m1
                n = _gather(logits, blocks, num, lo, hi, items, counter, vocab, CAPACITY, TILE)
                item, count, mass = _rank(items, n, n_above, m_above, largest, scale, CAPACITY)
                valid = tl.arange(0, CAPACITY) < n
            reached = valid & (tl.where(stage == 0, count, mass) >= need)
            # Rounding may put the need above all there is: then everything down to `lo` stays.
            found = tl.max(tl.where(reached, item, lo))
            cut = tl.maximum(cut, found)
            if stage == 2:
                token = (found & _ID_MASK) ^ _ID_MASK
        if (stage == 0) & (limited | (cut > _LOWEST)) | (wanted & (stage == 1)):
            if (cut >= lo) & (cut <= hi):
                kept = (tl.arange(0, CAPACITY) < n) & (item >= cut)
                total = tl.max(tl.where(kept, mass, m_above))
                num_kept = tl.max(tl.where(kept, count, n_above))
            else:
                num = _list_blocks(blocks, keys, cut)
                num_kept, _, _, total, _, _ = _measure(logits, blocks, num, cut, cut, cut, largest, scale, vocab, TILE)
            falling = limited | (num_kept <= _PROBE) | (vocab <= _PROBE)
    return cut, token


@triton.jit
def _pick(weights, target):
    """Index of the first weight at which their running sum exceeds `target`, else of the last that is not zero."""
    index = tl.arange(0, weights.shape[0])
    bounds = tl.cumsum(weights)
    hit = (bounds > target) & (weights > 0)
    first = tl.min(tl.where(hit, index, weights.shape[0]))
    last = tl.max(tl.where(weights > 0, index, 0))
    chosen = tl.where(first < weights.shape[0], first, last)
    return chosen, tl.sum(tl.where(index == chosen, bounds - weights, 0.0))


@triton.jit(do_not_specialize=["num_blocks"])
def _draw(
    logits, slots, temperature, top_k, top_p, min_p, seed, output_index, last_token, out, maxima, sums, blocks, items,
    counters, vocab, stride, num_blocks, GREEDY: tl.constexpr, BLOCKS: tl.constexpr, CAPACITY: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row)
    token = tl.full((), -1, tl.int64)
    if slot >= 0:
        logits += row * stride
        maxima += row * num_blocks
        sums += row * num_blocks
        blocks += row * num_blocks
        index = tl.arange(0, BLOCKS)
        highest = tl.load(maxima + index, mask=index < num_blocks, other=float("-inf"))
        largest = tl.max(highest)
        t = tl.load(temperature + slot)
        if (largest > float("-inf")) & (largest < float("inf")):
            if t < GREEDY:
                block = tl.min(tl.where(highest == largest, index, BLOCKS))
                inside = tl.arange(0, BLOCK)
                x = tl.load(logits + block * BLOCK + inside, mask=block * BLOCK + inside < vocab, other=float("-inf"))
                token += 1 + block * BLOCK + tl.min(tl.where(x.to(tl.float32) == largest, inside, BLOCK))
            else:
                k, p, least = tl.load(top_k + slot), tl.load(top_p + slot), tl.load(min_p + slot)
                u = _uniform(tl.load(seed + slot), tl.load(output_index + row))
                scale = (1.0 / t * _LOG2E).to(tl.float32)
                limited = (k > 0) & (k < vocab)
                keys = _key(highest)
                cut = tl.full((), _LOWEST, tl.int64)
                if least > 0:
                    cut = _key((largest + tl.log(least) * t).to(tl.float32)) << _ID_BITS
                factor = tl.exp2((highest - largest) * scale).to(tl.float64)
                if limited | (p < 1.0):
                    total = tl.full((), 0, tl.int64)
                    if (limited == 0) & (least <= 0):
                        sizes = tl.load(sums + index, mask=index < num_blocks, other=0.0).to(tl.float64)
                        total = (tl.sum(sizes * factor) * _ONE).to(tl.int64)
                    # Less likely items weigh nothing in integers.
                    floor = _key(tl.maximum(largest - 32.0 * t, -3.0e38).to(tl.float32)) << _ID_BITS
                    cut, token = _search(
                        logits, keys, blocks, items + row * CAPACITY, counters + row, largest, scale, floor, cut,
                        total, k, p, u, limited, vocab, num_blocks, CAPACITY, TILE,
                    )  # fmt: skip
                if token < 0:
                    if cut > _LOWEST:
                        num = _list_blocks(blocks, keys, cut)
                        for start in range(0, num, TILE):
                            at = start + tl.arange(0, TILE)
                            block = tl.load(blocks + at, mask=at < num, other=vocab)
                            x, item = _load_blocks(logits, block, vocab)
                            base = tl.load(maxima + block, mask=at < num, other=0.0)
                            weights = tl.where(item >= cut, tl.exp2((x - base[:, None]) * scale), 0.0)
                            tl.store(sums + block, tl.sum(weights, axis=1), mask=at < num)
                        tl.debug_barrier()
                    listed = (index < num_blocks) & (keys >= (cut >> _ID_BITS))
                    sizes = tl.load(sums + index, mask=listed, other=0.0).to(tl.float64) * factor
                    target = u * tl.sum(sizes)
                    block, before = _pick(sizes, target)
                    x, item = _load_blocks(logits, block + tl.zeros([1], tl.int32), vocab)
                    base = tl.max(tl.where(index == block, highest, float("-inf")))
                    inside = tl.where(item >= cut, tl.exp2((x - base) * scale), 0.0).to(tl.float64)
                    inside *= tl.exp2((base - largest) * scale).to(tl.float64)
                    chosen, _ = _pick(tl.reshape(inside, [BLOCK]), target - before)
                    token = (block * BLOCK + chosen).to(tl.int64)
        tl.store(last_token + slot, tl.maximum(token, 0))
    tl.store(out + row, token)


def workspace_size(num_rows: int, vocab: int) -> int:
    """Number of int32 elements that `sample_slots` needs."""
    return num_rows * (2 * _CAPACITY + 1 + 3 * triton.cdiv(vocab, BLOCK.value))


def sample_slots(
    logits: Tensor, slots: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor,
    output_index: Tensor, last_token: Tensor, workspace: Tensor, out: Tensor,
) -> Tensor:  # fmt: skip
    num_rows, vocab = logits.shape
    num_blocks = triton.cdiv(vocab, BLOCK.value)
    items = workspace[: 2 * _CAPACITY * num_rows].view(torch.int64)
    counters = workspace[items.numel() * 2 :][:num_rows]
    stats = workspace[items.numel() * 2 + num_rows :][: 3 * num_rows * num_blocks].view(3, -1)
    maxima, sums, blocks = stats[0].view(torch.float32), stats[1].view(torch.float32), stats[2]
    tile = 8 if num_rows < 8 else 32
    _block_stats[(num_rows, triton.cdiv(num_blocks, tile))](
        logits, slots, temperature, top_k, maxima, sums, vocab, logits.stride(0), num_blocks,
        GREEDY=GREEDY_TEMPERATURE, TILE=tile, num_warps=4 if tile == 8 else 8,
    )  # fmt: skip
    _draw[(num_rows,)](
        logits, slots, temperature, top_k, top_p, min_p, seed, output_index, last_token, out, maxima, sums, blocks,
        items, counters, vocab, logits.stride(0), num_blocks, GREEDY=GREEDY_TEMPERATURE,
        BLOCKS=max(triton.next_power_of_2(num_blocks), 16), CAPACITY=_CAPACITY, TILE=32, num_warps=16,
    )  # fmt: skip
    return out

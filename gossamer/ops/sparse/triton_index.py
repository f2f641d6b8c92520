"""The kernel that scores blocks by the best of their tokens' index keys, which it reads from their pages once.

All index heads of a token are rows of one product, for they share the keys; no score of a single key leaves a program.
"""

import torch
import triton
import triton.language as tl

from gossamer.ops.attention.triton import PRECISION
from gossamer.ops.dispatch import overlap_options
from gossamer.ops.sparse.selection import Selection
from gossamer.ops.sparse.triton import overlap


@triton.jit(
    do_not_specialize=["num_tokens", "splits", "dense_below"],
    do_not_specialize_on_alignment=["token_slots", "positions"],
)
def _index_kernel(
    q, key_pages, page_table, token_slots, positions, scores,
    num_tokens, table_stride, score_stride, splits, dense_below,
    LOCAL: tl.constexpr, OFFSET: tl.constexpr, NUM_HEADS: tl.constexpr, HEADS_P: tl.constexpr, TOKENS: tl.constexpr,
    DIM: tl.constexpr, PAGE: tl.constexpr, SIZE: tl.constexpr, BLOCK_N: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: some tokens against a part of the blocks before their LOCAL last, which have SIZE tokens each.

    BLOCK_N: keys of a product, one block or some. Tokens of several sequences: one of these after the other.
    """
    BLOCKS: tl.constexpr = BLOCK_N // SIZE
    tile, split = tl.program_id(0) // splits, tl.program_id(0) % splits
    m = tl.arange(0, TOKENS * HEADS_P)
    token, head = tile * TOKENS + m // HEADS_P, m % HEADS_P
    slot = tl.load(token_slots + token, mask=token < num_tokens, other=-1)
    position = tl.load(positions + token, mask=token < num_tokens, other=0) - OFFSET
    todo = (slot >= 0) & (position >= dense_below)
    end = tl.where(todo, tl.maximum(position // SIZE - LOCAL + 1, 0), 0)
    share = tl.cdiv(tl.cdiv(tl.max(end, 0), splits), BLOCKS) * BLOCKS
    overlap(PDL)
    if split * share >= tl.max(end, 0):
        return
    row = (token * NUM_HEADS + head).to(tl.int64)
    real = todo & (head < NUM_HEADS)
    d = tl.arange(0, DIM)
    n = tl.arange(0, BLOCK_N)
    queries = tl.load(q + row[:, None] * DIM + d[None, :], mask=real[:, None], other=0.0)
    current = tl.max(tl.where(todo, slot, -1), 0)
    while current >= 0:
        mine = todo & (slot == current)
        stop = tl.minimum(tl.max(tl.where(mine, end, 0), 0), (split + 1) * share)
        table = page_table + current.to(tl.int64) * table_stride
        for low in range(split * share, stop, BLOCKS):
            index = low * SIZE + n
            inside = index < stop * SIZE
            page = tl.load(table + index // PAGE, mask=inside, other=0).to(tl.int64)
            at = (page * PAGE + index % PAGE) * DIM
            keys = tl.load(key_pages + at[None, :] + d[:, None], mask=inside[None, :], other=0.0)
            logits = tl.dot(queries, keys.to(queries.dtype), input_precision=PRECISION)
            best = tl.max(tl.reshape(logits, [TOKENS * HEADS_P, BLOCKS, SIZE]), 2)
            best = tl.where(best == 0.0, 0.0, best)  # no zero below zero
            block = (low + tl.arange(0, BLOCKS))[None, :]
            kept = (mine & real)[:, None] & (block < tl.minimum(end, stop)[:, None])
            tl.store(scores + row[:, None] * score_stride + block, best, mask=kept)
        todo = todo & (slot != current)
        current = tl.max(tl.where(todo, slot, -1), 0)


def index_cut(q: torch.Tensor, decode: bool) -> tuple[int, int, int]:
    """Rows, warps and stages of a program."""
    if q.element_size() == 4:
        return (16, 4, 1) if decode else (64, 4, 1)
    return (16, 4, 3) if decode else (128, 8, 3)


def index_scores(
    q: torch.Tensor, key_pages: torch.Tensor, page_table: torch.Tensor, token_slots: torch.Tensor,
    positions: torch.Tensor, rule: Selection, scores: torch.Tensor, *, decode: bool,
) -> None:  # fmt: skip
    """scores fp32 [tokens, heads, blocks] of the blocks that `select` ranks; decode: `positions` are lengths."""
    (num_tokens, num_heads, dim), page_size = q.shape, key_pages.shape[2]
    size = page_size * rule.pages
    if dim < 16 or dim & (dim - 1) or size & (size - 1) or key_pages.shape[1::2] != (1, dim):
        raise ValueError(f"index keys {[*key_pages.shape]} and blocks of {size} must be powers of two, from 16 on")
    if not all(t.is_contiguous() for t in (q, key_pages, scores)) or page_table.stride(1) != 1:
        raise ValueError("index_scores needs contiguous tensors")
    rows, warps, stages = index_cut(q, decode)
    heads_p = max(16 if decode else 1, triton.next_power_of_2(num_heads))
    tokens, block_n = max(1, rows // heads_p), max(64, size)
    tiles = triton.cdiv(num_tokens, tokens)
    num_sms = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 4
    splits = max(1, min(triton.cdiv(4 * num_sms, tiles), triton.cdiv(scores.shape[2] * size, block_n)))
    _index_kernel[(tiles * splits,)](
        q, key_pages, page_table, token_slots, positions, scores, num_tokens, page_table.stride(0), scores.stride(1),
        splits, rule.dense_below, LOCAL=rule.local, OFFSET=int(decode), NUM_HEADS=num_heads, HEADS_P=heads_p,
        TOKENS=tokens, DIM=dim, PAGE=page_size, SIZE=size, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
        **overlap_options(q),
    )  # fmt: skip

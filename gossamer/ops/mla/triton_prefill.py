"""Expanded prefill: latents are gathered from their pages and expanded piece by piece, each attended to in a launch.

Expanding costs 2 x rank x (nope + v) per head and token, absorbing 2 x (2 rank - nope - v) more per pair: from some
170 new tokens on expanding is less, however long the prefix. The softmax is carried from piece to piece.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gossamer.ops.attention.triton import LOG2E, LOW, PRECISION, row_block
from gossamer.ops.dispatch import overlap_options
from gossamer.ops.mla.triton import check_pages

PIECE_BYTES = 1 << 29  # of expanded keys and values: the step's largest temporary


# The metadata begins behind that of a step's decode rows: no compilation for each alignment.
@triton.jit(do_not_specialize=["num_rows", "start", "count"], do_not_specialize_on_alignment=["slots", "seq_lens"])
def _gather_kernel(
    pages, scales, page_table, slots, seq_lens, out, num_rows, start, count, table_stride,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, PAGE: tl.constexpr, BLOCK_R: tl.constexpr, TOKENS: tl.constexpr,
    SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tokens start .. start + count - 1 of all rows' contexts laid end to end; zeros beyond the last."""
    rows = tl.arange(0, BLOCK_R)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    column = tl.arange(0, BLOCK_W)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot_of = tl.load(slots + rows, mask=rows < num_rows, other=-1)
    lens = tl.where(slot_of >= 0, tl.load(seq_lens + rows, mask=rows < num_rows, other=0), 0)
    ends = tl.cumsum(lens, 0)
    own = (ends - lens)[None, :] <= (start + token)[:, None]
    own = own & ((start + token)[:, None] < ends[None, :])
    present = (start + token < tl.sum(lens, 0)) & (token < count)
    slot = tl.sum(tl.where(own, slot_of[None, :], 0), 1)
    position = start + token - tl.sum(tl.where(own, (ends - lens)[None, :], 0), 1)
    page = tl.load(page_table + slot.to(tl.int64) * table_stride + position // PAGE, mask=present, other=0)
    at = (page.to(tl.int64) * PAGE + position % PAGE)[:, None] * WIDTH + column[None, :]
    values = tl.load(pages + at, mask=present[:, None] & (column < WIDTH)[None, :], other=0.0)
    if SCALED:
        scale = tl.load(scales + page, mask=present, other=0.0)
        values = tl.where(present[:, None], values.to(tl.float32) * scale[:, None], 0.0)
    to = out + token.to(tl.int64)[:, None] * WIDTH + column[None, :]
    tl.store(to, values.to(out.dtype.element_ty), mask=(token < count)[:, None] & (column < WIDTH)[None, :])


@triton.jit
def _attend(
    nope_q, rope_q, peak, weight, total, k_desc, v_desc, rope_desc, column, low, tiles, position, shift, high,
    scale_log2, NOPE: tl.constexpr, RANK: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """`tiles` tiles of the piece's keys from `low` on; the key in its line i has position i + shift, if i < high."""
    for tile in range(tiles):
        first = low + tile * BLOCK_N
        k = k_desc.load([first, column])
        key = rope_desc.load([first, RANK])
        scores = tl.dot(nope_q, k.T, input_precision=PRECISION)
        scores = tl.dot(rope_q, key.T, scores, input_precision=PRECISION)
        v = v_desc.load([first, column + NOPE])
        if MASKED:
            line = first + tl.arange(0, BLOCK_N)
            scores = tl.where((line + shift)[None, :] <= position[:, None], scores, float("-inf"))
            scores = tl.where((line < high)[None, :], scores, float("-inf"))
            # What follows is another sequence's and may be NaN, and 0 * NaN is NaN.
            v = tl.where((line < high)[:, None], v, 0.0)
        highest = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
        fade = tl.exp2(peak - highest)
        weights = tl.exp2(scores * scale_log2 - highest[:, None])
        weight = weight * fade + tl.sum(weights, 1)
        total = tl.dot(weights.to(v.dtype), v, total * fade[:, None], input_precision=PRECISION)
        peak = highest
    return peak, weight, total


@triton.jit(
    do_not_specialize=["num_tokens", "num_rows", "num_blocks", "start", "count", "last"],
    do_not_specialize_on_alignment=["slots", "cu_seqlens_q", "seq_lens"],
)
def _prefill_kernel(
    q, k_desc, v_desc, rope_desc, slots, cu_seqlens_q, seq_lens, out, carried, lse,
    num_tokens, num_rows, num_blocks, start, count, last, scale_log2,
    NUM_HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, V: tl.constexpr, RANK: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of BLOCK_M tokens of one row, over the keys that lie in lines start .. start + count - 1 of all rows'.

    Until the `last` piece the normalised sum lies in `carried`, and the log2 of its weight in `lse`.
    """
    head = tl.program_id(0) % NUM_HEADS
    block = num_blocks - 1 - tl.program_id(0) // NUM_HEADS  # a sequence's last blocks see the most keys
    rows = tl.arange(0, BLOCK_R)
    starts = tl.load(cu_seqlens_q + rows, mask=rows < num_rows, other=0)
    counts = tl.load(cu_seqlens_q + rows + 1, mask=rows < num_rows, other=0) - starts
    lens = tl.load(seq_lens + rows, mask=rows < num_rows, other=0)
    lens = tl.where(tl.load(slots + rows, mask=rows < num_rows, other=-1) >= 0, lens, 0)
    ends = tl.cumsum(tl.cdiv(counts, BLOCK_M), 0)
    context = tl.cumsum(lens, 0) - lens
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, V)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    used = tl.max(ends, 0)
    row = tl.minimum(tl.sum((ends <= block).to(tl.int32), 0), num_rows - 1)
    before = tl.max(tl.where(ends <= block, ends, 0), 0)
    padding = block >= used
    row_stop = tl.where(padding, num_tokens, tl.load(cu_seqlens_q + row + 1))
    behind = tl.load(cu_seqlens_q + num_rows) + (block - used) * BLOCK_M
    first = tl.where(padding, behind, tl.load(cu_seqlens_q + row) + (block - before) * BLOCK_M)
    token = first + m
    inside = token < row_stop
    seq_len = tl.sum(tl.where(rows == row, lens, 0), 0)
    row_context = tl.sum(tl.where(rows == row, context, 0), 0)
    to_position = seq_len - row_stop
    # Of a row in padded slots, and of padding, nothing is visible.
    visible = tl.where(padding | (seq_len == 0), 0, tl.minimum(first + BLOCK_M, row_stop) + to_position)
    low = tl.maximum(row_context - start, 0)
    high = tl.minimum(row_context + visible - start, count)
    at = (token.to(tl.int64) * NUM_HEADS + head)[:, None]
    state = token.to(tl.int64) * NUM_HEADS + head
    carries = inside & (start + m * 0 > 0)
    peak = tl.load(lse + state, mask=carries, other=LOW)
    weight = tl.where(peak > LOW, 1.0, 0.0)
    total = tl.load(carried + at * V + d[None, :], mask=carries[:, None], other=0.0)
    if low < high:
        q_at = q + at * (NOPE + ROPE)
        nope_q = tl.load(q_at + tl.arange(0, NOPE)[None, :], mask=inside[:, None], other=0.0)
        rope_q = tl.load(q_at + NOPE + tl.arange(0, ROPE)[None, :], mask=inside[:, None], other=0.0)
        shift = start - row_context
        whole_high = tl.minimum(first + to_position + 1 - shift, high)  # below, every token sees every key
        whole = tl.maximum(whole_high - low, 0) // BLOCK_N
        column = head * (NOPE + V)
        position = token + to_position
        peak, weight, total = _attend(
            nope_q, rope_q, peak, weight, total, k_desc, v_desc, rope_desc, column, low, whole, position, shift, high,
            scale_log2, NOPE, RANK, BLOCK_N, False,
        )  # fmt: skip
        low += whole * BLOCK_N
        peak, weight, total = _attend(
            nope_q, rope_q, peak, weight, total, k_desc, v_desc, rope_desc, column, low, tl.cdiv(high - low, BLOCK_N),
            position, shift, high, scale_log2, NOPE, RANK, BLOCK_N, True,
        )  # fmt: skip
    result = tl.where(inside[:, None], total / tl.maximum(weight, 1e-30)[:, None], 0.0)
    if last:
        tl.store(out + at * V + d[None, :], result.to(out.dtype.element_ty), mask=inside[:, None])
    else:
        tl.store(carried + at * V + d[None, :], result, mask=inside[:, None])
        tl.store(lse + state, tl.where(weight > 0, peak + tl.log2(tl.maximum(weight, 1e-30)), LOW), mask=inside)


def prefill_cut(element_size: int) -> tuple[int, int, int, int]:
    """Queries and keys of a tile, warps and pipeline stages (measured on an H200)."""
    return (32, 32, 4, 1) if element_size == 4 else (128, 64, 8, 3)


def latent_prefill(
    q: torch.Tensor, kv_b: torch.Tensor, pages: torch.Tensor, page_table: torch.Tensor, slots: torch.Tensor,
    cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor, num_context: int, max_q_len: int, scale: float,
    out: torch.Tensor, *, scales: torch.Tensor | None,
) -> None:  # fmt: skip
    (num_tokens, num_heads, head_dim), (_, out_dim, rank) = q.shape, kv_b.shape
    width, num_rows = pages.shape[3], seq_lens.shape[0]
    nope_dim, v_dim = head_dim - (width - rank), out_dim - head_dim + (width - rank)
    indices = {"page_table": page_table, "slots": slots, "cu_seqlens_q": cu_seqlens_q, "seq_lens": seq_lens}
    check_pages(q, pages, rank, indices)
    if out.shape != (num_tokens, num_heads, v_dim) or kv_b.shape[0] != num_heads:
        raise ValueError(f"q {[*q.shape]}, out {[*out.shape]}, kv_b {[*kv_b.shape]}, pages {[*pages.shape]} differ")
    if any(size < 16 or size & (size - 1) for size in (nope_dim, v_dim)):
        raise ValueError(f"head dimensions {nope_dim} and {v_dim}: powers of two from 16 on")
    if not all(t.is_contiguous() for t in (q, kv_b, out)):
        raise ValueError("q, kv_b and out must be contiguous")
    if num_tokens == 0:
        return
    if num_rows == 0:
        out.zero_()
        return
    block_m, block_n, num_warps, num_stages = prefill_cut(q.element_size())
    piece = max(block_n, PIECE_BYTES // (num_heads * out_dim * q.element_size()))
    num_context = max(num_context, 1)
    num_pieces = triton.cdiv(num_context, piece)
    kept = num_tokens if num_pieces > 1 else 0
    carried = torch.empty(kept, num_heads, v_dim, dtype=torch.float32, device=q.device)
    lse = carried.new_empty(kept, num_heads)
    num_blocks = triton.cdiv(num_tokens, block_m) + num_rows
    common: dict[str, Any] = {"BLOCK_R": row_block(num_rows), **overlap_options(q)}
    # Few sizes, so that one step's memory serves the next.
    lines = min(piece, max(64, triton.next_power_of_2(num_context)))
    latents = q.new_empty(lines, width)
    expanded = q.new_empty(lines, num_heads * out_dim)
    for start in range(0, num_context, piece):
        count = min(lines, triton.cdiv(num_context - start, 64) * 64)
        _gather_kernel[(triton.cdiv(count, 16),)](
            pages, scales, page_table, slots, seq_lens, latents, num_rows, start, count, page_table.stride(0),
            WIDTH=width, BLOCK_W=triton.next_power_of_2(width), PAGE=pages.shape[2], TOKENS=16,
            SCALED=scales is not None, num_warps=4, **common,
        )  # fmt: skip
        torch.mm(latents[:count, :rank], kv_b.flatten(0, 1).t(), out=expanded[:count])
        _prefill_kernel[(num_blocks * num_heads,)](
            q, TensorDescriptor.from_tensor(expanded, [block_n, nope_dim]),
            TensorDescriptor.from_tensor(expanded, [block_n, v_dim]),
            TensorDescriptor.from_tensor(latents, [block_n, width - rank]), slots, cu_seqlens_q, seq_lens, out, carried,
            lse, num_tokens, num_rows, num_blocks, start, count, start + piece >= num_context, scale * LOG2E,
            NUM_HEADS=num_heads, NOPE=nope_dim, ROPE=width - rank, V=v_dim, RANK=rank, BLOCK_M=block_m, BLOCK_N=block_n,
            num_warps=num_warps, num_stages=num_stages, **common,
        )  # fmt: skip

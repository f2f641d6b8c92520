"""Triton kernels of absorbed decode over latent pages: a page is loaded once, as keys and as values.

The query heads are the rows of the products. Work is cut as in `ops/attention/triton_decode.py`; parts are merged by a
launch of its own, for a row's heads are many and its latents wide. Of sparse attention (TOP) a row's table is a list of
as many tokens, its length a position, and its programs are its own.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gossamer.ops.attention.triton import LOG2E, LOW, PRECISION, copy_scale, row_block
from gossamer.ops.attention.workspace import DecodeWorkspace
from gossamer.ops.dispatch import overlap_options
from gossamer.ops.kv_cache.triton import write_rows_fp8
from gossamer.ops.mla import hopper, hopper_fp8

_MIN_PAGES = 2  # in a program: fewer cost more in merging than they gain in parallelism
_MERGE_PARTS = 16  # that a merging program has at once
_LISTED = 64  # tokens of a list at a time


@triton.jit
def _turn(row, cos, sin, position, inside, ROPE: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Both halves of what is ROPE wide at `row` [n, 1], rotated; an angle lies in the second half of the tables."""
    pair = tl.arange(0, HALF)[None, :]
    wide = inside & (pair < ROPE // 2)
    first, second = pair, pair + ROPE // 2
    if INTERLEAVED:
        first, second = 2 * pair, 2 * pair + 1
    a = tl.load(row + first, wide, 0.0).to(tl.float32)
    b = tl.load(row + second, wide, 0.0).to(tl.float32)
    angle = position * ROPE + ROPE // 2 + pair
    c = tl.load(cos + angle, pair < ROPE // 2, 0.0).to(tl.float32)
    s = tl.load(sin + angle, pair < ROPE // 2, 0.0).to(tl.float32)
    return pair, wide, a * c - b * s, b * c + a * s


@triton.jit
def _rope_write_kernel(
    q, kv, norm, cos, sin, positions, token_slots, page_table, kept, q_out, q_stride, kv_stride, max_pages, eps,
    NUM_HEADS: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, RANK: tl.constexpr, PAGE: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_NOPE: tl.constexpr, BLOCK_RANK: tl.constexpr, HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr, PACKED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A token's latent and key (program 0 of its axis) or HEADS of its queries. PACKED: `kept` is by token, no page."""
    token, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    column = tl.arange(0, BLOCK_RANK)
    weight = tl.load(norm + column, column < RANK, 0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(token_slots + token)
    live = slot >= 0
    position = tl.where(live, tl.load(positions + token), 0).to(tl.int64)
    if part == 0:
        if live:
            at = token * (RANK + ROPE)
            if not PACKED:
                page = tl.load(page_table + slot.to(tl.int64) * max_pages + position // PAGE).to(tl.int64)
                at = (page * PAGE + position % PAGE) * (RANK + ROPE)
            latent = tl.load(kv + token * kv_stride + column, column < RANK, 0.0).to(tl.float32)
            latent *= tl.rsqrt(tl.sum(latent * latent) / RANK + eps) * weight
            tl.store(kept + at + column, latent.to(kept.dtype.element_ty), column < RANK)
            zero = tl.zeros([1, 1], tl.int64)
            row = kv + token * kv_stride + RANK + zero
            pair, wide, x, y = _turn(row, cos, sin, position, zero == 0, ROPE, HALF, INTERLEAVED)
            tl.store(kept + at + RANK + pair, x.to(kept.dtype.element_ty), wide)
            tl.store(kept + at + RANK + ROPE // 2 + pair, y.to(kept.dtype.element_ty), wide)
    else:
        head = (part - 1) * HEADS + tl.arange(0, HEADS)[:, None]
        dim = tl.arange(0, BLOCK_NOPE)[None, :]
        inside = (head < NUM_HEADS) & (dim < NOPE)
        row = q + token * q_stride + head * (NOPE + ROPE)
        out = q_out + (token * NUM_HEADS + head) * (NOPE + ROPE)
        # A padded token leaves zeros, whatever its row holds.
        tl.store(out + dim, tl.where(live, tl.load(row + dim, inside, 0.0), 0.0), inside)
        pair, wide, x, y = _turn(row + NOPE, cos, sin, position, head < NUM_HEADS, ROPE, HALF, INTERLEAVED)
        tl.store(out + NOPE + pair, tl.where(live, x, 0.0).to(q_out.dtype.element_ty), wide)
        tl.store(out + NOPE + ROPE // 2 + pair, tl.where(live, y, 0.0).to(q_out.dtype.element_ty), wide)


def rope_write_latents(
    q: torch.Tensor, kv: torch.Tensor, norm: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor,
    positions: torch.Tensor, token_slots: torch.Tensor, page_table: torch.Tensor, pages: torch.Tensor,
    q_out: torch.Tensor, *, interleaved: bool, scales: torch.Tensor | None,
) -> None:  # fmt: skip
    (num_tokens, num_heads, head_dim), rope_dim, rank = q_out.shape, cos.shape[-1], norm.shape[0]
    if num_tokens == 0:
        return
    kept = pages if scales is None else torch.empty(num_tokens, rank + rope_dim, dtype=kv.dtype, device=kv.device)
    heads = min(4 if num_tokens <= 64 else 16, triton.next_power_of_2(num_heads))
    _rope_write_kernel[(num_tokens, 1 + triton.cdiv(num_heads, heads))](
        q, kv, norm, cos, sin, positions, token_slots, page_table, kept, q_out, q.stride(0), kv.stride(0),
        page_table.shape[1], eps, NUM_HEADS=num_heads, NOPE=head_dim - rope_dim, ROPE=rope_dim, RANK=rank,
        PAGE=pages.shape[2], HEADS=heads, BLOCK_NOPE=triton.next_power_of_2(head_dim - rope_dim),
        BLOCK_RANK=triton.next_power_of_2(rank), HALF=triton.next_power_of_2(rope_dim // 2), INTERLEAVED=interleaved,
        PACKED=scales is not None, num_warps=2 if heads > 4 else 1, **overlap_options(q),
    )  # fmt: skip
    if scales is not None:
        write_rows_fp8(kept, positions, token_slots, page_table, pages, scales)


@triton.jit
def _attend_pages(
    latent_q, rope_q, peak, weight, total, measure, pages, latent_desc, rope_desc, scales, table, low, high, seq_len,
    scale_log2, RANK: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr, SCALED: tl.constexpr, TOP: tl.constexpr,
):  # fmt: skip
    """Pages low .. high - 1 of one sequence. SCALED: `total` counts in units of `measure`, the last page's scale.

    Of a list a page is PAGE tokens, scaled each by itself: by a power of two, exactly.
    """
    page = tl.load(table + tl.maximum(tl.minimum(low, high - 1), 0))
    # The one page that is masked passes through registers: no memory is left to load others ahead.
    for p in tl.range(low, high, num_stages=1 if MASKED else None):
        to_log2 = scale_log2
        if TOP:
            n = p * PAGE + tl.arange(0, PAGE)
            at = tl.load(table + n, mask=n < seq_len, other=-1).to(tl.int64)[:, None]
            line = pages + at * (RANK + rope_q.shape[1])
            latent = tl.load(line + tl.arange(0, RANK)[None, :], mask=at >= 0, other=0.0)
            key = tl.load(line + RANK + tl.arange(0, rope_q.shape[1])[None, :], mask=at >= 0, other=0.0)
            if SCALED:
                factor = tl.load(scales + at // SCALED, mask=at >= 0, other=0.0)
                latent, key = (latent.to(tl.float32) * factor), (key.to(tl.float32) * factor)
                latent, key = latent.to(latent_q.dtype), key.to(latent_q.dtype)
        else:
            latent = latent_desc.load([page * PAGE, 0])
            key = rope_desc.load([page * PAGE, RANK])
        if SCALED and not TOP:
            page_scale = tl.load(scales + page)
            to_log2 *= page_scale
            latent, key = latent.to(latent_q.dtype), key.to(latent_q.dtype)
        if MASKED:
            # What the last page holds beyond the sequence may be NaN, and 0 * NaN is NaN.
            visible = p * PAGE + tl.arange(0, PAGE) < seq_len
            latent = tl.where(visible[:, None], latent, 0.0)
        scores = tl.dot(latent_q, latent.T, input_precision=PRECISION)
        scores = tl.dot(rope_q, key.T, scores, input_precision=PRECISION)
        if MASKED:
            scores = tl.where(visible[None, :], scores, float("-inf"))
        highest = tl.maximum(peak, tl.max(scores, 1) * to_log2)
        fade = tl.exp2(peak - highest)
        weights = tl.exp2(scores * to_log2 - highest[:, None])
        weight = weight * fade + tl.sum(weights, 1)
        if SCALED and not TOP:
            fade *= measure / page_scale
            measure = copy_scale(page_scale)
        total = tl.dot(weights.to(latent.dtype), latent, total * fade[:, None], input_precision=PRECISION)
        peak = highest
        page = tl.load(table + tl.minimum(p + 1, high - 1))
    return peak, weight, total, measure


@triton.jit
def _cut(slots, seq_lens, num_rows, num_programs, PAGE: tl.constexpr, BLOCK_R: tl.constexpr, MIN_PAGES: tl.constexpr):
    """Each row's pages, where they end in the row of all rows' pages, and a program's share of that."""
    rows = tl.arange(0, BLOCK_R)
    lens = tl.load(seq_lens + rows, mask=rows < num_rows, other=0)
    lens = tl.where(tl.load(slots + rows, mask=rows < num_rows, other=-1) >= 0, lens, 0)
    pages = tl.cdiv(lens, PAGE)
    ends = tl.cumsum(pages, 0)
    share = tl.maximum(tl.cdiv(tl.sum(pages, 0), num_programs), MIN_PAGES)
    return pages, ends, share


@triton.jit(do_not_specialize=["num_rows"], do_not_specialize_on_alignment=["slots", "seq_lens"])
def _decode_kernel(
    latent_q, rope_q, pages, latent_desc, rope_desc, scales, page_table, slots, seq_lens, out, partials, lse,
    num_rows, row_stride, head_stride, table_stride, scale_log2,
    NUM_BLOCKS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_R: tl.constexpr, MIN_PAGES: tl.constexpr, SCALED: tl.constexpr, TOP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """All rows' pages, laid end to end, are cut into equal shares: program p of a block of GROUP heads takes share p.

    A row that lies in one share is finished here; of others parts are left for `_merge_kernel`. The blocks of a share
    are neighbours, so that one finds in the L2 cache what the other has loaded.
    """
    block = tl.program_id(0) % NUM_BLOCKS
    program = tl.program_id(0) // NUM_BLOCKS
    num_programs = tl.num_programs(0) // NUM_BLOCKS
    if TOP:
        parts = num_programs // num_rows
        share = tl.cdiv(tl.cdiv(TOP, PAGE), parts)
        begin, stop = program * share, program * share + share
        row = program // parts
        row_begin = row * parts * share
    else:
        _pages, ends, share = _cut(slots, seq_lens, num_rows, num_programs, PAGE, BLOCK_R, MIN_PAGES)
        begin = program * share
        stop = tl.minimum(begin + share, tl.max(ends, 0))
        row = tl.sum((ends <= begin).to(tl.int32), 0)
        row_begin = tl.max(tl.where(ends <= begin, ends, 0), 0)
    g = tl.arange(0, BLOCK_G)
    r = tl.arange(0, RANK)
    head = block * GROUP + g
    inside = g < GROUP
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    unit = begin
    while unit < stop:
        slot = tl.load(slots + row)
        seq_len = tl.where(slot >= 0, tl.load(seq_lens + row), 0)
        row_end = row_begin + tl.cdiv(seq_len, PAGE)
        table = page_table + slot.to(tl.int64) * table_stride
        if TOP:
            seq_len = tl.where(slot >= 0, tl.minimum(seq_len + 1, TOP), 0)
            row_end = row_begin + parts * share
            table = page_table + row.to(tl.int64) * table_stride
        if row_end > unit:
            part_end = tl.minimum(row_end, stop)
            low, high = unit - row_begin, tl.minimum(part_end - row_begin, tl.cdiv(seq_len, PAGE))
            at = ((row * NUM_BLOCKS * GROUP + head).to(tl.int64) * RANK)[:, None] + r[None, :]
            queries = tl.load(latent_q + at, mask=inside[:, None], other=0.0)
            rope_at = row.to(tl.int64) * row_stride + head[:, None] * head_stride + tl.arange(0, ROPE)[None, :]
            rotated = tl.load(rope_q + rope_at, mask=inside[:, None], other=0.0)
            peak = tl.full([BLOCK_G], LOW, tl.float32)
            weight = tl.zeros([BLOCK_G], tl.float32)
            total = tl.zeros([BLOCK_G, RANK], tl.float32)
            measure = 1.0
            whole = tl.maximum(tl.minimum(seq_len // PAGE, high), low)
            peak, weight, total, measure = _attend_pages(
                queries, rotated, peak, weight, total, measure, pages, latent_desc, rope_desc, scales, table,
                low, whole, seq_len, scale_log2, RANK, PAGE, False, SCALED, TOP,
            )  # fmt: skip
            peak, weight, total, measure = _attend_pages(
                queries, rotated, peak, weight, total, measure, pages, latent_desc, rope_desc, scales, table,
                whole, high, seq_len, scale_log2, RANK, PAGE, True, SCALED, TOP,
            )  # fmt: skip
            weight = tl.maximum(weight, 1e-30)  # of no token at all
            result = total * (measure / weight)[:, None]
            if (low == 0) & (part_end == row_end):
                tl.store(out + at, result.to(out.dtype.element_ty), mask=inside[:, None])
            else:
                index = (program * NUM_BLOCKS + block) * 2 + (unit > begin).to(tl.int32)
                tl.store(lse + index * GROUP + g, peak + tl.log2(weight), mask=inside)
                part = (index * GROUP + g)[:, None] * RANK + r[None, :]
                tl.store(partials + part, result, mask=inside[:, None])
            unit = part_end
        row_begin = row_end
        row += 1


@triton.jit(do_not_specialize=["num_rows", "num_programs"], do_not_specialize_on_alignment=["slots", "seq_lens"])
def _merge_kernel(
    slots, seq_lens, out, partials, lse, num_rows, num_programs,
    NUM_BLOCKS: tl.constexpr, GROUP: tl.constexpr, RANK: tl.constexpr, PAGE: tl.constexpr, BLOCK_R: tl.constexpr,
    MIN_PAGES: tl.constexpr, PARTS: tl.constexpr, TOP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One head of one row: the sum over its parts, in the order of their programs; zeros for a row of padding."""
    row, head = tl.program_id(0), tl.program_id(1)
    block, g = head // GROUP, head % GROUP
    if TOP:
        count = num_programs // num_rows
        first, last, within = row * count, row * count + count - 1, 0
    else:
        pages, ends, share = _cut(slots, seq_lens, num_rows, num_programs, PAGE, BLOCK_R, MIN_PAGES)
        own = tl.arange(0, BLOCK_R) == row
        count = tl.sum(tl.where(own, pages, 0), 0)
        begin = tl.sum(tl.where(own, ends, 0), 0) - count
        first, last = begin // share, (begin + count - 1) // share
        within = (begin > first * share).to(tl.int32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    r = tl.arange(0, RANK)
    to = out + (row * NUM_BLOCKS * GROUP + head).to(tl.int64) * RANK + r
    if count == 0:
        tl.store(to, tl.zeros([RANK], out.dtype.element_ty))
    elif first != last:
        peak = tl.full([1], LOW, tl.float32)
        weight = tl.zeros([1], tl.float32)
        total = tl.zeros([RANK], tl.float32)
        for start in range(first, last + 1, PARTS):
            owner = start + tl.arange(0, PARTS)
            part = ((owner * NUM_BLOCKS + block) * 2 + (owner == first).to(tl.int32) * within) * GROUP + g
            sizes = tl.load(lse + part, mask=owner <= last, other=LOW)
            values = tl.load(partials + part[:, None] * RANK + r[None, :], mask=(owner <= last)[:, None], other=0.0)
            highest = tl.maximum(peak, tl.max(sizes, 0))
            new = tl.exp2(sizes - highest)
            fade = tl.exp2(peak - highest)
            weight = weight * fade + tl.sum(new, 0)
            total = total * fade + tl.sum(values * new[:, None], 0)
            peak = highest
        tl.store(to, (total / weight).to(out.dtype.element_ty))


def check_pages(q: torch.Tensor, pages: torch.Tensor, rank: int, indices: dict[str, torch.Tensor]) -> None:
    fits = pages.dtype in (q.dtype, torch.float8_e4m3fn)
    if not fits or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q {q.dtype}, pages {pages.dtype}: both fp32, fp16 or bf16, or pages e4m3")
    _, planes, page_size, width = pages.shape
    sizes = (page_size, rank, width - rank)
    if planes != 1 or any(size < 16 or size & (size - 1) for size in sizes) or not pages.is_contiguous():
        raise ValueError(f"pages {[*pages.shape]} with latents of {rank}: powers of two from 16 on, contiguous")
    for name, tensor in indices.items():
        if tensor.dtype != torch.int32 or tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be int32 and contiguous in its last dimension")


class DecodeCut(NamedTuple):
    """A decode program: its heads (padded), warps and pipeline stages."""

    block_g: int
    num_warps: int
    num_stages: int


def decode_cut(group: int, itemsize: int) -> DecodeCut:
    """For `group` heads and queries of `itemsize` bytes (measured on an H200).

    From 64 rows on products are Hopper's own, whose rows lie in shared memory: one page fewer is loaded ahead.
    """
    block_g = max(16, triton.next_power_of_2(group))
    if itemsize == 4:
        return DecodeCut(block_g, 4, 1)
    return DecodeCut(block_g, 8, 3 if block_g < 64 else 2)


def latent_decode(
    q_latent: torch.Tensor, q_rope: torch.Tensor, pages: torch.Tensor, page_table: torch.Tensor, slots: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, out: torch.Tensor, *, scales: torch.Tensor | None,
    workspace: DecodeWorkspace | None, max_seq_len: int, listed: bool = False,
) -> None:  # fmt: skip
    """listed: `page_table` has a list of tokens (`ops.dsa`) for each row, max_seq_len long; `seq_lens`: positions."""
    (num_rows, num_heads, rank), page_size = q_latent.shape, pages.shape[2]
    check_pages(q_latent, pages, rank, {"page_table": page_table, "slots": slots, "seq_lens": seq_lens})
    if q_rope.shape != (num_rows, num_heads, pages.shape[3] - rank) or q_rope.stride(2) != 1:
        raise ValueError(f"q_latent {[*q_latent.shape]} and q_rope {[*q_rope.shape]} do not fit {[*pages.shape]}")
    if not q_latent.is_contiguous() or not out.is_contiguous() or out.shape != q_latent.shape:
        raise ValueError("q_latent and out must be contiguous, and of one shape")
    if workspace is None:
        raise ValueError("the kernel of latent_decode needs a DecodeWorkspace")
    max_programs, num_blocks, _, group, dim = workspace.partials.shape
    if (num_blocks * group, dim) != (num_heads, rank):
        raise ValueError(f"the workspace is for {[*workspace.partials.shape]}: [programs, blocks, 2, heads, rank]")
    if num_rows == 0:
        return
    num_sms, top = max_programs * num_blocks // 2, max_seq_len * listed
    if listed:  # in fp32 more heads and tokens do not fit into shared memory
        narrow, tokens = (16, 32) if q_latent.element_size() == 4 and group % 16 == 0 else (0, _LISTED)
    else:
        narrow, tokens = hopper_fp8.group_of(q_latent, q_rope, pages, group), page_size
    if narrow:
        num_blocks, group = num_blocks * group // narrow, narrow
    # Two programs share a multiprocessor, and so the workspace is made, if they are of 16 heads over FP8 pages.
    fitting, pages_per_row = max(1, num_sms * (1 + (narrow == 16)) // num_blocks), triton.cdiv(max_seq_len, tokens)
    num_programs = min(fitting, triton.cdiv(num_rows * max(1, pages_per_row), _MIN_PAGES))
    if listed:  # as many for each row
        num_programs = num_rows * max(1, min(fitting // num_rows, triton.cdiv(pages_per_row, _MIN_PAGES)))
    block_r = 32 if listed else row_block(num_rows)
    shares: dict[str, Any] = {"NUM_BLOCKS": num_blocks, "BLOCK_R": block_r, "MIN_PAGES": _MIN_PAGES}
    common = {**shares, "PAGE": tokens, "GROUP": group, "RANK": rank, "TOP": top, **overlap_options(q_latent)}
    metadata, parts = (page_table, slots, seq_lens), (workspace.partials, workspace.lse)
    if narrow and not listed:
        hopper_fp8.decode(
            q_latent, q_rope, pages, scales, *metadata, scale * LOG2E, out, *parts, num_programs, GROUP=group, **shares
        )
    elif hopper.serves(q_latent, pages, group):
        hopper.decode(q_latent, q_rope, pages, *metadata, scale * LOG2E, out, *parts, num_programs, TOP=top, **shares)
    else:
        cut, flat, rope_dim = decode_cut(group, q_latent.element_size()), pages.flatten(0, 2), q_rope.shape[2]
        latents, keys = (TensorDescriptor.from_tensor(flat, [tokens, width]) for width in (rank, rope_dim))
        _decode_kernel[(num_programs * num_blocks,)](
            q_latent, q_rope, pages, latents, keys, scales, *metadata, out, *parts, num_rows, *q_rope.stride()[:2],
            page_table.stride(0), scale * LOG2E, BLOCK_G=cut.block_g, ROPE=rope_dim,
            SCALED=0 if scales is None else page_size, num_warps=cut.num_warps, num_stages=cut.num_stages, **common,
        )  # fmt: skip
    if not listed or num_programs > num_rows:
        _merge_kernel[(num_rows, num_heads)](
            slots, seq_lens, out, *parts, num_rows, num_programs, PARTS=_MERGE_PARTS, num_warps=4, **common
        )

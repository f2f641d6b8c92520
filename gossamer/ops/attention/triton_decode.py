"""Triton kernel of split-KV decode: the query heads of one KV head are the rows of a program's products."""

import torch
import triton
import triton.language as tl

from gossamer.ops.attention.triton import (
    HALF_RANGE,
    LOG2E,
    LOW,
    NO_WINDOW,
    PRECISION,
    check,
    copy_scale,
    page_scales,
    row_block,
    store_heads,
)
from gossamer.ops.attention.workspace import DecodeWorkspace
from gossamer.ops.dispatch import overlap_options

# Fewer pages in a program than this cost more in merging than they gain in parallelism.
_MIN_PAGES = 2
# Elements of partial results that the merge holds at once: as many as leave the registers of two programs.
_MERGE_ELEMENTS = 8192


@triton.jit
def _merge_partials(
    partials, lse, head, first, last, tail_of_first, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The normalised sum [BLOCK_G, HEAD_DIM] over programs first .. last, in their order whoever arrived last."""
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, HEAD_DIM)
    peak = tl.full([BLOCK_G], LOW, tl.float32)
    weight = tl.zeros([BLOCK_G], tl.float32)
    total = tl.zeros([BLOCK_G, HEAD_DIM], tl.float32)
    for start in range(first, last + 1, CHUNK):
        owner = start + tl.arange(0, CHUNK)
        second = tail_of_first & (owner == first)
        part = ((owner * NUM_KV_HEADS + head) * 2 + second.to(tl.int32))[None, :] * GROUP + g[:, None]
        inside = (g < GROUP)[:, None] & (owner <= last)[None, :]
        # With the parts in the middle a thread holds all parts of its columns: these sums cross no threads.
        rows = partials + part[:, :, None] * HEAD_DIM + d[None, None, :]
        values = tl.load(rows, mask=inside[:, :, None], other=0.0, cache_modifier=".cg")
        sizes = tl.load(lse + part, mask=inside, other=LOW, cache_modifier=".cg")
        highest = tl.maximum(peak, tl.max(sizes, 1))
        old = tl.exp2(peak - highest)
        new = tl.exp2(sizes - highest[:, None])
        weight = weight * old + tl.sum(new, 1)
        total = total * old[:, None] + tl.sum(values * new[:, :, None], 1)
        peak = highest
    return total / weight[:, None]


@triton.jit
def _unpack(pairs, dtype: tl.constexpr):
    """int16 pairs of E4M3 numbers -> the even and the odd columns. Bytes cannot be transposed on the way out of shared
    memory, pairs can."""
    even = (pairs & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    odd = ((pairs >> 8) & 255).to(tl.uint8).to(tl.float8e4nv, bitcast=True)
    return even.to(dtype), odd.to(dtype)


@triton.jit
def _half(queries):
    """bf16 queries as fp16 below 2, exact but for what is below 2^-24, and the power of two that was divided out.

    E4M3 becomes fp16 in half an instruction a number, but bf16 only by way of fp16 and fp32.
    """
    x = queries.to(tl.float32)
    size = tl.abs(x)
    largest = tl.max(tl.max(tl.where(size < float("inf"), size, 0.0), 1), 0)
    exponent = tl.maximum(tl.minimum(largest.to(tl.int32, bitcast=True) & 0x7F800000, 253 << 23), 1 << 23)
    inverse = (0x7F000000 - exponent).to(tl.float32, bitcast=True)
    return (x * inverse).to(tl.float16), exponent.to(tl.float32, bitcast=True)


@triton.jit
def _kept(seq_len, dense_below, PAGE: tl.constexpr, LIST: tl.constexpr, UNIT: tl.constexpr):
    """Tokens that a row of this length attends to: longer than `dense_below`, those of LIST pages, UNIT by UNIT."""
    kept = seq_len
    if LIST:
        kept = tl.minimum(seq_len, (LIST - UNIT) * PAGE + (seq_len - 1) % (PAGE * UNIT) + 1)
        kept = tl.where(seq_len > dense_below, kept, seq_len)
    return kept


@triton.jit
def _listed(table, pages, index, seq_len, dense_below, LIST: tl.constexpr):
    """Where the pages of a row stand: in its table, or in a list of its own."""
    if LIST:  # noqa: SIM102 - known when compiling
        if tl.load(seq_len) > dense_below:
            table = pages + index.to(tl.int64) * LIST
    return table


@triton.jit(do_not_specialize=["num_rows", "row_stride", "head_stride", "window", "dense_below"])
def _decode_kernel(
    q, k_pages, v_pages, k_scales, v_scales, page_table, slots, seq_lens, sinks, out, out_scales, partials, lse,
    arrivals, pages, num_rows, table_stride, row_stride, head_stride, scale_log2, window, dense_below,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, MERGE_G: tl.constexpr, PAGE: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, MIN_PAGES: tl.constexpr, CHUNK: tl.constexpr, LIST: tl.constexpr,
    UNIT: tl.constexpr, HAS_SINKS: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All rows' visible pages, laid end to end, are cut into equal shares: program p of a KV head takes share p.

    A row that lies in one share is finished there; the parts of any other are merged by the last program to arrive.
    SCALED: keys' scales go into the scores; `total` counts in units of the page's scale of values. LIST: rows longer
    than `dense_below` have that many pages at most, UNIT by UNIT, which each KV head lists; all but the last are whole.
    """
    head = tl.program_id(0) % NUM_KV_HEADS
    program = tl.program_id(0) // NUM_KV_HEADS
    num_programs = tl.num_programs(0) // NUM_KV_HEADS
    rows = tl.arange(0, BLOCK_R)
    lens = tl.load(seq_lens + rows, mask=rows < num_rows, other=0)
    present = tl.load(slots + rows, mask=rows < num_rows, other=-1) >= 0
    lens = _kept(tl.where(present, lens, 0), dense_below, PAGE, LIST, UNIT)
    row_pages = tl.cdiv(lens, PAGE) - tl.maximum(lens - window, 0) // PAGE
    ends = tl.cumsum(row_pages, 0)
    num_pages = tl.sum(row_pages, 0)
    share = tl.maximum(tl.cdiv(num_pages, num_programs), MIN_PAGES)
    begin = program * share
    stop = tl.minimum(begin + share, num_pages)
    row = tl.sum((ends <= begin).to(tl.int32), 0)
    row_begin = tl.max(tl.where(ends <= begin, ends, 0), 0)
    num_empty = tl.sum(((row_pages == 0) & (rows < num_rows)).to(tl.int32), 0)

    g = tl.arange(0, BLOCK_G)
    n = tl.arange(0, PAGE)
    d = tl.arange(0, HEAD_DIM)
    pair = tl.arange(0, HEAD_DIM // 2)
    if PDL:
        # Few rows leave the bus idle: the weights of the projection that follows are read meanwhile.
        tl.extra.cuda.gdc_launch_dependents()
    unit = begin
    while unit < stop:
        slot = tl.load(slots + row)
        seq_len = _kept(tl.where(slot >= 0, tl.load(seq_lens + row), 0), dense_below, PAGE, LIST, UNIT)
        first_token = tl.maximum(seq_len - window, 0)
        first_page = first_token // PAGE
        row_end = row_begin + tl.cdiv(seq_len, PAGE) - first_page
        if row_end > unit:
            part_end = tl.minimum(row_end, stop)
            low, high = first_page + unit - row_begin, first_page + part_end - row_begin
            q_rows = (row * NUM_KV_HEADS + head) * GROUP
            if PDL:
                tl.extra.cuda.gdc_wait()
            queries = tl.load(
                q + (q_rows + g).to(tl.int64)[:, None] * HEAD_DIM + d[None, :], mask=(g < GROUP)[:, None], other=0.0
            )
            peak = tl.full([BLOCK_G], LOW, tl.float32)
            weight = tl.zeros([BLOCK_G], tl.float32)
            if HAS_SINKS:
                sink = tl.load(sinks + head * GROUP + g, mask=g < GROUP, other=0.0).to(tl.float32)
                peak = tl.where(unit == row_begin, tl.maximum(sink * 1.4426950408889634, LOW), peak)
                weight = tl.where(unit == row_begin, 1.0, weight)
            table = page_table + slot.to(tl.int64) * table_stride
            table = _listed(table, pages, row * NUM_KV_HEADS + head, seq_lens + row, dense_below, LIST)
            page = tl.load(table + low)
            to_log2 = scale_log2
            if SCALED:
                if queries.dtype == tl.bfloat16:
                    queries, q_scale = _half(queries)
                    to_log2 *= q_scale
                k_scale, v_scale = page_scales(k_scales, v_scales, page, head, True, NUM_KV_HEADS)
                measure = copy_scale(v_scale)
                even = tl.zeros([BLOCK_G, HEAD_DIM // 2], tl.float32)
                odd = tl.zeros([BLOCK_G, HEAD_DIM // 2], tl.float32)
            else:
                total = tl.zeros([BLOCK_G, HEAD_DIM], tl.float32)
            for p in range(low, high):
                base = (page.to(tl.int64) * NUM_KV_HEADS + head) * (PAGE * HEAD_DIM)
                token = p * PAGE + n
                visible = (token >= first_token) & (token < seq_len)
                # Masked: what a page holds beyond the sequence may be NaN, and 0 * NaN is NaN.
                k = tl.load(k_pages + base + n[None, :] * HEAD_DIM + d[:, None], mask=visible[None, :], other=0.0)
                if SCALED:
                    v_at = base // 2 + n[:, None] * (HEAD_DIM // 2) + pair[None, :]
                    pairs = tl.load(v_pages + v_at, mask=visible[:, None], other=0)
                else:
                    v = tl.load(v_pages + base + n[:, None] * HEAD_DIM + d[None, :], mask=visible[:, None], other=0.0)
                scores = tl.dot(queries, k.to(queries.dtype), input_precision=PRECISION)
                if SCALED:
                    scores *= to_log2 * k_scale
                else:
                    scores *= to_log2
                scores = tl.where(visible[None, :], scores, float("-inf"))
                highest = tl.maximum(peak, tl.max(scores, 1) - (HALF_RANGE if SCALED else 0.0))
                fade = tl.exp2(peak - highest)
                weights = tl.exp2(scores - highest[:, None])
                weight = weight * fade + tl.sum(weights, 1)
                weights = weights.to(queries.dtype)
                peak = highest
                if SCALED:
                    fade *= measure / v_scale
                    measure = copy_scale(v_scale)
                    v, v_odd = _unpack(pairs, queries.dtype)
                    even = tl.dot(weights, v, even * fade[:, None], input_precision=PRECISION)
                    odd = tl.dot(weights, v_odd, odd * fade[:, None], input_precision=PRECISION)
                else:
                    v = v.to(queries.dtype)
                    total = tl.dot(weights, v, total * fade[:, None], input_precision=PRECISION)
                page = tl.load(table + tl.minimum(p + 1, high - 1))
                if SCALED:
                    k_scale, v_scale = page_scales(k_scales, v_scales, page, head, True, NUM_KV_HEADS)
            if SCALED:
                total = tl.reshape(tl.join(even, odd), [BLOCK_G, HEAD_DIM]) * measure

            first_program, last_program = row_begin // share, (row_end - 1) // share
            if first_program == last_program:
                result = total / weight[:, None]
                store_heads(
                    out, out_scales, row_stride, head_stride, row, head * GROUP + g, g < GROUP, result,
                    NUM_KV_HEADS * GROUP, HEAD_DIM, q.dtype.element_ty,
                )  # fmt: skip
            else:
                index = (program * NUM_KV_HEADS + head) * 2 + (unit > begin).to(tl.int32)
                tl.store(lse + index * GROUP + g, peak + tl.log2(weight), mask=g < GROUP)
                part = partials + (index * GROUP + g)[:, None] * HEAD_DIM + d[None, :]
                tl.store(part, total / weight[:, None], mask=(g < GROUP)[:, None])
                tl.debug_barrier()
                counter = arrivals + row * NUM_KV_HEADS + head
                arrived = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
                if arrived == last_program - first_program:
                    merged = _merge_partials(
                        partials, lse, head, first_program, last_program, row_begin > first_program * share,
                        NUM_KV_HEADS, GROUP, MERGE_G, HEAD_DIM, CHUNK,
                    )  # fmt: skip
                    mg = tl.arange(0, MERGE_G)
                    store_heads(
                        out, out_scales, row_stride, head_stride, row, head * GROUP + mg, mg < GROUP, merged,
                        NUM_KV_HEADS * GROUP, HEAD_DIM, q.dtype.element_ty,
                    )  # fmt: skip
                    tl.store(counter, 0)
            unit = part_end
        row_begin = row_end
        row += 1
    if PDL:
        tl.extra.cuda.gdc_wait()
    if num_empty > 0:
        for r in range(program, num_rows, num_programs):
            if (tl.load(slots + r) < 0) | (tl.load(seq_lens + r) <= 0):
                zeros = tl.zeros([BLOCK_G, HEAD_DIM], tl.float32)
                store_heads(
                    out, out_scales, row_stride, head_stride, r, head * GROUP + g, g < GROUP, zeros,
                    NUM_KV_HEADS * GROUP, HEAD_DIM, q.dtype.element_ty,
                )  # fmt: skip


def _decode_cut(
    num_rows: int, num_listed: int, workspace: DecodeWorkspace, page_bytes: int, scaled: bool
) -> tuple[int, int, int]:
    """Programs of a KV head, pipeline stages and registers a thread (0: any), for K and V pages of `page_bytes` in all.

    Few rows: one program per multiprocessor, with more pages in flight, leaves fewer parts to merge; two pages listed
    for each are sooner there than a pipeline is filled. FP8 pages take a program as long as others twice as large:
    twice as many programs hide that better than more pages in flight.
    """
    few = max(1, workspace.num_programs // 4)
    most = 2 * few if scaled or page_bytes > 98304 else 4 * few  # of larger pages three stages do not fit
    if 0 < (listed := num_rows * num_listed) <= most:
        return few, 3 if 2 * few < listed else 1 + scaled, 0
    if scaled:
        return workspace.num_programs, 2, 128 if page_bytes <= 16384 else 0
    if not listed and 4 * num_rows <= workspace.num_programs:
        return few, 1 + min(4, 163840 // page_bytes), 0
    return max(1, workspace.num_programs // 2), 1 + min(2, 98304 // page_bytes), 0


def paged_decode(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, page_table: torch.Tensor, slots: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, out: torch.Tensor, *, out_scales: torch.Tensor | None, window: int | None,
    sinks: torch.Tensor | None, k_scales: torch.Tensor | None, v_scales: torch.Tensor | None,
    workspace: DecodeWorkspace | None, max_seq_len: int,
    selected: tuple[torch.Tensor, int, int] | None = None,
) -> None:  # fmt: skip
    """selected: pages, int32 [num_rows, num_kv_heads, list], of rows longer than the second; there is no window then.

    A list has the row's pages, blocks of the third each, as many as it has place for at most; the row's last page comes
    last.
    """
    indices = {"page_table": page_table, "slots": slots, "seq_lens": seq_lens}
    check(q, k_pages, v_pages, out, out_scales, window, indices)
    num_rows, num_q_heads, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1:3]
    group = num_q_heads // num_kv_heads
    if workspace is None:
        raise ValueError("the kernel of paged_decode needs a DecodeWorkspace")
    if workspace.partials.shape[1:] != (num_kv_heads, 2, group, head_dim):
        raise ValueError(f"the workspace is for {[*workspace.partials.shape]}: [programs, kv heads, 2, group, dim]")
    if workspace.arrivals.numel() < num_rows * num_kv_heads:
        raise ValueError(f"the workspace has fewer than {num_rows} rows")
    if num_rows == 0:
        return
    pages_per_row = max(1, triton.cdiv(max_seq_len, page_size))
    if window is not None:
        pages_per_row = min(pages_per_row, (window - 1) // page_size + 2)
    pages, dense_below, unit = (None, 0, 1) if selected is None else selected
    num_listed = 0 if pages is None else pages.shape[2]
    if num_listed:
        pages_per_row = min(pages_per_row, max(num_listed, triton.cdiv(dense_below, page_size)))
    page_bytes, scaled = 2 * page_size * head_dim * k_pages.element_size(), k_scales is not None
    max_programs, num_stages, registers = _decode_cut(num_rows, num_listed, workspace, page_bytes, scaled)
    # Programs without a share leave at once; their number never changes the others' shares.
    num_programs = min(max_programs, triton.cdiv(num_rows * pages_per_row, _MIN_PAGES))
    merge_g = triton.next_power_of_2(group)
    _decode_kernel[(num_programs * num_kv_heads,)](
        q, k_pages, v_pages.view(torch.int16) if scaled else v_pages, k_scales, v_scales, page_table, slots, seq_lens,
        sinks, out, out_scales,
        workspace.partials, workspace.lse, workspace.arrivals, pages,
        num_rows, page_table.stride(0), *((0, 0) if out_scales is None else out_scales.stride()), scale * LOG2E,
        window or NO_WINDOW, dense_below,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, BLOCK_G=max(16, merge_g), MERGE_G=merge_g, HEAD_DIM=head_dim,
        PAGE=page_size, BLOCK_R=row_block(num_rows), MIN_PAGES=_MIN_PAGES,
        CHUNK=max(1, min(16, _MERGE_ELEMENTS // (merge_g * head_dim))), HAS_SINKS=sinks is not None,
        SCALED=scaled, LIST=num_listed, UNIT=unit, num_warps=4, num_stages=num_stages,
        **({"maxnreg": registers} if registers else {}), **overlap_options(q),
    )  # fmt: skip

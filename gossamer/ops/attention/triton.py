"""Triton kernels of paged attention: split-KV decode and variable-length prefill, for MHA, GQA and MQA.

Both give the query heads of one KV head to one program as rows of its products, and both find their share of the
work on the device, so that launch parameters depend on shapes alone.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gossamer.ops.attention.workspace import DecodeWorkspace
from gossamer.ops.dispatch import overlap_options

_LOG2E = 1.4426950408889634
_NO_WINDOW = 2**31 - 1
# Fewer pages in a program than this cost more in merging than they gain in parallelism.
_MIN_PAGES = 2
# Elements of partial results that the merge holds at once: as many as leave the registers of two programs.
_MERGE_ELEMENTS = 8192
# Stands for minus infinity where a difference of two of them must be zero.
_LOW = tl.constexpr(-1e30)
# Of fp32 products: three tf32 products on the tensor cores, whose error is near that of fp32.
_PRECISION = tl.constexpr("tf32x3")
# With FP8 pages the softmax's weights are fp16 of up to 2 to this power, so that small ones of many tokens count too.
_HALF_RANGE = tl.constexpr(15.0)


@triton.jit
def _merge_partials(
    partials, lse, head, first, last, tail_of_first, NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_G: tl.constexpr, HEAD_DIM: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The normalised sum [BLOCK_G, HEAD_DIM] over programs first .. last, in their order whoever arrived last."""
    g = tl.arange(0, BLOCK_G)
    d = tl.arange(0, HEAD_DIM)
    peak = tl.full([BLOCK_G], _LOW, tl.float32)
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
        sizes = tl.load(lse + part, mask=inside, other=_LOW, cache_modifier=".cg")
        highest = tl.maximum(peak, tl.max(sizes, 1))
        old = tl.exp2(peak - highest)
        new = tl.exp2(sizes - highest[:, None])
        weight = weight * old + tl.sum(new, 1)
        total = total * old[:, None] + tl.sum(values * new[:, :, None], 1)
        peak = highest
    return total / weight[:, None]


@triton.jit
def _page_scales(k_scales, v_scales, page, head, inside, NUM_KV_HEADS: tl.constexpr):
    """A page's scales of keys and values. Loaded a page ahead and not looked at before it: nothing waits for them."""
    at = page.to(tl.int64) * NUM_KV_HEADS + head
    return tl.load(k_scales + at, mask=inside, other=1.0), tl.load(v_scales + at, mask=inside, other=1.0)


@triton.jit
def _copy(scale):
    """A positive number. Triton carries no two names of one value through a loop, and pipelines none that hands a value
    from one name to the next: the copy must be the result of an operation."""
    return tl.abs(scale)


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


@triton.jit(do_not_specialize=["num_rows", "window"])
def _decode_kernel(
    q, k_pages, v_pages, k_scales, v_scales, page_table, slots, seq_lens, sinks, out, partials, lse, arrivals,
    num_rows, table_stride, scale_log2, window,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_G: tl.constexpr, MERGE_G: tl.constexpr,
    HEAD_DIM: tl.constexpr, PAGE: tl.constexpr, BLOCK_R: tl.constexpr, MIN_PAGES: tl.constexpr,
    CHUNK: tl.constexpr, HAS_SINKS: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """All rows' visible pages, laid end to end, are cut into equal shares: program p of a KV head takes share p.

    A row that lies in one share is finished there; the parts of any other are merged by the last program to arrive.
    SCALED: keys' scales go into the scores; `total` counts in units of the page's scale of values.
    """
    head = tl.program_id(0) % NUM_KV_HEADS
    program = tl.program_id(0) // NUM_KV_HEADS
    num_programs = tl.num_programs(0) // NUM_KV_HEADS
    rows = tl.arange(0, BLOCK_R)
    lens = tl.load(seq_lens + rows, mask=rows < num_rows, other=0)
    lens = tl.where(tl.load(slots + rows, mask=rows < num_rows, other=-1) >= 0, lens, 0)
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
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    unit = begin
    while unit < stop:
        slot = tl.load(slots + row)
        seq_len = tl.where(slot >= 0, tl.load(seq_lens + row), 0)
        first_token = tl.maximum(seq_len - window, 0)
        first_page = first_token // PAGE
        row_end = row_begin + tl.cdiv(seq_len, PAGE) - first_page
        if row_end > unit:
            part_end = tl.minimum(row_end, stop)
            low, high = first_page + unit - row_begin, first_page + part_end - row_begin
            q_rows = (row * NUM_KV_HEADS + head) * GROUP
            queries = tl.load(
                q + (q_rows + g).to(tl.int64)[:, None] * HEAD_DIM + d[None, :], mask=(g < GROUP)[:, None], other=0.0
            )
            peak = tl.full([BLOCK_G], _LOW, tl.float32)
            weight = tl.zeros([BLOCK_G], tl.float32)
            if HAS_SINKS:
                sink = tl.load(sinks + head * GROUP + g, mask=g < GROUP, other=0.0).to(tl.float32)
                peak = tl.where(unit == row_begin, tl.maximum(sink * 1.4426950408889634, _LOW), peak)
                weight = tl.where(unit == row_begin, 1.0, weight)
            table = page_table + slot.to(tl.int64) * table_stride
            page = tl.load(table + low)
            to_log2 = scale_log2
            if SCALED:
                if queries.dtype == tl.bfloat16:
                    queries, q_scale = _half(queries)
                    to_log2 *= q_scale
                k_scale, v_scale = _page_scales(k_scales, v_scales, page, head, True, NUM_KV_HEADS)
                measure = _copy(v_scale)
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
                scores = tl.dot(queries, k.to(queries.dtype), input_precision=_PRECISION)
                if SCALED:
                    scores *= to_log2 * k_scale
                else:
                    scores *= to_log2
                scores = tl.where(visible[None, :], scores, float("-inf"))
                highest = tl.max(scores, 1)
                if SCALED:
                    highest -= _HALF_RANGE
                highest = tl.maximum(peak, highest)
                fade = tl.exp2(peak - highest)
                weights = tl.exp2(scores - highest[:, None])
                weight = weight * fade + tl.sum(weights, 1)
                weights = weights.to(queries.dtype)
                peak = highest
                if SCALED:
                    fade *= measure / v_scale
                    measure = _copy(v_scale)
                    v, v_odd = _unpack(pairs, queries.dtype)
                    even = tl.dot(weights, v, even * fade[:, None], input_precision=_PRECISION)
                    odd = tl.dot(weights, v_odd, odd * fade[:, None], input_precision=_PRECISION)
                else:
                    v = v.to(queries.dtype)
                    total = tl.dot(weights, v, total * fade[:, None], input_precision=_PRECISION)
                page = tl.load(table + tl.minimum(p + 1, high - 1))
                if SCALED:
                    k_scale, v_scale = _page_scales(k_scales, v_scales, page, head, True, NUM_KV_HEADS)
            if SCALED:
                total = tl.reshape(tl.join(even, odd), [BLOCK_G, HEAD_DIM]) * measure

            first_program, last_program = row_begin // share, (row_end - 1) // share
            if first_program == last_program:
                rows_out = out + (q_rows + g).to(tl.int64)[:, None] * HEAD_DIM + d[None, :]
                tl.store(rows_out, (total / weight[:, None]).to(out.dtype.element_ty), mask=(g < GROUP)[:, None])
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
                    merged_out = out + (q_rows + mg).to(tl.int64)[:, None] * HEAD_DIM + d[None, :]
                    tl.store(merged_out, merged.to(out.dtype.element_ty), mask=(mg < GROUP)[:, None])
                    tl.store(counter, 0)
            unit = part_end
        row_begin = row_end
        row += 1
    if num_empty > 0:
        for r in range(program, num_rows, num_programs):
            if (tl.load(slots + r) < 0) | (tl.load(seq_lens + r) <= 0):
                rows_out = out + ((r * NUM_KV_HEADS + head) * GROUP + g).to(tl.int64)[:, None] * HEAD_DIM + d[None, :]
                tl.store(rows_out, tl.zeros([BLOCK_G, HEAD_DIM], out.dtype.element_ty), mask=(g < GROUP)[:, None])


@triton.jit
def _attend_pages(
    queries, peak, weight, total, measure, k_desc, v_desc, k_scales, v_scales, table, head, low, high, position,
    seq_len, scale_log2, window,
    NUM_KV_HEADS: tl.constexpr, PAGE: tl.constexpr, MASKED: tl.constexpr, HAS_WINDOW: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    """Pages low .. high - 1 of one sequence; queries [BLOCK_M, head_dim] at `position` [BLOCK_M].

    `total` counts in units of `measure`, the scale of the last page's values.
    """
    page = tl.load(table + tl.maximum(tl.minimum(low, high - 1), 0))
    some = low < high
    if SCALED:
        k_scale, v_scale = _page_scales(k_scales, v_scales, page, head, some, NUM_KV_HEADS)
    for p in range(low, high):
        base = (page * NUM_KV_HEADS + head) * PAGE
        k = k_desc.load([base, 0])
        scores = tl.dot(queries, k.to(queries.dtype).T, input_precision=_PRECISION)
        if MASKED:
            token = p * PAGE + tl.arange(0, PAGE)
            visible = token[None, :] <= position[:, None]
            if HAS_WINDOW:
                visible = visible & (token[None, :] > position[:, None] - window)
            scores = tl.where(visible, scores, float("-inf"))
        to_log2 = scale_log2
        if SCALED:
            to_log2 = scale_log2 * k_scale
        highest = tl.max(scores, 1) * to_log2
        if SCALED:
            highest -= _HALF_RANGE
        highest = tl.maximum(peak, highest)
        fade = tl.exp2(peak - highest)
        weights = tl.exp2(scores * to_log2 - highest[:, None])
        weight = weight * fade + tl.sum(weights, 1)
        if SCALED:
            fade *= measure / v_scale
            measure = _copy(v_scale)
        v = v_desc.load([base, 0])
        if SCALED and queries.dtype == tl.bfloat16:
            # As in decode; keys stay bf16, for queries that are computed would come from registers in every product.
            v = v.to(tl.float16)
        else:
            v = v.to(queries.dtype)
        if MASKED:
            # What the last page holds beyond the sequence may be NaN, and 0 * NaN is NaN.
            v = tl.where((p * PAGE + tl.arange(0, PAGE) < seq_len)[:, None], v, 0.0)
        total = tl.dot(weights.to(v.dtype), v, total * fade[:, None], input_precision=_PRECISION)
        peak = highest
        page = tl.load(table + tl.minimum(p + 1, high - 1))
        if SCALED:
            k_scale, v_scale = _page_scales(k_scales, v_scales, page, head, some, NUM_KV_HEADS)
    return peak, weight, total, measure


# The metadata begins behind that of a step's decode rows: no compilation for each alignment.
@triton.jit(
    do_not_specialize=["num_tokens", "num_rows", "num_blocks", "window"],
    do_not_specialize_on_alignment=["slots", "cu_seqlens_q", "seq_lens"],
)
def _prefill_kernel(
    q, k_desc, v_desc, k_scales, v_scales, page_table, slots, cu_seqlens_q, seq_lens, sinks, out,
    num_tokens, num_rows, num_blocks, table_stride, scale_log2, window,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr, BLOCK_R: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_WINDOW: tl.constexpr,
    SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One program: the query heads of a KV head for BLOCK_M // GROUP tokens of one row, causal over the row's pages.

    A row has ceil(tokens / BLOCK_TOKENS) blocks; those left over beyond all rows' write zeros into padded tokens.
    """
    BLOCK_TOKENS: tl.constexpr = BLOCK_M // GROUP
    head = tl.program_id(0) % NUM_KV_HEADS
    # A sequence's last blocks see the most keys: they start first.
    block = num_blocks - 1 - tl.program_id(0) // NUM_KV_HEADS
    rows = tl.arange(0, BLOCK_R)
    starts = tl.load(cu_seqlens_q + rows, mask=rows < num_rows, other=0)
    counts = tl.load(cu_seqlens_q + rows + 1, mask=rows < num_rows, other=0) - starts
    ends = tl.cumsum(tl.cdiv(counts, BLOCK_TOKENS), 0)
    used = tl.max(ends, 0)
    m = tl.arange(0, BLOCK_M)
    d = tl.arange(0, HEAD_DIM)
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if block >= used:
        token = tl.load(cu_seqlens_q + num_rows) + (block - used) * BLOCK_TOKENS + m // GROUP
        inside = (m < BLOCK_TOKENS * GROUP) & (token < num_tokens)
        rows_out = ((token * NUM_KV_HEADS + head) * GROUP + m % GROUP).to(tl.int64)
        zeros = tl.zeros([BLOCK_M, HEAD_DIM], out.dtype.element_ty)
        tl.store(out + rows_out[:, None] * HEAD_DIM + d[None, :], zeros, mask=inside[:, None])
        return
    row = tl.sum((ends <= block).to(tl.int32), 0)
    row_block = block - tl.max(tl.where(ends <= block, ends, 0), 0)
    row_start = tl.load(cu_seqlens_q + row)
    row_stop = tl.load(cu_seqlens_q + row + 1)
    seq_len = tl.load(seq_lens + row)
    table = page_table + tl.maximum(tl.load(slots + row), 0).to(tl.int64) * table_stride
    first = row_start + row_block * BLOCK_TOKENS
    token = first + m // GROUP
    inside = (m < BLOCK_TOKENS * GROUP) & (token < row_stop)
    q_rows = ((token * NUM_KV_HEADS + head) * GROUP + m % GROUP).to(tl.int64)
    queries = tl.load(q + q_rows[:, None] * HEAD_DIM + d[None, :], mask=inside[:, None], other=0.0)
    shift = seq_len - row_stop
    position = token + shift
    first_position = first + shift
    last_position = tl.minimum(first + BLOCK_TOKENS, row_stop) - 1 + shift

    peak = tl.full([BLOCK_M], _LOW, tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks + head * GROUP + m % GROUP).to(tl.float32)
        peak = tl.maximum(sink * 1.4426950408889634, _LOW)
        weight = tl.full([BLOCK_M], 1.0, tl.float32)
    total = tl.zeros([BLOCK_M, HEAD_DIM], tl.float32)
    measure = 1.0
    last_page = last_position // PAGE + 1
    low = 0
    whole_low = 0
    if HAS_WINDOW:
        low = tl.maximum(first_position - window + 1, 0) // PAGE
        whole_low = tl.minimum(tl.cdiv(tl.maximum(last_position - window + 1, 0), PAGE), last_page)
        peak, weight, total, measure = _attend_pages(
            queries, peak, weight, total, measure, k_desc, v_desc, k_scales, v_scales, table, head, low, whole_low,
            position, seq_len, scale_log2, window, NUM_KV_HEADS, PAGE, True, HAS_WINDOW, SCALED,
        )  # fmt: skip
    whole_high = tl.maximum((first_position + 1) // PAGE, whole_low)
    peak, weight, total, measure = _attend_pages(
        queries, peak, weight, total, measure, k_desc, v_desc, k_scales, v_scales, table, head, whole_low, whole_high,
        position, seq_len, scale_log2, window, NUM_KV_HEADS, PAGE, False, HAS_WINDOW, SCALED,
    )  # fmt: skip
    peak, weight, total, measure = _attend_pages(
        queries, peak, weight, total, measure, k_desc, v_desc, k_scales, v_scales, table, head, whole_high, last_page,
        position, seq_len, scale_log2, window, NUM_KV_HEADS, PAGE, True, HAS_WINDOW, SCALED,
    )  # fmt: skip
    if SCALED:
        total *= measure
    result = (total / tl.maximum(weight, 1e-30)[:, None]).to(out.dtype.element_ty)
    tl.store(out + q_rows[:, None] * HEAD_DIM + d[None, :], result, mask=inside[:, None])


def _check(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, out: torch.Tensor, window: int | None,
    indices: dict[str, torch.Tensor],
) -> None:  # fmt: skip
    num_kv_heads, page_size, head_dim = k_pages.shape[1:]
    fits = k_pages.dtype == v_pages.dtype and k_pages.dtype in (q.dtype, torch.float8_e4m3fn)
    if not fits or q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"q {q.dtype}, k {k_pages.dtype}, v {v_pages.dtype}: one of fp32, fp16, bf16 for all three, or k and v e4m3"
        )
    if k_pages.shape != v_pages.shape or q.shape[2] != head_dim or q.shape[1] % num_kv_heads or out.shape != q.shape:
        raise ValueError(f"q {[*q.shape]}, out {[*out.shape]}, k {[*k_pages.shape]}, v {[*v_pages.shape]} do not match")
    if head_dim not in (16, 32, 64, 128, 256) or page_size not in (16, 32, 64, 128):
        raise ValueError(f"head_dim {head_dim} (16 .. 256), page_size {page_size} (16 .. 128): powers of two")
    if not all(t.is_contiguous() for t in (q, k_pages, v_pages, out)):
        raise ValueError("q, out, k_pages and v_pages must be contiguous")
    if window is not None and window < 1:
        raise ValueError(f"window {window} must be at least 1")
    num_rows = indices["seq_lens"].shape[0]
    if indices["slots"].shape[0] != num_rows or indices.get("cu_seqlens_q", q[:0]).shape[0] not in (0, num_rows + 1):
        raise ValueError(f"seq_lens has {num_rows} rows; slots or cu_seqlens_q do not match")
    for name, tensor in indices.items():
        if tensor.dtype != torch.int32 or tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be int32 and contiguous in its last dimension")


def _decode_cut(num_rows: int, workspace: DecodeWorkspace, page_bytes: int, scaled: bool) -> tuple[int, int, int]:
    """Programs of a KV head, pipeline stages and registers a thread (0: any), for K and V pages of `page_bytes` in all.

    Few rows: one program per multiprocessor, with more pages in flight, leaves fewer parts to merge. FP8 pages take
    a program as long as others twice as large, so that twice as many programs are wanted.
    """
    if scaled:
        return workspace.num_programs, 1 + min(2, 49152 // page_bytes), 128 if page_bytes <= 16384 else 0
    if 4 * num_rows <= workspace.num_programs:
        return max(1, workspace.num_programs // 4), 1 + min(4, 163840 // page_bytes), 0
    return max(1, workspace.num_programs // 2), 1 + min(2, 98304 // page_bytes), 0


def _prefill_cut(q: torch.Tensor, group: int, max_q_len: int) -> tuple[int, int, int]:
    """Rows, warps and pipeline stages of a prefill program.

    Four warps with 128 rows keep two programs on a multiprocessor, one computing while the other waits.
    """
    head_dim = q.shape[2]
    if q.element_size() == 4:
        rows, warps, stages = (64 if head_dim < 128 else 32), 4, 1
    elif max_q_len * group <= 64:
        rows, warps, stages = 64, 4, 2
    else:
        rows, warps, stages = 128, (8 if head_dim > 128 else 4), 2
    return max(rows, triton.next_power_of_2(group)), warps, stages


def _row_block(num_rows: int) -> int:
    return max(32, triton.next_power_of_2(num_rows))


def paged_decode(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    slots: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    out: torch.Tensor,
    *,
    window: int | None,
    sinks: torch.Tensor | None,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
    workspace: DecodeWorkspace | None,
    max_seq_len: int,
) -> None:
    _check(q, k_pages, v_pages, out, window, {"page_table": page_table, "slots": slots, "seq_lens": seq_lens})
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
    page_bytes, scaled = 2 * page_size * head_dim * k_pages.element_size(), k_scales is not None
    max_programs, num_stages, registers = _decode_cut(num_rows, workspace, page_bytes, scaled)
    # Programs without a share leave at once; their number never changes the others' shares.
    num_programs = min(max_programs, triton.cdiv(num_rows * pages_per_row, _MIN_PAGES))
    merge_g = triton.next_power_of_2(group)
    _decode_kernel[(num_programs * num_kv_heads,)](
        q, k_pages, v_pages.view(torch.int16) if scaled else v_pages, k_scales, v_scales, page_table, slots, seq_lens,
        sinks, out,
        workspace.partials, workspace.lse, workspace.arrivals,
        num_rows, page_table.stride(0), scale * _LOG2E, window or _NO_WINDOW,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, BLOCK_G=max(16, merge_g), MERGE_G=merge_g, HEAD_DIM=head_dim,
        PAGE=page_size, BLOCK_R=_row_block(num_rows), MIN_PAGES=_MIN_PAGES,
        CHUNK=max(1, min(16, _MERGE_ELEMENTS // (merge_g * head_dim))), HAS_SINKS=sinks is not None,
        SCALED=scaled, num_warps=4, num_stages=num_stages, **({"maxnreg": registers} if registers else {}),
        **overlap_options(q),
    )  # fmt: skip


def paged_prefill(
    q: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    page_table: torch.Tensor,
    slots: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    max_q_len: int,
    scale: float,
    out: torch.Tensor,
    *,
    window: int | None,
    sinks: torch.Tensor | None,
    k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None,
) -> None:
    indices = {"page_table": page_table, "slots": slots, "cu_seqlens_q": cu_seqlens_q, "seq_lens": seq_lens}
    _check(q, k_pages, v_pages, out, window, indices)
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1:3]
    num_rows = seq_lens.shape[0]
    if num_tokens == 0:
        return
    if num_rows == 0:
        out.zero_()
        return
    group = num_q_heads // num_kv_heads
    block_m, num_warps, num_stages = _prefill_cut(q, group, max_q_len)
    num_blocks = triton.cdiv(num_tokens, block_m // group) + num_rows
    page_rows = [page_size, head_dim]
    _prefill_kernel[(num_blocks * num_kv_heads,)](
        q, TensorDescriptor.from_tensor(k_pages.view(-1, head_dim), page_rows),
        TensorDescriptor.from_tensor(v_pages.view(-1, head_dim), page_rows),
        k_scales, v_scales, page_table, slots, cu_seqlens_q, seq_lens, sinks, out,
        num_tokens, num_rows, num_blocks, page_table.stride(0), scale * _LOG2E, window or _NO_WINDOW,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, BLOCK_M=block_m, HEAD_DIM=head_dim, PAGE=page_size,
        BLOCK_R=_row_block(num_rows), HAS_SINKS=sinks is not None, HAS_WINDOW=window is not None,
        SCALED=k_scales is not None, num_warps=num_warps, num_stages=num_stages, **overlap_options(q),
    )  # fmt: skip

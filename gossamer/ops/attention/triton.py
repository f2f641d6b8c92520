"""Triton kernel of variable-length paged prefill for MHA, GQA and MQA, and what it shares with decode.

Both give the query heads of one KV head to one program as rows of its products, and both find their share of the
work on the device, so that launch parameters depend on shapes alone.
"""

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from gossamer.ops.attention import hopper
from gossamer.ops.dispatch import overlap_options
from gossamer.ops.quantize_fp8.triton import BLOCK as FP8_BLOCK
from gossamer.ops.quantize_fp8.triton import quantize_rows

LOG2E = 1.4426950408889634
NO_WINDOW = 2**31 - 1
# FP8 pages that a step's prefill widens at most, and numbers of a page of keys: 1 GiB in bf16 with values.
SCRATCH_PAGES, SCRATCH_PAGE = 4096, 65_536
# Stands for minus infinity where a difference of two of them must be zero.
LOW = tl.constexpr(-1e30)
# Of fp32 products: three tf32 products on the tensor cores, whose error is near that of fp32.
PRECISION = tl.constexpr("tf32x3")
# With FP8 pages the softmax's weights are fp16 of up to 2 to this power, so that small ones of many tokens count too.
HALF_RANGE = tl.constexpr(15.0)


@triton.jit
def page_scales(k_scales, v_scales, page, head, inside, NUM_KV_HEADS: tl.constexpr):
    """A page's scales of keys and values. Loaded a page ahead and not looked at before it: nothing waits for them."""
    at = page.to(tl.int64) * NUM_KV_HEADS + head
    return tl.load(k_scales + at, mask=inside, other=1.0), tl.load(v_scales + at, mask=inside, other=1.0)


@triton.jit
def copy_scale(scale):
    """A positive number. Triton carries no two names of one value through a loop, and pipelines none that hands a value
    from one name to the next: the copy must be the result of an operation."""
    return tl.abs(scale)


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
        k_scale, v_scale = page_scales(k_scales, v_scales, page, head, some, NUM_KV_HEADS)
    for p in range(low, high):
        base = (page * NUM_KV_HEADS + head) * PAGE
        k = k_desc.load([base, 0])
        scores = tl.dot(queries, k.to(queries.dtype).T, input_precision=PRECISION)
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
            highest -= HALF_RANGE
        highest = tl.maximum(peak, highest)
        fade = tl.exp2(peak - highest)
        weights = tl.exp2(scores * to_log2 - highest[:, None])
        weight = weight * fade + tl.sum(weights, 1)
        if SCALED:
            fade *= measure / v_scale
            measure = copy_scale(v_scale)
        v = v_desc.load([base, 0])
        if SCALED and queries.dtype == tl.bfloat16:
            # As in decode; keys stay bf16, for queries that are computed would come from registers in every product.
            v = v.to(tl.float16)
        else:
            v = v.to(queries.dtype)
        if MASKED:
            # What the last page holds beyond the sequence may be NaN, and 0 * NaN is NaN.
            v = tl.where((p * PAGE + tl.arange(0, PAGE) < seq_len)[:, None], v, 0.0)
        total = tl.dot(weights.to(v.dtype), v, total * fade[:, None], input_precision=PRECISION)
        peak = highest
        page = tl.load(table + tl.minimum(p + 1, high - 1))
        if SCALED:
            k_scale, v_scale = page_scales(k_scales, v_scales, page, head, some, NUM_KV_HEADS)
    return peak, weight, total, measure


@triton.jit
def store_heads(
    out, out_scales, row_stride, head_stride, row, heads, inside, result,
    NUM_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Stores `heads` of a row, or of as many rows; with scales in FP8, each head a group."""
    result = result.to(DTYPE)
    at = out + (row * NUM_HEADS + heads).to(tl.int64)[:, None] * HEAD_DIM + tl.arange(0, HEAD_DIM)[None, :]
    if out_scales is None:
        tl.store(at, result, mask=inside[:, None])
    else:
        code, scale = quantize_rows(result.to(tl.float32), False, out.dtype.element_ty)
        tl.store(at, code, mask=inside[:, None])
        tl.store(out_scales + row * row_stride + heads * head_stride, scale, mask=inside)


# The metadata begins behind that of a step's decode rows: no compilation for each alignment.
@triton.jit(
    do_not_specialize=["num_tokens", "num_rows", "num_blocks", "row_stride", "head_stride", "window"],
    do_not_specialize_on_alignment=["slots", "cu_seqlens_q", "seq_lens", "out_scales"],
)
def _prefill_kernel(
    q, k_desc, v_desc, k_scales, v_scales, page_table, slots, cu_seqlens_q, seq_lens, sinks, out, out_scales,
    num_tokens, num_rows, num_blocks, table_stride, row_stride, head_stride, scale_log2, window,
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
    heads = head * GROUP + m % GROUP
    if PDL:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    if block >= used:
        token = tl.load(cu_seqlens_q + num_rows) + (block - used) * BLOCK_TOKENS + m // GROUP
        inside = (m < BLOCK_TOKENS * GROUP) & (token < num_tokens)
        store_heads(
            out, out_scales, row_stride, head_stride, token, heads, inside, tl.zeros([BLOCK_M, HEAD_DIM], tl.float32),
            NUM_KV_HEADS * GROUP, HEAD_DIM, q.dtype.element_ty,
        )  # fmt: skip
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
    q_rows = (token * (NUM_KV_HEADS * GROUP) + heads).to(tl.int64)
    queries = tl.load(q + q_rows[:, None] * HEAD_DIM + d[None, :], mask=inside[:, None], other=0.0)
    shift = seq_len - row_stop
    position = token + shift
    first_position = first + shift
    last_position = tl.minimum(first + BLOCK_TOKENS, row_stop) - 1 + shift

    peak = tl.full([BLOCK_M], LOW, tl.float32)
    weight = tl.zeros([BLOCK_M], tl.float32)
    if HAS_SINKS:
        sink = tl.load(sinks + head * GROUP + m % GROUP).to(tl.float32)
        peak = tl.maximum(sink * 1.4426950408889634, LOW)
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
    store_heads(
        out, out_scales, row_stride, head_stride, token, heads, inside, total / tl.maximum(weight, 1e-30)[:, None],
        NUM_KV_HEADS * GROUP, HEAD_DIM, q.dtype.element_ty,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=["num_rows", "window"], do_not_specialize_on_alignment=["slots", "cu_seqlens_q", "seq_lens"]
)
def _widen_kernel(
    k_pages, v_pages, k_scales, v_scales, page_table, slots, cu_seqlens_q, seq_lens, k_out, v_out, table_out, slots_out,
    num_rows, table_stride, window, NUM_KV_HEADS: tl.constexpr, PAGE: tl.constexpr, SIZE: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """One program: a page, of all rows' laid end to end, of one head, if a new token of its row sees it."""
    place = tl.program_id(0)
    rows = tl.arange(0, BLOCK_R)
    mine = rows < num_rows
    counts = tl.load(cu_seqlens_q + rows + 1, mask=mine, other=0) - tl.load(cu_seqlens_q + rows, mask=mine, other=0)
    slot_of = tl.load(slots + rows, mask=mine, other=-1)
    lens = tl.load(seq_lens + rows, mask=mine & (slot_of >= 0) & (counts > 0), other=0)
    ends = tl.cumsum(tl.cdiv(lens, PAGE), 0)
    begins = ends - tl.cdiv(lens, PAGE)
    tl.store(table_out + place, place)
    tl.store(slots_out + rows, begins, mask=mine)
    own = (begins <= place) & (place < ends)
    index = place - tl.sum(tl.where(own, begins, 0), 0)
    first = tl.sum(tl.where(own, tl.maximum(lens - counts - window + 1, 0), 0), 0) // PAGE
    if (place < tl.max(ends, 0)) & (index >= first):
        line = page_table + tl.sum(tl.where(own, slot_of, 0), 0).to(tl.int64) * table_stride
        page = tl.load(line + index) * NUM_KV_HEADS + tl.program_id(1)
        source = page.to(tl.int64) * SIZE + tl.arange(0, SIZE)
        target = (place * NUM_KV_HEADS + tl.program_id(1)).to(tl.int64) * SIZE + tl.arange(0, SIZE)
        tl.store(k_out + target, (tl.load(k_pages + source).to(tl.float32) * tl.load(k_scales + page)).to(tl.bfloat16))
        tl.store(v_out + target, (tl.load(v_pages + source).to(tl.float32) * tl.load(v_scales + page)).to(tl.bfloat16))


def check(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, out: torch.Tensor, out_scales: torch.Tensor | None,
    window: int | None, indices: dict[str, torch.Tensor],
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
    if out_scales is not None and (head_dim != FP8_BLOCK or out_scales.shape != q.shape[:2]):
        raise ValueError(f"FP8 output {[*out_scales.shape]}: a scale a head, of head_dim {FP8_BLOCK}")
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


def row_block(num_rows: int) -> int:
    return max(32, triton.next_power_of_2(num_rows))


def widen(
    planes: tuple[torch.Tensor, ...], page_table: torch.Tensor, rows: tuple[torch.Tensor, ...], window: int | None,
    num_pages: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Pages of keys and values in bf16, exactly, for scales are powers of two; their table, and the rows' slots in it.

    planes: k_pages, v_pages and their scales. rows: slots, cu_seqlens_q, seq_lens. `num_pages` bounds the rows' pages.
    The table is one line of them: a slot is where a row's begin.
    """
    shape, num_rows = planes[0].shape[1:], rows[0].shape[0]
    k, v = (planes[0].new_empty(num_pages, *shape, dtype=torch.bfloat16) for _ in range(2))
    table, slots = page_table.new_empty(num_pages, 1), page_table.new_empty(num_rows)
    _widen_kernel[(num_pages, shape[0])](
        *planes, page_table, *rows, k, v, table, slots, num_rows, page_table.stride(0), window or NO_WINDOW,
        NUM_KV_HEADS=shape[0], PAGE=shape[1], SIZE=shape[1] * shape[2], BLOCK_R=row_block(num_rows), num_warps=4,
    )  # fmt: skip
    return k, v, table, slots


def paged_prefill(
    q: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, page_table: torch.Tensor, slots: torch.Tensor,
    cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor, max_q_len: int, scale: float, out: torch.Tensor, *,
    out_scales: torch.Tensor | None, window: int | None, sinks: torch.Tensor | None, k_scales: torch.Tensor | None,
    v_scales: torch.Tensor | None, num_context: int | None = None,
) -> None:  # fmt: skip
    indices = {"page_table": page_table, "slots": slots, "cu_seqlens_q": cu_seqlens_q, "seq_lens": seq_lens}
    check(q, k_pages, v_pages, out, out_scales, window, indices)
    num_tokens, num_q_heads, head_dim = q.shape
    num_kv_heads, page_size = k_pages.shape[1:3]
    num_rows = seq_lens.shape[0]
    if num_tokens == 0:
        return
    strides = (0, 0) if out_scales is None else out_scales.stride()
    if num_rows == 0:
        out.zero_()
        if out_scales is not None:
            out_scales.fill_(1)
        return
    group = num_q_heads // num_kv_heads
    pages = 0 if num_context is None else num_context // page_size + num_rows
    # By count, widening a page takes about as long as 300 rows of scores over it save.
    widens = num_tokens * group >= 1024 * num_rows and 0 < pages <= SCRATCH_PAGES and k_pages[0].numel() <= SCRATCH_PAGE
    if max_q_len * group > 64 and (k_scales is None or widens) and hopper.serves(q, k_pages):
        if k_scales is not None and v_scales is not None:
            # Few sizes, so that one step's memory serves the next.
            k_pages, v_pages, page_table, slots = widen(
                (k_pages, v_pages, k_scales, v_scales), page_table, (slots, cu_seqlens_q, seq_lens), window,
                triton.next_power_of_2(pages),
            )  # fmt: skip
        hopper.paged_prefill(
            q, k_pages, v_pages, page_table, slots, cu_seqlens_q, seq_lens, scale * LOG2E, out, out_scales, strides,
            window, sinks,
        )  # fmt: skip
        return
    block_m, num_warps, num_stages = _prefill_cut(q, group, max_q_len)
    num_blocks = triton.cdiv(num_tokens, block_m // group) + num_rows
    page_rows = [page_size, head_dim]
    _prefill_kernel[(num_blocks * num_kv_heads,)](
        q, TensorDescriptor.from_tensor(k_pages.view(-1, head_dim), page_rows),
        TensorDescriptor.from_tensor(v_pages.view(-1, head_dim), page_rows),
        k_scales, v_scales, page_table, slots, cu_seqlens_q, seq_lens, sinks, out, out_scales,
        num_tokens, num_rows, num_blocks, page_table.stride(0), *strides, scale * LOG2E, window or NO_WINDOW,
        NUM_KV_HEADS=num_kv_heads, GROUP=group, BLOCK_M=block_m, HEAD_DIM=head_dim, PAGE=page_size,
        BLOCK_R=row_block(num_rows), HAS_SINKS=sinks is not None, HAS_WINDOW=window is not None,
        SCALED=k_scales is not None, num_warps=num_warps, num_stages=num_stages, **overlap_options(q),
    )  # fmt: skip

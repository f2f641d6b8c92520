"""QK norm, clamp, rotary embedding and the paged KV write in one pass over the packed projection."""

import torch
import triton
import triton.language as tl

from gossamer.ops.dispatch import overlap_options
from gossamer.ops.kv_cache.triton import encode_e4m3, finite_size, rescale, scale_bits, write_kv_fp8


@triton.jit
def _sum_squares(row, count: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(row + at, at < count, 0.0).to(tl.float32)
    return tl.sum(x * x)


@triton.jit
def _rope_write_kv_kernel(
    qkv, q_norm, k_norm, cos, sin, positions, token_slots, page_table, k_pages, v_pages, k_scales, v_scales, q_out,
    row_stride, max_pages, page_size, eps, clip,
    NUM_Q: tl.constexpr, NUM_KV: tl.constexpr, NUM_V: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    NORM: tl.constexpr, CLIP: tl.constexpr, HEADS: tl.constexpr, PAIRS: tl.constexpr, BLOCK_ROW: tl.constexpr,
    PACKED: tl.constexpr, SCALED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    # NORM: 0 none, 1 per head, 2 over all heads at once. A program takes HEADS packed heads of one token, whatever
    # they are: masks tell queries, keys and values apart. PACKED: `k_pages` are [num_tokens, 2 * NUM_KV, HEAD_DIM].
    # SCALED: pages are FP8, as bytes, and the token is the only one of the step in its page.
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    pair = tl.arange(0, PAIRS)[None, :]
    half: tl.constexpr = ROTARY_DIM // 2
    # Pair i is what one rotation mixes, (i, i + half); the dimensions that do not turn pair up behind those that do.
    turns = pair < half
    first, second = pair, pair + half
    if ROTARY_DIM < HEAD_DIM:
        first = tl.where(turns, pair, pair + half)
        second = first + tl.where(turns, half, (HEAD_DIM - ROTARY_DIM) // 2)
    inside = pair < HEAD_DIM // 2
    is_q, is_v = head < NUM_Q, head >= NUM_Q + NUM_KV
    is_k = (head >= NUM_Q) & (head < NUM_Q + NUM_KV)
    # The step's metadata, tables and weights are there, and a page's scale is that of the step before: all is on its
    # way while the projection still runs.
    slot = tl.load(token_slots + token)
    live = slot >= 0
    position = tl.where(live, tl.load(positions + token), 0).to(tl.int64)
    # Both halves of a table row hold the same angle, the second half of `sin` without the sign of rotate-half.
    angle = position * ROTARY_DIM + half + pair
    rotates = turns & (head < NUM_Q + NUM_KV)
    c = tl.load(cos + angle, rotates, 1.0).to(tl.float32)
    s = tl.load(sin + angle, rotates, 0.0).to(tl.float32)
    if NORM > 0:
        # Per head every head shares its kind's weight; over all heads each has its own part.
        q_at, k_at = head * 0, head * 0
        if NORM == 2:
            q_at, k_at = head * HEAD_DIM, (head - NUM_Q) * HEAD_DIM
        q_mask, k_mask, value = is_q & inside, is_k & inside, tl.where(is_v, 1.0, 0.0)
        gain = tl.load(q_norm + q_at + first, q_mask, 0.0).to(tl.float32)
        gain += tl.load(k_norm + k_at + first, k_mask, 0.0).to(tl.float32) + value
        gain_pair = tl.load(q_norm + q_at + second, q_mask, 0.0).to(tl.float32)
        gain_pair += tl.load(k_norm + k_at + second, k_mask, 0.0).to(tl.float32) + value
    if not PACKED:
        page = tl.load(page_table + slot.to(tl.int64) * max_pages + position // page_size, live, 0).to(tl.int64)
        owner = page * NUM_KV + tl.where(is_v, head - NUM_Q - NUM_KV, head - NUM_Q)
        at = (owner * page_size + position % page_size) * HEAD_DIM
    if SCALED:
        is_kv = (is_k | is_v) & (head < NUM_Q + NUM_KV + NUM_V)
        scales = tl.where(is_v, v_scales, k_scales) + owner
        held = tl.load(scales, is_kv, 0.0).to(tl.int32, bitcast=True)
        held = tl.where(position % page_size > 0, held, 0)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    row = qkv + token * row_stride
    mask = (head < NUM_Q + NUM_KV + NUM_V) & inside
    a = tl.load(row + head * HEAD_DIM + first, mask, 0.0).to(tl.float32)
    b = tl.load(row + head * HEAD_DIM + second, mask, 0.0).to(tl.float32)
    if NORM > 0:
        if NORM == 1:
            squares = tl.sum(a * a + b * b, 1)[:, None] / HEAD_DIM
        else:
            squares = _sum_squares(row + NUM_Q * HEAD_DIM, NUM_KV * HEAD_DIM, BLOCK_ROW) / (NUM_KV * HEAD_DIM)
            if NUM_Q > 0:
                q_squares = _sum_squares(row, NUM_Q * HEAD_DIM, BLOCK_ROW) / (NUM_Q * HEAD_DIM)
                squares = tl.where(is_q, q_squares, squares)
        inverse = tl.where(is_v, 1.0, tl.rsqrt(squares + eps))
        a *= inverse * gain
        b *= inverse * gain_pair
    if CLIP:
        a = tl.minimum(tl.maximum(a, -clip), clip)
        b = tl.minimum(tl.maximum(b, -clip), clip)
    # A padded token leaves zeros in q_out, whatever its row holds.
    x = tl.where(live, a * c - b * s, 0.0)
    y = tl.where(live, b * c + a * s, 0.0)
    q_row = q_out + (token * NUM_Q + head) * HEAD_DIM
    tl.store(q_row + first, x.to(q_out.dtype.element_ty), is_q & inside)
    tl.store(q_row + second, y.to(q_out.dtype.element_ty), is_q & inside)
    if PACKED:
        kept_row = k_pages + (token * 2 * NUM_KV + head - NUM_Q) * HEAD_DIM
        tl.store(kept_row + first, x.to(k_pages.dtype.element_ty), mask & (head >= NUM_Q))
        tl.store(kept_row + second, y.to(k_pages.dtype.element_ty), mask & (head >= NUM_Q))
    elif live:
        if SCALED:  # as `write_kv_fp8`
            a, b = x.to(qkv.dtype.element_ty).to(tl.float32), y.to(qkv.dtype.element_ty).to(tl.float32)
            largest = tl.max(tl.maximum(finite_size(a), finite_size(b)), 1)[:, None]
            grown = tl.maximum(scale_bits(largest), held)
            inverse = (0x7F000000 - grown).to(tl.float32, bitcast=True)
            kept, kept_pair = encode_e4m3(a * inverse), encode_e4m3(b * inverse)
            grows, ratio = is_kv & (grown > held), held.to(tl.float32, bitcast=True) * inverse
            old = tl.where(is_v, v_pages, k_pages) + owner * page_size * HEAD_DIM
            t, d = tl.arange(0, 128 // HEADS)[None, :, None], tl.arange(0, 2 * PAIRS)[None, None, :]
            num_old = tl.where(tl.max(grows.to(tl.int32)) > 0, position % page_size, 0).to(tl.int32)
            for low in range(0, num_old, 128 // HEADS):
                stale = grows[:, :, None] & (low + t < num_old) & (d < HEAD_DIM)
                rescale(old[:, :, None] + (low + t) * HEAD_DIM + d, stale, ratio[:, :, None])
            tl.debug_barrier()  # no warp may find the new scale where it looks for the old one
            tl.store(scales, grown.to(tl.float32, bitcast=True), is_kv)
        else:
            kept, kept_pair = x.to(k_pages.dtype.element_ty), y.to(k_pages.dtype.element_ty)
        tl.store(k_pages + at + first, kept, is_k & inside)
        tl.store(k_pages + at + second, kept_pair, is_k & inside)
        if NUM_V > 0:
            tl.store(v_pages + at + first, kept, mask & is_v)
            tl.store(v_pages + at + second, kept_pair, mask & is_v)


def rope_write_kv(
    qkv: torch.Tensor, num_q_heads: int, num_kv_heads: int, head_dim: int, cos: torch.Tensor, sin: torch.Tensor,
    positions: torch.Tensor, token_slots: torch.Tensor, page_table: torch.Tensor, k_pages: torch.Tensor,
    v_pages: torch.Tensor | None, q_out: torch.Tensor, *, k_scales: torch.Tensor | None, v_scales: torch.Tensor | None,
    q_norm: torch.Tensor | None, k_norm: torch.Tensor | None, eps: float, norm_full: bool, clip: float | None,
    single: bool,
) -> None:  # fmt: skip
    if not (num_tokens := qkv.shape[0]):
        return
    num_values = 0 if v_pages is None else num_kv_heads
    num_heads = num_q_heads + num_kv_heads + num_values
    packed, pages = None, (k_pages, v_pages, k_scales, v_scales)
    if scaled := single and k_scales is not None and v_pages is not None:
        pages = k_pages.view(torch.uint8), v_pages.view(torch.uint8), k_scales, v_scales
    elif k_scales is not None:
        packed = qkv.new_empty(num_tokens, 2, num_kv_heads, head_dim)
        pages = packed, v_pages, None, None
    # Few tokens: spread the heads over the device. Many: fewer and larger programs.
    heads = min(4 if num_tokens <= 64 else 8, triton.next_power_of_2(num_heads))
    warps = 4 if scaled else 2 if heads > 4 else 1
    _rope_write_kv_kernel[(num_tokens, triton.cdiv(num_heads, heads))](
        qkv, qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, cos, sin, positions, token_slots,
        page_table, *pages, q_out, qkv.stride(0), page_table.shape[1], k_pages.shape[2], eps, clip or 0.0,
        NUM_Q=num_q_heads, NUM_KV=num_kv_heads, NUM_V=num_values,
        HEAD_DIM=head_dim, ROTARY_DIM=cos.shape[-1], NORM=0 if q_norm is None else 2 if norm_full else 1,
        CLIP=clip is not None, HEADS=heads, PAIRS=triton.next_power_of_2(head_dim // 2),
        BLOCK_ROW=triton.next_power_of_2(max(num_q_heads, num_kv_heads) * head_dim),
        PACKED=packed is not None, SCALED=scaled, num_warps=warps, **overlap_options(qkv),
    )  # fmt: skip
    if packed is not None and v_pages is not None and k_scales is not None and v_scales is not None:
        write_kv_fp8(packed, positions, token_slots, page_table, k_pages, v_pages, k_scales, v_scales)

"""The write into FP8 pages: a program owns a page and head, so that its scale can grow without a race."""

import torch
import triton
import triton.language as tl

from gossamer.ops.dispatch import overlap_options

# Tokens of a page that are in registers at once.
_BLOCK_TOKENS = 16
# Up to this many tokens of a step every one has programs of its own, which a decode step needs.
_SPREAD_TOKENS = 512


@triton.jit
def encode_e4m3(x):
    """The E4M3 bytes of fp32 `x`, |x| <= 448, to nearest even; NaN of anything larger, infinities and NaN included.

    In integers, for the interpreter's own conversion drops carries; it makes every backend agree to the bit.
    """
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    # Below 2^-6 numbers are 2^-9 apart, as those from 2^14 on are in fp32.
    low = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    high = ((size + 0x7FFFF + ((size >> 20) & 1)) >> 20) - (120 << 3)
    code = tl.where(size < 0x3C800000, low, high)
    code = tl.where(size > 0x43E00000, 127, code)
    return (code | ((bits >> 24) & 128)).to(tl.uint8)


@triton.jit
def finite_size(x):
    return tl.where(tl.abs(x) < float("inf"), tl.abs(x), 0.0)


@triton.jit
def scale_bits(largest):
    """reference.page_scale of the largest size: an exponent alone, so that one over it is 0x7F000000 less it."""
    return tl.maximum(((largest.to(tl.int32, bitcast=True) + 0x1FFFFF) & 0x7F800000) - (8 << 23), 87 << 23)


@triton.jit
def rescale(at, inside, ratio):
    """E4M3 numbers times a power of two up to one; NaN stays what it is."""
    code = tl.load(at, inside, 0)
    value = code.to(tl.float8e4nv, bitcast=True).to(tl.float32) * ratio
    tl.store(at, tl.where((code & 127) == 127, code, encode_e4m3(value)), inside)


@triton.jit(do_not_specialize=["num_tokens"])
def _write_kernel(
    kv, positions, token_slots, page_table, k_pages, v_pages, k_scales, v_scales, num_tokens, table_stride,
    NUM_KV: tl.constexpr, HEAD_DIM: tl.constexpr, ROW: tl.constexpr, PAGE: tl.constexpr, TOKENS: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The pages whose first token of this step is one of TOKENS, for one head of keys or values."""
    begin = tl.program_id(0) * TOKENS
    is_v, head = tl.program_id(1) >= NUM_KV, tl.program_id(1) % NUM_KV
    pages, scales = tl.where(is_v, v_pages, k_pages), tl.where(is_v, v_scales, k_scales)
    d, t, n = tl.arange(0, BLOCK_D)[None, :], tl.arange(0, BLOCK_T), tl.arange(0, PAGE)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for i in range(tl.minimum(num_tokens - begin, TOKENS)):
        token = begin + i
        slot, position = tl.load(token_slots + token), tl.load(positions + token)
        offset = position % PAGE
        before = tl.load(token_slots + token - 1, mask=token > 0, other=-1)
        if (slot >= 0) & ((offset == 0) | (before != slot)):
            same = tl.load(token_slots + token + n, mask=token + n < num_tokens, other=-1) == slot
            count = tl.minimum(tl.min(tl.where(same, PAGE, n), 0), PAGE - offset)
            at = tl.load(page_table + slot.to(tl.int64) * table_stride + position // PAGE).to(tl.int64) * NUM_KV + head
            base = pages + at * (PAGE * HEAD_DIM)
            rows = kv + token.to(tl.int64) * ROW + tl.program_id(1) * HEAD_DIM
            largest = tl.zeros([BLOCK_T], tl.float32)
            for low in range(0, count, BLOCK_T):
                inside = (low + t < count)[:, None] & (d < HEAD_DIM)
                x = tl.load(rows + (low + t)[:, None] * ROW + d, inside, 0.0).to(tl.float32)
                largest = tl.maximum(largest, tl.max(finite_size(x), 1))
            held = tl.where(offset > 0, tl.load(scales + at).to(tl.int32, bitcast=True), 0)
            grown = tl.maximum(scale_bits(tl.max(largest, 0)), held)
            inverse = (0x7F000000 - grown).to(tl.float32, bitcast=True)
            if grown > held:
                ratio = held.to(tl.float32, bitcast=True) * inverse
                for low in range(0, offset, BLOCK_T):
                    inside = (low + t < offset)[:, None] & (d < HEAD_DIM)
                    rescale(base + (low + t)[:, None] * HEAD_DIM + d, inside, ratio)
            for low in range(0, count, BLOCK_T):
                inside = (low + t < count)[:, None] & (d < HEAD_DIM)
                x = tl.load(rows + (low + t)[:, None] * ROW + d, inside, 0.0).to(tl.float32)
                # A finite number times `inverse` is finite, and no larger than 448.
                tl.store(base + (offset + low + t)[:, None] * HEAD_DIM + d, encode_e4m3(x * inverse), inside)
            # No warp may find the new scale where it looks for the old one.
            tl.debug_barrier()
            tl.store(scales + at, grown.to(tl.float32, bitcast=True))


def write_kv_fp8(
    kv: torch.Tensor, positions: torch.Tensor, token_slots: torch.Tensor, page_table: torch.Tensor,
    k_pages: torch.Tensor, v_pages: torch.Tensor, k_scales: torch.Tensor, v_scales: torch.Tensor,
) -> None:  # fmt: skip
    _write(kv, positions, token_slots, page_table, (k_pages, k_scales), (v_pages, v_scales))


def write_rows_fp8(
    rows: torch.Tensor, positions: torch.Tensor, token_slots: torch.Tensor, page_table: torch.Tensor,
    pages: torch.Tensor, scales: torch.Tensor,
) -> None:  # fmt: skip
    """`write_kv_fp8` of one plane with one head: rows [num_tokens, dim]."""
    _write(rows, positions, token_slots, page_table, (pages, scales))


def _write(
    new: torch.Tensor, positions: torch.Tensor, token_slots: torch.Tensor, page_table: torch.Tensor,
    *planes: tuple[torch.Tensor, torch.Tensor],
) -> None:  # fmt: skip
    num_tokens, (num_heads, page_size, dim) = new.shape[0], planes[0][0].shape[1:]
    if not num_tokens:
        return
    # Of the tokens of a long prompt one in a page has work: programs for all would mostly start in vain.
    tokens, block_d = 1 if num_tokens <= _SPREAD_TOKENS else 8, triton.next_power_of_2(dim)
    (k_pages, k_scales), (v_pages, v_scales) = planes[0], planes[-1]
    _write_kernel[(triton.cdiv(num_tokens, tokens), len(planes) * num_heads)](
        new, positions, token_slots, page_table, k_pages.view(torch.uint8), v_pages.view(torch.uint8), k_scales,
        v_scales, num_tokens, page_table.shape[1], NUM_KV=num_heads, HEAD_DIM=dim, ROW=len(planes) * num_heads * dim,
        PAGE=page_size, TOKENS=tokens, BLOCK_T=min(_BLOCK_TOKENS, page_size), BLOCK_D=block_d,
        num_warps=4 if block_d <= 256 else 8, **overlap_options(new),
    )  # fmt: skip

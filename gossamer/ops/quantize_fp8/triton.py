"""FP8 quantisation on the device: `quantize_rows` for the epilogues of other kernels, and a kernel of its own.

Division and rounding are exact, so that every path gives the reference's bits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.ops.dispatch import overlap_options

BLOCK = 128
TRITON_DTYPE = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


@triton.jit
def quantize_rows(x, UE8M0: tl.constexpr, DTYPE: tl.constexpr):
    """x fp32 [R, G], a group a row -> q of DTYPE [R, G], scales fp32 [R]; `reference.quantize_activation` to the bit."""
    E4M3: tl.constexpr = DTYPE == tl.float8e4nv
    LIMIT: tl.constexpr = 448.0 if E4M3 else 57344.0
    finite = tl.abs(x) < float("inf")
    known = tl.where(finite, x, 0.0)
    amax = tl.max(tl.abs(known), 1)
    # At least the smallest number: a quotient of denormals may round to 0.
    bits = tl.maximum(tl.div_rn(amax, LIMIT).to(tl.int32, bitcast=True), 1)
    if UE8M0:
        bits = (bits + 0x7FFFFF) & 0x7F800000
    scale = tl.where(amax > 0, bits.to(tl.float32, bitcast=True), 1.0)
    y = tl.minimum(tl.maximum(tl.div_rn(known, tl.broadcast_to(scale[:, None], x.shape)), -LIMIT), LIMIT)
    # To the nearest number of DTYPE, ties to even, by fp32's own rounding at 1.5 * 2^23 times its spacing; the
    # conversion is exact then, also the interpreter's, which does not round.
    LEAST: tl.constexpr = (121 if E4M3 else 113) << 23
    UP: tl.constexpr = ((20 if E4M3 else 21) << 23) + 0x400000
    exponent = tl.maximum(y.to(tl.int32, bitcast=True) & 0x7F800000, LEAST)
    magic = (exponent + UP).to(tl.float32, bitcast=True)
    code = ((y + magic) - magic).to(DTYPE).to(tl.uint8, bitcast=True)
    # A number that rounds to zero keeps its sign.
    code = tl.where(y.to(tl.int32, bitcast=True) < 0, code | 128, code)
    return tl.where(finite, code, 127).to(tl.uint8).to(DTYPE, bitcast=True), scale


@triton.jit
def _quantize_kernel(
    x, q, scales, live_blocks, num_rows, width, groups,
    ROWS: tl.constexpr, GROUP: tl.constexpr, LIVE: tl.constexpr, UE8M0: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """One group of ROWS rows; rows from `live_blocks` * LIVE on, where LIVE is not 0, nobody reads."""
    group = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = group * GROUP + tl.arange(0, GROUP)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    end = num_rows
    if LIVE:
        end = tl.minimum(num_rows, tl.load(live_blocks) * LIVE)
    inside = (row < end)[:, None] & (column < width)[None, :]
    at = row[:, None].to(tl.int64) * width + column[None, :]
    value, scale = quantize_rows(tl.load(x + at, inside, 0.0).to(tl.float32), UE8M0, DTYPE)
    tl.store(q + at, value, inside)
    tl.store(scales + row.to(tl.int64) * groups + group, scale, row < end)


def quantize_activation(
    x: torch.Tensor,
    *,
    per_token: bool = False,
    ue8m0: bool = False,
    dtype: torch.dtype = torch.float8_e4m3fn,
    live_blocks: torch.Tensor | None = None,
    block_rows: int = 0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`live_blocks` int32 [1]: only that many blocks of `block_rows` rows are quantised, the others left as they are."""
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(f"quantize_activation needs a contiguous matrix, not {tuple(x.shape)}")
    num_rows, width = x.shape
    groups = 1 if per_token else triton.cdiv(width, BLOCK)
    q, scales = torch.empty_like(x, dtype=dtype), x.new_empty(num_rows, groups, dtype=torch.float32)
    if q.numel():
        group = triton.next_power_of_2(width) if per_token else BLOCK
        rows = max(1, min(4 if num_rows <= 512 else 16, 4096 // group))
        _quantize_kernel[(triton.cdiv(num_rows, rows), groups)](
            x, q, scales, live_blocks, num_rows, width, groups, ROWS=rows, GROUP=group, LIVE=block_rows, UE8M0=ue8m0,
            DTYPE=TRITON_DTYPE[dtype], num_warps=4, **overlap_options(x),
        )  # fmt: skip
    return q, scales

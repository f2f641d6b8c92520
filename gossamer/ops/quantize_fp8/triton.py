"""FP8 quantisation on the device: `quantize_rows` for the epilogues of other kernels, and a kernel of its own.

Every path gives the reference's bits.
"""

import torch
import triton
import triton.language as tl

from gossamer.ops.dispatch import overlap_options

BLOCK = 128
COLUMN_MAJOR_ROWS = 64
INTERPRETED: tl.constexpr = tl.constexpr(triton.knobs.runtime.interpret)
TRITON_DTYPE = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


@triton.jit
def _to_fp8(y, DTYPE: tl.constexpr):
    """y fp32, no larger than the largest of DTYPE -> DTYPE, to nearest, ties to even; NaN stays NaN."""
    if not INTERPRETED:
        return y.to(DTYPE)
    # fp32's own rounding at 1.5 * 2^23 times the spacing; then the conversion is exact. The interpreter's truncates.
    E4M3: tl.constexpr = DTYPE == tl.float8e4nv  # noqa: SIM300
    LEAST: tl.constexpr = (121 if E4M3 else 113) << 23
    UP: tl.constexpr = ((20 if E4M3 else 21) << 23) + 0x400000
    bits = y.to(tl.int32, bitcast=True)
    magic = (tl.maximum(bits & 0x7F800000, LEAST) + UP).to(tl.float32, bitcast=True)
    code = ((y + magic) - magic).to(DTYPE).to(tl.uint8, bitcast=True)
    # A number that rounds to zero keeps its sign.
    code = tl.where(y == y, tl.where(bits < 0, code | 128, code), 127)
    return code.to(tl.uint8).to(DTYPE, bitcast=True)


@triton.jit
def _divide(x, scale):
    """x / scale to the nearest, [R, G] by [R, 1], at the price of three products (Markstein 1990); -0 becomes 0."""
    if INTERPRETED:  # its fma rounds twice
        return tl.div_rn(x, tl.broadcast_to(scale, x.shape)) + 0.0
    inverse = tl.div_rn(1.0, scale)
    y = x * inverse
    return tl.fma(tl.fma(-y, tl.broadcast_to(scale, x.shape), x), tl.broadcast_to(inverse, x.shape), y)


@triton.jit
def quantize_rows(x, UE8M0: tl.constexpr, DTYPE: tl.constexpr):
    """x fp32 [R, G], a group a row -> q of DTYPE [R, G], scales fp32 [R]: the reference's to the bit."""
    LIMIT: tl.constexpr = 448.0 if DTYPE == tl.float8e4nv else 57344.0  # noqa: SIM300
    finite = tl.abs(x) < float("inf")
    amax = tl.max(tl.where(finite, tl.abs(x), 0.0), 1)
    # A power of two keeps tiny groups away from denormals, whose reciprocals are infinite.
    lift = tl.where(amax < 2.0**-100, 2.0**100, 1.0)
    scale = tl.div_rn(amax * lift, LIMIT)
    if UE8M0:
        scale = ((scale.to(tl.int32, bitcast=True) + 0x7FFFFF) & 0x7F800000).to(tl.float32, bitcast=True)
    scale = tl.where(amax > 0, scale, 1.0)
    q = _to_fp8(tl.where(finite, _divide(x * lift[:, None], scale[:, None]), float("nan")), DTYPE)
    bits = (scale * tl.where(amax < 2.0**-100, 2.0**-100, 1.0)).to(tl.int32, bitcast=True)
    # At least the smallest number: the scale itself may be too small for any.
    lowered = tl.maximum(bits, 1).to(tl.float32, bitcast=True)
    return q, tl.where(amax > 0, lowered, 1.0)


@triton.jit(do_not_specialize=["row_stride", "group_stride"])
def _quantize_kernel(
    x, q, scales, num_rows, width, row_stride, group_stride,
    ROWS: tl.constexpr, GROUP: tl.constexpr, UE8M0: tl.constexpr, DTYPE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """One group of ROWS rows."""
    group = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = group * GROUP + tl.arange(0, GROUP)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    inside = (row < num_rows)[:, None] & (column < width)[None, :]
    at = row[:, None].to(tl.int64) * width + column[None, :]
    value, scale = quantize_rows(tl.load(x + at, inside, 0.0).to(tl.float32), UE8M0, DTYPE)
    tl.store(q + at, value, inside)
    tl.store(scales + row.to(tl.int64) * row_stride + group * group_stride, scale, row < num_rows)


def fp8_like(
    x: torch.Tensor, per_token: bool = False, dtype: torch.dtype = torch.float8_e4m3fn
) -> tuple[torch.Tensor, torch.Tensor]:
    """Where the FP8 form of x [M, K] goes: q [M, K], and scales of 1 x 128 groups or of rows.

    Of many rows a group's scales lie side by side, as products of many rows read them.
    """
    num_rows, width = x.shape
    groups = 1 if per_token else triton.cdiv(width, BLOCK)
    q = x.new_empty(num_rows, width, dtype=dtype)
    if num_rows >= COLUMN_MAJOR_ROWS:
        return q, x.new_empty(groups, num_rows, dtype=torch.float32).t()
    return q, x.new_empty(num_rows, groups, dtype=torch.float32)


def quantize_activation(
    x: torch.Tensor, *, per_token: bool = False, ue8m0: bool = False, dtype: torch.dtype = torch.float8_e4m3fn,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    if x.dim() != 2 or not x.is_contiguous():
        raise ValueError(f"quantize_activation needs a contiguous matrix, not {tuple(x.shape)}")
    (num_rows, width), (q, scales) = x.shape, fp8_like(x, per_token, dtype)
    if q.numel():
        group = triton.next_power_of_2(width) if per_token else BLOCK
        rows = max(1, min(4 if num_rows <= 512 else 16, 4096 // group))
        _quantize_kernel[(triton.cdiv(num_rows, rows), scales.shape[1])](
            x, q, scales, num_rows, width, *scales.stride(), ROWS=rows, GROUP=group, UE8M0=ue8m0,
            DTYPE=TRITON_DTYPE[dtype], num_warps=4, **overlap_options(x),
        )  # fmt: skip
    return q, scales

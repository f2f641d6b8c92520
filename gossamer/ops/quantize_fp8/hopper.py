"""FP8 quantisation in the epilogues of Hopper's kernels."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from gossamer.ops.quantize_fp8.triton import quantize_rows


@gluon.jit
def quantize_usual_rows(y, dtype: gl.constexpr):
    """`quantize_rows`, at half the price where every row is zeros or holds no infinity and no tiny maximum.

    NaN is in no maximum and stays NaN.
    """
    peak = gl.max(gl.abs(y), 1)
    odd = (peak > 0) & ((peak < 2.0**-100) | (peak == float("inf")))
    if gl.max(odd.to(gl.int32), 0) == 0:
        scale = gl.where(peak > 0, gl.div_rn(peak, 448.0 if dtype == gl.float8e4nv else 57344.0), 1.0)
        inverse = gl.div_rn(1.0, scale)
        near = y * inverse[:, None]
        q = gl.fma(gl.fma(-near, gl.broadcast(scale[:, None], y)[0], y), gl.broadcast(inverse[:, None], y)[0], near)
        code = q.to(dtype)
    else:
        code, scale = quantize_rows(y, False, dtype)
    return code, scale

"""FP8 quantisation in the epilogues of Hopper's kernels."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def quantize_rows(y, dtype: gl.constexpr):
    """What the kernels elsewhere call by this name, to the bit and cheaper: nothing is selected for being finite.

    Infinities times zero are NaN, which is in no maximum; divided they and NaN become NaN.
    """
    peak = gl.max(gl.abs(y) + y * 0.0, 1)
    tiny = peak < 2.0**-100  # a power of two keeps these away from denormals, whose reciprocals are infinite
    scale = gl.div_rn(peak * gl.where(tiny, 2.0**100, 1.0), 448.0 if dtype == gl.float8e4nv else 57344.0)
    scale = gl.where(peak > 0, scale, 1.0)
    inverse = gl.div_rn(1.0, scale)
    y *= gl.where(tiny, 2.0**100, 1.0)[:, None]
    near = y * inverse[:, None]
    q = gl.fma(gl.fma(-near, gl.broadcast(scale[:, None], y)[0], y), gl.broadcast(inverse[:, None], y)[0], near)
    # At least the smallest number: the scale itself may be too small for any.
    lowered = gl.maximum((scale * 2.0**-100).to(gl.int32, bitcast=True), 1).to(gl.float32, bitcast=True)
    return q.to(dtype), gl.where(tiny & (peak > 0), lowered, scale)

"""Products of a few rows with 32 outputs of a weight, in the layouts of torch's and oneDNN's own packed weights.

bf16 [N / 64, K / 2, 64, 2] | int8 [N / 64, K / 4, 64, 4] | int4 [N / 64, K, 32], outputs 32 apart in a byte, and scale
and zero bf16 [K / 32, N, 2]. Half h of a tile of 64 is its outputs 16 h .. and 32 + 16 h .., sixteen each.
"""

from gossamer.ops.native import MAX_ROWS, TILE
from gossamer.ops.native.emitter import BYTES, FLOAT, FLOATS, I32, I64, INTS, LANE_BYTES, PAIRS, POINTER, VOID, Emitter

LOW_DIGIT = 254.0
ARGUMENTS = (POINTER, I64, I64, POINTER, POINTER, I64, POINTER, POINTER)
"""x, bytes between its rows, K, weight (the half's first), scales (likewise), bytes between groups of scales, sums of
groups of x fp32 [rows, K / 32] or the sum of each int8 row times -128, out fp32 [rows, 2, 16]."""


def bf16(module, rows):
    """x bf16."""
    b = Emitter(module, f"bf16_{rows}", VOID, *ARGUMENTS)
    x, pitch, k, weight, *_, out = b.arguments
    for block in _blocks(rows, 8):
        cells = [(row, column) for row in block for column in range(2)]
        sums = {cell: b.variable(b.all(0.0, FLOATS)) for cell in cells}
        with b.loop(0, b.over(k, 2), 4) as pair:
            for u in range(4):
                tiles = [b.get(PAIRS, weight, b.times(b.plus(pair, u), 4 * TILE), 128 * c) for c in range(2)]
                for row, c in cells:
                    value = _broadcast(b, x, b.times(pitch, row), b.times(pair, 4), 4 * u)
                    b.store(b.dot_bf16(b.value(sums[row, c]), value, tiles[c]), sums[row, c])
        for row, c in cells:
            b.put(b.value(sums[row, c]), out, _out(row, c))
    b.ret_void()


def int4(module, rows):
    """x bf16: w = (q - 8) * scale + zero. A digit q becomes 128 + q in bf16, exactly, by setting an exponent's bits."""
    b = Emitter(module, f"int4_{rows}", VOID, *ARGUMENTS)
    x, pitch, k, weight, scales, stride, group_sums, out = b.arguments
    for block in _blocks(rows, 8):
        cells = [(row, column) for row in block for column in range(2)]
        totals = {cell: b.variable(b.all(0.0, FLOATS)) for cell in cells}
        with b.loop(0, b.over(k, 32)) as group:
            sums = {cell: b.variable(b.all(0.0, FLOATS)) for cell in cells}
            with b.loop(0, 16) as pair:
                at = b.times(group, 1024), b.times(pair, 64)
                even, odd = (b.zext(b.get(LANE_BYTES, weight, *at, 32 * i), INTS) for i in range(2))
                both = b.or_(even, b.shl(odd, b.all(16, INTS)))
                digits = (b.and_(d, b.all(0x000F000F, INTS)) for d in (both, b.lshr(both, b.all(4, INTS))))
                tiles = [b.bitcast(b.or_(d, b.all(0x43004300, INTS)), PAIRS) for d in digits]
                for row, c in cells:
                    value = _broadcast(b, x, b.times(pitch, row), b.times(group, 64), b.times(pair, 4))
                    b.store(b.dot_bf16(b.value(sums[row, c]), value, tiles[c]), sums[row, c])
            for c in range(2):
                both = b.get(INTS, scales, b.times(group, stride), 128 * c)
                scale = b.bitcast(b.shl(both, b.all(16, INTS)), FLOATS)
                zero = b.bitcast(b.and_(both, b.all(0xFFFF0000, INTS)), FLOATS)
                zero = b.fused(scale, b.all(-136.0, FLOATS), zero)
                for row in block:
                    of_x = b.get(FLOAT, group_sums, b.times(b.plus(b.times(b.over(k, 32), row), group), 4))
                    total = b.fused(zero, b.splat(of_x), b.value(totals[row, c]))
                    b.store(b.fused(scale, b.value(sums[row, c]), total), totals[row, c])
        for row, c in cells:
            b.put(b.value(totals[row, c]), out, _out(row, c))
    b.ret_void()


def int8(module, rows):
    """x as two digits, uint8 [2, 16, K], each plus 128; the products of integers are exact."""
    b = Emitter(module, f"int8_{rows}", VOID, *ARGUMENTS)
    x, pitch, k, weight, _, _, offsets, out = b.arguments
    for block in _blocks(rows, 4):
        cells = [(row, column, digit) for row in block for column in range(2) for digit in range(2)]
        sums = {cell: b.variable(b.all(0, INTS)) for cell in cells}
        with b.loop(0, b.over(k, 4), 2) as four:
            for u in range(2):
                tiles = [b.get(BYTES, weight, b.times(b.plus(four, u), 4 * TILE), 128 * c) for c in range(2)]
                for row, c, digit in cells:
                    at = b.times(pitch, row + MAX_ROWS * digit), b.times(four, 4), 4 * u
                    place = sums[row, c, digit]
                    b.store(b.dot_u8_s8(b.value(place, INTS), _broadcast(b, x, *at, kind=BYTES), tiles[c]), place)
        for row, c in ((row, c) for row in block for c in range(2)):
            offset = b.get(INTS, offsets, 128 * c)
            high, low = (b.sitofp(b.add(b.value(sums[row, c, d], INTS), offset), FLOATS) for d in range(2))
            b.put(b.fused(low, b.all(1 / LOW_DIGIT, FLOATS), high), out, _out(row, c))
    b.ret_void()


def _blocks(rows, most):
    """Rows whose sums the registers hold together: sixteen sums, in two halves where there are more rows."""
    size = next(size for size in range(min(rows, most), 0, -1) if rows % size == 0)
    return [range(start, start + size) for start in range(0, rows, size)]


def _broadcast(b, x, *offsets, kind=PAIRS):
    """Four bytes of x in every lane."""
    return b.bitcast(b.splat(b.get(I32, x, *offsets), INTS), kind)


def _out(row, column):
    return 64 * (2 * row + column)

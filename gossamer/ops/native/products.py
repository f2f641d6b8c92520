"""Products of a few rows with 32 outputs of a weight, in the layouts of torch's and oneDNN's own packed weights.

A weight [N, K] lies in tiles of 64 outputs; half h of a tile is its outputs 16 h .. and 32 + 16 h .. (sixteen each):

    bf16  [N / 64, K / 2, 64, 2]     int8  [N / 64, K / 4, 64, 4]
    int4  [N / 64, K, 32], two outputs, 32 apart, in a byte; scale and zero bf16 [K / 32, N, 2]
"""

from llvmlite import ir

from gossamer.ops.native import MAX_ROWS, TILE
from gossamer.ops.native.emitter import BYTES, FLOAT, FLOATS, I8, I32, I64, INTS, LANES, PAIRS, POINTER, VOID, Emitter

LOW_DIGIT = 254.0
ARGUMENTS = (POINTER, I64, I64, POINTER, POINTER, I64, POINTER, POINTER)
"""x, bytes between its rows, K, weight (the half's first), scales (likewise), bytes between groups of scales, sums of
groups of x fp32 [rows, K / 32] or the sum of each int8 row times -128, out fp32 [rows, 2, 16]."""


def bf16(module, rows):
    """x bf16."""
    b = Emitter(module, f"bf16_{rows}", VOID, *ARGUMENTS)
    x, pitch, k, weight, *_, out = b.arguments
    columns, block, unrolled = 2, rows if rows <= 8 else rows // 2, 4 if rows <= 2 else 2
    for first, start in ((c, r) for c in range(0, 2, columns) for r in range(0, rows, block)):
        cells = [(row, column) for row in range(start, start + block) for column in range(columns)]
        sums = {cell: b.variable(b.all(0.0, FLOATS)) for cell in cells}
        with b.loop(0, b.over(k, 2), unrolled) as pair:
            for u in range(unrolled):
                base = b.times(b.plus(pair, u), 4 * TILE)
                tiles = [b.get(PAIRS, weight, base, 128 * (first + c)) for c in range(columns)]
                for row in range(start, start + block):
                    value = _broadcast(b, x, b.times(pitch, row), b.times(pair, 4), 4 * u)
                    for c in range(columns):
                        b.store(b.dot_bf16(b.value(sums[row, c]), value, tiles[c]), sums[row, c])
        for row, c in cells:
            b.put(b.value(sums[row, c]), out, _out(row, first + c))
    b.ret_void()


def int4(module, rows):
    """x bf16: w = (q - 8) * scale + zero. A digit q becomes 128 + q in bf16, exactly, by setting an exponent's bits."""
    b = Emitter(module, f"int4_{rows}", VOID, *ARGUMENTS)
    x, pitch, k, weight, scales, stride, group_sums, out = b.arguments
    num_groups, columns, block = b.over(k, 32), 2, rows if rows <= 8 else rows // 2
    for first, start in ((c, r) for c in range(0, 2, columns) for r in range(0, rows, block)):
        cells = [(row, column) for row in range(start, start + block) for column in range(columns)]
        totals = {cell: b.variable(b.all(0.0, FLOATS)) for cell in cells}
        with b.loop(0, num_groups) as group:
            sums = {cell: b.all(0.0, FLOATS) for cell in cells}
            for pair in range(16):
                even, odd = (
                    b.zext(b.get(ir.VectorType(I8, LANES), weight, b.times(group, 1024), 64 * pair + 32 * i), INTS)
                    for i in range(2)
                )
                both = b.or_(even, b.shl(odd, b.all(16, INTS)))
                digits = [b.lshr(both, b.all(4, INTS)) if first + c else both for c in range(columns)]
                digits = [b.or_(b.and_(d, b.all(0x000F000F, INTS)), b.all(0x43004300, INTS)) for d in digits]
                for row in range(start, start + block):
                    value = _broadcast(b, x, b.times(pitch, row), b.times(group, 64), 4 * pair)
                    for c in range(columns):
                        sums[row, c] = b.dot_bf16(sums[row, c], value, b.bitcast(digits[c], PAIRS))
            for c in range(columns):
                both = b.get(INTS, scales, b.times(group, stride), 128 * (first + c))
                scale = b.bitcast(b.shl(both, b.all(16, INTS)), FLOATS)
                zero = b.bitcast(b.and_(both, b.all(0xFFFF0000, INTS)), FLOATS)
                zero = b.fused(scale, b.all(-136.0, FLOATS), zero)
                for row in range(start, start + block):
                    of_x = b.get(FLOAT, group_sums, b.times(b.plus(b.times(num_groups, row), group), 4))
                    total = b.fused(zero, b.splat(of_x), b.value(totals[row, c]))
                    b.store(b.fused(scale, sums[row, c], total), totals[row, c])
        for row, c in cells:
            b.put(b.value(totals[row, c]), out, _out(row, first + c))
    b.ret_void()


def int8(module, rows):
    """x as two digits, uint8 [2, 16, K], each plus 128; the products of integers are exact."""
    b = Emitter(module, f"int8_{rows}", VOID, *ARGUMENTS)
    x, pitch, k, weight, _, _, offsets, out = b.arguments
    columns, block = 2 if rows <= 4 else 1, min(rows, 8 if rows % 8 == 0 else 6)
    for first, start in ((c, r) for c in range(0, 2, columns) for r in range(0, rows, block)):
        cells = [(r, c, digit) for r in range(block) for c in range(columns) for digit in range(2)]
        sums = {cell: b.variable(b.all(0, INTS)) for cell in cells}
        with b.loop(0, b.over(k, 4), 2) as four:
            for u in range(2):
                base = b.times(b.plus(four, u), 4 * TILE)
                tiles = [b.get(BYTES, weight, base, 128 * (first + c)) for c in range(columns)]
                for r, digit in ((r, digit) for r in range(block) for digit in range(2)):
                    row = b.times(pitch, start + r + MAX_ROWS * digit)
                    value = _broadcast(b, x, row, b.times(four, 4), 4 * u, kind=BYTES)
                    for c in range(columns):
                        place = sums[r, c, digit]
                        b.store(b.dot_u8_s8(b.value(place, INTS), value, tiles[c]), place)
        for r, c in ((r, c) for r in range(block) for c in range(columns)):
            offset = b.get(INTS, offsets, 128 * (first + c))
            high, low = (b.sitofp(b.add(b.value(sums[r, c, d], INTS), offset), FLOATS) for d in range(2))
            b.put(b.fused(low, b.all(1 / LOW_DIGIT, FLOATS), high), out, _out(start + r, first + c))
    b.ret_void()


def _broadcast(b, x, *offsets, kind=PAIRS):
    """Four bytes of x in every lane."""
    return b.bitcast(b.splat(b.get(I32, x, *offsets), INTS), kind)


def _out(row, column):
    return 64 * (2 * row + column)

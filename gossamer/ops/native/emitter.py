"""A thin layer over llvmlite's builder: loops, vectors of sixteen lanes and the instructions of AVX-512.

Kernels are written as Python functions that emit LLVM's language: what they loop over in Python is unrolled.
"""

import math
from contextlib import contextmanager

from llvmlite import ir


class _BFloat(ir.Type):
    """bf16, which llvmlite does not know."""

    intrinsic_name = "bf16"

    def _to_string(self):
        return "bfloat"

    __str__ = _to_string


LANES = 16
I8, I16, I32, I64, FLOAT, VOID = *map(ir.IntType, (8, 16, 32, 64)), ir.FloatType(), ir.VoidType()
POINTER = ir.PointerType()
BYTES, INTS, FLOATS = ir.VectorType(I8, 64), ir.VectorType(I32, LANES), ir.VectorType(FLOAT, LANES)
HALVES = ir.VectorType(_BFloat(), LANES)
PAIRS = ir.VectorType(HALVES.element, 2 * LANES)
LANE_BYTES = ir.VectorType(I8, LANES)


class Emitter(ir.IRBuilder):
    """Builds one function. Offsets are in bytes; numbers may be given where 64-bit values are expected."""

    def __init__(self, module, name, result, *arguments):
        self.function_made = ir.Function(module, ir.FunctionType(result, arguments), name)
        super().__init__(self.function_made.append_basic_block("entry"))

    @property
    def arguments(self):
        return self.function_made.args

    def number(self, value):
        return ir.Constant(I64, value) if isinstance(value, int) else value

    def plus(self, *values):
        total = self.number(values[0])
        for value in values[1:]:
            total = self.add(total, self.number(value))
        return total

    def times(self, a, b):
        return self.mul(self.number(a), self.number(b))

    def over(self, a, b):
        return self.udiv(self.number(a), self.number(b))

    def at(self, pointer, *offsets):
        return self.gep(pointer, [self.plus(*offsets)], source_etype=I8)

    def get(self, kind, pointer, *offsets):
        return self.load(self.at(pointer, *offsets) if offsets else pointer, typ=kind, align=1)

    def put(self, value, pointer, *offsets):
        self.store(value, self.at(pointer, *offsets) if offsets else pointer, align=1)

    def field(self, table, index, kind=I64):
        """An 8-byte entry of a table."""
        return self.get(kind, table, 8 * index)

    def variable(self, value):
        """A place for a value that loops change; LLVM keeps it in registers."""
        with self.goto_entry_block():
            place = self.alloca(value.type)
        self.store(value, place)
        return place

    def value(self, variable, kind=FLOATS):
        return self.load(variable, typ=kind)

    def all(self, value, kind):
        """A constant in every lane."""
        return ir.Constant(kind, [value] * kind.count)

    def splat(self, scalar, kind=FLOATS):
        undefined = ir.Constant(kind, ir.Undefined)
        first = self.insert_element(undefined, scalar, ir.Constant(I32, 0))
        return self.shuffle_vector(first, undefined, self.all(0, ir.VectorType(I32, kind.count)))

    def invoke(self, name, result, *values, **options):
        """Calls a function of LLVM's, or of this module, by name."""
        callee = self.module.globals.get(name)
        if callee is None:
            callee = ir.Function(self.module, ir.FunctionType(result, [v.type for v in values]), name)
        return self.call(callee, values, **options)

    def call_pointer(self, pointer, result, *values):
        return self.call(_Pointed(pointer, result, [v.type for v in values]), values)

    def fused(self, a, b, c):
        """a * b + c"""
        return self.invoke("llvm.fma.v16f32", FLOATS, a, b, c)

    def dot_bf16(self, total, a, b):
        """total + the products of neighbours: lane i gets a[2 i] b[2 i] + a[2 i + 1] b[2 i + 1]."""
        return self.invoke("llvm.x86.avx512bf16.dpbf16ps.512", FLOATS, total, a, b)

    def dot_u8_s8(self, total, a, b):
        """total + the products of four neighbours, of unsigned bytes a and signed bytes b."""
        return self.invoke("llvm.x86.avx512.vpdpbusd.512", INTS, total, a, b)

    def to_bf16(self, value):
        return self.invoke("llvm.x86.avx512bf16.cvtneps2bf16.512", HALVES, value)

    def widened(self, pointer, *offsets):
        """Sixteen bf16 numbers in memory as floats."""
        raw = self.get(ir.VectorType(I16, LANES), pointer, *offsets)
        return self.bitcast(self.shl(self.zext(raw, INTS), self.all(16, INTS)), FLOATS)

    def round(self, value):
        return self.invoke("llvm.roundeven.v16f32", FLOATS, value)

    def larger(self, a, b):
        return self.invoke("llvm.smax.i64", I64, a, self.number(b))

    def smaller(self, a, b):
        return self.invoke("llvm.smin.i64", I64, a, self.number(b))

    def maximum(self, a, b):
        """NaN if one is."""
        return self.invoke("llvm.maximum.v16f32", FLOATS, a, b)

    def lane_maximum(self, value):
        return self.invoke("llvm.vector.reduce.fmaximum.v16f32", FLOAT, value)

    def lane_sum(self, value):
        start = ir.Constant(FLOAT, 0.0)
        return self.invoke("llvm.vector.reduce.fadd.v16f32", FLOAT, start, value, fastmath=["reassoc"])

    def lane_sums(self, values):
        """Sixteen vectors to one of their sums."""
        width = LANES // 2
        while len(values) > 1:
            low, high = ([i for i in range(2 * LANES) if i // width % 2 == side] for side in (0, 1))
            masks = [ir.Constant(INTS, lanes) for lanes in (low, high)]
            values = [
                self.fadd(*(self.shuffle_vector(a, b, mask) for mask in masks))
                for a, b in zip(values[::2], values[1::2], strict=True)
            ]
            width //= 2
        return values[0]

    def exp(self, x):
        """e^x as a power of two by a polynomial of degree six, to some 2e-7 of it; NaN stays."""
        t = self.fmul(x, self.all(1 / math.log(2.0), FLOATS))
        low = self.all(-126.0, FLOATS)
        t = self.select(self.fcmp_ordered("<", t, low), low, t)
        n = self.round(t)
        r = self.fsub(t, n)
        terms = [math.log(2.0) ** k / math.factorial(k) for k in range(6, -1, -1)]
        total = self.all(terms[0], FLOATS)
        for term in terms[1:]:
            total = self.fused(total, r, self.all(term, FLOATS))
        mask = ir.Constant(I16, -1)
        return self.invoke("llvm.x86.avx512.mask.scalef.ps.512", FLOATS, total, n, total, mask, ir.Constant(I32, 4))

    @contextmanager
    def loop(self, start, stop, step=1):
        """Counts from start to below stop."""
        before, (head, body, end) = self.basic_block, map(self.append_basic_block, ("head", "body", "end"))
        self.branch(head)
        self.position_at_end(head)
        index = self.phi(I64)
        index.add_incoming(self.number(start), before)
        self.cbranch(self.icmp_signed("<", index, self.number(stop)), body, end)
        self.position_at_end(body)
        yield index
        index.add_incoming(self.add(index, self.number(step)), self.basic_block)
        self.branch(head)
        self.position_at_end(end)


class _Pointed:
    """A function at an address known when it runs."""

    def __init__(self, pointer, result, arguments):
        self.function_type = self.ftype = ir.FunctionType(result, arguments)
        self.type, self.args, self._pointer = pointer.type, arguments, pointer

    def get_reference(self):
        return self._pointer.get_reference()

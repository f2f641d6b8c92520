"""One function for a decode step of a dense decoder: every thread of a team runs it, with a barrier between stages.

Stages of a layer: norm and qkv | rotary embedding, KV write, attention | output projection | norm, gate, up and
activation | down projection. The residual stream stays fp32; what is multiplied is bf16. The head follows the layers.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import accumulate, product

from llvmlite import ir

from gossamer.ops.native import ARGUMENTS, KINDS, LAYER, MAX_ROWS, ROW_COUNTS, TILE, WEIGHT, Shape, products
from gossamer.ops.native.emitter import FLOAT, FLOATS, I32, I64, INTS, LANE_BYTES, LANES, PAIRS, POINTER, VOID, Emitter


def modules(shape: Shape, kinds: list[str]) -> Iterator[str]:
    """LLVM's language for the kernels `<kind>_<rows>` and for `step`, of a pointer to ARGUMENTS: a module each."""
    for kind, rows in product(kinds, ROW_COUNTS):
        module = ir.Module()
        getattr(products, kind)(module, rows)
        yield str(module)
    module = ir.Module()
    _Step(module, shape).build()
    yield str(module)


def scratch(shape: Shape) -> dict[str, int]:
    """Where a thread's own memory holds what, in bytes; "end" is its size."""
    s, group = shape, shape.num_q_heads // shape.num_kv_heads
    sizes = {
        "normed": 2 * MAX_ROWS * s.hidden, "sums": MAX_ROWS * max(s.hidden, s.intermediate, s.q_width) // 8,
        "first": 128 * MAX_ROWS, "second": 128 * MAX_ROWS, "digits": 2 * MAX_ROWS * s.hidden, "steps": 4 * MAX_ROWS,
        "q": 2 * group * s.head_dim, "scores": 4 * group * s.page_size, "mixed": 4 * group * s.head_dim,
        "largest": 4 * group, "weights": 4 * group,
    }  # fmt: skip
    rounded = [-(-size // 64) * 64 for size in sizes.values()]
    return dict(zip((*sizes, "end"), accumulate(rounded, initial=0), strict=True))


class _Step:
    def __init__(self, module, shape):
        self.b, self.shape, self.layer = Emitter(module, "step", VOID, POINTER), shape, None
        b, self.table = self.b, self.b.arguments[0]
        asked = (b.call_pointer(self.argument(name, POINTER), I32) for name in ("thread_num", "num_threads"))
        self.thread, self.threads = (b.zext(value, I64) for value in asked)
        s, self.rows, self.group = shape, self.argument("rows"), shape.num_q_heads // shape.num_kv_heads
        self.sizes = {  # outputs and inputs of each weight
            "qkv": (s.qkv, s.hidden), "o": (s.hidden, s.q_width), "head": (s.vocab_size, s.hidden),
            "gate_up": (2 * s.intermediate, s.hidden), "down": (s.hidden, s.intermediate),
        }  # fmt: skip
        own = b.at(self.argument("scratch", POINTER), b.times(self.thread, scratch(shape)["end"]))
        self.mine = {name: b.at(own, offset) for name, offset in scratch(shape).items()}
        buffers = "x", "qkv", "attended", "activated", "logits"
        self.x, self.qkv, self.attended, self.activated, self.logits = (
            self.argument(name, POINTER) for name in buffers
        )

    def argument(self, name, kind=I64):
        return self.b.field(self.table, ARGUMENTS.index(name), kind)

    def of_layer(self, name, kind=I64):
        return self.b.field(self.layer, LAYER.index(name), kind)

    def barrier(self):
        self.b.call_pointer(self.argument("barrier", POINTER), VOID)

    @contextmanager
    def share(self, count):
        """This thread's part of `count` items, evenly and in order."""
        b = self.b
        first, last = (b.over(b.times(count, i), self.threads) for i in (self.thread, b.plus(self.thread, 1)))
        with b.loop(first, last) as item:
            yield item

    def build(self):
        b, s = self.b, self.shape
        ids, embed = self.argument("ids", POINTER), self.argument("embed", POINTER)
        with b.loop(0, self.rows) as row, b.loop(0, s.hidden, LANES) as i:
            start = b.times(b.get(I64, ids, b.times(row, 8)), 2 * s.hidden)
            b.put(b.widened(embed, start, b.times(i, 2)), self.x, b.times(row, 4 * s.hidden), b.times(i, 4))
        layers, num_layers = self.argument("layers", POINTER), self.argument("num_layers")
        with b.loop(0, num_layers) as layer:
            self.layer = b.at(layers, b.times(layer, 8 * len(LAYER)))
            self.block()
        self.layer = b.at(layers, b.times(num_layers, 8 * len(LAYER)))
        self.norm("attn_norm")
        if s.int8_head:
            self.write_digits()
            self.product("head", self.mine["digits"], self.scaled)
        else:
            self.product("head", self.mine["normed"], self.store(self.logits, s.vocab_size))
        b.ret_void()

    def block(self):
        b, s = self.b, self.shape
        self.norm("attn_norm")
        self.product("qkv", self.mine["normed"], self.store(self.qkv, s.qkv))
        self.barrier()
        with self.share(b.times(self.rows, s.num_kv_heads)) as item:
            self.attend(b.over(item, s.num_kv_heads), b.urem(item, b.number(s.num_kv_heads)))
        self.barrier()
        self.product("o", self.attended, self.store(self.x, s.hidden, add=True))
        self.barrier()
        self.norm("mlp_norm")
        self.product("gate_up", self.mine["normed"], self.activate, parts=2)
        self.barrier()
        self.product("down", self.activated, self.store(self.x, s.hidden, add=True))
        self.barrier()

    def norm(self, name):
        """RMSNorm of the stream into this thread's own rows."""
        b, s = self.b, self.shape
        weight = self.of_layer(name, POINTER)
        with b.loop(0, self.rows) as row:
            x, out = b.at(self.x, b.times(row, 4 * s.hidden)), b.at(self.mine["normed"], b.times(row, 2 * s.hidden))
            factor = b.splat(self.inverse_rms(x, s.hidden))
            with b.loop(0, s.hidden, LANES) as i:
                at = b.times(i, 4)
                value = b.fmul(b.fmul(b.get(FLOATS, x, at), factor), b.get(FLOATS, weight, at))
                b.put(b.to_bf16(value), out, b.times(i, 2))

    def inverse_rms(self, x, width):
        b = self.b
        total = b.variable(b.all(0.0, FLOATS))
        with b.loop(0, width, LANES) as i:
            value = b.get(FLOATS, x, b.times(i, 4))
            b.store(b.fused(value, value, b.value(total)), total)
        mean = b.fdiv(b.lane_sum(b.value(total)), ir.Constant(FLOAT, float(width)))
        root = b.invoke("llvm.sqrt.f32", FLOAT, b.fadd(mean, ir.Constant(FLOAT, self.shape.eps)))
        return b.fdiv(ir.Constant(FLOAT, 1.0), root)

    def group_sums(self, weight, x, width):
        """Sums of 32 neighbours in each row of x, which int4 weights ask for."""
        b = self.b
        with b.if_then(b.icmp_unsigned("==", self.of_layer(f"{weight}.kernel"), b.number(KINDS.index("int4")))):
            ones = b.bitcast(b.all(0x3F803F80, INTS), PAIRS)
            with b.loop(0, b.times(self.rows, width // 32)) as group:
                value = b.get(PAIRS, x, b.times(group, 64))
                total = b.lane_sum(b.dot_bf16(b.all(0.0, FLOATS), value, ones))
                b.put(total, self.mine["sums"], b.times(group, 4))

    def product(self, weight, x, finish, parts=1):
        """`finish(row, column, *values)` gets sixteen outputs of each of the weight's parts, which are of one size."""
        b, (num_out, width) = self.b, self.sizes[weight]
        outs, digits = (self.mine["first"], self.mine["second"])[:parts], x is self.mine["digits"]
        if not digits:
            self.group_sums(weight, x, width)
        tiles, bias = num_out // TILE // parts, self.of_layer(f"{weight}.bias", POINTER)
        with self.share(2 * tiles) as item:
            tile, half = b.over(item, 2), b.urem(item, b.number(2))
            for part, out in enumerate(outs):
                self.half_tile(weight, x, b.plus(tile, tiles * part), half, out, digits)
            with b.loop(0, self.rows) as row:
                for i in range(2):
                    column = b.plus(b.times(tile, TILE), b.times(half, LANES), 2 * LANES * i)
                    values = [b.get(FLOATS, out, b.times(row, 128), 64 * i) for out in outs]
                    if not digits:
                        places = (b.at(bias, b.times(column, 4), 4 * TILE * tiles * part) for part in range(parts))
                        values = [b.fadd(v, b.get(FLOATS, place)) for v, place in zip(values, places, strict=True)]
                    finish(row, column, *values)

    def half_tile(self, weight, x, tile, half, out, digits):
        """The products of all rows with half a tile of a weight, into `out` [rows, 2, 16]."""
        b, (num_out, width) = self.b, self.sizes[weight]
        kind, data, tile_bytes, half_bytes = (self.of_layer(f"{weight}.{name}") for name in WEIGHT[:4])
        kernel = b.get(POINTER, self.table, b.times(kind, 8), 8 * ARGUMENTS.index("bf16"))
        start = b.inttoptr(b.plus(data, b.times(tile, tile_bytes), b.times(half, half_bytes)), POINTER)
        place = b.times(tile, 4 * TILE), b.times(half, 4 * LANES)
        scales = b.at(self.of_layer(f"{weight}.scales", POINTER), *place)
        sums = b.at(self.of_layer(f"{weight}.bias", POINTER), *place) if digits else self.mine["sums"]
        pitch, stride = b.number(width if digits else 2 * width), b.number(4 * num_out)
        b.call_pointer(kernel, VOID, x, pitch, b.number(width), start, scales, stride, sums, out)

    def store(self, target, width, add=False):
        b = self.b

        def finish(row, column, value):
            place = b.at(target, b.times(row, 4 * width), b.times(column, 4))
            b.put(b.fadd(value, b.get(FLOATS, place)) if add else value, place)

        return finish

    def activate(self, row, column, gate, up):
        """silu(gate) * up"""
        b = self.b
        sigmoid = b.fdiv(gate, b.fadd(b.all(1.0, FLOATS), b.exp(b.fneg(gate))))
        at = b.times(row, 2 * self.shape.intermediate), b.times(column, 2)
        b.put(b.to_bf16(b.fmul(sigmoid, up)), self.activated, *at)

    def scaled(self, row, column, value):
        """Logits of the int8 head."""
        b = self.b
        step = b.splat(b.get(FLOAT, self.mine["steps"], b.times(row, 4)))
        scale = b.fmul(step, b.get(FLOATS, self.of_layer("head.scales", POINTER), b.times(column, 4)))
        b.put(b.fmul(value, scale), self.logits, b.times(row, 4 * self.shape.vocab_size), b.times(column, 4))

    def write_digits(self):
        """The normed rows as two digits each: x = (high + low / 254) * step, each plus 128 in a byte."""
        b, s = self.b, self.shape
        with b.loop(0, self.rows) as row:
            x, peak = b.at(self.mine["normed"], b.times(row, 2 * s.hidden)), b.variable(b.all(0.0, FLOATS))
            with b.loop(0, s.hidden, LANES) as i:
                value = b.invoke("llvm.fabs.v16f32", FLOATS, b.widened(x, b.times(i, 2)))
                b.store(b.maximum(value, b.value(peak)), peak)
            largest = b.fadd(b.lane_maximum(b.value(peak)), ir.Constant(FLOAT, 1e-30))
            step = b.fmul(largest, ir.Constant(FLOAT, 1 / 127))
            b.put(step, self.mine["steps"], b.times(row, 4))
            inverse = b.splat(b.fdiv(ir.Constant(FLOAT, 1.0), step))
            with b.loop(0, s.hidden, LANES) as i:
                scaled = b.fmul(b.widened(x, b.times(i, 2)), inverse)
                high = b.round(scaled)
                low = b.round(b.fmul(b.fsub(scaled, high), b.all(products.LOW_DIGIT, FLOATS)))
                for digit, value in ((0, high), (1, low)):
                    byte = b.trunc(b.fptosi(b.fadd(value, b.all(128.0, FLOATS)), INTS), LANE_BYTES)
                    b.put(byte, self.mine["digits"], b.times(b.plus(row, MAX_ROWS * digit), s.hidden), i)

    def rotate(self, x, target, position, norm):
        """A head of fp32 x, normed and rotated, into bf16 at `target`."""
        b, s = self.b, self.shape
        half, turn = s.head_dim // 2, b.times(position, 2 * s.head_dim)
        cos, sin = self.argument("cos", POINTER), self.argument("sin", POINTER)
        values = [b.get(FLOATS, x, 4 * i) for i in range(0, s.head_dim, LANES)]
        if s.qk_norm:
            factor, weight = b.splat(self.inverse_rms(x, s.head_dim)), self.of_layer(norm, POINTER)
            values = [b.fmul(b.fmul(v, factor), b.get(FLOATS, weight, 64 * i)) for i, v in enumerate(values)]
        for i, (low, high) in enumerate(zip(values[: half // LANES], values[half // LANES :], strict=True)):
            c, t = b.widened(cos, turn, 2 * LANES * i), b.widened(sin, turn, 2 * half + 2 * LANES * i)
            b.put(b.to_bf16(b.fsub(b.fmul(low, c), b.fmul(high, t))), target, 2 * LANES * i)
            b.put(b.to_bf16(b.fused(high, c, b.fmul(low, t))), target, 2 * half + 2 * LANES * i)

    def attend(self, row, head):
        """One KV head of one row: its queries, its new key and value, and its attention, page by page."""
        b, s = self.b, self.shape
        width, position = s.head_dim, b.get(I64, self.argument("positions", POINTER), b.times(row, 8))
        pages = b.get(POINTER, self.argument("page_tables", POINTER), b.times(row, 8))
        qkv, queries = b.at(self.qkv, b.times(row, 4 * s.qkv)), b.times(head, self.group)
        with b.loop(0, self.group) as i:
            x = b.at(qkv, b.times(b.plus(queries, i), 4 * width))
            self.rotate(x, b.at(self.mine["q"], b.times(i, 2 * width)), position, "q_norm")
            b.put(ir.Constant(FLOAT, float("-inf")), self.mine["largest"], b.times(i, 4))
            b.put(ir.Constant(FLOAT, 0.0), self.mine["weights"], b.times(i, 4))
            for lane in range(0, width, LANES):
                b.put(b.all(0.0, FLOATS), self.mine["mixed"], b.times(i, 4 * width), 4 * lane)
        keys, values = self.new_token(qkv, head, position, pages)
        end, size = b.plus(position, 1), b.number(s.page_size)
        start = b.larger(b.sub(end, self.of_layer("window")), 0)
        with b.loop(b.over(start, size), b.over(b.plus(end, s.page_size - 1), size)) as page:
            low = b.larger(b.sub(start, b.times(page, size)), 0)
            high = b.smaller(b.sub(end, b.times(page, size)), size)
            at = self.page_offset(pages, page)
            with b.loop(0, self.group) as i:
                self.page_scores(i, b.at(keys, at), low, high)
            self.page_values(b.at(values, at), low, high)
        with b.loop(0, self.group) as i:
            total = b.splat(b.get(FLOAT, self.mine["weights"], b.times(i, 4)))
            out = b.at(self.attended, b.times(row, 2 * s.q_width), b.times(b.plus(queries, i), 2 * width))
            for lane in range(0, width, LANES):
                mixed = b.get(FLOATS, self.mine["mixed"], b.times(i, 4 * width), 4 * lane)
                b.put(b.to_bf16(b.fdiv(mixed, total)), out, 2 * lane)

    def page_offset(self, pages, page):
        index = self.b.zext(self.b.get(I32, pages, self.b.times(page, 4)), I64)
        return self.b.times(index, self.argument("page_bytes"))

    def new_token(self, qkv, head, position, pages):
        """Writes the row's key and value; a page that it is the first of owes nothing to its former owner.

        Returns where the head's keys and values begin.
        """
        b, s = self.b, self.shape
        width, offset = s.head_dim, b.urem(position, b.number(s.page_size))
        at = self.page_offset(pages, b.over(position, s.page_size))
        first = b.times(head, self.argument("kv_head_bytes"))
        planes = [b.at(self.of_layer(name, POINTER), first) for name in ("k_pages", "v_pages")]
        with b.if_then(b.icmp_unsigned("==", offset, b.number(0))), b.loop(0, 2 * s.page_size * width, 64) as i:
            for plane in planes:
                b.put(b.all(0.0, FLOATS), plane, at, i)
        token = b.plus(at, b.times(offset, 2 * width))
        heads = b.at(qkv, b.times(head, 4 * width), 4 * s.q_width)
        self.rotate(heads, b.at(planes[0], token), position, "k_norm")
        for i in range(0, width, LANES):
            value = b.get(FLOATS, heads, 4 * width * s.num_kv_heads + 4 * i)
            b.put(b.to_bf16(value), planes[1], token, 2 * i)
        return planes

    def page_scores(self, i, keys, low, high):
        """Query i's exp(score - largest so far) of a page's tokens; what was gathered before is scaled to them."""
        b, s = self.b, self.shape
        width, blocks, query = s.head_dim, s.page_size // LANES, b.at(self.mine["q"], b.times(i, 2 * s.head_dim))
        scores = b.at(self.mine["scores"], b.times(i, 4 * s.page_size))
        largest, weights = (b.at(self.mine[name], b.times(i, 4)) for name in ("largest", "weights"))
        low, high = (b.splat(b.trunc(bound, I32), INTS) for bound in (low, high))
        before = b.splat(b.get(FLOAT, largest))
        peak, total = b.variable(before), b.variable(b.all(0.0, FLOATS))
        with b.loop(0, blocks) as block:
            sums = [b.all(0.0, FLOATS)] * LANES
            for part in range(0, 2 * width, 64):
                for token in range(LANES):
                    key = b.get(PAIRS, keys, b.times(block, 2 * width * LANES), 2 * width * token + part)
                    sums[token] = b.dot_bf16(sums[token], key, b.get(PAIRS, query, part))
            score = b.fmul(b.lane_sums(sums), b.all(width**-0.5, FLOATS))
            token = b.add(b.splat(b.trunc(b.times(block, LANES), I32), INTS), ir.Constant(INTS, list(range(LANES))))
            inside = b.and_(b.icmp_signed(">=", token, low), b.icmp_signed("<", token, high))
            score = b.select(inside, score, b.all(float("-inf"), FLOATS))
            b.put(score, scores, b.times(block, 64))
            b.store(b.maximum(score, b.value(peak)), peak)
        top = b.lane_maximum(b.value(peak))
        b.put(top, largest)
        with b.loop(0, blocks) as block:
            weight = b.exp(b.fsub(b.get(FLOATS, scores, b.times(block, 64)), b.splat(top)))
            b.put(weight, scores, b.times(block, 64))
            b.store(b.fadd(b.value(total), weight), total)
        factor = b.exp(b.fsub(before, b.splat(top)))
        scaled = b.fmul(b.splat(b.get(FLOAT, weights)), factor)
        scaled = b.fadd(scaled, b.splat(b.lane_sum(b.value(total))))
        b.put(b.extract_element(scaled, ir.Constant(I32, 0)), weights)
        for lane in range(0, width, LANES):
            place = b.at(self.mine["mixed"], b.times(i, 4 * width), 4 * lane)
            b.put(b.fmul(b.get(FLOATS, place), factor), place)

    def page_values(self, values, low, high):
        """Adds the page's weighted values to what was gathered, for as many queries at once as registers hold."""
        b, s = self.b, self.shape
        width, blocks = s.head_dim, s.head_dim // LANES
        together = max(1, LANES // blocks)
        for first in range(0, self.group, together):
            cells = [(i, j) for i in range(first, min(first + together, self.group)) for j in range(blocks)]
            places = {(i, j): b.at(self.mine["mixed"], 4 * width * i + 64 * j) for i, j in cells}
            sums = {cell: b.variable(b.get(FLOATS, place)) for cell, place in places.items()}
            with b.loop(low, high) as token:
                parts = [b.widened(values, b.times(token, 2 * width), 2 * LANES * j) for j in range(blocks)]
                for i, j in cells:
                    weight = b.splat(b.get(FLOAT, self.mine["scores"], 4 * s.page_size * i, b.times(token, 4)))
                    b.store(b.fused(weight, parts[j], b.value(sums[i, j])), sums[i, j])
            for cell, place in places.items():
                b.put(b.value(sums[cell]), place)

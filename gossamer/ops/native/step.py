"""One function for a decode step of a dense decoder: every thread of a team runs it, with a barrier between stages.

Stages of a layer: norm and qkv | rotary embedding, KV write, attention | output projection | norm, gate, up and
activation | down projection. The residual stream stays fp32; what is multiplied is bf16. The head follows the layers.
"""

from contextlib import contextmanager

from llvmlite import ir

from gossamer.ops.native import ARGUMENTS, KINDS, LAYER, MAX_ROWS, TILE, WEIGHT, Shape
from gossamer.ops.native.emitter import FLOAT, FLOATS, I8, I16, I32, I64, INTS, LANES, PAIRS, POINTER, VOID, Emitter
from gossamer.ops.native.products import LOW_DIGIT


def build(module: ir.Module, shape: Shape) -> None:
    """Adds the function `step`, of a pointer to ARGUMENTS."""
    _Step(module, shape).build()


class _Step:
    def __init__(self, module, shape):
        self.b, self.shape = Emitter(module, "step", VOID, POINTER), shape
        b, self.table = self.b, self.b.arguments[0]
        thread, self.threads = (
            b.zext(b.call_pointer(self.argument(name, POINTER), I32), I64) for name in ("thread_num", "num_threads")
        )
        self.thread, self.rows = thread, self.argument("rows")
        self.own = b.at(self.argument("scratch", POINTER), b.times(thread, shape.scratch["end"]))
        self.x, self.qkv, self.attended, self.activated = (
            self.argument(name, POINTER) for name in ("x", "qkv", "attended", "activated")
        )
        self.digits = self.mine("digits")
        self.layer = None

    def argument(self, name, kind=I64):
        return self.b.field(self.table, ARGUMENTS.index(name), kind)

    def of_layer(self, name, kind=I64):
        return self.b.field(self.layer, LAYER.index(name), kind)

    def mine(self, name):
        return self.b.at(self.own, self.shape.scratch[name])

    def barrier(self):
        self.b.call_pointer(self.argument("barrier", POINTER), VOID)

    @contextmanager
    def share(self, count):
        """This thread's part of `count` items, evenly and in order."""
        first, last = (self.b.over(self.b.times(count, i), self.threads) for i in (self.thread, self.b.plus(self.thread, 1)))
        with self.b.loop(first, last) as item:
            yield item

    def build(self):
        b, s = self.b, self.shape
        ids, embed = self.argument("ids", POINTER), self.argument("embed", POINTER)
        with b.loop(0, self.rows) as row, b.loop(0, s.hidden, LANES) as i:
            start = b.times(b.get(I64, ids, b.times(row, 8)), 2 * s.hidden)
            b.put(b.widened(embed, start, b.times(i, 2)), self.x, b.times(row, 4 * s.hidden), b.times(i, 4))
        with b.loop(0, self.argument("num_layers")) as layer:
            self.layer = b.at(self.argument("layers", POINTER), b.times(layer, 8 * len(LAYER)))
            self.block()
        self.layer = b.at(self.argument("layers", POINTER), b.times(self.argument("num_layers"), 8 * len(LAYER)))
        self.head()
        b.ret_void()

    def block(self):
        s = self.shape
        normed, q_width = self.mine("normed"), s.q_width
        self.norm("attn_norm")
        self.product("qkv", normed, s.hidden, s.qkv, self.store(self.qkv, s.qkv))
        self.barrier()
        with self.share(self.b.times(self.rows, s.num_kv_heads)) as item:
            self.attend(self.b.over(item, s.num_kv_heads), self.b.urem(item, self.b.number(s.num_kv_heads)))
        self.barrier()
        self.group_sums("o", self.attended, q_width)
        self.product("o", self.attended, q_width, s.hidden, self.store(self.x, s.hidden, add=True))
        self.barrier()
        self.norm("mlp_norm")
        self.group_sums("gate_up", normed, s.hidden)
        self.gated(normed)
        self.barrier()
        self.group_sums("down", self.activated, s.intermediate)
        self.product("down", self.activated, s.intermediate, s.hidden, self.store(self.x, s.hidden, add=True))
        self.barrier()

    def norm(self, name):
        """RMSNorm of the stream into this thread's own rows."""
        b, s = self.b, self.shape
        weight, normed = self.of_layer(name, POINTER), self.mine("normed")
        with b.loop(0, self.rows) as row:
            x, out = b.at(self.x, b.times(row, 4 * s.hidden)), b.at(normed, b.times(row, 2 * s.hidden))
            factor = b.splat(self.inverse_rms(x, s.hidden))
            with b.loop(0, s.hidden, LANES) as i:
                at = b.times(i, 4)
                value = b.fmul(b.fmul(b.get(FLOATS, x, at), factor), b.get(FLOATS, weight, at))
                b.put(b.to_bf16(value), out, b.times(i, 2))
        if name == "attn_norm":
            self.group_sums("qkv", normed, s.hidden)

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
                b.put(total, self.mine("sums"), b.times(group, 4))

    def half(self, weight, x, pitch, width, num_out, tile, half, out):
        """The products of all rows with half a tile of a weight, into `out` [rows, 2, 16]."""
        b = self.b
        kind, data, tile_bytes, half_bytes = (self.of_layer(f"{weight}.{name}") for name in WEIGHT[:4])
        kernel = b.get(POINTER, self.table, b.times(kind, 8), 8 * ARGUMENTS.index("bf16"))
        start = b.inttoptr(b.plus(data, b.times(tile, tile_bytes), b.times(half, half_bytes)), POINTER)
        place = b.times(tile, 4 * TILE), b.times(half, 4 * LANES)
        scales = b.at(self.of_layer(f"{weight}.scales", POINTER), *place)
        sums = self.mine("sums")
        if x is self.digits:
            sums = b.at(self.of_layer(f"{weight}.bias", POINTER), *place)
        numbers = (b.number(pitch), b.number(width)), b.number(4 * num_out)
        b.call_pointer(kernel, VOID, x, *numbers[0], start, scales, numbers[1], sums, out)

    def product(self, weight, x, width, num_out, store):
        """`store(row, column, value)` is called for every sixteen outputs, bias included."""
        b, out = self.b, self.mine("first")
        with self.share(num_out // (TILE // 2)) as item:
            tile, half = b.over(item, 2), b.urem(item, b.number(2))
            self.half(weight, x, 2 * width, width, num_out, tile, half, out)
            with b.loop(0, self.rows) as row:
                for i in range(2):
                    column = b.plus(b.times(tile, TILE), b.times(half, LANES), 2 * LANES * i)
                    bias = b.get(FLOATS, self.of_layer(f"{weight}.bias", POINTER), b.times(column, 4))
                    store(row, column, b.fadd(b.get(FLOATS, out, b.times(row, 128), 64 * i), bias))

    def store(self, target, width, add=False):
        b = self.b

        def store(row, column, value):
            place = b.at(target, b.times(row, 4 * width), b.times(column, 4))
            b.put(b.fadd(value, b.get(FLOATS, place)) if add else value, place)

        return store

    def gated(self, normed):
        """silu(gate) * up, of the same columns of the merged weight's halves."""
        b, s = self.b, self.shape
        first, second = self.mine("first"), self.mine("second")
        tiles, bias = s.intermediate // TILE, self.of_layer("gate_up.bias", POINTER)
        with self.share(2 * tiles) as item:
            tile, half = b.over(item, 2), b.urem(item, b.number(2))
            for out, skipped in ((first, 0), (second, tiles)):
                place = b.plus(tile, skipped)
                self.half("gate_up", normed, 2 * s.hidden, s.hidden, 2 * s.intermediate, place, half, out)
            with b.loop(0, self.rows) as row:
                for i in range(2):
                    column = b.plus(b.times(tile, TILE), b.times(half, LANES), 2 * LANES * i)
                    gate, up = (
                        b.fadd(b.get(FLOATS, out, b.times(row, 128), 64 * i), b.get(FLOATS, bias, b.times(column, 4), at))
                        for out, at in ((first, 0), (second, 4 * s.intermediate))
                    )
                    scale = b.fadd(b.all(1.0, FLOATS), b.exp(b.fneg(gate)))
                    value = b.to_bf16(b.fmul(b.fdiv(gate, scale), up))
                    b.put(value, self.activated, b.times(row, 2 * s.intermediate), b.times(column, 2))

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
        qkv = b.at(self.qkv, b.times(row, 4 * s.qkv))
        for i in range(s.group):
            x = b.at(qkv, b.times(b.plus(b.times(head, s.group), i), 4 * width))
            self.rotate(x, b.at(self.mine("q"), 2 * width * i), position, "q_norm")
        keys, values = self.new_token(qkv, head, position, pages)
        for i in range(s.group):
            b.put(ir.Constant(FLOAT, float("-inf")), self.mine("largest"), 4 * i)
            b.put(ir.Constant(FLOAT, 0.0), self.mine("weights"), 4 * i)
        with b.loop(0, s.group * width, LANES) as i:
            b.put(b.all(0.0, FLOATS), self.mine("mixed"), b.times(i, 4))
        end, window = b.plus(position, 1), self.of_layer("window")
        start = b.select(b.icmp_signed(">", end, window), b.sub(end, window), b.number(0))
        with b.loop(b.over(start, s.page_size), b.over(b.plus(end, s.page_size - 1), s.page_size)) as page:
            skipped, past = b.times(page, s.page_size), b.number(s.page_size)
            low, high = b.sub(start, skipped), b.sub(end, skipped)
            low = b.select(b.icmp_signed("<", low, b.number(0)), b.number(0), low)
            high = b.select(b.icmp_signed("<", high, past), high, past)
            at = self.page_offset(pages, page)
            self.page_scores(b.at(keys, at), low, high)
            self.page_values(b.at(values, at), low, high)
        for i in range(s.group):
            factor = b.fdiv(ir.Constant(FLOAT, 1.0), b.get(FLOAT, self.mine("weights"), 4 * i))
            query = b.plus(b.times(row, s.num_q_heads), b.times(head, s.group), i)
            for lane in range(0, width, LANES):
                mixed = b.fmul(b.get(FLOATS, self.mine("mixed"), 4 * (width * i + lane)), b.splat(factor))
                b.put(b.to_bf16(mixed), self.attended, b.times(query, 2 * width), 2 * lane)

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
        planes = [
            b.at(self.of_layer(name, POINTER), b.times(head, self.argument("kv_head_bytes")))
            for name in ("k_pages", "v_pages")
        ]
        with b.if_then(b.icmp_unsigned("==", offset, b.number(0))):
            for plane in planes:
                with b.loop(0, s.page_size * width, LANES) as i:
                    b.put(b.all(0, ir.VectorType(I16, LANES)), plane, at, b.times(i, 2))
        token = b.plus(at, b.times(offset, 2 * width))
        heads = b.at(qkv, b.times(head, 4 * width), 4 * width * s.num_q_heads)
        self.rotate(heads, b.at(planes[0], token), position, "k_norm")
        for i in range(0, width, LANES):
            value = b.get(FLOATS, heads, 4 * width * s.num_kv_heads + 4 * i)
            b.put(b.to_bf16(value), planes[1], token, 2 * i)
        return planes

    def page_scores(self, keys, low, high):
        """Weights exp(score - largest so far) of a page's tokens; what was gathered before is scaled to them."""
        b, s = self.b, self.shape
        width, blocks = s.head_dim, s.page_size // LANES
        lanes = ir.Constant(INTS, list(range(LANES)))
        low, high = (b.splat(b.trunc(bound, I32), INTS) for bound in (low, high))
        for i in range(s.group):
            scores, largest = b.at(self.mine("scores"), 4 * s.page_size * i), b.at(self.mine("largest"), 4 * i)
            peak = b.variable(b.splat(b.get(FLOAT, largest)))
            with b.loop(0, blocks) as block:
                sums = [b.all(0.0, FLOATS)] * LANES
                for part in range(0, 2 * width, 64):
                    query = b.get(PAIRS, self.mine("q"), 2 * width * i + part)
                    for token in range(LANES):
                        key = b.get(PAIRS, keys, b.times(block, 2 * width * LANES), 2 * width * token + part)
                        sums[token] = b.dot_bf16(sums[token], key, query)
                score = b.fmul(b.lane_sums(sums), b.all(width**-0.5, FLOATS))
                token = b.add(b.splat(b.trunc(b.times(block, LANES), I32), INTS), lanes)
                inside = b.and_(b.icmp_signed(">=", token, low), b.icmp_signed("<", token, high))
                score = b.select(inside, score, b.all(float("-inf"), FLOATS))
                b.put(score, scores, b.times(block, 64))
                higher = b.fcmp_unordered(">", score, b.value(peak))
                b.store(b.select(higher, score, b.value(peak)), peak)
            self.rescale(i, scores, largest, b.value(peak), blocks)

    def rescale(self, i, scores, largest, peak, blocks):
        b, width = self.b, self.shape.head_dim
        top = b.splat(b.invoke("llvm.vector.reduce.fmax.v16f32", FLOAT, peak))
        factor = b.exp(b.fsub(b.splat(b.get(FLOAT, largest)), top))
        b.put(b.extract_element(top, ir.Constant(I32, 0)), largest)
        total = b.variable(b.all(0.0, FLOATS))
        for block in range(blocks):
            weight = b.exp(b.fsub(b.get(FLOATS, scores, 64 * block), top))
            b.put(weight, scores, 64 * block)
            b.store(b.fadd(b.value(total), weight), total)
        weights, scalar = b.at(self.mine("weights"), 4 * i), b.extract_element(factor, ir.Constant(I32, 0))
        b.put(b.fadd(b.fmul(b.get(FLOAT, weights), scalar), b.lane_sum(b.value(total))), weights)
        for lane in range(0, width, LANES):
            place = b.at(self.mine("mixed"), 4 * (width * i + lane))
            b.put(b.fmul(b.get(FLOATS, place), factor), place)

    def page_values(self, values, low, high):
        """Adds the page's weighted values to what was gathered, for as many queries at once as registers hold."""
        b, s = self.b, self.shape
        width, blocks = s.head_dim, s.head_dim // LANES
        together = max(1, LANES // blocks)
        for first in range(0, s.group, together):
            cells = [(i, j) for i in range(first, min(first + together, s.group)) for j in range(blocks)]
            places = {(i, j): b.at(self.mine("mixed"), 4 * width * i + 64 * j) for i, j in cells}
            sums = {cell: b.variable(b.get(FLOATS, place)) for cell, place in places.items()}
            with b.loop(low, high) as token:
                parts = [b.widened(values, b.times(token, 2 * width), 2 * LANES * j) for j in range(blocks)]
                for i, j in cells:
                    weight = b.splat(b.get(FLOAT, self.mine("scores"), 4 * s.page_size * i, b.times(token, 4)))
                    b.store(b.fused(weight, parts[j], b.value(sums[i, j])), sums[i, j])
            for cell, place in places.items():
                b.put(b.value(sums[cell]), place)

    def head(self):
        """The final norm, and the logits fp32 [16, vocab_size]."""
        b, s = self.b, self.shape
        logits, normed = self.argument("logits", POINTER), self.mine("normed")
        self.norm("attn_norm")
        if not s.int8_head:
            self.product("qkv", normed, s.hidden, s.vocab_size, self.store(logits, s.vocab_size))
            return
        self.write_digits()
        out, scales = self.mine("first"), self.of_layer("qkv.scales", POINTER)
        with self.share(s.vocab_size // (TILE // 2)) as item:
            tile, half = b.over(item, 2), b.urem(item, b.number(2))
            self.half("qkv", self.digits, s.hidden, s.hidden, s.vocab_size, tile, half, out)
            with b.loop(0, self.rows) as row:
                step = b.splat(b.get(FLOAT, self.mine("steps"), b.times(row, 4)))
                for i in range(2):
                    column = b.plus(b.times(tile, TILE), b.times(half, LANES), 2 * LANES * i)
                    scale = b.fmul(step, b.get(FLOATS, scales, b.times(column, 4)))
                    value = b.fmul(b.get(FLOATS, out, b.times(row, 128), 64 * i), scale)
                    b.put(value, logits, b.times(row, 4 * s.vocab_size), b.times(column, 4))

    def write_digits(self):
        """The normed rows as two digits each: x = (high + low / 254) * step, each plus 128 in a byte."""
        b, s = self.b, self.shape
        with b.loop(0, self.rows) as row:
            x, peak = b.at(self.mine("normed"), b.times(row, 2 * s.hidden)), b.variable(b.all(0.0, FLOATS))
            with b.loop(0, s.hidden, LANES) as i:
                value = b.invoke("llvm.fabs.v16f32", FLOATS, b.widened(x, b.times(i, 2)))
                higher = b.fcmp_unordered(">", value, b.value(peak))
                b.store(b.select(higher, value, b.value(peak)), peak)
            largest = b.invoke("llvm.vector.reduce.fmax.v16f32", FLOAT, b.value(peak))
            step = b.fmul(b.fadd(largest, ir.Constant(FLOAT, 1e-30)), ir.Constant(FLOAT, 1 / 127))
            b.put(step, self.mine("steps"), b.times(row, 4))
            inverse = b.splat(b.fdiv(ir.Constant(FLOAT, 1.0), step))
            with b.loop(0, s.hidden, LANES) as i:
                scaled = b.fmul(b.widened(x, b.times(i, 2)), inverse)
                high = b.invoke("llvm.roundeven.v16f32", FLOATS, scaled)
                low = b.invoke("llvm.roundeven.v16f32", FLOATS, b.fmul(b.fsub(scaled, high), b.all(LOW_DIGIT, FLOATS)))
                for digit, value in ((0, high), (1, low)):
                    byte = b.trunc(b.fptosi(b.fadd(value, b.all(128.0, FLOATS)), INTS), ir.VectorType(I8, LANES))
                    b.put(byte, self.digits, b.times(b.plus(row, MAX_ROWS * digit), s.hidden), i)

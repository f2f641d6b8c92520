"""NSA's layer, on both routes, against the paper's equations in float64; what may not matter; its accounting."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from gossamer.config import ModelConfig, NSAConfig, SparseConfig
from gossamer.kv_cache.pool import KVPool
from gossamer.layers.attention import gqa, nsa
from gossamer.layers.attention.base import AttentionBatch, Chunks, PagedPlan
from gossamer.layers.linear import WeightFormat
from gossamer.layers.residual import ResidualStream
from gossamer.models.cost import StepCost
from gossamer.models.shapes import expected_shapes

PAGE, LEN = 16, 150
HIDDEN, Q_HEADS, KV_HEADS, DIM = 24, 4, 2, 16
BASE = ModelConfig(
    "llama", 50, HIDDEN, 32, 1, Q_HEADS, KV_HEADS, DIM, 512, attention="nsa", nsa=NSAConfig(20),
    sparse=SparseConfig(PAGE, 4, 1, 2), sliding_windows=(24,),
)  # fmt: skip
CONFIGS = {
    "shared": BASE,
    "independent": dataclasses.replace(BASE, nsa=NSAConfig(20, shared_kv=False), qkv_bias=True),
    "normed": dataclasses.replace(BASE, nsa=NSAConfig(20, shared_kv=False), qk_norm="head"),
    "normed over all heads": dataclasses.replace(BASE, nsa=NSAConfig(20, shared_kv=False), qk_norm="full"),
}
ANGLES = torch.arange(512).double()[:, None] * 10000.0 ** (-torch.arange(0, DIM, 2).double() / DIM)
Weights = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def weights_of(config: ModelConfig) -> Weights:
    found = {n: s for n, s in expected_shapes(config).items() if ".attn." in n}
    weights = {n.removeprefix("layers.0.attn."): torch.randn(s, dtype=torch.float64) for n, s in found.items()}
    return {n: w * (0.5 if w.ndim == 1 else 2 * w.shape[1] ** -0.5) for n, w in weights.items()}


class Layer:
    """One layer with its own pool, on either route; `run` continues sequences by chunks."""

    def __init__(
        self, config: ModelConfig, weights: Weights, paged: bool, dtype: torch.dtype = torch.float64,
        backend: str = "reference",
    ) -> None:  # fmt: skip
        self.config, self.paged, self.dtype = config, paged, dtype
        self.layer = nsa.build(config, 0, backend)
        fmt = WeightFormat(dtype, torch.device("cpu"))
        for name, weight in weights.items():
            self.layer.load(f"layers.0.attn.{name}", weight, fmt)
        self.workspace = nsa.workspace(config, 3, torch.device("cpu"))
        layout = nsa.kv_layout(config, "float32")
        self.pool = KVPool(1, layout, 40, PAGE, torch.device("cpu"), heads_first=not paged)
        self.planes = [p.to(dtype).fill_(torch.nan) for p in self.pool.layers[0]]
        self.tables = torch.randperm(40, dtype=torch.int32)[:36].view(3, 12)
        angles = ANGLES.repeat(1, 2)[:, None]
        self.cos, self.sin = angles.cos(), angles.sin() * torch.tensor([-1.0, 1.0]).repeat_interleave(DIM // 2)

    def run(self, xs: list[torch.Tensor], starts: list[int], num_decode: int = 0) -> list[torch.Tensor]:
        """xs: new tokens of sequences 0, 1, ..."""
        lengths, x = [len(x) for x in xs], torch.cat(xs).to(self.dtype)
        positions = torch.cat([torch.arange(s, s + n) for s, n in zip(starts, lengths, strict=True)]).int()
        if not self.paged:
            tables = [t.tolist() for t in self.tables[: len(xs)]]
            batch = AttentionBatch(num_decode, starts, lengths, tables, PAGE)
            plan = nsa.plan(self.config, batch, self.dtype)
            cos_sin = self.cos[positions.long()], self.sin[positions.long()]
            return list(self.layer(x, *cos_sin, plan, self.planes).split(lengths))
        slots = torch.arange(len(xs), dtype=torch.int32)
        rows = slots.repeat_interleave(torch.tensor(lengths))
        lens = torch.tensor(starts, dtype=torch.int32) + torch.tensor(lengths, dtype=torch.int32)
        bounds = torch.tensor([0, *lengths[num_decode:]]).cumsum(0).int()
        spans = list(zip(starts, lengths, strict=True))[num_decode:]
        chunks = Chunks(
            max((n for _, n in spans), default=0), sum(map(sum, spans)), (0, max(map(sum, spans), default=0))
        )
        plan = PagedPlan(
            num_decode, positions, rows, slots, lens, bounds, chunks, self.tables, 12 * PAGE, self.workspace
        )
        eps = self.config.rms_norm_eps
        stream = ResidualStream(x.clone(), eps, "reference")
        q = torch.full((len(x), *self.layer.q_shape), torch.nan, dtype=self.dtype)
        out = torch.full((len(x), *self.layer.out_shape), torch.nan, dtype=self.dtype)
        norm, tables = torch.ones(HIDDEN, dtype=self.dtype), (self.cos[:, 0], self.sin[:, 0])
        self.layer.project(stream, norm, *tables, plan, self.planes, q)
        self.layer.attend(q, plan, self.planes, out)
        return list(self.layer.o(out.flatten(1)).split(lengths))


def normed(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + BASE.rms_norm_eps)


def rotate(x: torch.Tensor) -> torch.Tensor:
    """[tokens, heads, DIM], by pairs (i, i + DIM / 2)."""
    a, b = x.chunk(2, -1)
    cos, sin = ANGLES[: len(x)].cos()[:, None], ANGLES[: len(x)].sin()[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


def oracle(config: ModelConfig, w: Weights, x: torch.Tensor) -> torch.Tensor:
    """Equations 5 to 12 of arXiv:2502.11089, token by token, for a whole sequence."""
    assert config.nsa is not None
    assert config.sparse is not None
    block, stride, group, scale = PAGE // 2, PAGE // 4, Q_HEADS // KV_HEADS, DIM**-0.5

    def project(name: str, heads: int) -> torch.Tensor:
        return (x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(()))).view(len(x), heads, DIM)

    def norm(y: torch.Tensor, name: str) -> torch.Tensor:
        if config.qk_norm == "none":
            return y
        rows = y.flatten(1) if config.qk_norm == "full" else y
        rows = rows * torch.rsqrt(rows.square().mean(-1, keepdim=True) + config.rms_norm_eps)
        return (rows * w[f"{name}.weight"]).view_as(y)

    names = dict.fromkeys(("compressed", "selected", "window"), ("k", "v"))
    if not config.nsa.shared_kv:
        names |= {b: (f"{b}.k_proj", f"{b}.v_proj") for b in ("compressed", "window")}
    q = rotate(norm(project("q", Q_HEADS), "q_norm"))
    kv = {b: (rotate(norm(project(k, KV_HEADS), "k_norm")), project(v, KV_HEADS)) for b, (k, v) in names.items()}

    def compress(y: torch.Tensor, kind: str) -> torch.Tensor:
        starts = range(0, len(y) - block + 1, stride)
        position = w[f"compress_{kind}.position.weight"].view(block, DIM)
        found = []
        for i in starts:
            span = (y[i : i + block] + position[:, None]).transpose(0, 1).flatten(1)
            inner = span @ w[f"compress_{kind}.in_proj.weight"].T
            found.append(inner * torch.sigmoid(inner) @ w[f"compress_{kind}.out_proj.weight"].T)
        return torch.stack(found)

    ck, cv = (compress(y, kind) for y, kind in zip(kv["compressed"], "kv", strict=True))
    gates = torch.sigmoid(x @ w["branch_gate.weight"].T).view(len(x), 3, Q_HEADS)
    out = torch.zeros(len(x), Q_HEADS, DIM, dtype=torch.float64)
    for t in range(len(x)):
        seen = [i for i in range(len(ck)) if i * stride + block - 1 <= t]
        for h in range(KV_HEADS):
            heads = slice(h * group, (h + 1) * group)
            p = torch.softmax(q[t, heads] @ ck[seen, h].T * scale, -1)
            if seen:
                out[t, heads] += gates[t, 0, heads, None] * (p @ cv[seen, h])
            scores = []
            for j in range(t // PAGE + 1):
                shared = [
                    max(0, (min(i * stride + block, (j + 1) * PAGE) - max(i * stride, j * PAGE)) // stride)
                    for i in seen
                ]
                scores.append(float((p.sum(0) * torch.tensor(shared, dtype=torch.float64)).sum()))
            last = t // PAGE
            forced = [j for j in range(last + 1) if j < config.sparse.first or j > last - config.sparse.local]
            rest = sorted((j for j in range(last + 1) if j not in forced), key=lambda j: (-scores[j], j))
            blocks = forced + rest[: config.sparse.num_blocks - config.sparse.first - config.sparse.local]
            window = config.sliding_windows[0]
            assert window is not None
            for branch, name, keys in (
                (1, "selected", [i for i in range(t + 1) if i // PAGE in blocks]),
                (2, "window", list(range(max(0, t + 1 - window), t + 1))),
            ):
                k, v = kv[name]
                attended = torch.softmax(q[t, heads] @ k[keys, h].T * scale, -1) @ v[keys, h]
                out[t, heads] += gates[t, branch, heads, None] * attended
    return out.flatten(1) @ w["o.weight"].T


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("name", CONFIGS)
def test_the_layer_is_the_papers(name: str, paged: bool) -> None:
    config, weights = CONFIGS[name], weights_of(CONFIGS[name])
    x = normed(torch.randn(LEN, HIDDEN, dtype=torch.float64))
    (found,) = Layer(config, weights, paged).run([x], [0])
    torch.testing.assert_close(found, oracle(config, weights, normed(x) if paged else x), rtol=0, atol=1e-10)


@pytest.mark.parametrize("paged", [False, True])
def test_chunks_decode_and_company_change_nothing(paged: bool) -> None:
    weights = weights_of(BASE)
    a, b = (normed(torch.randn(n, HIDDEN, dtype=torch.float64)) for n in (LEN, 90))
    whole, other = (Layer(BASE, weights, paged).run([x], [0])[0] for x in (a, b))
    layer = Layer(BASE, weights, paged)
    found, at = [], 0
    for i, size in enumerate((3, 13, 31, 1, 60)):  # beside another sequence's chunks
        mine, its = layer.run([a[at : at + size], b[15 * i : 15 * i + 15]], [at, 15 * i])
        found.append(mine)
        torch.testing.assert_close(its, other[15 * i : 15 * i + 15], rtol=0, atol=1e-10)
        at += size
    while at < LEN:
        found += layer.run([a[at : at + 1], b[at - 33 : at - 32]], [at, at - 33], num_decode=2)[:1] if at < 123 else (
            layer.run([a[at : at + 1]], [at], num_decode=1)
        )  # fmt: skip
        at += 1
    torch.testing.assert_close(torch.cat(found), whole, rtol=0, atol=1e-10)


@pytest.mark.parametrize("paged", [False, True])
def test_the_future_changes_nothing(paged: bool) -> None:
    weights, x = weights_of(BASE), normed(torch.randn(LEN, HIDDEN, dtype=torch.float64))
    changed = torch.cat((x[:101], normed(torch.randn(LEN - 101, HIDDEN, dtype=torch.float64))))
    before, after = (Layer(BASE, weights, paged).run([y], [0])[0] for y in (x, changed))
    torch.testing.assert_close(before[:101], after[:101], rtol=0, atol=1e-12)
    assert not torch.allclose(before[101], after[101])


def gated(weights: Weights, branch: int) -> Weights:
    """Only this branch's gates open: the input's first channel is a constant."""
    gate = torch.zeros(3, Q_HEADS, HIDDEN, dtype=torch.float64)
    gate[..., 0] = -1e4
    gate[branch, :, 0] = 1e4
    return weights | {"branch_gate.weight": gate.flatten(0, 1)}


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(
    ("branch", "traits"),
    [(1, {"sparse": SparseConfig(PAGE, LEN // PAGE + 1, 1, 2)}), (2, {"sliding_windows": (LEN,)})],
)
def test_all_blocks_and_a_window_of_everything_are_dense(paged: bool, branch: int, traits: dict[str, object]) -> None:
    config = dataclasses.replace(BASE, **traits)  # type: ignore[arg-type]
    weights, x = weights_of(BASE), torch.randn(LEN, HIDDEN, dtype=torch.float64)
    x[:, 0] = 3.0
    x = normed(x)
    (found,) = Layer(config, gated(weights, branch), paged).run([x], [0])
    (sparse,) = Layer(BASE, gated(weights, branch), paged).run([x], [0])
    assert not torch.allclose(found, sparse)
    x = normed(x) if paged else x
    q, k, v = (x @ weights[f"{n}.weight"].T for n in "qkv")
    q, k, v = rotate(q.view(LEN, Q_HEADS, DIM)), rotate(k.view(LEN, KV_HEADS, DIM)), v.view(LEN, KV_HEADS, DIM)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(y.transpose(0, 1) for y in (q, k, v)), is_causal=True, enable_gqa=True
    )
    expected = dense.transpose(0, 1).flatten(1) @ weights["o.weight"].T
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize(("start", "length"), [(0, 1), (63, 1), (0, 90), (29, 3), (31, 17), (400, 150), (5000, 1)])
def test_cost_equals_a_count(start: int, length: int) -> None:
    sparse, window, stride, block = SparseConfig(PAGE, 4, 1, 2), 24, PAGE // 4, PAGE // 2
    widths = (Q_HEADS, KV_HEADS, 24, 16)
    tokens = range(start, start + length)
    seen = [
        sum([sum(i * stride + block - 1 <= t for i in range(t)) for t in tokens]),
        sum([t + 1 if t // PAGE < 4 else 3 * PAGE + t % PAGE + 1 for t in tokens]),
        sum([min(t + 1, window) for t in tokens]),
    ]
    batch = AttentionBatch(0, [start], [length], [()], 0)
    cost = nsa.branch_cost(batch, sparse, window, widths, 2, 1, written=3)
    assert cost.flops == 2 * sum(seen) * Q_HEADS * (24 + 16)
    last, end = start + length - 1, start + length
    entries = sum(i * stride + block - 1 <= last for i in range(last))
    new = sum(start <= i * stride + block - 1 <= last for i in range(last))
    read = entries + min(end, seen[1]) + min(end, window + length - 1)
    assert cost.bytes == (read + 3 * length + new) * KV_HEADS * 40 + 2 * length * Q_HEADS * 40


def test_the_figures_of_64k_and_a_million() -> None:
    """64 query and 4 KV heads, keys of 192, values of 128, bf16; the dense figures are of the same formulas."""
    sparse, widths = SparseConfig(64, 16, 1, 2), (64, 4, 192, 128)
    for length, dense, ours, saved in (
        (1 << 16, (167.8e6, 2.68e9), (14.4e6, 0.231e9), 11.6), (1 << 20, (2.684e9, 42.9e9), (171.7e6, 2.75e9), 15.6)
    ):  # fmt: skip
        decode = AttentionBatch(1, [length - 1], [1], [()], 0)
        cost = nsa.branch_cost(decode, sparse, 512, widths, 2, 2)
        # All blocks selected, no window: the selected branch alone is dense.
        everything = nsa.branch_cost(decode, SparseConfig(64, length // 64, 1, 2), 0, widths, 2, 2)
        compressed = nsa.branch_cost(decode, SparseConfig(64, 0, 0, 0), 0, widths, 2, 2)
        written = 2 * (4 + 64) * 320 + 2 * 4 * 320
        own = nsa.branch_cost(AttentionBatch(1, [0], [1], [()], 0), SparseConfig(64, 1, 1, 0), 0, widths, 2, 2)
        assert own.bytes == written
        whole = everything.bytes - compressed.bytes, everything.flops - compressed.flops
        assert whole == (pytest.approx(dense[0], rel=2e-3), pytest.approx(dense[1], rel=2e-3))
        assert (cost.bytes, cost.flops) == (pytest.approx(ours[0], rel=5e-3), pytest.approx(ours[1], rel=2e-3))
        assert round(dense[0] / cost.bytes, 1) == round(whole[1] / cost.flops, 1) == saved
    prefill = AttentionBatch(0, [0], [1 << 16], [()], 0)
    pairs = (1 << 16) * ((1 << 16) + 1) / 2
    # 9.17 where a token's own block counts whole; 9.25 up to the token.
    ratio = 2 * 64 * 320 * pairs / nsa.branch_cost(prefill, sparse, 512, widths, 2, 2).flops
    assert ratio == pytest.approx(9.18, rel=1e-2)


def test_compression_counts_once_for_each_head_and_stride() -> None:
    step = StepCost(BASE, nsa, WeightFormat(torch.float32, torch.device("cpu")), 4)
    attention = nsa.cost(BASE, 0, AttentionBatch(0, [0], [40], [()], 0), 4)
    shapes = {n: s for n, s in expected_shapes(BASE).items() if len(s) == 2 and n.startswith("layers")}
    per_token = sum(math.prod(s) for n, s in shapes.items() if ".compress_" not in n)
    per_entry = sum(math.prod(s) for n, s in shapes.items() if ".compress_" in n)
    found = step(0, [0], [40], 0)
    assert found.flops - attention.flops == 2 * 40 * per_token + 2 * (40 / 4) * KV_HEADS * per_entry


def test_what_is_stored_and_what_gqa_stores() -> None:
    gqa_bytes = gqa.kv_layout(BASE, "bfloat16").page_bytes(64)
    assert nsa.kv_layout(BASE, "bfloat16").page_bytes(64) == gqa_bytes * (1 + 1 / 16)
    independent = nsa.kv_layout(CONFIGS["independent"], "bfloat16")
    assert independent.page_bytes(64) == gqa_bytes * (3 + 1 / 16)

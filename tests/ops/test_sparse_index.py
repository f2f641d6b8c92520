"""Blocks that an indexer scores (MiniMax-M3) against float64 loops from the definition: reference and kernels."""

from __future__ import annotations

import pytest
import torch

from gossamer.ops.attention import DecodeWorkspace
from gossamer.ops.sparse import Selection, page_entries, reference, sparse_attention, sparse_decode, triton_prefill
from gossamer.ops.sparse import triton as sparse_kernels
from gossamer.ops.sparse.triton_index import index_scores

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU, BF16 = pytest.mark.gpu, torch.bfloat16
NAN = float("nan")
# rel-RMS against float64. Half precisions round the softmax weights before their product.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float64, torch.float32, *(pytest.param(dtype, marks=GPU) for dtype in (torch.float16, torch.bfloat16))]
# Blocks of 16 and of 32 tokens over pages of 16; more last blocks than one, and tokens that see all.
RULES = [Selection(3, 0, 1, 0), Selection(4, 0, 2, 0, 2), Selection(3, 0, 1, 96, 2), Selection(5, 1, 1, 40)]
PAGE = 16


class Cache:
    """Sequences in pages; what no token may read is NaN, and other entries of the table do not exist."""

    def __init__(
        self, lens: list[int], dtype: torch.dtype, heads: tuple[int, int, int] = (4, 2, 16), index_dim: int = 32,
        page: int = PAGE,
    ) -> None:  # fmt: skip
        torch.manual_seed(sum(lens))
        (self.q_heads, self.kv_heads, self.dim), self.index_dim = heads, index_dim
        self.dtype, self.page, self.lens = dtype, page, lens
        counts = [-(-n // page) for n in lens]
        total = sum(counts) + 2
        self.page_table = torch.full((len(lens), max(counts) + 2), 2**30, dtype=torch.int32, device=DEVICE)
        shapes = [(total, self.kv_heads, page, self.dim)] * 2 + [(total, 1, page, index_dim)]
        self.planes = [torch.full(shape, NAN, dtype=dtype, device=DEVICE) for shape in shapes]
        self.values: list[list[torch.Tensor]] = []
        for slot, ids in enumerate(torch.randperm(total)[: sum(counts)].split(counts)):
            self.page_table[slot, : len(ids)] = ids.to(DEVICE)
            n, at = lens[slot], torch.arange(lens[slot])
            rows = [self.random(n, *plane.shape[1::2]) for plane in self.planes]
            for plane, new in zip(self.planes, rows, strict=True):
                plane[ids[at // page].to(DEVICE), :, (at % page).to(DEVICE)] = new
            self.values.append(rows)
        self.scales: dict[str, torch.Tensor] = {}

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64).to(DEVICE, self.dtype)

    def ask(self, spans: list[tuple[int, int, int]]) -> None:
        """Random queries of the tokens of (slot, start, end); slot -1 is padding, with a position of anything."""
        self.slots = torch.cat([torch.full((b - a,), s, dtype=torch.int32) for s, a, b in spans]).to(DEVICE)
        self.positions = torch.cat([torch.arange(a, b, dtype=torch.int32) for _, a, b in spans]).to(DEVICE)
        self.q = self.random(len(self.slots), self.q_heads, self.dim)
        self.index_q = self.random(len(self.slots), self.kv_heads, self.index_dim)

    def run(self, rule: Selection, backend: str, *, decode: bool = False) -> torch.Tensor:
        out = torch.full_like(self.q, NAN)
        options = {"index_q": self.index_q, "max_seq_len": max(self.lens), "backend": backend, **self.scales}
        common = (self.q, *self.planes[:2], (self.planes[2],), self.page_table, self.slots)
        rest = (rule, page_entries(rule, self.page), self.dim**-0.5, out)
        if not decode:
            sparse_attention(*common, self.positions, *rest, **options)
            return out
        space = DecodeWorkspace.allocate(len(self.q), self.q_heads, self.kv_heads, self.dim, DEVICE, 5)
        space.partials.fill_(NAN)
        sparse_decode(*common, self.positions + 1, *rest, **options, workspace=space)
        return out

    def blocks(self, token: int, head: int, rule: Selection) -> tuple[list[int], float]:
        """Those of the definition, and how far the last of them scores above the first left out."""
        slot, position = int(self.slots[token]), int(self.positions[token])
        size = self.page * rule.pages
        last = position // size
        if position < rule.dense_below:
            return list(range(last + 1)), 1.0
        keys = self.values[slot][2][: position + 1, 0].double()
        logits = keys @ self.index_q[token, head].double()
        scores = [float(logits[j * size : (j + 1) * size].max()) for j in range(last + 1)]
        forced = [j for j in range(last + 1) if j < rule.first or j > last - rule.local]
        rest = sorted((j for j in range(last + 1) if j not in forced), key=lambda j: (-scores[j], j))
        few = rule.num_scored
        gap = scores[rest[few - 1]] - scores[rest[few]] if len(rest) > few else 1.0
        return sorted(forced + rest[:few]), gap

    def oracle(self, rule: Selection) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention in float64 [num_tokens, q_heads, dim], and which heads' choice is nearer to a tie than sums are
        exact."""
        out = torch.zeros(self.q.shape, dtype=torch.float64, device=DEVICE)
        close = torch.zeros(self.q.shape[:2], dtype=torch.bool, device=DEVICE)
        group = self.q_heads // self.kv_heads
        for token in range(len(self.q)):
            slot, position = int(self.slots[token]), int(self.positions[token])
            if slot < 0:
                continue
            k, v = (x[: position + 1].double() for x in self.values[slot][:2])
            for head in range(self.kv_heads):
                blocks, gap = self.blocks(token, head, rule)
                at = [i for j in blocks for i in range(j * self.page * rule.pages, (j + 1) * self.page * rule.pages)]
                kept = torch.tensor([i for i in at if i <= position], device=DEVICE)
                rows = slice(head * group, (head + 1) * group)
                weights = torch.softmax(self.q[token, rows].double() @ k[kept, head].t() * self.dim**-0.5, -1)
                out[token, rows] = weights @ v[kept, head]
                close[token, rows] = gap < 1e-3
        return out, close


def backend_of(dtype: torch.dtype) -> str:
    return "reference" if dtype == torch.float64 else "triton"


def check(found: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert torch.isfinite(found).all()
    error = (found.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert float(error) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_chunks(rule: Selection, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_prefill, "_UNIT", 4)
    cache = Cache([150, 61, 90], dtype)
    cache.ask([(0, 90, 97), (0, 134, 150), (1, 55, 61), (-1, 3, 6), (2, 88, 90)])
    expected, close = cache.oracle(rule)
    dense = (cache.slots >= 0) & (cache.positions < rule.dense_below)
    for workspace_bytes in (1 << 30, 1):
        monkeypatch.setattr(triton_prefill, "_WORKSPACE_BYTES", workspace_bytes)
        found = cache.run(rule, backend_of(dtype))
        assert found.isnan().flatten(1).all(1).equal(dense)
        kept = ~dense[:, None] & ~close
        assert float(kept.double().mean()) > 0.1
        check(found[kept], expected[kept], dtype)
        assert not found[cache.slots < 0].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rule", RULES)
def test_decode(rule: Selection, dtype: torch.dtype) -> None:
    cache = Cache([200, 61], dtype, heads=(6, 2, 32))
    spans = [(0, 199), (0, 160), (0, 175), (0, 96), (1, 60), (1, 31), (0, 0), (1, 3)]
    cache.ask([(slot, t, t + 1) for slot, t in spans] + [(-1, 5, 6)])
    expected, close = cache.oracle(rule)
    assert not close.all(1).any()
    found = cache.run(rule, backend_of(dtype), decode=True)
    check(found[~close], expected[~close], dtype)
    assert not found[-1].any()


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_fp8_pages(backend: str) -> None:
    """Scales change what keys and values are; the indexer's keys beside them have none."""
    cache, rule = Cache([150], torch.float32), RULES[1]
    for name, i in (("k_scales", 0), ("v_scales", 1)):
        scale = torch.randint(-3, 4, cache.planes[i].shape[:2], device=DEVICE).float().exp2()
        cache.planes[i] = (cache.planes[i] / scale[..., None, None]).to(torch.float8_e4m3fn)
        cache.scales[name] = scale
        at = torch.arange(150, device=DEVICE)
        page = cache.page_table[0, at // PAGE].long()
        cache.values[0][i] = cache.planes[i][page, :, at % PAGE].float() * scale[page][..., None]
    cache.ask([(0, 149, 150), (0, 130, 131), (0, 70, 71)])
    expected, _ = cache.oracle(rule)
    for decode in (False, True):
        check(cache.run(rule, backend, decode=decode), expected, torch.float32)


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("whole", [True, False])
def test_signed_scores_and_ties(decode: bool, whole: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores below zero, equal ones (the earlier block) and both zeros; NaN still gives a whole list of real pages."""
    monkeypatch.setattr(sparse_kernels, "_SELECT_MOST", 4096 if whole else 32)
    rule, num_blocks = Selection(9, 0, 2, 0, 2), 75
    positions = torch.tensor([num_blocks * 2 * PAGE - 1, 75 * 2 * PAGE - 20, 700, 290, 40, 3], dtype=torch.int32)
    scores = (torch.rand(6, 2, num_blocks) * 8).round() / 4 - 1.5
    scores[0, 0], scores[1, 0] = torch.randn(num_blocks), -torch.rand(num_blocks)
    table = torch.randperm(2 * num_blocks, dtype=torch.int32)[None]
    expected = reference.select(scores, positions, rule, 2 * PAGE)
    given = [x.to(DEVICE) for x in (scores, table, torch.zeros(6, dtype=torch.int32), positions + int(decode))]
    num_listed = 2 * (rule.num_blocks if decode else rule.num_scored)
    found = torch.full((6, 2, num_listed), -7, dtype=torch.int32, device=DEVICE)
    sparse_kernels.select(*given, rule, PAGE, found, decode=decode, signed=True)
    for token, position in enumerate(positions.tolist()):
        for head in range(2):
            ids = expected[token, head]
            ids = ids[ids >= 0]
            ids = ids if decode else ids[ids <= position // (2 * PAGE) - rule.local]
            pages = [2 * j + i for j in ids.tolist() for i in range(2) if 2 * j + i <= position // PAGE]
            padding = [-7 if decode else -1] * (num_listed - len(pages))
            assert found[token, head].tolist() == table[0, pages].tolist() + padding
    given[0].fill_(NAN)
    found.fill_(-7)
    sparse_kernels.select(*given, rule, PAGE, found, decode=decode, signed=True)
    assert found[0, 0].tolist()[: 2 * rule.num_scored] == table[0, : 2 * rule.num_scored].tolist()


@pytest.mark.parametrize("decode", [False, True])
@pytest.mark.parametrize("heads", [1, 3, 4])
def test_scores_are_the_best_products(heads: int, decode: bool) -> None:
    """Of whole blocks alone, and where several sequences share a program; what is not scored is not written."""
    cache, rule = Cache([200, 77], torch.float32, heads=(heads, heads, 16)), Selection(3, 0, 1, 0, 2)
    cache.ask([(0, 170, 200), (1, 60, 77), (-1, 0, 3)])
    scores = torch.full((len(cache.q), heads, 9), NAN, device=DEVICE)
    index_scores(
        cache.index_q, cache.planes[2], cache.page_table, cache.slots, cache.positions + int(decode), rule, scores,
        decode=decode,
    )  # fmt: skip
    for token, (slot, position) in enumerate(zip(cache.slots.tolist(), cache.positions.tolist(), strict=True)):
        count = position // 32 if slot >= 0 else 0
        assert scores[token, :, count:].isnan().all()
        for head in range(heads):
            logits = cache.values[slot][2][: count * 32, 0].double() @ cache.index_q[token, head].double()
            expected = logits.view(-1, 32).amax(1) if count else logits
            torch.testing.assert_close(scores[token, head, :count].double(), expected, rtol=1e-5, atol=1e-5)


def test_a_million_positions() -> None:
    """Position 2^20 - 1, in blocks of 1024: pages repeat a few, but for one with the key that the query looks for."""
    page, length = 64, 1 << 20
    cache, rule = Cache([8 * page], torch.float32, heads=(2, 1, 16), index_dim=16, page=page), Selection(3, 0, 1, 0, 16)
    cache.ask([(0, 8 * page - 1, 8 * page)])
    own = cache.page_table[0, :8].clone()
    repeated = own[torch.arange(length // page, device=DEVICE) % 4].clone()
    repeated[12345] = own[5]
    cache.page_table, cache.lens = repeated[None].contiguous(), [length]
    cache.positions.fill_(length - 1)
    cache.index_q[:] = 100 * cache.planes[2][own[5].long(), 0, 7]
    cache.q[:] = 4 * cache.planes[0][own[5].long(), 0, 7]
    expected = cache.run(rule, "reference", decode=True)
    cache.page_table[0, 12345] = own[1]
    missed = cache.run(rule, "reference", decode=True)
    assert float((missed - expected).norm() / expected.norm()) > 0.1
    cache.page_table[0, 12345] = own[5]
    check(cache.run(rule, "triton", decode=True), expected.double(), torch.float32)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "page", "pages"), [(BF16, 64, 2), (BF16, 128, 1), (torch.float32, 64, 2)])
def test_published_sizes_on_the_device(dtype: torch.dtype, page: int, pages: int) -> None:
    """64 query and 4 KV heads of 128, 16 blocks of 128: chunks, decode, and decode in a graph whose lengths change."""
    rule = Selection(16, 0, 1, 2048, pages)
    cache = Cache([5000, 2500], dtype, heads=(64, 4, 128), index_dim=128, page=page)
    spans = [(0, 2040, 2060), (0, 4400, 4700), (1, 2400, 2500)]
    cache.ask(spans)
    found, exact = cache.run(rule, "triton"), cache.run(rule, "reference")
    dense = cache.positions < 2048
    assert found.isnan().flatten(1).all(1).equal(dense)
    found, exact = found[~dense].double(), exact[~dense].double()
    per_head = (found - exact).norm(dim=-1) / exact.norm(dim=-1)
    assert float((per_head > 3 * TOLERANCE[dtype]).double().mean()) < 0.02  # near ties
    cache.ask([(0, 4999, 5000), (1, 2200, 2201), (0, 900, 901), (-1, 0, 1)])
    out = torch.full_like(cache.q, NAN)
    lens = cache.positions + 1
    space = DecodeWorkspace.allocate(4, 64, 4, 128, DEVICE)

    def step() -> None:
        sparse_decode(
            cache.q, *cache.planes[:2], (cache.planes[2],), cache.page_table, cache.slots, lens, rule,
            page_entries(rule, page), 128**-0.5, out, index_q=cache.index_q, workspace=space, max_seq_len=1 << 20,
        )  # fmt: skip

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for shift in (0, 77, 2047):
        lens.copy_((cache.positions + 1 - shift).clamp_min(1))
        cache.positions, kept = lens - 1, cache.positions
        expected, close = cache.oracle(rule)
        cache.positions = kept
        out.fill_(NAN)
        graph.replay()
        check(out[~close], expected[~close], dtype)
        assert not out[-1].any()

"""Token-sparse latent attention against float64 loops written from the definition: references, and their kernels."""

from __future__ import annotations

import pytest
import torch

from gossamer.ops import dsa
from gossamer.ops.attention import DecodeWorkspace
from gossamer.ops.dsa import attend_chosen, choose_tokens, rope_write_index
from gossamer.ops.kv_cache.reference import page_scale
from gossamer.ops.mla import latent_decode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = pytest.mark.gpu
NAN = float("nan")
# rel-RMS against float64. Half precisions round the softmax weights before their product.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float64, torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=GPU)]
PAGE = 16


class Cache:
    """Sequences in pages; what no token may read is NaN, and other entries of the table do not exist."""

    def __init__(
        self, lens: list[int], dtype: torch.dtype, *, index: tuple[int, int] = (3, 16),
        sizes: tuple[int, int, int] = (2, 32, 16), page: int = PAGE,
    ) -> None:  # fmt: skip
        torch.manual_seed(sum(lens))
        (self.index_heads, self.index_dim), (self.heads, self.rank, self.rope) = index, sizes
        self.dtype, self.page, self.lens = dtype, page, lens
        counts = [-(-n // page) for n in lens]
        total = sum(counts) + 2
        self.page_table = torch.full((len(lens), max(counts) + 2), 2**30, dtype=torch.int32, device=DEVICE)
        self.pages = torch.full((total, 1, page, self.rank + self.rope), NAN, dtype=dtype, device=DEVICE)
        self.key_pages = torch.full((total, 1, page, self.index_dim), NAN, dtype=dtype, device=DEVICE)
        for slot, ids in enumerate(torch.randperm(total)[: sum(counts)].split(counts)):
            self.page_table[slot, : len(ids)] = ids.to(DEVICE)
            n = lens[slot]
            rows = self.rows(slot, range(n))
            self.pages.view(-1, self.pages.shape[3])[rows] = self.random(n, self.pages.shape[3])
            self.key_pages.view(-1, self.index_dim)[rows] = self.random(n, self.index_dim)

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64).to(DEVICE, self.dtype)

    def rows(self, slot: int, positions: range) -> torch.Tensor:
        p = torch.tensor(list(positions), device=DEVICE)
        return self.page_table[slot, p // self.page].long() * self.page + p % self.page

    def ask(self, spans: list[tuple[int, int, int]]) -> None:
        """Random queries of the tokens of (slot, start, end); slot -1 is padding, with a position of anything."""
        self.slots = torch.cat([torch.full((b - a,), s, dtype=torch.int32) for s, a, b in spans]).to(DEVICE)
        self.positions = torch.cat([torch.arange(a, b, dtype=torch.int32) for _, a, b in spans]).to(DEVICE)
        num = len(self.slots)
        self.index_q = self.random(num, self.index_heads, self.index_dim)
        self.weights = self.random(num, self.index_heads)
        self.q_latent, self.q_rope = self.random(num, self.heads, self.rank), self.random(num, self.heads, self.rope)

    def choose(self, top_k: int, backend: str) -> torch.Tensor:
        chosen = torch.full((len(self.slots), top_k), 2**30, dtype=torch.int32, device=DEVICE)
        choose_tokens(
            self.index_q, self.weights, self.key_pages, self.page_table, self.slots, self.positions, chosen,
            max_seq_len=max(self.lens), backend=backend,
        )  # fmt: skip
        return chosen

    def attend(self, chosen: torch.Tensor, backend: str, num_programs: int = 2, blocks: int = 1) -> torch.Tensor:
        out = torch.full_like(self.q_latent, NAN)
        workspace = DecodeWorkspace.allocate(8, self.heads, blocks, self.rank, DEVICE, 2 * num_programs)
        workspace.partials.fill_(NAN)
        workspace.lse.fill_(NAN)
        attend_chosen(
            self.q_latent, self.q_rope, self.pages, chosen, self.slots, self.positions, 0.2, out,
            scales=getattr(self, "scales", None), workspace=workspace, backend=backend,
        )  # fmt: skip
        return out

    def best(self, token: int, top_k: int) -> tuple[list[int], float]:
        """The rows chosen by the definition, and how far the last of them scores above the first left out."""
        slot, position = int(self.slots[token]), int(self.positions[token])
        if slot < 0:
            return [], 1.0
        rows = self.rows(slot, range(position + 1))
        keys = self.key_pages.view(-1, self.index_dim)[rows].double()
        scores = torch.zeros(position + 1, dtype=torch.float64, device=DEVICE)
        for h in range(self.index_heads):
            scores += self.weights[token, h].double() * torch.relu(keys @ self.index_q[token, h].double())
        order = sorted(range(position + 1), key=lambda i: (-float(scores[i]), i))
        gap = float(scores[order[top_k - 1]] - scores[order[top_k]]) if position + 1 > top_k else 1.0
        return rows[sorted(order[:top_k])].tolist(), gap

    def oracle(self, chosen: torch.Tensor) -> torch.Tensor:
        out = torch.zeros(self.q_latent.shape, dtype=torch.float64, device=DEVICE)
        latents = self.pages.double()
        if hasattr(self, "scales"):
            latents = latents * self.scales.double()[..., None, None]
        latents = latents.view(-1, latents.shape[3])
        for token, listed in enumerate(chosen):
            rows = latents[listed[listed >= 0].long()]
            q = torch.cat((self.q_latent[token], self.q_rope[token]), -1).double()
            if len(rows):
                out[token] = torch.softmax(q @ rows.t() * 0.2, -1) @ rows[:, : self.rank]
        return out


def backend_of(dtype: torch.dtype) -> str:
    return "reference" if dtype == torch.float64 else "triton"


def rel_rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


SPANS = [
    [(0, 0, 1)],
    [(1, 40, 61)],
    [(0, 99, 100), (-1, 7, 8), (1, 60, 61), (2, 0, 1)],
    [(2, 3, 4), (0, 70, 100), (1, 0, 30), (-1, 0, 5)],
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 8, 40, 128])
@pytest.mark.parametrize("spans", SPANS, ids=str)
def test_the_best_tokens_are_chosen(spans: list[tuple[int, int, int]], top_k: int, dtype: torch.dtype) -> None:
    cache = Cache([100, 61, 5], dtype)
    cache.ask(spans)
    chosen = cache.choose(top_k, backend_of(dtype))
    decided = 0
    for token, listed in enumerate(chosen.tolist()):
        expected, gap = cache.best(token, top_k)
        assert len([row for row in listed if row >= 0]) == len(expected)
        assert listed[len(expected) :] == [-1] * (top_k - len(expected))
        if gap == 0 or gap > 1e-4:  # else nearer to a tie than the sums are exact
            decided += 1
            assert listed[: len(expected)] == expected
    assert decided >= 0.9 * len(chosen)


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("held", [128, 32])
@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_ties_go_to_the_earliest(weight: float, held: int, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also among zeros, whose sign is that of the weights, and where more are equal than a program holds."""
    from gossamer.ops.dsa import triton

    monkeypatch.setattr(triton, "_HELD", held)
    monkeypatch.setattr(triton, "_SAMPLE", 16)
    monkeypatch.setattr(triton, "_GATHER", 16)
    cache = Cache([100], torch.float32, index=(1, 16))
    cache.ask([(0, 90, 95)])
    cache.index_q.fill_(1.0)
    cache.weights.fill_(weight)
    flat = cache.key_pages.view(-1, 16)
    flat[cache.rows(0, range(100))] = -1.0  # nothing but zeros
    assert cache.choose(7, backend).tolist() == [cache.rows(0, range(7)).tolist()] * 5
    flat[cache.rows(0, range(50, 53))] = 1.0  # three that differ, alike
    kept = [*range(4), 50, 51, 52] if weight > 0 else range(7)
    expected = cache.page_table[0, torch.tensor(kept) // PAGE] * PAGE + torch.tensor(kept, device=DEVICE) % PAGE
    assert cache.choose(7, backend).tolist() == [expected.tolist()] * 5
    flat[cache.rows(0, range(100))] = torch.arange(100.0, device=DEVICE)[:, None].expand(-1, 16).clone()
    chosen = cache.choose(7, backend).tolist()
    for token, position in enumerate(range(90, 95)):
        best = range(position - 6, position + 1) if weight > 0 else range(7)
        assert chosen[token] == cache.rows(0, best).tolist()


@pytest.mark.parametrize("sample", [4, 32])
@pytest.mark.parametrize("order", ["random", "rising", "falling", "steps", "sampled low", "sampled high"])
def test_candidates_hold_the_best(order: str, sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However scores are ordered along a row, listed by several programs: also where their sample misleads them."""
    from gossamer.ops.dsa import triton

    monkeypatch.setattr(triton, "_HELD", 64)
    monkeypatch.setattr(triton, "_SAMPLE", sample)
    monkeypatch.setattr(triton, "_GATHER", 64)
    num, top_k = 500, 20
    cache = Cache([num], torch.float32, index=(1, 16))
    cache.ask([(0, num - 3, num)])
    cache.index_q.fill_(1.0)
    cache.weights.fill_(1.0)
    mixed, rising = torch.randperm(num) + 1.0, torch.arange(num) + 1.0
    values = {"rising": rising, "falling": rising.flip(0), "steps": 1.0 + torch.arange(num) // 15}.get(order, mixed)
    if order.startswith("sampled"):
        values[:: -(-num // sample)] += num if order.endswith("high") else -num
    cache.key_pages.view(-1, 16)[cache.rows(0, range(num))] = values[:, None].expand(-1, 16).to(DEVICE)
    for token, listed in enumerate(cache.choose(top_k, "triton").tolist()):
        assert listed == cache.best(token, top_k)[0]


@pytest.mark.parametrize("nan", [0x7FC00000, 0x7FFFFFFF, -1])
@pytest.mark.parametrize("held", [128, 32])
def test_scores_that_are_no_numbers_still_give_a_list(nan: int, held: int) -> None:
    """Whatever their bits (CUDA's arithmetic gives 0x7FFFFFFF): places of the row's own pages, each once."""
    from gossamer.ops.dsa import triton

    scores = torch.full((2, 100), nan, dtype=torch.int32, device=DEVICE).view(torch.float32)
    table = torch.randperm(9, device=DEVICE)[None].int()
    zeros, positions = torch.zeros(2, dtype=torch.int32, device=DEVICE), torch.tensor([99, 60], device=DEVICE).int()
    chosen = torch.full((4, 7), -7, dtype=torch.int32, device=DEVICE)
    where, buffers = (table, zeros, positions), (chosen.new_empty(2, 3, 2, held), chosen.new_empty(2, 3))
    sizes = {"TOP": 7, "PAGE": 16, "HELD": held, "PDL": False}
    triton._gather_kernel[(6,)](scores, *buffers, *where, 9, 100, 3, SAMPLE=16, BLOCK=16, **sizes)
    triton._choose_kernel[(2,)](scores, *buffers, *where, chosen, 9, 100, 3, **sizes)
    assert chosen[:2].tolist() == [(table[0, 0] * 16 + torch.arange(7, device=DEVICE)).tolist()] * 2
    assert (chosen[2:] == -7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("top_k", "num_programs", "blocks"), [(1, 1, 1), (8, 1, 2), (40, 30, 1), (128, 100, 2)])
@pytest.mark.parametrize("spans", SPANS, ids=str)
def test_attention_to_the_chosen(
    spans: list[tuple[int, int, int]], top_k: int, num_programs: int, blocks: int, dtype: torch.dtype
) -> None:
    cache = Cache([100, 61, 5], dtype)
    cache.ask(spans)
    chosen = cache.choose(top_k, "reference")
    found = cache.attend(chosen, backend_of(dtype), num_programs, blocks)
    assert rel_rms(found, cache.oracle(chosen)) < TOLERANCE[dtype]
    assert not found[cache.slots < 0].any()


def test_blocks_of_heads() -> None:
    """In fp32 they are of 16 heads, whatever the workspace has."""
    cache = Cache([100], torch.float32, sizes=(32, 32, 16))
    cache.ask([(0, 97, 100)])
    chosen = cache.choose(40, "reference")
    for num_programs in (1, 30):
        assert rel_rms(cache.attend(chosen, "triton", num_programs), cache.oracle(chosen)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("num_programs", [1, 30])
def test_attention_to_the_chosen_of_fp8_pages(num_programs: int, backend: str) -> None:
    cache = Cache([100, 33], torch.float32)
    x = cache.pages * torch.randint(-4, 4, (len(cache.pages), 1, 1, 1), device=DEVICE).float().exp2()
    cache.scales = page_scale(x.abs().nan_to_num(0.0).amax((2, 3)))  # type: ignore[attr-defined]
    cache.pages = (x / cache.scales[..., None, None]).to(torch.float8_e4m3fn)  # type: ignore[attr-defined]
    cache.ask([(0, 80, 90), (1, 32, 33)])
    chosen = cache.choose(24, "reference")
    assert rel_rms(cache.attend(chosen, backend, num_programs), cache.oracle(chosen)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_list_of_everything_is_dense(backend: str) -> None:
    cache = Cache([100, 61, 5], torch.float32)
    cache.ask([(0, 99, 100), (1, 60, 61), (2, 4, 5)])
    dense = torch.full_like(cache.q_latent, NAN)
    latent_decode(
        cache.q_latent, cache.q_rope, cache.pages, cache.page_table, cache.slots, cache.positions + 1, 0.2, dense,
        workspace=None, max_seq_len=100, backend="reference",
    )  # fmt: skip
    assert rel_rms(cache.attend(cache.choose(100, backend), backend), dense) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_token_depends_on_its_past_alone(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not on what comes later, on others, or on how many share a launch; scores exist for a few tokens at a time."""
    from gossamer.ops.dsa import triton

    cache = Cache([100, 61], torch.float32)
    cache.ask([(0, 60, 75), (1, 40, 50)])
    before = cache.choose(16, backend)
    out = cache.attend(before, backend)
    monkeypatch.setattr(triton, "_SCORE_BYTES", 4 * 100 * 3)
    monkeypatch.setattr(dsa.reference, "_TILE_ELEMENTS", 1000)
    for later in (cache.rows(0, range(75, 100)), cache.rows(1, range(50, 61))):
        cache.key_pages.view(-1, cache.index_dim)[later] = NAN
        cache.pages.view(-1, cache.pages.shape[3])[later] = NAN
    assert cache.choose(16, backend).equal(before)
    torch.testing.assert_close(cache.attend(before, backend, 100), out, rtol=1e-5, atol=1e-6)
    slots, positions, q, w = cache.slots, cache.positions, cache.index_q, cache.weights
    for token in (0, 14, 24):
        one = slice(token, token + 1)
        cache.slots, cache.positions, cache.index_q, cache.weights = slots[one], positions[one], q[one], w[one]
        assert cache.choose(16, backend)[0].equal(before[token])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("num_heads", "dim", "rope"), [(3, 16, 8), (24, 32, 32), (2, 128, 64)])
def test_index_keys_and_queries(num_heads: int, dim: int, rope: int, interleaved: bool, dtype: torch.dtype) -> None:
    """LayerNorm of the key, then rotations as those of complex numbers, written as halves; padding writes nothing."""
    cache = Cache([40, 20], dtype, index=(num_heads, dim))
    slots = torch.tensor([0] * 9 + [-1] + [1] * 3, dtype=torch.int32, device=DEVICE)
    positions = torch.tensor([*range(11, 20), 5, *range(17, 20)], dtype=torch.int32, device=DEVICE)
    num, before = len(slots), cache.key_pages.clone()
    wide = cache.random(num, num_heads * dim + dim + num_heads + 3)
    q, key, weights, _ = wide.split((num_heads * dim, dim, num_heads, 3), 1)
    norm = cache.random(dim), cache.random(dim)
    angles = torch.outer(torch.arange(40.0), torch.rand(rope // 2)).double()
    cos, sin = (torch.cat(p, 1).to(DEVICE, dtype) for p in ((angles.cos(),) * 2, (-angles.sin(), angles.sin())))
    q_out = torch.full((num, num_heads, dim), NAN, dtype=dtype, device=DEVICE)
    w_out = torch.full((num, num_heads), NAN, dtype=dtype, device=DEVICE)
    rope_write_index(
        q, key, weights, norm, 1e-6, cos, sin, positions, slots, cache.page_table, cache.key_pages, q_out, w_out,
        interleaved=interleaved, backend=backend_of(dtype),
    )  # fmt: skip
    x = key.double()
    x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    turned = torch.cat((q.double().unflatten(1, (num_heads, dim)), (x * norm[0] + norm[1]).double()[:, None]), 1)
    part = turned[..., :rope]
    pairs = part.unflatten(-1, (-1, 2)) if interleaved else part.unflatten(-1, (2, -1)).transpose(-1, -2)
    unit = torch.complex(cos[positions.long(), : rope // 2].double(), sin[positions.long(), rope // 2 :].double())
    spun = torch.view_as_complex(pairs.contiguous()) * unit[:, None]
    turned = torch.cat((spun.real, spun.imag, turned[..., rope:]), -1)
    live = slots >= 0
    rows = torch.tensor([int(cache.rows(s, range(p, p + 1))) for s, p in zip(slots, positions, strict=True) if s >= 0])
    flat = cache.key_pages.view(-1, dim)
    tolerance = TOLERANCE[dtype]
    assert rel_rms(q_out[live], turned[live, :-1]) < tolerance
    assert rel_rms(flat[rows.to(DEVICE)], turned[live, -1]) < tolerance
    assert w_out[live].equal(weights[live])
    assert not q_out[~live].any()
    assert not w_out[~live].any()
    flat[rows.to(DEVICE)] = before.view(-1, dim)[rows.to(DEVICE)]
    torch.testing.assert_close(cache.key_pages, before, equal_nan=True, rtol=0, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("num_heads", "index_heads"), [(128, 64), (64, 32)])
def test_published_sizes(num_heads: int, index_heads: int) -> None:
    """DeepSeek-V3.2 and GLM-5: decode rows, split and not, and a chunk."""
    cache = Cache(
        [9000, 3000, 100, 5000], torch.bfloat16, index=(index_heads, 128), sizes=(num_heads, 512, 64), page=64
    )
    blocks = num_heads // 64
    for spans in ([(0, 8999, 9000), (2, 99, 100), (-1, 0, 1), (3, 4999, 5000)], [(1, 2400, 3000), (0, 10, 30)]):
        cache.ask(spans)
        chosen, expected = cache.choose(2048, "triton"), cache.choose(2048, "reference")
        assert (chosen >= 0).sum(1).equal((expected >= 0).sum(1))
        for token in range(0, len(chosen), 57):
            best, _ = cache.best(token, 2048)
            assert len({*best} - {*chosen[token].tolist()}) <= 0.005 * max(1, len(best))
        for num_programs in (1, 66):
            for some in (chosen, chosen[:, :100].contiguous()):  # of which no whole number of blocks is 100
                found = cache.attend(some, "triton", num_programs, blocks)
                assert rel_rms(found, cache.oracle(some)) < TOLERANCE[torch.bfloat16]
                assert not found[cache.slots < 0].any()


@pytest.mark.gpu
def test_a_captured_graph_follows_its_inputs() -> None:
    """Contexts that grow, rows that come and go: sizes and launches are those of the longest context."""
    cache = Cache([9000, 3000, 100, 5000], torch.bfloat16, index=(64, 128), sizes=(128, 512, 64), page=64)
    cache.ask([(0, 10, 11), (1, 2999, 3000), (2, 50, 51), (-1, 0, 1)])
    workspace = DecodeWorkspace.allocate(8, 128, 2, 512, DEVICE, 132)
    chosen = torch.full((4, 2048), 2**30, dtype=torch.int32, device=DEVICE)
    out = torch.full_like(cache.q_latent, NAN)

    def step() -> None:
        where = cache.slots, cache.positions
        choose_tokens(
            cache.index_q, cache.weights, cache.key_pages, cache.page_table, *where, chosen, max_seq_len=1 << 17
        )
        attend_chosen(cache.q_latent, cache.q_rope, cache.pages, chosen, *where, 0.2, out, workspace=workspace)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for slots, positions in (([0, 1, 2, 3], [8999, 20, 99, 4000]), ([3, -1, 0, -1], [2047, 0, 2048, 7])):
        cache.slots.copy_(torch.tensor(slots))
        cache.positions.copy_(torch.tensor(positions))
        cache.index_q.normal_()
        graph.replay()
        found = out.clone()
        listed = (chosen >= 0).sum(1).tolist()
        assert listed == [min(p + 1, 2048) * (s >= 0) for s, p in zip(slots, positions, strict=True)]
        assert rel_rms(found, cache.oracle(chosen)) < TOLERANCE[torch.bfloat16]

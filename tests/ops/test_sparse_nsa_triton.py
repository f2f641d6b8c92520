"""NSA's kernels against the references: spans and their entries, compressed branch, gated sum, a whole layer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from layers.test_nsa import BASE, CONFIGS, HIDDEN, Layer, normed, weights_of
from ops.test_sparse_triton import DEVICE, TOLERANCE, check

from gossamer.ops.attention import DecodeWorkspace
from gossamer.ops.sparse import (
    Selection,
    entry_spans,
    mix_branches,
    nsa_entries,
    sparse_attention,
    sparse_decode,
    write_entries,
)

PAGE = 16
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="runs in the interpreter")
DTYPES = [
    torch.float32,
    pytest.param(torch.bfloat16, marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="on a device")),
]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def tokens_of(spans: list[tuple[int, int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Slots and positions of (slot, start, end), int32."""
    slots = torch.cat([torch.full((b - a,), s, dtype=torch.int32) for s, a, b in spans])
    return slots.to(DEVICE), torch.cat([torch.arange(a, b, dtype=torch.int32) for _, a, b in spans]).to(DEVICE)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(
    "spans", [[(0, 0, 37), (-1, 0, 9), (1, 5, 40)], [(1, 39, 40), (0, 63, 64), (0, 6, 7)], [(0, 0, 7)]], ids=str
)
def test_spans_and_their_entries(spans: list[tuple[int, int, int]], scaled: bool) -> None:
    heads, dim, per = 2, 16, nsa_entries().per_block
    table = torch.randperm(12, dtype=torch.int32, device=DEVICE).view(2, 6)
    pages = tuple(torch.randn(12, heads, PAGE, dim, device=DEVICE) for _ in range(2))
    scales = tuple(torch.rand(12, heads, device=DEVICE) + 0.5 for _ in range(2)) if scaled else None
    if scaled:
        pages = tuple(p.to(torch.float8_e4m3fn) for p in pages)
    embeddings = tuple(torch.randn(PAGE // 2 * dim, device=DEVICE) for _ in range(2))
    where = (table, *tokens_of(spans))
    found = {}
    for backend in ("reference", "triton"):
        tokens, made = entry_spans(pages, embeddings, where, per, scales=scales, backend=backend)
        entries = tuple(torch.full((12, heads, per, dim), torch.nan, device=DEVICE) for _ in range(2))
        k, v = (m.unflatten(2, (-1, dim)).sum(2) for m in made)
        write_entries(entries, k, v, tokens, where, PAGE, backend=backend)
        found[backend] = tokens, made, entries
    (tokens, made, entries), (kernel_tokens, kernel_made, kernel_entries) = found["reference"], found["triton"]
    n, num_tokens = len(tokens), len(where[1])
    assert len(kernel_tokens) == min(num_tokens, num_tokens // 4 + len(table))  # by shapes alone
    assert kernel_tokens.tolist() == [*tokens.tolist(), *[-1] * (len(kernel_tokens) - n)]
    for a, b in zip((*made, *entries), (*(m[:n] for m in kernel_made), *kernel_entries), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5, equal_nan=True)
    written = sum((s >= 0) and (p + 1) % 4 == 0 and p >= 7 for s, a, b in spans for p in range(a, b))
    assert n == written == int((~entries[0].isnan()).sum()) // (heads * dim)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_heads", [4, 6, 20])
def test_gated_sum(num_heads: int, dtype: torch.dtype) -> None:
    branches = [torch.randn(5, num_heads, 16, device=DEVICE).to(dtype) for _ in range(3)]
    gates = torch.randn(5, 3 * num_heads, device=DEVICE).to(dtype)
    exact = [b.double() for b in branches]
    mix_branches(exact[2], gates.double(), *exact[:2], backend="reference")
    opened = torch.sigmoid(gates.double()).view(5, 3, num_heads, 1)
    torch.testing.assert_close(exact[2], sum(opened[:, i] * b.double() for i, b in enumerate(branches)))
    mix_branches(branches[2], gates, *branches[:2], backend="triton")
    check(branches[2], exact[2].cpu(), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decode", [True, False])
def test_the_compressed_branch_comes_with_the_selected(decode: bool, dtype: torch.dtype) -> None:
    """A group of 3 in 4 rows; rows that see no entry yet, and padding, are zero."""
    q_heads, heads, dim, num_pages = 6, 2, 16, 9
    rule, entries = Selection(4, 1, 2, 0), nsa_entries()
    spans = [(0, 143, 144), (1, 6, 7), (0, 57, 58), (-1, 0, 1), (1, 30, 31)]
    if not decode:
        spans = [(0, 100, 144), (-1, 0, 3), (1, 0, 30)]
    table = torch.randperm(2 * num_pages, dtype=torch.int32, device=DEVICE).view(2, num_pages)
    pages = [torch.randn(2 * num_pages, heads, n, dim, device=DEVICE).to(dtype) for n in (PAGE, PAGE, 4, 4)]
    for plane in pages[2:]:
        plane[table[:, 0].long(), :, 0] = torch.nan  # would begin before the sequence
        plane[table[1, 2:].long()] = torch.nan
    slots, positions = tokens_of(spans)
    q = torch.randn(len(slots), q_heads, dim, device=DEVICE).to(dtype)
    found = {}
    for backend in ("reference", "triton"):
        exact = [x.double() if backend == "reference" else x for x in (q, *pages)]
        out, compressed = (torch.full_like(exact[0], torch.nan) for _ in range(2))
        (run, at) = (
            (sparse_decode, torch.where(slots < 0, 0, positions + 1)) if decode else (sparse_attention, positions)
        )
        options = {"workspace": DecodeWorkspace.allocate(len(slots), q_heads, heads, dim, DEVICE)} if decode else {}
        run(
            *exact[:3], (exact[3],), table, slots, at, rule, entries, 0.3, out, values=exact[4],
            compressed=compressed, max_seq_len=num_pages * PAGE, backend=backend, **options,
        )  # fmt: skip
        found[backend] = compressed, out
    for expected, actual in zip(found["reference"], found["triton"], strict=True):
        check(actual, expected.cpu(), dtype)
    blind = (slots < 0) | (positions < 7)
    assert not found["triton"][0][blind].any()
    assert found["triton"][0][~blind].any(-1).all()


@on_cpu
@pytest.mark.parametrize(
    "name", ["shared", "independent", pytest.param("normed over all heads", marks=pytest.mark.slow)]
)
def test_a_layer_of_kernels(name: str) -> None:
    """Prefill in two chunks and decode beside it; the oracle of the layer is float64 on the same route."""
    config = dataclasses.replace(CONFIGS[name], sparse=dataclasses.replace(BASE.sparse, num_blocks=4))
    weights, x = weights_of(config), normed(torch.randn(70, HIDDEN, dtype=torch.float64))
    (expected,) = Layer(config, weights, True).run([x], [0])
    layer = Layer(config, weights, True, torch.float32, backend="triton")
    found = [layer.run([part], [at])[0] for part, at in ((x[:41], 0), (x[41:67], 41))]
    found += [layer.run([x[at : at + 1], x[:9]], [at, 0], num_decode=1)[0] for at in (67, 68)]
    found += layer.run([x[69:70]], [69], num_decode=1)
    check(torch.cat(found), expected, torch.float32)
    assert TOLERANCE[torch.float32] < 1e-5

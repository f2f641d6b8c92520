"""Latent attention's kernels against float64: ragged and padded rows, cuts, pieces, FP8 pages, poisoned memory."""

from __future__ import annotations

import pytest
import torch

from gossamer.ops.attention import DecodeWorkspace
from gossamer.ops.kv_cache.reference import page_scale
from gossamer.ops.mla import latent_decode, latent_prefill, rope_write_latents

# rel-RMS against float64. Half precisions round the softmax weights, and what is expanded, before their products.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPU = pytest.mark.gpu
NAN = float("nan")


class Batch:
    """Rows over latent pages. Everything no row may read is NaN, or a page that does not exist."""

    def __init__(
        self, seq_lens: list[int], q_lens: list[int], sizes: tuple[int, int, int, int, int], dtype: torch.dtype,
        *, page: int = 16, padding: int = 0, fp8: bool = False,
    ) -> None:  # fmt: skip
        torch.manual_seed(sum(seq_lens) + len(q_lens))
        self.heads, self.rank, self.nope, self.rope, self.v = sizes
        counts = [-(-n // page) for n in seq_lens]
        order = torch.randperm(sum(counts) + 2)[: sum(counts)].split(counts)
        table = torch.full((len(seq_lens) + 1, max(counts, default=0) + 2), 2**30)
        slots = torch.randperm(len(seq_lens) + 1)[: len(seq_lens)]
        pages = torch.full((sum(counts) + 2, 1, page, self.rank + self.rope), NAN, dtype=torch.float64)
        for slot, ids, seq_len in zip(slots.tolist(), order, seq_lens, strict=True):
            table[slot, : len(ids)] = ids
            tokens = torch.randn(seq_len, self.rank + self.rope, dtype=torch.float64)
            tokens[:, self.rank :] *= 8  # rotated keys are larger than latents
            for position in range(seq_len):
                pages[ids[position // page], 0, position % page] = tokens[position]
        live = [q_len > 0 for q_len in q_lens]
        self.pages, self.scales = pages.to(DEVICE, dtype), None
        if fp8:
            x = self.pages.float() * torch.randint(-4, 4, (len(pages), 1, 1, 1), device=DEVICE).float().exp2()
            self.scales = page_scale(x.abs().nan_to_num(0.0).amax((2, 3)))
            self.pages = (x / self.scales[..., None, None]).to(torch.float8_e4m3fn)
            self.scales = self.scales.masked_fill(x.isnan().all(3).all(2), NAN).contiguous()
        self.page_table = table.to(DEVICE, torch.int32)
        int32 = {"dtype": torch.int32, "device": DEVICE}
        self.slots = torch.tensor([s if a else -1 for s, a in zip(slots.tolist(), live, strict=True)], **int32)
        self.seq_lens = torch.tensor([n if a else 0 for n, a in zip(seq_lens, live, strict=True)], **int32)
        self.cu_seqlens_q = torch.tensor([0, *q_lens], device=DEVICE).cumsum(0).to(torch.int32)
        self.q = torch.randn(sum(q_lens) + padding, self.heads, self.nope + self.rope).to(DEVICE, dtype)
        self.kv_b = (torch.randn(self.heads, self.nope + self.v, self.rank) / self.rank**0.5).to(DEVICE, dtype)
        self.q_latent = torch.randn(len(q_lens), self.heads, self.rank).to(DEVICE, dtype)
        self.scale = (self.nope + self.rope) ** -0.5 / 4
        self.max_q_len, self.max_seq_len = max(q_lens, default=0), max(seq_lens, default=0)
        self.num_context = sum(seq_lens)

    def exact(self) -> torch.Tensor:
        return self.pages.double() * (1.0 if self.scales is None else self.scales.double()[..., None, None])

    def prefill(self, backend: str, num_context: int | None = None) -> torch.Tensor:
        wide = backend == "reference"
        q, kv_b, pages = (
            (self.q.double(), self.kv_b.double(), self.exact()) if wide else (self.q, self.kv_b, self.pages)
        )
        out = q.new_full((len(q), self.heads, self.v), NAN)
        latent_prefill(
            q, kv_b, pages, self.page_table, self.slots, self.cu_seqlens_q, self.seq_lens,
            self.num_context if num_context is None else num_context, self.max_q_len, self.scale, out,
            scales=None if wide else self.scales, backend=backend,
        )  # fmt: skip
        return out

    def decode(self, backend: str, num_programs: int | None = None, blocks: int = 1) -> torch.Tensor:
        wide = backend == "reference"
        q, rope, pages = self.q_latent, self.q[: len(self.q_latent), :, self.nope :], self.pages
        if wide:
            q, rope, pages = q.double(), rope.double(), self.exact()
        double = None if num_programs is None else 2 * num_programs  # for two that share a multiprocessor
        workspace = DecodeWorkspace.allocate(len(q), self.heads, blocks, self.rank, DEVICE, double)
        workspace.partials.fill_(NAN)
        workspace.lse.fill_(NAN)
        out = torch.full_like(q, NAN)
        latent_decode(
            q, rope, pages, self.page_table, self.slots, self.seq_lens, self.scale, out,
            scales=None if wide else self.scales, workspace=workspace, max_seq_len=self.max_seq_len, backend=backend,
        )  # fmt: skip
        return out


def rel_rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-30))


TINY, V3 = (2, 32, 16, 16, 32), (16, 512, 128, 64, 128)
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=GPU)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_programs", [1, 2, 5, 40])
@pytest.mark.parametrize("seq_lens", [[1], [33], [16, 0, 100, 1, 47], [64, 32, 16]])
def test_decode(seq_lens: list[int], num_programs: int, dtype: torch.dtype) -> None:
    batch = Batch(seq_lens, [int(n > 0) for n in seq_lens], TINY, dtype, padding=seq_lens.count(0))
    expected = batch.decode("reference")
    found = batch.decode("triton", num_programs)
    assert rel_rms(found, expected) < TOLERANCE[dtype]
    assert not found[batch.slots < 0].any()
    assert rel_rms(batch.decode("triton", num_programs, blocks=2), expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("num_programs", [1, 3])
def test_decode_over_fp8_pages(num_programs: int) -> None:
    batch = Batch([33, 80, 1], [1, 1, 1], TINY, torch.float32, fp8=True)
    assert rel_rms(batch.decode("triton", num_programs), batch.decode("reference")) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("seq_lens", "q_lens"),
    [([40], [40]), ([70], [3]), ([33, 50, 1, 20], [33, 7, 1, 0]), ([100, 5], [64, 5]), ([90], [1])],
)
def test_prefill(seq_lens: list[int], q_lens: list[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.ops.mla import triton_prefill

    batch = Batch(seq_lens, q_lens, TINY, dtype, padding=5)
    expected = batch.prefill("reference")
    # In one piece, in pieces of 64 lines, and with more announced than there are.
    for piece, announced in ((1 << 29, 0), (64, 0), (64, 200)):
        size = 2 * (16 + 32) * batch.q.element_size()
        monkeypatch.setattr(triton_prefill, "PIECE_BYTES", min(1 << 29, piece * size))
        found = batch.prefill("triton", batch.num_context + announced)
        assert rel_rms(found, expected) < TOLERANCE[dtype]
        assert not found[sum(q_lens) :].any()


def test_prefill_over_fp8_pages() -> None:
    batch = Batch([33, 50], [20, 7], TINY, torch.float32, fp8=True)
    assert rel_rms(batch.prefill("triton"), batch.prefill("reference")) < TOLERANCE[torch.float32]


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered")
def test_one_sequence_never_changes_another() -> None:
    """Even if it holds NaN, in the same tiles as others."""
    batch = Batch([33, 50, 20], [33, 9, 20], TINY, torch.float32)
    before, decoded = batch.prefill("triton"), batch.decode("triton", 2)
    batch.pages[batch.page_table[batch.slots[1].long(), :4].long()] = NAN
    after, decoded_after = batch.prefill("triton"), batch.decode("triton", 2)
    assert after[33:42].isnan().all()
    for rows in (slice(0, 33), slice(42, 62)):
        assert after[rows].equal(before[rows])
    assert decoded_after[[0, 2]].equal(decoded[[0, 2]])


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("num_tokens", [0, 1, 37])
def test_rotation_and_write(num_tokens: int, fp8: bool, interleaved: bool) -> None:
    heads, rank, nope, rope = 3, 48, 24, 8
    projected = torch.randn(num_tokens, heads * (nope + rope) + rank + rope, device=DEVICE)
    q, kv = projected.split([heads * (nope + rope), rank + rope], 1)
    positions = torch.arange(5, 5 + num_tokens, dtype=torch.int32, device=DEVICE)
    slots = torch.ones(num_tokens, dtype=torch.int32, device=DEVICE)
    slots[18:20] = -1
    slots[20:] = 0
    table = torch.tensor([[0, 1, 2, 9, 9], [3, 4, 6, 9, 9]], dtype=torch.int32, device=DEVICE)
    angles = torch.rand(64, rope // 2, device=DEVICE)
    cos, sin = torch.cat((angles.cos(),) * 2, 1), torch.cat((-angles.sin(), angles.sin()), 1)
    norm, results = torch.rand(rank, device=DEVICE), []
    for backend in ("reference", "triton"):
        pages = torch.zeros(7, 1, 16, rank + rope, device=DEVICE)
        pages, scales = (pages.to(torch.float8_e4m3fn), torch.zeros(7, 1, device=DEVICE)) if fp8 else (pages, None)
        out = torch.full((num_tokens, heads, nope + rope), NAN, device=DEVICE)
        rope_write_latents(
            q, kv, norm, 1e-6, cos, sin, positions, slots, table, pages, out, interleaved=interleaved, scales=scales,
            backend=backend,
        )  # fmt: skip
        results.append((out, pages.float() * (1.0 if scales is None else scales[..., None, None])))
    (expected, expected_pages), (found, found_pages) = results
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    # A last bit of fp32 decides on numbers in the middle of two of E4M3.
    torch.testing.assert_close(found_pages, expected_pages, rtol=0.13 if fp8 else 1e-5, atol=1e-2 if fp8 else 1e-5)
    assert not found[18:20].any()


def test_what_the_kernels_do_not_serve_is_refused() -> None:
    batch = Batch([20], [1], TINY, torch.float32)
    with pytest.raises(ValueError, match="needs a DecodeWorkspace"):
        latent_decode(
            batch.q_latent, batch.q[..., 16:], batch.pages, batch.page_table, batch.slots, batch.seq_lens, 1.0,
            torch.empty_like(batch.q_latent), workspace=None, max_seq_len=20, backend="triton",
        )  # fmt: skip
    with pytest.raises(ValueError, match="powers of two"):
        Batch([20], [1], (2, 48, 16, 16, 32), torch.float32).decode("triton", 1)
    with pytest.raises(ValueError, match="powers of two"):
        Batch([20], [1], (2, 32, 24, 16, 32), torch.float32).prefill("triton")
    batch.pages = batch.pages.half()
    with pytest.raises(ValueError, match="both fp32"):
        batch.decode("triton", 1)
    batch = Batch([20], [1], TINY, torch.float32, fp8=True)
    batch.scales = None
    with pytest.raises(ValueError, match="without scales"):
        batch.decode("triton", 1)


@GPU
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("heads", [16, 64, 128])
def test_decode_at_full_size(heads: int, fp8: bool) -> None:
    seq_lens = [1, 64, 65, 1000, 0, 4096, 777, 63]
    batch = Batch(
        seq_lens, [int(n > 0) for n in seq_lens], (heads, *V3[1:]), torch.bfloat16, page=64, padding=1, fp8=fp8
    )
    expected = batch.decode("reference")
    for programs in (1, 7, 132):
        found = batch.decode("triton", programs, blocks=max(1, heads // 64))
        assert rel_rms(found, expected) < TOLERANCE[torch.bfloat16]


@GPU
@pytest.mark.parametrize("heads", [16, 64])
def test_fp8_pages_of_numbers_far_apart(heads: int) -> None:
    """Scales and queries of many magnitudes; a NaN shows in its own sequence alone, wherever in a token it lies."""
    batch = Batch([1000, 64, 130], [1, 1, 1], (heads, *V3[1:]), torch.bfloat16, page=64, fp8=True)
    assert batch.scales is not None
    batch.scales *= torch.randint(-20, 1, batch.scales.shape, device=DEVICE).float().exp2()
    for row, magnitude in enumerate((2.0**-40, 2.0**8, 2.0**30)):
        batch.q_latent[row] *= magnitude
        batch.q[row] *= magnitude
    before, expected = batch.decode("triton", 132), batch.decode("reference")
    for row in range(3):
        assert rel_rms(before[row], expected[row]) < TOLERANCE[torch.bfloat16]
    page = batch.page_table[batch.slots[0].long(), 3].long()
    for column in (0, 1, 511, 575):
        held = batch.pages.view(torch.uint8)[page, 0, 5].clone()
        batch.pages.view(torch.uint8)[page, 0, 5, column] = 0x7F
        after = batch.decode("triton", 132)
        assert after[0].isnan().all()
        assert after[1:].equal(before[1:])
        batch.pages.view(torch.uint8)[page, 0, 5] = held


@GPU
@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("pieces", [False, True])
def test_prefill_at_full_size(pieces: bool, fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.ops.mla import triton_prefill

    if pieces:
        monkeypatch.setattr(triton_prefill, "PIECE_BYTES", 1 << 22)
    batch = Batch([1000, 300, 64, 2000, 0], [1000, 7, 64, 500, 0], V3, torch.bfloat16, page=64, padding=33, fp8=fp8)
    found = batch.prefill("triton")
    assert rel_rms(found, batch.prefill("reference")) < TOLERANCE[torch.bfloat16]
    assert not found[1571:].any()


@GPU
def test_decode_in_a_graph_follows_its_inputs() -> None:
    batch = Batch([300, 64, 1], [1, 1, 1], V3, torch.bfloat16, page=64)
    workspace = DecodeWorkspace.allocate(3, 16, 1, 512, DEVICE, 264)
    out, rope = torch.empty_like(batch.q_latent), batch.q[:3, :, 128:]

    def step() -> None:
        latent_decode(
            batch.q_latent, rope, batch.pages, batch.page_table, batch.slots, batch.seq_lens, batch.scale, out,
            workspace=workspace, max_seq_len=4096,
        )  # fmt: skip

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lens in ((300, 64, 1), (17, 2, 1), (0, 63, 1)):
        batch.seq_lens.copy_(torch.tensor(lens))
        graph.replay()
        assert rel_rms(out, batch.decode("reference")) < TOLERANCE[torch.bfloat16]

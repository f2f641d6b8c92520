"""Kernels of paged attention against a float64 oracle: ragged and padded rows, windows, sinks, poisoned pages."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from gossamer.ops.attention import DecodeWorkspace, paged_decode, paged_prefill
from gossamer.ops.attention.triton import SCRATCH_PAGES, widen
from gossamer.ops.attention.triton_decode import _decode_cut
from gossamer.ops.kv_cache.reference import page_scale
from gossamer.ops.quantize_fp8 import quantize_activation
from gossamer.runtime.cuda_runner import WARM_UP_CONTEXT

# rel-RMS against float64. Half precisions round the softmax weights before the product with V.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
PAGE = 16 if DEVICE == "cpu" else 64


class Batch:
    """Rows of a paged cache. Everything no row may read is NaN, or a page that does not exist."""

    def __init__(
        self, seq_lens: list[int], q_lens: list[int], heads: tuple[int, int, int], dtype: torch.dtype,
        *, page: int = PAGE, window: int | None = None, padding: int = 0, fp8: bool = False,
    ) -> None:  # fmt: skip
        q_heads, kv_heads, dim = heads
        counts = [-(-n // page) for n in seq_lens]
        order = torch.randperm(sum(counts) + 2)[: sum(counts)].split(counts)
        num_slots = len(seq_lens) + 1
        slots = torch.randperm(num_slots)[: len(seq_lens)]
        table = torch.full((num_slots, max(counts, default=0) + 2), 2**30)
        shape = (sum(counts) + 2, kv_heads, page, dim)
        pages = [torch.full(shape, torch.nan, dtype=torch.float64) for _ in range(2)]
        for slot, ids, seq_len, q_len in zip(slots.tolist(), order, seq_lens, q_lens, strict=True):
            first = 0 if window is None else max(0, seq_len - q_len - window + 1) // page
            table[slot, first : len(ids)] = ids[first:]
            for position in range(first * page, seq_len):
                for x in pages:
                    x[ids[position // page], :, position % page] = torch.randn(kv_heads, dim, dtype=torch.float64)
        row_slots = [-1 if q_len == 0 else slot for slot, q_len in zip(slots.tolist(), q_lens, strict=True)]
        lens = [0 if q_len == 0 else seq_len for seq_len, q_len in zip(seq_lens, q_lens, strict=True)]
        self.k_pages, self.v_pages = (x.to(DEVICE, dtype) for x in pages)
        self.exact = self.k_pages, self.v_pages
        self.scales: dict[str, torch.Tensor] = {}
        if fp8:
            self._quantize()
        self.q = torch.randn(sum(q_lens) + padding, q_heads, dim).to(DEVICE, dtype)
        self.page_table = table.to(DEVICE, torch.int32)
        self.slots = torch.tensor(row_slots, dtype=torch.int32, device=DEVICE)
        self.seq_lens = torch.tensor(lens, dtype=torch.int32, device=DEVICE)
        self.cu_seqlens_q = torch.tensor([0, *q_lens], device=DEVICE).cumsum(0).to(torch.int32)
        self.sinks = torch.randn(q_heads, device=DEVICE)
        self.window, self.scale, self.max_q_len = window, dim**-0.5, max(q_lens, default=0)
        self.max_seq_len, self.num_context = max(seq_lens, default=0), sum(seq_lens)

    def _quantize(self) -> None:
        """Pages of very different sizes, E4M3 and scaled; where nothing was written, page and scale are NaN."""
        quantized, exact = [], []
        for name, pages, largest in (("k_scales", self.k_pages, 0), ("v_scales", self.v_pages, 4)):
            power = torch.randint(-4, largest + 1, (*pages.shape[:2], 1, 1), device=DEVICE) * 1.7
            x = pages.float() * power.exp2()
            scale = page_scale(x.abs().nan_to_num(0.0).amax((2, 3)))
            self.scales[name] = scale.masked_fill(x.isnan().all(3).all(2), torch.nan)
            quantized.append((x / scale[..., None, None]).to(torch.float8_e4m3fn))
            exact.append(x)
        (self.k_pages, self.v_pages), self.exact = quantized, (exact[0], exact[1])

    def dequantized(self) -> list[torch.Tensor]:
        pairs = ((self.k_pages, "k_scales"), (self.v_pages, "v_scales"))
        scales = [self.scales[name].double()[..., None, None] if self.scales else 1.0 for _, name in pairs]
        return [pages.double() * scale for (pages, _), scale in zip(pairs, scales, strict=True)]

    def oracle(self, sinks: torch.Tensor | None, pages: Sequence[torch.Tensor] = ()) -> torch.Tensor:
        """Over dequantised pages, or others."""
        q, k_pages, v_pages = (x.double() for x in (self.q, *(pages or self.dequantized())))
        out = torch.full_like(q, torch.nan)
        paged_prefill(
            q, k_pages, v_pages, self.page_table, self.slots, self.cu_seqlens_q, self.seq_lens, self.max_q_len,
            self.scale, out, window=self.window, sinks=sinks, backend="reference",
        )  # fmt: skip
        return out

    def prefill(self, sinks: torch.Tensor | None, out_scales: torch.Tensor | None = None) -> torch.Tensor:
        out = torch.full_like(self.q, torch.nan, dtype=self.q.dtype if out_scales is None else torch.float8_e4m3fn)
        paged_prefill(
            self.q, self.k_pages, self.v_pages, self.page_table, self.slots, self.cu_seqlens_q, self.seq_lens,
            self.max_q_len, self.scale, out, out_scales=out_scales, window=self.window, sinks=sinks, backend="triton",
            num_context=self.num_context, **self.scales,
        )  # fmt: skip
        return out

    def reference(self, sinks: torch.Tensor | None, *, decode: bool) -> torch.Tensor:
        out = torch.full_like(self.q, torch.nan)
        cache = (self.q, self.k_pages, self.v_pages, self.page_table, self.slots)
        options = {"window": self.window, "sinks": sinks, "backend": "reference", **self.scales}
        if decode:
            paged_decode(*cache, self.seq_lens, self.scale, out, max_seq_len=self.max_seq_len, **options)  # type: ignore[arg-type]
        else:
            paged_prefill(*cache, self.cu_seqlens_q, self.seq_lens, self.max_q_len, self.scale, out, **options)  # type: ignore[arg-type]
        return out

    def decode(
        self, sinks: torch.Tensor | None, num_programs: int | None, rows: slice = slice(None),
        out_scales: torch.Tensor | None = None,
    ) -> torch.Tensor:  # fmt: skip
        """`rows` are a batch of their own; a padded row keeps its line of q."""
        slots, lens, q = (x[rows].contiguous() for x in (self.slots, self.seq_lens, self.q))
        out = torch.full_like(q, torch.nan, dtype=q.dtype if out_scales is None else torch.float8_e4m3fn)
        heads = (q.shape[1], self.k_pages.shape[1], q.shape[2])
        workspace = DecodeWorkspace.allocate(len(slots), *heads, DEVICE, num_programs)
        workspace.partials.fill_(torch.nan)
        workspace.lse.fill_(torch.nan)
        for _ in range(2):
            paged_decode(
                q, self.k_pages, self.v_pages, self.page_table, slots, lens, self.scale, out, window=self.window,
                out_scales=out_scales, sinks=sinks, workspace=workspace, max_seq_len=self.max_seq_len,
                backend="triton", **self.scales,
            )  # fmt: skip
        assert not workspace.arrivals.any()
        return out


def check(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert torch.isfinite(actual).all()
    error = (actual.double() - expected).norm() / expected.norm().clamp_min(1e-30)
    assert float(error) < TOLERANCE[actual.dtype]


def decode_case(lens: list[int], heads: tuple[int, int, int], dtype: torch.dtype, **options: int | None) -> Batch:
    """A decode batch: a length of 0 is a padded row, which has a line of q like every row."""
    batch = Batch([max(n, 1) for n in lens], [1] * len(lens), heads, dtype, **options)  # type: ignore[arg-type]
    padded = torch.tensor([n == 0 for n in lens], dtype=torch.bool, device=DEVICE)
    batch.slots.masked_fill_(padded, -1)
    batch.seq_lens.masked_fill_(padded, 0)
    return batch


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("heads", "window", "num_programs"),
    [((6, 2, 16), None, 5), ((2, 2, 32), 20, 5), ((3, 1, 64), 1, 5), ((6, 2, 16), 20, 1), ((3, 1, 64), None, 1)],
)
def test_decode_equals_float64(
    dtype: torch.dtype, heads: tuple[int, int, int], window: int | None, num_programs: int
) -> None:
    batch = decode_case([0, 1, 16, 71, 0, 33, 0], heads, dtype, window=window)
    sinks = batch.sinks if num_programs == 5 else None
    check(batch.decode(sinks, num_programs), batch.oracle(sinks))


@pytest.mark.parametrize("lens", [[], [0, 0], [5], [200]])
def test_decode_of_few_rows(lens: list[int]) -> None:
    batch = decode_case(lens, (4, 2, 16), torch.float32)
    check(batch.decode(batch.sinks, 7), batch.oracle(batch.sinks))


def test_decode_merges_more_parts_than_it_loads_at_once() -> None:
    batch = decode_case([40 * PAGE - 3], (2, 1, 16), torch.float32)
    check(batch.decode(None, 40), batch.oracle(None))


def test_padded_rows_change_no_bit_of_a_decode_batch() -> None:
    batch = decode_case([50, 90, 7, 0, 0], (4, 2, 16), torch.float32)
    assert torch.equal(batch.decode(None, 3)[:3], batch.decode(None, 3, slice(3)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("heads", "window"), [((6, 2, 16), None), ((6, 2, 16), 20), ((2, 2, 32), 20), ((3, 1, 64), None), ((3, 1, 64), 1)]
)
def test_prefill_equals_float64(dtype: torch.dtype, heads: tuple[int, int, int], window: int | None) -> None:
    seq_lens, q_lens = [50, 17, 9, 70, 16], [50, 1, 0, 33, 16]
    batch = Batch(seq_lens, q_lens, heads, dtype, window=window, padding=13)
    sinks = batch.sinks if window else None
    check(batch.prefill(sinks), batch.oracle(sinks))


@pytest.mark.parametrize("q_lens", [[], [0], [0, 1, 0]])
def test_prefill_of_few_tokens(q_lens: list[int]) -> None:
    batch = Batch([20] * len(q_lens), q_lens, (4, 2, 16), torch.float32, padding=3)
    check(batch.prefill(batch.sinks), batch.oracle(batch.sinks))


FP8_CASES = [
    ((6, 2, 16), None, torch.float32),
    ((2, 2, 32), 20, torch.float32),
    ((3, 1, 64), None, torch.float16),
    ((6, 2, 16), 1, torch.float16),
]


@pytest.mark.parametrize(("heads", "window", "dtype"), FP8_CASES)
def test_fp8_pages_count_as_what_they_stand_for(
    heads: tuple[int, int, int], window: int | None, dtype: torch.dtype
) -> None:
    batch = decode_case([0, 1, 16, 71, 0, 33, 90], heads, dtype, window=window, fp8=True)
    for sinks, num_programs in ((batch.sinks, 5), (None, 1)):
        expected = batch.oracle(sinks)
        check(batch.decode(sinks, num_programs), expected)
        check(batch.reference(sinks, decode=True), expected)
    batch = Batch([50, 17, 9, 70, 16], [50, 1, 0, 33, 16], heads, dtype, window=window, padding=13, fp8=True)
    check(batch.prefill(batch.sinks), batch.oracle(batch.sinks))
    check(batch.reference(batch.sinks, decode=False), batch.oracle(batch.sinks))


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)])
def test_an_output_in_fp8_is_the_output_quantised(dtype: torch.dtype, fp8: bool) -> None:
    batch = decode_case([0, 1, 16, 71, 0, 90], (6, 2, 128), dtype, fp8=fp8)
    scales = torch.empty(batch.q.shape[1::-1], device=DEVICE).t()  # as products of many rows want them
    for num_programs in (5, 1):
        found = batch.decode(batch.sinks, num_programs, out_scales=scales.fill_(torch.nan))
        check_quantised(found, scales, batch.decode(batch.sinks, num_programs))
    with pytest.raises(ValueError, match="128"):
        decode_case([3], (4, 2, 16), dtype).decode(None, 1, out_scales=torch.zeros(1, 4, device=DEVICE))
    lengths = [([50, 17, 70], [50, 1, 33]), ([300, 65], [300, 1])]  # on Hopper the second has a kernel of its own
    if DEVICE == "cuda":
        lengths.append(([900], [900]))  # and this one over FP8 pages too
    for lens in lengths:
        batch = Batch(*lens, (6, 2, 128), dtype, padding=13, fp8=fp8)
        scales = torch.full(batch.q.shape[1::-1], torch.nan, device=DEVICE).t()
        check_quantised(batch.prefill(batch.sinks, scales), scales, batch.prefill(batch.sinks))


def check_quantised(found: torch.Tensor, scales: torch.Tensor, dense: torch.Tensor) -> None:
    expected, expected_scales = quantize_activation(dense.flatten(1), backend="reference")
    assert torch.equal(scales, expected_scales)
    assert torch.equal(found.flatten(1).view(torch.uint8), expected.view(torch.uint8))


def test_fp8_pages_and_bf16_queries() -> None:
    # Decode computes in fp16, which the interpreter can; prefill's bf16 product of queries and keys it cannot.
    batch = decode_case([0, 1, 16, 71, 0, 33, 90], (6, 2, 16), torch.bfloat16, fp8=True)
    batch.q *= torch.tensor([0, 1e-30, 3.0, 1e-3, 0, 2.0, 1.0], device=DEVICE)[:, None, None]
    for num_programs in (5, 1):
        check(batch.decode(batch.sinks, num_programs), batch.oracle(batch.sinks))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("page_bytes", [1 << n for n in range(12, 18)])
def test_pages_on_their_way_fit_a_multiprocessor(page_bytes: int, scaled: bool) -> None:
    """All stages of a pipeline but one are in its 227 KB, beside queries and weights."""
    workspace = DecodeWorkspace.allocate(256, 32, 4, 128, "cpu", 528)
    for num_rows in (1, 2, 3, 4, 9, 200):
        for num_listed in (0, 32, 64):
            stages = _decode_cut(num_rows, num_listed, workspace, page_bytes, scaled)[1]
            assert (stages - 1) * page_bytes <= 163840


@pytest.mark.parametrize("window", [None, 1, 20])
def test_widened_pages_are_exact(window: int | None) -> None:
    seq_lens, q_lens = [3 * PAGE + 2, 7, PAGE, 4 * PAGE + 6, 5], [3 * PAGE + 2, 1, 0, PAGE + 1, 5]
    batch = Batch(seq_lens, q_lens, (6, 2, 32), torch.bfloat16, window=window, fp8=True)
    planes = batch.k_pages, batch.v_pages, *batch.scales.values()
    rows = batch.slots, batch.cu_seqlens_q, batch.seq_lens
    k, v, table, slots = widen(planes, batch.page_table, rows, window, 16)
    assert table.flatten().tolist() == list(range(16))
    assert slots.tolist() == [0, 4, 5, 5, 10]
    for row, (seq_len, q_len) in enumerate(zip(seq_lens, q_lens, strict=True)):
        first = 0 if window is None else max(0, seq_len - q_len - window + 1) // PAGE
        for p in range(first, -(-seq_len // PAGE) if q_len else 0):
            page, held = batch.page_table[batch.slots[row], p], slice(seq_len - p * PAGE)
            for found, exact in zip((k, v), batch.dequantized(), strict=True):
                assert torch.equal(found[slots[row] + p, :, held].double(), exact[page][:, held])


def test_a_warm_up_takes_the_largest_scratch() -> None:
    assert SCRATCH_PAGES // 2 < WARM_UP_CONTEXT // 64 + 1 <= SCRATCH_PAGES  # sizes are powers of two


def test_fp8_costs_no_more_than_its_rounding() -> None:
    batch = Batch([300, 120], [40, 120], (8, 2, 64), torch.float32, fp8=True)
    found, exact = batch.prefill(None).double(), batch.oracle(None, batch.exact)
    # Keys and values are off by at most 1/16 of themselves, 2.6% in the mean square.
    assert 1e-3 < float((found - exact).norm() / exact.norm()) < 0.05


@pytest.mark.parametrize(("value", "other"), [(0.0, 1e18), (1e-12, 1.0), (1.0, 1e-30)])
def test_fp8_pages_of_extreme_scales_stay_finite(value: float, other: float) -> None:
    batch = decode_case([4 * PAGE], (2, 1, 16), torch.float32, fp8=True)
    order = batch.page_table[batch.slots[0]].long()
    for name in ("k_scales", "v_scales"):
        amax = torch.tensor([value, other, value, other], device=DEVICE)[:, None]
        batch.scales[name][order[:4]] = page_scale(amax) * (1e-20 if name == "k_scales" else 1.0)
    check(batch.decode(None, 1), batch.oracle(None))


def test_unsupported_input_is_refused() -> None:
    batch = decode_case([5], (4, 2, 16), torch.float32)
    with pytest.raises(ValueError, match="one of fp32"):
        Batch([5], [1], (4, 2, 16), torch.float64).prefill(None)
    with pytest.raises(ValueError, match="head_dim 48"):
        Batch([5], [1], (4, 2, 48), torch.float32).prefill(None)
    batch.k_pages = batch.k_pages.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match="contiguous"):
        batch.prefill(None)
    batch = decode_case([5], (4, 2, 16), torch.float32, fp8=True)
    batch.scales = {}
    with pytest.raises(ValueError, match="without scales"):
        batch.prefill(None)
    batch = decode_case([5, 6], (4, 2, 16), torch.float32, window=0)
    with pytest.raises(ValueError, match="window 0"):
        batch.decode(None, 2)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("heads", "dtype"),
    [
        ((32, 4, 128), torch.bfloat16),
        ((28, 4, 128), torch.float16),
        ((64, 2, 64), torch.bfloat16),
        ((16, 1, 256), torch.bfloat16),
        ((8, 8, 64), torch.float32),
    ],
)
@pytest.mark.parametrize("window", [None, 128, 1000])
@pytest.mark.parametrize("fp8", [False, True])
def test_on_the_device(heads: tuple[int, int, int], dtype: torch.dtype, window: int | None, fp8: bool) -> None:
    batch = decode_case([1, 0, 64, 1500, 333, 5000, 0, 65], heads, dtype, window=window, fp8=fp8)
    check(batch.decode(batch.sinks, None), batch.oracle(batch.sinks))
    first, second = batch.decode(None, None), batch.decode(None, None)
    check(first, batch.oracle(None))
    assert torch.equal(first, second)
    seq_lens, q_lens = [700, 1, 65, 9, 2100, 300], [700, 1, 1, 0, 513, 300]
    batch = Batch(seq_lens, q_lens, heads, dtype, window=window, padding=200, fp8=fp8)
    check(batch.prefill(batch.sinks), batch.oracle(batch.sinks))
    check(batch.prefill(None), batch.oracle(None))


@pytest.mark.gpu
@pytest.mark.parametrize("heads", [(32, 4, 128), (28, 4, 128), (16, 1, 64)])
@pytest.mark.parametrize("fp8", [False, True])
def test_a_row_alone_of_more_blocks_than_programs(heads: tuple[int, int, int], fp8: bool) -> None:
    # On Hopper its blocks are taken in an order of their own, in whole rounds of the programs and a part of one.
    batch = Batch([3000], [2900], heads, torch.bfloat16, padding=40, fp8=fp8)
    batch.num_context += 5000  # a bound is enough
    check(batch.prefill(None), batch.oracle(None))


@pytest.mark.gpu
def test_few_new_tokens_of_fp8_rows_and_too_long_contexts_are_served_as_they_lie(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gossamer.ops.attention.triton.widen", None)
    for seq_lens, q_lens, context in (([3000, 900], [30, 30], 3900), ([900], [900], 1 << 20), ([900], [900], None)):
        batch = Batch(seq_lens, q_lens, (32, 4, 128), torch.bfloat16, fp8=True)
        batch.num_context = context  # type: ignore[assignment]
        check(batch.prefill(None), batch.oracle(None))


@pytest.mark.gpu
def test_one_captured_graph_serves_all_lengths() -> None:
    long = decode_case([4000, 1700, 300, 1], (32, 4, 128), torch.bfloat16)
    out = torch.empty_like(long.q)
    workspace = DecodeWorkspace.allocate(4, 32, 4, 128, DEVICE)

    def step() -> None:
        paged_decode(
            long.q, long.k_pages, long.v_pages, long.page_table, long.slots, long.seq_lens, long.scale, out,
            workspace=workspace, max_seq_len=4096,
        )  # fmt: skip

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for lens in ([4000, 1700, 300, 1], [64, 1, 65, 1], [0, 1500, 2, 1]):
        long.seq_lens.copy_(torch.tensor(lens, dtype=torch.int32))
        out.fill_(torch.nan)
        graph.replay()
        replayed = out.clone()
        step()
        assert torch.equal(replayed, out)
        long.slots.copy_(torch.where(long.seq_lens > 0, long.slots, -1))
        check(replayed, long.oracle(None))

"""Time of block-sparse attention beside dense: decode beside our own kernel, prefill beside cuDNN's causal attention.

python benchmarks/ops/bench_sparse.py [--only decode|prefill|tune] [--prefill 4k ...] [--out FILE]
Random keys and queries: neighbouring tokens choose unrelated pages, the worst case for whoever shares their reads.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import common

from gossamer.ops.attention import DecodeWorkspace, paged_decode, paged_prefill
from gossamer.ops.sparse import (
    Selection,
    nsa_entries,
    page_entries,
    sparse_attention,
    sparse_decode,
    triton_prefill,
    write_summaries,
)
from gossamer.ops.sparse import triton as sparse_kernels

Q_HEADS, KV_HEADS, DIM, PAGE = 64, 4, 128, 64
SCALE = DIM**-0.5
RULE = Selection(num_blocks=32, first=1, local=8, dense_below=8192)
SHORT_RULE = RULE._replace(dense_below=RULE.num_blocks * PAGE)
ENTRIES = page_entries(RULE, PAGE)
NSA_RULE = Selection(num_blocks=16, first=1, local=2, dense_below=0)
MSA_RULE = Selection(num_blocks=16, first=0, local=1, dense_below=2048, pages=2)
CHUNK = 8192
"""Tokens of a prefill step."""
PREFILL = {"4k": 1 << 12, "16k": 1 << 14, "64k": 1 << 16, "256k": 1 << 18}
DECODE = {"4k x 8": (1 << 12, 8), "16k x 8": (1 << 14, 8), "64k x 1": (1 << 16, 1), "64k x 8": (1 << 16, 8),
          "256k x 8": (1 << 18, 8), "1M x 8": (1 << 20, 8)}  # fmt: skip
CUTS = (
    (triton_prefill, "page_cut", ((128, 4, 2, 2), (64, 4, 1, 4), (64, 4, 2, 3), (64, 4, 1, 6), (128, 8, 1, 2))),
    (triton_prefill, "span_cut", ((128, 8, 2), (128, 4, 2), (64, 4, 2), (64, 4, 3), (128, 8, 3))),
    (
        sparse_kernels,
        "entry_cut",
        ((128, 64, 4, 3, 168), (128, 64, 8, 3, 128), (128, 128, 8, 2, 128), (256, 64, 8, 3, 128), (256, 64, 8, 4, 128)),
    ),
    (sparse_kernels, "select_cut", ((1, 1, 4096), (32, 128, 1024), (16, 256, 512), (8, 512, 256))),
)
"""What the kernels' cuts were chosen from."""
Report = dict[str, dict[str, object]]


class Cache:
    """`num_rows` sequences of one length in shuffled pages, with their summaries."""

    def __init__(self, length: int, num_rows: int, kv: str) -> None:
        num_pages = length // PAGE
        total = num_pages * num_rows
        self.k_pages, self.v_pages = (
            torch.randn(total, KV_HEADS, PAGE, DIM, dtype=torch.bfloat16, device="cuda") for _ in range(2)
        )
        self.scales: dict[str, torch.Tensor] = {}
        if kv == "fp8":
            self.k_pages, self.v_pages = (x.to(torch.float8_e4m3fn) for x in (self.k_pages, self.v_pages))
            self.scales = {n: torch.ones(total, KV_HEADS, device="cuda") for n in ("k_scales", "v_scales")}
        self.page_table = torch.randperm(total, device="cuda").to(torch.int32).view(num_rows, num_pages)
        self.summaries = (torch.empty(total, KV_HEADS, 1, DIM, dtype=torch.bfloat16, device="cuda"),)
        self.index_keys = torch.randn(total, 1, PAGE, DIM, dtype=torch.bfloat16, device="cuda")
        self.slots = torch.arange(num_rows, dtype=torch.int32, device="cuda")
        self.seq_lens = torch.full_like(self.slots, length)
        ends = torch.arange(PAGE - 1, length, PAGE, dtype=torch.int32, device="cuda")
        for slot in self.slots:
            self.summarise(slot.expand(num_pages).contiguous(), ends)

    def summarise(self, token_slots: torch.Tensor, positions: torch.Tensor) -> None:
        k_scales = self.scales.get("k_scales")
        write_summaries(self.k_pages, self.summaries, self.page_table, token_slots, positions, k_scales=k_scales)


def decode_cases(length: int, num_rows: int, kv: str) -> dict[str, Callable[[int], None]]:
    """Dense and sparse, the latter also launched as a graph for 1M tokens would be; NSA without its window branch."""
    cache = Cache(length, num_rows, kv)
    q = torch.randn(num_rows, Q_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)
    workspace = DecodeWorkspace.allocate(num_rows, Q_HEADS, KV_HEADS, DIM, "cuda")
    keys = q, cache.k_pages, cache.v_pages
    rows = cache.page_table, cache.slots, cache.seq_lens

    def dense(_: int) -> None:
        paged_decode(*keys, *rows, SCALE, out, workspace=workspace, max_seq_len=length, **cache.scales)

    def sparse(_: int, bound: int = length, rule: Selection = SHORT_RULE) -> None:
        sparse_decode(
            *keys, cache.summaries, *rows, rule, ENTRIES, SCALE, out, workspace=workspace, max_seq_len=bound,
            **cache.scales,
        )  # fmt: skip

    keys_of, values_of = (
        torch.randn(*cache.summaries[0].shape[:2], 4, DIM, dtype=q.dtype, device="cuda") for _ in "kv"
    )
    compressed = torch.empty_like(q)

    def nsa(_: int) -> None:
        sparse_decode(
            *keys, (keys_of,), *rows, NSA_RULE, nsa_entries(), SCALE, out, workspace=workspace, max_seq_len=length,
            values=values_of, compressed=compressed, **cache.scales,
        )  # fmt: skip

    index_q = torch.randn(num_rows, KV_HEADS, DIM, dtype=q.dtype, device="cuda")

    def msa(_: int) -> None:
        sparse_decode(
            *keys, (cache.index_keys,), *rows, MSA_RULE, ENTRIES, SCALE, out, workspace=workspace, max_seq_len=length,
            index_q=index_q, **cache.scales,
        )  # fmt: skip

    return {
        "dense": dense,
        "sparse": sparse,
        "sparse, sized for 1M": lambda i: sparse(i, 1 << 20),
        "sparse from 8k": lambda i: sparse(i, length, RULE),
        "NSA, two branches": nsa,
        "MSA": msa,
    }


def run_decode(results: dict[str, dict[str, float | str]], details: Report, kv: str) -> None:
    for name, (length, num_rows) in DECODE.items():
        times = {
            case: common.measure_us(call, calls=8 if length < 1 << 20 else 2)
            for case, call in decode_cases(length, num_rows, kv).items()
        }
        medians = {case: statistics.median(values) for case, values in times.items()}
        per_row = {"dense": length * 4, "NSA, two branches": NSA_RULE.num_blocks * PAGE * 4 + length // PAGE * 16}
        per_row["MSA"] = MSA_RULE.num_blocks * MSA_RULE.pages * PAGE * 4 + length // 2  # index keys
        attended = min(length, RULE.num_blocks * PAGE) * 4 + length // PAGE * 2
        floors = {c: common.floor_us(num_rows * KV_HEADS * DIM * per_row.get(c, attended)) for c in times}
        results[f"decode {name}"] = {
            **medians, "of floor": floors["sparse"] / medians["sparse"], "faster": medians["dense"] / medians["sparse"],
        }  # fmt: skip
        for case, values in times.items():
            details[f"decode {name}, {case}"] = {"median": medians[case], "all": values, "floor": floors[case]}
        torch.cuda.empty_cache()


def prefill_inputs(length: int, rule: Selection) -> tuple[torch.Tensor, ...]:
    """Slots and positions of all tokens; and the bounds and the length of those that see all, as a row."""
    positions, first = torch.arange(length, dtype=torch.int32), min(length, rule.dense_below)
    bounds, lens = (torch.tensor(x, dtype=torch.int32) for x in ([0, first], [first]))
    return tuple(x.cuda() for x in (torch.zeros_like(positions), positions, bounds, lens))


def sparse_prefill(
    cache: Cache, q: torch.Tensor, out: torch.Tensor, inputs: tuple[torch.Tensor, ...],
    index_q: torch.Tensor | None = None,
) -> None:  # fmt: skip
    """A prompt in chunks, as the engine computes it: the first tokens dense, with the write of summaries.

    With queries of an indexer, MSA's.
    """
    length, rule = len(q), RULE if index_q is None else MSA_RULE
    slots, positions, bounds, lens = inputs
    for low in range(0, length, CHUNK):
        high = min(low + CHUNK, length)
        part = slice(low, high)
        where = cache.page_table, slots[part], positions[part]
        if index_q is None:
            cache.summarise(slots[part], positions[part])
        if low < rule.dense_below:
            first = slice(0, min(length, rule.dense_below))
            paged_prefill(
                q[first], cache.k_pages, cache.v_pages, cache.page_table, cache.slots, bounds, lens, first.stop, SCALE,
                out[first], **cache.scales,
            )  # fmt: skip
        if high > rule.dense_below:
            scored = {"index_q": None if index_q is None else index_q[part], "max_seq_len": high, **cache.scales}
            summaries = cache.summaries if index_q is None else (cache.index_keys,)
            sparse_attention(
                q[part], cache.k_pages, cache.v_pages, summaries, *where, rule, ENTRIES, SCALE, out[part], **scored
            )


def timed_us(cases: dict[str, Callable[[], object]], repeats: int, calls: int = 1) -> dict[str, list[float]]:
    """In turns, for the device slows as it warms, and without a graph: a prefill step is launched kernel by kernel.

    `calls` at a time hide the host's time.
    """
    times: dict[str, list[float]] = {name: [] for name in cases}
    for i in range(1 + repeats):
        for name, call in cases.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls if i else 1):
                call()
            end.record()
            torch.cuda.synchronize()
            if i:
                times[name].append(1e3 * start.elapsed_time(end) / calls)
    return times


def cudnn(length: int) -> Callable[[], object]:
    q = torch.randn(1, Q_HEADS, length, DIM, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(1, KV_HEADS, length, DIM, dtype=torch.bfloat16, device="cuda") for _ in range(2))

    def call() -> object:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return call


def run_prefill(
    results: dict[str, dict[str, float | str]], details: Report, kv: str, lengths: dict[str, int] = PREFILL
) -> None:
    medians: dict[str, dict[str, float]] = {}
    for name, length in lengths.items():
        cache = Cache(length, 1, kv)
        q = torch.randn(length, Q_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
        out = torch.empty_like(q)
        index_q = torch.randn(length, KV_HEADS, DIM, dtype=q.dtype, device="cuda")
        inputs, index_inputs = (prefill_inputs(length, rule) for rule in (RULE, MSA_RULE))
        repeats = 15 if length <= 1 << 16 else 5
        cases: dict[str, Callable[[], object]] = {
            "sparse": lambda: sparse_prefill(cache, q, out, inputs),  # noqa: B023
            "MSA": lambda: sparse_prefill(cache, q, out, index_inputs, index_q),  # noqa: B023
            "cuDNN, dense": cudnn(length),
        }
        times = timed_us(cases, repeats, max(1, (1 << 16) // length))
        medians[name] = {case: statistics.median(values) for case, values in times.items()}
        flops = {"cuDNN, dense": 2.0 * Q_HEADS * DIM * length**2, "sparse": sparse_flops(length),
                 "MSA": sparse_flops(length, MSA_RULE)}  # fmt: skip
        results[f"prefill {name}"] = {
            **medians[name], "faster": medians[name]["cuDNN, dense"] / medians[name]["sparse"],
            "dense TFLOP/s": flops["cuDNN, dense"] / medians[name]["cuDNN, dense"] / 1e6,
            "sparse TFLOP/s": flops["sparse"] / medians[name]["sparse"] / 1e6,
        }  # fmt: skip
        for case, values in times.items():
            floor = common.floor_us(0, flops[case])
            details[f"prefill {name}, {case}"] = {"median": medians[name][case], "all": values, "floor": floor}
        torch.cuda.empty_cache()
    long = [name for name in medians if PREFILL[name] > CHUNK]
    if len(long) > 1:
        exponent = {case: slope([(PREFILL[n], medians[n][case]) for n in long]) for case in medians[long[0]]}
        print("time against length, exponent from 16k on:", exponent)
        details["exponent from 16k on"] = dict(exponent)


def sparse_flops(length: int, rule: Selection = RULE) -> float:
    """As the attention kinds' `cost` counts: a page scores once for each query head, MSA's tokens for each KV head."""
    pairs = scored = 0
    for page in range(length // PAGE):
        dense = (page + 1) * PAGE <= rule.dense_below
        pages = page if dense else min(page, rule.num_blocks * rule.pages - 1)
        pairs += PAGE * pages * PAGE + PAGE * (PAGE + 1) // 2
        scored += 0 if dense else PAGE * max(0, page + 1 - rule.local * rule.pages - rule.first)
    return Q_HEADS * DIM * 4.0 * pairs + DIM * 2.0 * scored * (KV_HEADS * PAGE if rule is MSA_RULE else Q_HEADS)


def slope(points: list[tuple[int, float]]) -> float:
    """Of the least-squares line through the logarithms."""
    xs, ys = [math.log(x) for x, _ in points], [math.log(y) for _, y in points]
    return statistics.linear_regression(xs, ys).slope


def tune() -> None:
    """The candidates, on the last chunk of 64k; then where the time goes."""
    length = 1 << 16
    cache = Cache(length, 1, "bf16")
    q = torch.randn(CHUNK, Q_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)
    slots = torch.zeros(CHUNK, dtype=torch.int32, device="cuda")
    positions = torch.arange(length - CHUNK, length, dtype=torch.int32, device="cuda")

    def call() -> None:
        sparse_attention(
            q, cache.k_pages, cache.v_pages, cache.summaries, cache.page_table, slots, positions, RULE, ENTRIES, SCALE,
            out, max_seq_len=length,
        )  # fmt: skip

    for module, name, candidates in CUTS:
        chosen = getattr(module, name)
        for cut in candidates:
            setattr(module, name, lambda *_, cut=cut: cut)
            try:
                print(name, cut, f"{statistics.median(timed_us({name: call}, 5)[name]):.0f} us", flush=True)
            except Exception as error:  # a cut that does not fit the device
                print(name, cut, str(error).splitlines()[0][:80])
        setattr(module, name, chosen)
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
    print(profile.key_averages().table(sort_by="cuda_time_total", row_limit=12, max_name_column_width=40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["decode", "prefill", "tune"])
    parser.add_argument("--prefill", choices=PREFILL, nargs="+", default=list(PREFILL), help="lengths of prompts")
    parser.add_argument("--kv", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.manual_seed(0)
    if options.only == "tune":
        tune()
        return
    details: Report = {}
    tables: dict[str, dict[str, float | str]] = {}
    lengths = {name: PREFILL[name] for name in options.prefill}
    for part, measure in (("decode", run_decode), ("prefill", partial(run_prefill, lengths=lengths))):
        if options.only in (None, part):
            results: dict[str, dict[str, float | str]] = {}
            measure(results, details, options.kv)
            common.print_table(results)
            tables |= results
    shape = {
        "num_q_heads": Q_HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "page_size": PAGE, "dtype": "bf16",
        "KV cache": options.kv, **RULE._asdict(),
    }  # fmt: skip
    common.write(options.out, unit="us", shapes=shape, repeats=15, table=tables, cases=details)


if __name__ == "__main__":
    main()

"""Paged attention against its floors, and against torch's attention over dense keys where that can be compared.

python benchmarks/ops/bench_attention.py [--only decode|prefill] [--out FILE]
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common

from gossamer.ops.attention import DecodeWorkspace, paged_decode, paged_prefill

Q_HEADS, KV_HEADS, DIM, PAGE = 32, 4, 128, 64
DECODE = {
    "b1 1k": [1024], "b1 8k": [8192], "b1 64k": [65536], "b4 64k": [65536] * 4, "b8 64k": [65536] * 8,
    "b32 1k": [1024] * 32, "b32 8k": [8192] * 32, "b64 1k": [1024] * 64, "b64 2k": [2048] * 64,
    "b128 1k": [1024] * 128, "b128 2k": [2048] * 128, "b128 8k": [8192] * 128,
    "b32 ragged": [65536, *([1024] * 31)], "b64 ragged": [256 * (1 + i) for i in range(64)],
}  # fmt: skip
# Rows of (new tokens, context with them).
PREFILL = {
    "16 x 1k": [(1024, 1024)] * 16, "2 x 8k": [(8192, 8192)] * 2, "16k": [(16384, 16384)],
    "8k after 56k": [(8192, 65536)], "64k": [(65536, 65536)],
    "ragged": [(64 * (1 + i), 64 * (1 + i)) for i in range(22)],
    "63 decodes + 2k": [*([(1, 2048)] * 63), (2048, 2048)],
}  # fmt: skip


class Cache:
    """Pages for `num_sets` batches of these lengths, scattered; set i uses slots[i]."""

    def __init__(self, seq_lens: list[int], num_sets: int, heads: int = KV_HEADS, dim: int = DIM) -> None:
        counts = [-(-n // PAGE) for n in seq_lens] * num_sets
        self.k_pages = torch.randn(sum(counts), heads, PAGE, dim, dtype=torch.bfloat16, device="cuda")
        self.v_pages = torch.randn_like(self.k_pages)
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for row, ids in enumerate(torch.randperm(sum(counts)).to(torch.int32).split(counts)):
            table[row, : len(ids)] = ids
        self.page_table = table.cuda()
        self.slots = torch.arange(len(counts), dtype=torch.int32, device="cuda").view(num_sets, -1)
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32, device="cuda")


def decode_case(seq_lens: list[int]) -> tuple[Callable[[int], None], float, int]:
    """The call, its floor in us, and how many input sets it rotates through."""
    num_bytes = sum(seq_lens) * KV_HEADS * DIM * 4
    num_sets = common.rotations(num_bytes, most=32)
    cache = Cache(seq_lens, num_sets)
    q = torch.randn(len(seq_lens), Q_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)
    workspace = DecodeWorkspace.allocate(len(seq_lens), Q_HEADS, KV_HEADS, DIM, "cuda")

    def call(i: int) -> None:
        paged_decode(
            q, cache.k_pages, cache.v_pages, cache.page_table, cache.slots[i % num_sets], cache.seq_lens, DIM**-0.5,
            out, workspace=workspace, max_seq_len=max(seq_lens),
        )  # fmt: skip

    return call, common.floor_us(num_bytes), num_sets


def prefill_flops(rows: list[tuple[int, int]]) -> float:
    return 4.0 * Q_HEADS * DIM * sum(n * (total - n) + n * (n + 1) / 2 for n, total in rows)


def prefill_case(rows: list[tuple[int, int]]) -> Callable[[int], None]:
    cache = Cache([total for _, total in rows], 1)
    q_lens = [n for n, _ in rows]
    cu_seqlens_q = torch.tensor([0, *q_lens]).cumsum(0).to("cuda", torch.int32)
    q = torch.randn(sum(q_lens), Q_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)

    def call(i: int) -> None:
        paged_prefill(
            q, cache.k_pages, cache.v_pages, cache.page_table, cache.slots[0], cu_seqlens_q, cache.seq_lens,
            max(q_lens), DIM**-0.5, out,
        )  # fmt: skip

    return call


def dense_case(rows: list[tuple[int, int]], backend: SDPBackend) -> Callable[[int], object] | None:
    """torch's attention over dense keys; for equal rows without a cached prefix."""
    if len(set(rows)) > 1 or rows[0][0] != rows[0][1]:
        return None
    q = torch.randn(len(rows), Q_HEADS, rows[0][0], DIM, dtype=torch.bfloat16, device="cuda")
    k, v = (torch.randn(len(rows), KV_HEADS, rows[0][0], DIM, dtype=torch.bfloat16, device="cuda") for _ in range(2))

    def call(i: int) -> object:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return call


def varlen_case(rows: list[tuple[int, int]]) -> Callable[[int], object] | None:
    """torch.nn.attention.varlen over dense packed keys, repeated for each query head."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if any(n != total for n, total in rows):
        return None
    total, longest = sum(n for n, _ in rows), max(n for n, _ in rows)
    q, k, v = (torch.randn(total, Q_HEADS, DIM, dtype=torch.bfloat16, device="cuda") for _ in range(3))
    cu_seqlens = torch.tensor([0, *(n for n, _ in rows)]).cumsum(0).to("cuda", torch.int32)
    return lambda i: varlen_attn(q, k, v, cu_seqlens, cu_seqlens, longest, longest, window_size=(-1, 0))


def run_decode(results: dict[str, dict[str, float | str]], details: dict[str, object]) -> None:
    for name, seq_lens in DECODE.items():
        call, floor, num_sets = decode_case(seq_lens)
        times = common.measure_us(call, calls=max(8, min(32, num_sets)))
        median = statistics.median(times)
        results[f"decode {name}"] = {"us": median, "floor": floor, "of floor": floor / median}
        details[f"decode {name}"] = {"median": median, "all": times, "floor": floor, "seq_lens": seq_lens}
        torch.cuda.empty_cache()


def run_prefill(results: dict[str, dict[str, float | str]], details: dict[str, object]) -> None:
    for name, rows in PREFILL.items():
        flops = prefill_flops(rows)
        floor = common.floor_us(0, flops)
        candidates = {
            "": prefill_case(rows),
            " (cuDNN, dense)": dense_case(rows, SDPBackend.CUDNN_ATTENTION),
            " (flash, dense)": dense_case(rows, SDPBackend.FLASH_ATTENTION),
            " (varlen, dense)": varlen_case(rows),
        }
        for suffix, call in candidates.items():
            if call is None:
                continue
            try:
                times = common.measure_us(call, calls=2, repeats=7)
            except RuntimeError as error:
                print(f"prefill {name}{suffix}: {str(error).splitlines()[0]}")
                continue
            median = statistics.median(times)
            key = f"prefill {name}{suffix}"
            results[key] = {"us": median, "floor": floor, "of floor": floor / median, "TFLOP/s": flops / median / 1e6}
            details[key] = {"median": median, "all": times, "floor": floor, "rows": rows}
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["decode", "prefill"])
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.manual_seed(0)
    results: dict[str, dict[str, float | str]] = {}
    details: dict[str, object] = {}
    if options.only != "prefill":
        run_decode(results, details)
        common.print_table(results)
    if options.only != "decode":
        prefill: dict[str, dict[str, float | str]] = {}
        run_prefill(prefill, details)
        common.print_table(prefill)
    shape = {"num_q_heads": Q_HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "page_size": PAGE, "dtype": "bf16"}
    common.write(options.out, unit="us", shapes=shape, repeats=15, cases=details)


if __name__ == "__main__":
    main()

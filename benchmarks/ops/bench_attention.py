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
from gossamer.ops.rope import rope_write_kv

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


# Tokens written in a step: a slot each (decode), or all of one (prefill).
WRITE = {"write b1": (1, True), "write b64": (64, True), "write b256": (256, True), "write 8k": (8192, False)}


class Cache:
    """Pages for `num_sets` batches of these lengths, scattered; set i uses slots[i]. FP8 pages have scales."""

    def __init__(self, seq_lens: list[int], num_sets: int, kv: str, heads: int = KV_HEADS, dim: int = DIM) -> None:
        counts = [-(-n // PAGE) for n in seq_lens] * num_sets
        dtype = torch.float8_e4m3fn if kv == "fp8" else torch.bfloat16
        self.k_pages, self.v_pages = (
            torch.randn(sum(counts), heads, PAGE, dim, dtype=torch.bfloat16, device="cuda").to(dtype) for _ in range(2)
        )
        ones = torch.ones(sum(counts), heads, device="cuda")
        self.scales = {"k_scales": ones, "v_scales": ones.clone()} if kv == "fp8" else {}
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for row, ids in enumerate(torch.randperm(sum(counts)).to(torch.int32).split(counts)):
            table[row, : len(ids)] = ids
        self.page_table = table.cuda()
        self.slots = torch.arange(len(counts), dtype=torch.int32, device="cuda").view(num_sets, -1)
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32, device="cuda")


def decode_case(seq_lens: list[int], kv: str) -> tuple[Callable[[int], None], float, int]:
    """The call, its floor in us, and how many input sets it rotates through."""
    num_bytes = sum(seq_lens) * KV_HEADS * DIM * (2 if kv == "fp8" else 4)
    num_sets = common.rotations(num_bytes, most=32)
    cache = Cache(seq_lens, num_sets, kv)
    q = torch.randn(len(seq_lens), Q_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)
    workspace = DecodeWorkspace.allocate(len(seq_lens), Q_HEADS, KV_HEADS, DIM, "cuda")

    def call(i: int) -> None:
        paged_decode(
            q, cache.k_pages, cache.v_pages, cache.page_table, cache.slots[i % num_sets], cache.seq_lens, DIM**-0.5,
            out, workspace=workspace, max_seq_len=max(seq_lens), **cache.scales,
        )  # fmt: skip

    return call, common.floor_us(num_bytes), num_sets


def prefill_flops(rows: list[tuple[int, int]]) -> float:
    return 4.0 * Q_HEADS * DIM * sum(n * (total - n) + n * (n + 1) / 2 for n, total in rows)


def prefill_case(rows: list[tuple[int, int]], kv: str) -> Callable[[int], None]:
    cache = Cache([total for _, total in rows], 1, kv)
    q_lens = [n for n, _ in rows]
    cu_seqlens_q = torch.tensor([0, *q_lens]).cumsum(0).to("cuda", torch.int32)
    q = torch.randn(sum(q_lens), Q_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    out = torch.empty_like(q)

    def call(i: int) -> None:
        paged_prefill(
            q, cache.k_pages, cache.v_pages, cache.page_table, cache.slots[0], cu_seqlens_q, cache.seq_lens,
            max(q_lens), DIM**-0.5, out, num_context=sum(total for _, total in rows), **cache.scales,
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


def write_case(num_tokens: int, decode: bool, kv: str) -> tuple[Callable[[int], None], float]:
    """`rope_write_kv` and its floor: in decode at rising positions of pages that are half full."""
    cache = Cache([PAGE] * num_tokens if decode else [num_tokens], 1, kv)
    qkv = torch.randn(num_tokens, (Q_HEADS + 2 * KV_HEADS) * DIM, dtype=torch.bfloat16, device="cuda")
    q_out = torch.empty(num_tokens, Q_HEADS, DIM, dtype=torch.bfloat16, device="cuda")
    angles, norm = torch.rand(max(num_tokens, PAGE), DIM, device="cuda"), qkv[0, :DIM].contiguous()
    tokens = torch.arange(num_tokens, dtype=torch.int32, device="cuda")
    slots, zeros = (tokens, torch.zeros_like(tokens)) if decode else (torch.zeros_like(tokens), tokens)
    positions = [zeros + (PAGE // 2 + i) if decode else zeros for i in range(PAGE // 2)]

    def call(i: int) -> None:
        rope_write_kv(
            qkv, Q_HEADS, KV_HEADS, DIM, angles, angles, positions[i % len(positions)], slots, cache.page_table,
            cache.k_pages, cache.v_pages, q_out, q_norm=norm, k_norm=norm, **cache.scales,
        )  # fmt: skip

    kept = 2 * KV_HEADS * DIM
    return call, common.floor_us(num_tokens * (4 * Q_HEADS * DIM + 2 * kept + kept * cache.k_pages.element_size()))


def run_write(results: dict[str, dict[str, float | str]], details: dict[str, object], kv: str) -> None:
    for name, (num_tokens, decode) in WRITE.items():
        call, floor = write_case(num_tokens, decode, kv)
        times = common.measure_us(call, calls=32)
        median = statistics.median(times)
        results[name] = {"us": median, "floor": floor, "of floor": floor / median}
        details[name] = {"median": median, "all": times, "floor": floor, "num_tokens": num_tokens}


def run_decode(results: dict[str, dict[str, float | str]], details: dict[str, object], kv: str) -> None:
    for name, seq_lens in DECODE.items():
        call, floor, num_sets = decode_case(seq_lens, kv)
        times = common.measure_us(call, calls=max(8, min(32, num_sets)))
        median = statistics.median(times)
        results[f"decode {name}"] = {"us": median, "floor": floor, "of floor": floor / median}
        details[f"decode {name}"] = {"median": median, "all": times, "floor": floor, "seq_lens": seq_lens}
        torch.cuda.empty_cache()


def run_prefill(results: dict[str, dict[str, float | str]], details: dict[str, object], kv: str) -> None:
    for name, rows in PREFILL.items():
        flops = prefill_flops(rows)
        floor = common.floor_us(0, flops)
        candidates = {
            "": prefill_case(rows, kv),
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
    parser.add_argument("--only", choices=["decode", "prefill", "write"])
    parser.add_argument("--kv", choices=["bf16", "fp8"], default="bf16")
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.manual_seed(0)
    details: dict[str, object] = {}
    for part, measure in (("write", run_write), ("decode", run_decode), ("prefill", run_prefill)):
        if options.only in (None, part):
            results: dict[str, dict[str, float | str]] = {}
            measure(results, details, options.kv)
            common.print_table(results)
    shape = {
        "num_q_heads": Q_HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM, "page_size": PAGE, "dtype": "bf16",
        "KV cache": options.kv,
    }  # fmt: skip
    common.write(options.out, unit="us", shapes=shape, repeats=15, cases=details)


if __name__ == "__main__":
    main()

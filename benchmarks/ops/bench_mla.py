"""Latent attention against its floors: absorbed decode for 16, 64 and 128 heads, expanded prefill, the write.

python benchmarks/ops/bench_mla.py [--only decode|prefill|write] [--kv bf16|fp8] [--sweep] [--out FILE]

Decode's floor reads every latent once (one block of heads shares what the other loads), or multiplies; bandwidth is
measured in the same run. `--sweep` tries the cuts of decode programs from which `decode_cut` was made.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common

from gossamer.ops.attention import DecodeWorkspace
from gossamer.ops.mla import latent_decode, latent_prefill, rope_write_latents
from gossamer.ops.mla import triton as kernels

RANK, NOPE, ROPE, V, PAGE = 512, 128, 64, 128, 64
WIDTH = RANK + ROPE
DECODE = {
    "b1 1k": [1024], "b1 8k": [8192], "b1 64k": [65536], "b64 1k": [1024] * 64, "b64 8k": [8192] * 64,
    "b256 1k": [1024] * 256, "b64 ragged": [256 * (1 + i) for i in range(64)],
}  # fmt: skip
# Rows of (new tokens, context with them).
PREFILL = {
    "8 x 1k": [(1024, 1024)] * 8,
    "8k": [(8192, 8192)],
    "8k after 56k": [(8192, 65536)],
    "512 after 8k": [(512, 8704)],
}
WRITE = {"write b1": 1, "write b64": 64, "write b256": 256}
SWEEP = [(16, 4, 3), (16, 8, 2), (16, 8, 3), (64, 8, 2)]


class Cache:
    """Pages for `num_sets` batches of these lengths, scattered; set i uses slots[i]. FP8 pages have scales."""

    def __init__(self, seq_lens: list[int], num_sets: int, kv: str) -> None:
        counts = [-(-n // PAGE) for n in seq_lens] * num_sets
        pages = torch.randn(sum(counts), 1, PAGE, WIDTH, dtype=torch.bfloat16, device="cuda")
        self.pages = pages.to(torch.float8_e4m3fn) if kv == "fp8" else pages
        self.scales = torch.ones(sum(counts), 1, device="cuda") if kv == "fp8" else None
        table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
        for row, ids in enumerate(torch.randperm(sum(counts)).to(torch.int32).split(counts)):
            table[row, : len(ids)] = ids
        self.page_table = table.cuda()
        self.slots = torch.arange(len(counts), dtype=torch.int32, device="cuda").view(num_sets, -1)
        self.seq_lens = torch.tensor(seq_lens, dtype=torch.int32, device="cuda")


def decode_case(seq_lens: list[int], heads: int, kv: str) -> tuple[Callable[[int], None], int]:
    num_sets = common.rotations(sum(seq_lens) * WIDTH * (1 if kv == "fp8" else 2), most=32)
    cache = Cache(seq_lens, num_sets, kv)
    q = torch.randn(len(seq_lens), heads, RANK, dtype=torch.bfloat16, device="cuda")
    q_rope = torch.randn(len(seq_lens), heads, NOPE + ROPE, dtype=torch.bfloat16, device="cuda")[..., NOPE:]
    out, blocks = torch.empty_like(q), max(1, heads // 64)
    programs = 2 * torch.cuda.get_device_properties(0).multi_processor_count // blocks
    workspace = DecodeWorkspace.allocate(len(seq_lens), heads, blocks, RANK, "cuda", programs)

    def call(i: int) -> None:
        latent_decode(
            q, q_rope, cache.pages, cache.page_table, cache.slots[i % num_sets], cache.seq_lens, 192**-0.5, out,
            scales=cache.scales, workspace=workspace, max_seq_len=max(seq_lens),
        )  # fmt: skip

    return call, num_sets


def run_decode(
    cases: dict[str, list[int]], heads: int, kv: str, read: float, tag: str = ""
) -> Iterator[tuple[str, dict[str, object]]]:
    for name, seq_lens in cases.items():
        tokens = sum(seq_lens)
        call, num_sets = decode_case(seq_lens, heads, kv)
        times = common.measure_us(call, calls=max(8, min(32, num_sets)))
        median, flops = statistics.median(times), 2.0 * tokens * heads * (WIDTH + RANK)
        num_bytes = tokens * WIDTH * (1 if kv == "fp8" else 2)
        floor = common.floor_us(num_bytes, flops)
        key = f"decode h{heads} {kv} {name}{tag}"
        yield key, {
            "median": median, "floor": floor, "TB/s": num_bytes / median / 1e6, "of read": num_bytes / median / read,
            "TFLOP/s": flops / median / 1e6, "all": times,
        }  # fmt: skip
        torch.cuda.empty_cache()


def prefill_case(rows: list[tuple[int, int]], heads: int, kv: str) -> Callable[[int], None]:
    cache, q_lens = Cache([total for _, total in rows], 1, kv), [n for n, _ in rows]
    kv_b = torch.randn(heads, NOPE + V, RANK, dtype=torch.bfloat16, device="cuda") / RANK**0.5
    ends = torch.tensor([0, *q_lens]).cumsum(0).to("cuda", torch.int32)
    q = torch.randn(sum(q_lens), heads, NOPE + ROPE, dtype=torch.bfloat16, device="cuda")
    out, context = q.new_empty(len(q), heads, V), sum(total for _, total in rows)

    def call(_: int) -> None:
        latent_prefill(
            q, kv_b, cache.pages, cache.page_table, cache.slots[0], ends, cache.seq_lens, context, max(q_lens),
            192**-0.5, out, scales=cache.scales,
        )  # fmt: skip

    return call


def run_prefill(heads: int, kv: str) -> Iterator[tuple[str, dict[str, object]]]:
    """The floor multiplies what the algorithm asks for: expanding a cached prefix again is not in it."""
    for name, rows in PREFILL.items():
        times = common.measure_us(prefill_case(rows, heads, kv), calls=2, repeats=7)
        pairs = sum(n * (total - n) + n * (n + 1) / 2 for n, total in rows)
        flops = 2.0 * heads * (pairs * (NOPE + ROPE + V) + sum(n for n, _ in rows) * RANK * (NOPE + V))
        median, floor = statistics.median(times), common.floor_us(flops=flops)
        key = f"prefill h{heads} {kv} {name}"
        yield key, {"median": median, "floor": floor, "TFLOP/s": flops / median / 1e6, "all": times}


def write_case(num_tokens: int, heads: int, kv: str) -> Callable[[int], None]:
    cache = Cache([PAGE] * num_tokens, 1, kv)
    both = torch.randn(num_tokens, heads * (NOPE + ROPE) + WIDTH, dtype=torch.bfloat16, device="cuda")
    q, latents = both.split([heads * (NOPE + ROPE), WIDTH], 1)
    out, norm = q.new_empty(num_tokens, heads, NOPE + ROPE), torch.ones(RANK, dtype=torch.bfloat16, device="cuda")
    angles, slots = torch.rand(PAGE, ROPE, device="cuda"), cache.slots[0]
    positions = [torch.full_like(slots, i) for i in range(PAGE)]

    def call(i: int) -> None:
        rope_write_latents(
            q, latents, norm, 1e-6, angles, angles, positions[i % PAGE], slots, cache.page_table, cache.pages, out,
            interleaved=True, scales=cache.scales,
        )  # fmt: skip

    return call


def run_write(heads: int, kv: str) -> Iterator[tuple[str, dict[str, object]]]:
    for name, num_tokens in WRITE.items():
        times = common.measure_us(write_case(num_tokens, heads, kv), calls=32)
        num_bytes = num_tokens * (4 * heads * (NOPE + ROPE) + WIDTH * (3 if kv == "fp8" else 4))
        floor = common.floor_us(num_bytes)
        yield f"{name} h{heads} {kv}", {"median": statistics.median(times), "floor": floor, "all": times}


def sweep(read: float) -> Iterator[tuple[str, dict[str, object]]]:
    """Cuts of the plain kernel, for 16 heads: which ones it compiles for, and how fast they are."""
    chosen = kernels.decode_cut
    for cut in SWEEP:
        kernels.decode_cut = lambda *_, cut=cut: kernels.DecodeCut(*cut)  # type: ignore[misc]
        tag = " g{} w{} s{}".format(*cut)
        try:
            yield from run_decode({"b64 8k": DECODE["b64 8k"]}, 16, "bf16", read, tag)
        except Exception as error:
            print(f"bf16{tag}: {type(error).__name__} {str(error)[:120]}", flush=True)
    kernels.decode_cut = chosen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["decode", "prefill", "write"])
    parser.add_argument("--kv", choices=["bf16", "fp8"], help="pages of this type alone")
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.manual_seed(0)
    read = common.ceilings()["read_bytes_per_second"] / 1e6
    print("ceilings", common.ceilings())
    cases: dict[str, object] = {}
    runs: list[Iterator[tuple[str, dict[str, object]]]] = []
    if options.sweep:
        runs.append(sweep(read))
    else:
        for kv in (options.kv,) if options.kv else ("bf16", "fp8"):
            if options.only in (None, "write"):
                runs.append(run_write(16, kv))
            if options.only in (None, "decode"):
                runs += [run_decode(DECODE, heads, kv, read) for heads in (16, 64, 128)]
            if options.only in (None, "prefill") and kv == "bf16":
                runs += [run_prefill(heads, kv) for heads in (16, 128)]
    for run in runs:
        for name, case in run:
            cases[name] = case
            shown = {k: f"{v:.4g}" for k, v in case.items() if isinstance(v, float)}
            print(f"{name:<44}", *(f"{k} {v}" for k, v in shown.items()), flush=True)
    shapes = {"kv_lora_rank": RANK, "qk_rope_head_dim": ROPE, "page_size": PAGE, "dtype": "bf16"}
    common.write(options.out, unit="us", shapes=shapes, repeats=15, cases=cases)


if __name__ == "__main__":
    main()

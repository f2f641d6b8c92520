"""Products of few rows against the library's: `python benchmarks/ops/bench_linear.py [--sweep] [--out FILE]`.

Shapes of Qwen3-30B-A3B's decode step; weights rotate through more memory than L2 holds. `--sweep` times every cut that
`gossamer.ops.gemm.triton.choose` may return; the last table is a chain of eight products with and without overlap.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import pathlib
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common

from gossamer.ops.gemm import triton as kernels
from gossamer.ops.gemm import use_fused_norm
from gossamer.ops.norm import add_rms_norm
from gossamer.ops.norm import triton as norms

# name: (N, K, output dtype)
SHAPES = {
    "qkv": (5120, 2048, torch.bfloat16),
    "o": (2048, 4096, torch.bfloat16),
    "router": (128, 2048, torch.float32),
    "head": (151936, 2048, torch.float32),
}
ROWS = (1, 2, 8, 16, 32, 64)


def candidates(num_rows: int, num_out: int) -> list[kernels.Config]:
    cuts = []
    if num_rows <= 2:
        cuts += [kernels.Config(n, 0, w) for n, w in ((1, 2), (1, 4), (1, 8), (2, 4), (4, 4), (4, 8), (8, 4), (8, 8))]
    block_m = max(16, num_rows)
    tiles = [(16, 256, 1), (16, 256, 2), (32, 256, 4), (64, 128, 4), (64, 256, 4), (128, 64, 4), (128, 128, 8)]
    for (n, k, warps), stages, split in itertools.product(tiles, (3, 5), (1, 2, 4)):
        shared = stages * 2 * k * (n + block_m)
        programs = -(-num_out // n) * split
        if shared <= 220_000 and (split == 1 or (programs <= 400 and num_out <= 8192)):
            cuts.append(kernels.Config(n, k, warps, stages, split))
    return cuts


class Inputs:
    def __init__(self, shape: str) -> None:
        num_out, width, self.dtype = SHAPES[shape]
        self.bytes = 2 * num_out * width
        sets = common.rotations(self.bytes)
        self.weights = [torch.randn(num_out, width, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(sets)]
        self.x = torch.randn(64, width, device="cuda", dtype=torch.bfloat16)

    def time(self, fn: Callable[[torch.Tensor], object]) -> list[float]:
        calls = max(4, min(len(self.weights), 16))
        return common.measure_us(lambda i: fn(self.weights[i % len(self.weights)]), calls=calls, repeats=9)


def library(x: torch.Tensor, dtype: torch.dtype, weight: torch.Tensor) -> torch.Tensor:
    return F.linear(x, weight).to(dtype)


def product(x: torch.Tensor, dtype: torch.dtype, config: kernels.Config | None, weight: torch.Tensor) -> torch.Tensor:
    return kernels.few_row_linear(x, weight, None, dtype, config)


def sweep(inputs: dict[str, Inputs], rows: tuple[int, ...]) -> None:
    for shape, data in inputs.items():
        for m in rows:
            x = data.x[:m].contiguous()
            found = sorted(
                (statistics.median(data.time(functools.partial(product, x, data.dtype, config))), config)
                for config in candidates(m, SHAPES[shape][0])
            )
            best = "  ".join(f"{t:.2f} {tuple(c)}" for t, c in found[:5])
            print(f"{shape} M={m} floor {common.floor_us(data.bytes):.2f} | {best}", flush=True)


def chain(m: int, overlap: bool, mode: str, data: list[list[torch.Tensor]]) -> float:
    """Microseconds of one product in a chain of eight: qkv, o, qkv, o ... each fed by the one before it."""
    qkv, o = data
    norm = torch.ones(2048, device="cuda", dtype=torch.bfloat16)
    residual = torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16)
    first = torch.randn(m, 2048, device="cuda", dtype=torch.bfloat16)
    original = kernels.overlap_options
    if not overlap:
        kernels.overlap_options = norms.overlap_options = lambda x: {"PDL": False}  # type: ignore[attr-defined]

    def run(i: int) -> None:
        x, stream = first, residual
        for j in range(4):
            up, down = qkv[(4 * i + j) % len(qkv)], o[(4 * i + j) % len(o)]
            if mode == "library":
                wide = F.linear(add_rms_norm(x, stream, norm, 1e-6), up)
                x = F.linear(wide.view(-1)[: m * 4096].view(m, 4096), down)
            elif mode == "fused":
                wide, stream, _ = kernels.add_rms_norm_linear(x, stream, norm, 1e-6, up, None, x.dtype, False)
                x = kernels.few_row_linear(wide.view(-1)[: m * 4096].view(m, 4096), down, None, x.dtype)
            else:
                wide = kernels.few_row_linear(add_rms_norm(x, stream, norm, 1e-6), up, None, x.dtype)
                x = kernels.few_row_linear(wide.view(-1)[: m * 4096].view(m, 4096), down, None, x.dtype)

    try:
        return common.median_us(run, calls=4) / 8
    finally:
        kernels.overlap_options = norms.overlap_options = original  # type: ignore[attr-defined]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--rows", type=lambda s: tuple(map(int, s.split(","))), default=ROWS)
    parser.add_argument("--shapes", type=lambda s: s.split(","), default=list(SHAPES))
    parser.add_argument("--out")
    args = parser.parse_args()
    inputs = {shape: Inputs(shape) for shape in args.shapes}
    if args.sweep:
        sweep(inputs, args.rows)
    median: dict[str, dict[str, float]] = {"library": {}, "few_row_linear": {}}
    floors: dict[str, float] = {}
    every: dict[str, list[float]] = {}
    table: dict[str, dict[str, float | str]] = {}
    for shape, data in inputs.items():
        for m in args.rows:
            x = data.x[:m].contiguous()
            case = f"{shape} M={m}"
            floors[case] = common.floor_us(data.bytes)
            every[case] = data.time(functools.partial(product, x, data.dtype, None))
            ours = median["few_row_linear"][case] = statistics.median(every[case])
            theirs = median["library"][case] = statistics.median(data.time(functools.partial(library, x, data.dtype)))
            table[case] = {
                "floor us": floors[case], "ours": ours, "library": theirs, "of floor": floors[case] / ours,
                "speedup": theirs / ours,
            }  # fmt: skip
    common.print_table(table)
    if {"qkv", "o"} <= inputs.keys():
        weights = [inputs["qkv"].weights, inputs["o"].weights]
        rows = {}
        for m in (1, 2, 8, 32):
            for mode in ("library", "separate", "fused")[: 3 if use_fused_norm(m, weights[0][0]) else 2]:
                rows[f"chain M={m} {mode}"] = {f"overlap {on}": chain(m, on, mode, weights) for on in (False, True)}
        common.print_table(rows)
        median["chain"] = {f"{name} {k}": v for name, row in rows.items() for k, v in row.items()}
    common.write(
        args.out, unit="us a call", shapes=str({s: SHAPES[s][:2] for s in inputs}), repeats=9, median=median,
        all=every, floor=floors,
    )  # fmt: skip


if __name__ == "__main__":
    main()

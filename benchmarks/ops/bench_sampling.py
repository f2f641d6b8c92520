"""Sampling a step's tokens on the device: by kind of request, batch size, dtype and shape of the distribution."""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2]))

from benchmarks.common import floor_us, measure_us, print_table, rotations, write
from gossamer.ops.sampling import sample_slots, workspace_size

VOCAB = 151_936
KINDS = {
    "greedy": {"temperature": 0.0},
    "temperature": {"temperature": 0.8},
    "top_k 20, top_p .95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    "top_p .95": {"temperature": 1.0, "top_p": 0.95},
    "min_p .05": {"temperature": 1.0, "min_p": 0.05},
    "top_k 1000": {"temperature": 1.0, "top_k": 1000},
    "top_k 1000, top_p .9": {"temperature": 1.0, "top_k": 1000, "top_p": 0.9},
}
DEFAULT = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
COLUMNS = {"temperature": torch.float64, "top_k": torch.int32, "top_p": torch.float64, "min_p": torch.float64}


def logits_of(kind: str, rows: int, dtype: torch.dtype) -> torch.Tensor:
    """`peaked`: a few likely tokens above a normal bulk, as a trained model's; `flat`: normal with deviation 1."""
    x = torch.randn(rows, VOCAB, device="cuda") * (2.2 if kind == "peaked" else 1.0)
    if kind == "peaked":
        ids = torch.randint(VOCAB, (rows, 30), device="cuda")
        x.scatter_(1, ids, 18.0 - 0.5 * torch.arange(30, device="cuda").float().expand(rows, -1))
    return x.to(dtype)


def run(params: dict[str, float], shape: str, rows: int, dtype: torch.dtype) -> list[float]:
    """Each call of a graph reads other logits, so they come from device memory unless one set exceeds its share."""
    num_sets = rotations(rows * VOCAB * dtype.itemsize, most=32)
    sets = [logits_of(shape, rows, dtype) for _ in range(num_sets)]
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    columns = [torch.full((rows,), (DEFAULT | params)[k], dtype=d, device="cuda") for k, d in COLUMNS.items()]
    seed = torch.arange(rows, device="cuda")
    last = torch.zeros(rows, dtype=torch.int64, device="cuda")
    index = torch.zeros(rows, dtype=torch.int64, device="cuda")
    out = torch.zeros(rows, dtype=torch.int64, device="cuda")
    workspace = torch.empty(workspace_size(rows, VOCAB), dtype=torch.int32, device="cuda")

    def call(i: int) -> None:
        logits = sets[i % num_sets]
        sample_slots(logits, slots, *columns, seed, index, last, workspace=workspace, out=out)

    return measure_us(call, calls=max(8, min(num_sets, 32)), repeats=9)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    parser.add_argument("--rows", type=int, nargs="*", default=[1, 8, 64, 256])
    parser.add_argument("--dtypes", nargs="*", default=["float32", "bfloat16"])
    options = parser.parse_args()
    results, table = [], {}
    print(torch.cuda.get_device_name(), f"vocab {VOCAB}, microseconds by rows (floor: logits read once)")
    for dtype in (getattr(torch, name) for name in options.dtypes):
        floors = {rows: floor_us(rows * VOCAB * dtype.itemsize) for rows in options.rows}
        table[f"floor {dtype}"] = {f"B={rows}": floor for rows, floor in floors.items()}
        for name, params in KINDS.items():
            for shape in ("peaked", "flat") if "top" in name or "min" in name else ("peaked",):
                line = table[f"{name} {shape}"] = {}
                for rows, floor in floors.items():
                    times = run(params, shape, rows, dtype)
                    median = statistics.median(times)
                    line[f"B={rows}"] = median
                    fields = {"kind": name, "logits": shape, "rows": rows, "vocab": VOCAB, "dtype": str(dtype)}
                    results.append(fields | {"median": median, "all": times, "floor": floor, "ratio": median / floor})
        print_table(table)
        table = {}
    write(options.out, unit="us", results=results)


if __name__ == "__main__":
    main()

"""What every device benchmark shares: timing by CUDA-graph replay, floors, and the JSON that documents are made of."""

from __future__ import annotations

import datetime
import functools
import json
import pathlib
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

L2_BYTES = 60 << 20
"""Of the largest device that these were run on."""


def measure_us(fn: Callable[[int], object], *, calls: int = 16, repeats: int = 15, warmup: int = 3) -> list[float]:
    """Microseconds of one call, `repeats` times, each the mean over a captured graph of fn(0) .. fn(calls - 1).

    `fn(i)` is to use input set i % num_sets: with sets of more than L2_BYTES in all (`rotations`), weights come from
    device memory, as they do in a model.
    """
    for i in range(min(calls, 2)):
        fn(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(calls):
            fn(i)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for _ in range(warmup):
        graph.replay()
    for start, end in events:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return [1e3 * start.elapsed_time(end) / calls for start, end in events]


def median_us(fn: Callable[[int], object], **options: int) -> float:
    """Median of `measure_us`."""
    return statistics.median(measure_us(fn, **options))


def rotations(bytes_per_set: int, most: int = 64) -> int:
    """How many input sets push each other out of L2 before they come round again."""
    return max(2, min(most, -(-4 * L2_BYTES // max(bytes_per_set, 1))))


@functools.cache
def ceilings() -> dict[str, Any]:
    """What this device can do at best, measured once a process, as `gossamer info --measure` does."""
    from gossamer.runtime import ceilings
    from gossamer.runtime.hardware import detect

    return ceilings.measure(detect("cuda"))


def floor_us(num_bytes: float = 0.0, flops: float = 0.0, *, dtype: str = "bfloat16") -> float:
    """The time below which no version can run: bytes over bandwidth or FLOPs over peak, whichever is longer."""
    best = ceilings()
    return 1e6 * max(num_bytes / best["read_bytes_per_second"], flops / best["flops_per_second"][dtype])


def environment() -> dict[str, str]:
    """command, git, device, torch, triton, date."""
    root = pathlib.Path(__file__).resolve().parent.parent
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True)
    try:
        import triton

        version = triton.__version__
    except ImportError:
        version = "none"
    return {
        "command": shlex.join(["python", *sys.argv]),
        "git": git.stdout.strip() or "unknown",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "torch": torch.__version__,
        "triton": version,
        "date": datetime.date.today().isoformat(),
    }


def write(path: str | None, **fields: Any) -> None:
    """Writes `environment()`, `ceilings()` and `fields` (unit, shapes, repeats, median, all, floor), given a path."""
    if path:
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        best = {"ceilings": ceilings()} if torch.cuda.is_available() else {}
        whole = {**environment(), **best, **fields}
        pathlib.Path(path).write_text(json.dumps(whole, indent=1) + "\n")


def print_table(rows: Mapping[str, Mapping[str, float | str]]) -> None:
    """Prints named rows of equal columns, numbers to three digits."""
    columns = list(next(iter(rows.values())))
    width = max(len(name) for name in rows)
    print(" " * width, *(f"{c:>10}" for c in columns))
    for name, row in rows.items():
        cells = (f"{v:>10.3g}" if isinstance(v, float) else f"{v!s:>10}" for v in row.values())
        print(f"{name:<{width}}", *cells, flush=True)

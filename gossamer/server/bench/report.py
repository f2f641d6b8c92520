"""From the times of tokens to the figures that people compare, and the JSON that documents are made of."""

import datetime
import importlib.metadata
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, astuple, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from gossamer.config import DeviceCeilings
from gossamer.core import EngineStats, StartupError
from gossamer.server.bench import BenchConfig

Figures = dict[str, float]


@dataclass(slots=True)
class Record:
    """One request as its sender saw it; times in seconds of any one clock."""

    prompt_len: int
    sent: float
    num_tokens: int = 0
    token_times: list[float] = field(default_factory=list)
    """When tokens came: one entry for each, or for each piece of a stream."""
    error: str | None = None


def figures(records: Sequence[Record], seconds: float) -> Figures:
    """Throughput, and medians and 99th percentiles of latencies, of the requests that succeeded."""
    done = [record for record in records if record.error is None and record.token_times]
    outputs, inputs = sum(r.num_tokens for r in done), sum(r.prompt_len for r in done)
    found = {
        "seconds": seconds,
        "requests": float(len(done)),
        "failed": float(len(records) - len(done)),
        "requests_per_second": len(done) / seconds,
        "output_tokens_per_second": outputs / seconds,
        "total_tokens_per_second": (inputs + outputs) / seconds,
    }
    latencies = {
        "ttft": [r.token_times[0] - r.sent for r in done],
        "tpot": [(r.token_times[-1] - r.token_times[0]) / (r.num_tokens - 1) for r in done if r.num_tokens > 1],
        "itl": [b - a for r in done for a, b in pairwise(r.token_times)],
        "e2e": [r.token_times[-1] - r.sent for r in done],
    }
    for name, values in latencies.items():
        if values:
            found[f"{name}_ms_median"] = 1e3 * statistics.median(values)
            found[f"{name}_ms_p99"] = 1e3 * sorted(values)[min(len(values) - 1, int(0.99 * len(values)))]
    return found


def engine_figures(before: EngineStats, after: EngineStats, ceilings: DeviceCeilings | None) -> Figures:
    """What the engine's own counters say of the time between two snapshots; nothing that was not measured."""
    grown = EngineStats(*(b - a for a, b in zip(astuple(before), astuple(after), strict=True)))
    found = {}
    if grown.prefix_cache_queries:
        found["prefix_hit_rate"] = grown.prefix_cache_hits / grown.prefix_cache_queries
    if grown.spec_decode_num_drafts:
        found["draft_acceptance_rate"] = grown.spec_decode_num_accepted_tokens / grown.spec_decode_num_drafts
    if grown.device_idle_fraction is not None:
        found["device_idle_fraction"] = grown.device_idle_fraction
    if ceilings is not None and grown.device_seconds:
        found["mfu"] = grown.model_flops / grown.device_seconds / ceilings.flops_per_second
        found["mbu"] = grown.model_bytes / grown.device_seconds / ceilings.bytes_per_second
    return found


def environment(device: str, program: str = "gossamer") -> dict[str, str]:
    """command, git, device, torch, triton, date: what a figure means nothing without."""
    folder = Path(__file__).resolve().parent
    git = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=folder, capture_output=True, text=True)
    facts = {"command": f"{program} {shlex.join(sys.argv[1:])}", "git": git.stdout.strip() or "unknown"}
    installed = {dist.name: dist.version for dist in importlib.metadata.distributions()}
    versions = {name: installed.get(name, "none") for name in ("torch", "triton")}
    return {**facts, "device": device, **versions, "date": datetime.date.today().isoformat()}


def publish(runs: list[Figures], model: str, bench: BenchConfig, device: str) -> Figures:
    """Prints the medians over the runs, writes everything to `bench.output_json` if set, and returns the medians."""
    median = {name: statistics.median(run[name] for run in runs if name in run) for name in runs[0]}
    for name, value in median.items():
        print(f"{name:<28}{value:>14,.4g}")
    if bench.output_json is not None:
        shapes = {"model": model, **{k: v for k, v in asdict(bench).items() if v is not None}}
        report = {**environment(device), "shapes": shapes, "repeats": len(runs), "median": median, "all": runs}
        write_report(bench.output_json, report)
    return median


def write_report(path: str, report: dict[str, Any]) -> None:
    """Writes what --output-json asked for. Raises StartupError if the file cannot be written."""
    try:
        Path(path).write_text(json.dumps(report, indent=1) + "\n")
    except OSError as error:
        raise StartupError(f"--output-json {path}: {error.strerror}.") from error

"""Writes the tables of the documents from the committed results: `python benchmarks/tables.py`.

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is a file under benchmarks/results. Where that
file does not exist yet, the command that writes it stands there instead.
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent

MAX_COLUMNS = 8
"""Of medians by implementation and case: more cases than this become rows."""

Rows = dict[str, dict[str, Any]]


def rows_of(report: dict[str, Any]) -> Rows:
    """Rows of named columns, whichever way a benchmark wrote its medians."""
    if "results" in report:
        return sampling_rows(report["results"])
    if "table" in report:
        return dict(report["table"])
    if "cases" in report:
        return {
            name: {"us": case["median"], "floor": case["floor"], "of floor": case["floor"] / case["median"]}
            for name, case in report["cases"].items()
        }
    medians, floors = report["median"], report.get("floor", {})
    if any(isinstance(value, dict) for value in medians.values()):
        return by_case(medians, floors) if max(map(len, medians.values())) > MAX_COLUMNS else dict(medians)
    return {
        name: {"median": value, **({"floor": floors[name], "of floor": value / floors[name]} if name in floors else {})}
        for name, value in medians.items()
    }


def by_case(medians: Rows, floors: dict[str, float]) -> Rows:
    """A row for each case, a column for each implementation, and the floor where there is one."""
    rows: Rows = {}
    for implementation, values in medians.items():
        for case, value in values.items():
            rows.setdefault(case, {"floor": floors[case]} if case in floors else {})[implementation] = value
    return rows


def sampling_rows(results: list[dict[str, Any]]) -> Rows:
    """A row for each kind of request, a column for each type and batch size, the floors on top."""
    table: Rows = {"floor": {}}
    for result in results:
        dtype = result["dtype"].removeprefix("torch.")
        column = f"{dtype}, {result['rows']} row{'s' * (result['rows'] > 1)}"
        table["floor"][column] = result["floor"]
        table.setdefault(f"{result['kind']}, {result['logits']}", {})[column] = result["median"]
    return table


def caption(report: dict[str, Any]) -> str:
    shapes = report.get("shapes") or f"vocabulary {report['results'][0]['vocab']}"
    if isinstance(shapes, dict):
        shapes = ", ".join(f"{name} {value}" for name, value in shapes.items())
    repeats = report.get("repeats") or len(report["results"][0]["all"])
    return (
        f"{report['unit']}. {shapes}. {report['device']}, torch {report['torch']}, medians of {repeats}, "
        f"{report['date']}: `{report['command']}`"
    )


def cell(value: Any) -> str:
    if isinstance(value, str):
        return value
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}"


def table(report: dict[str, Any]) -> str:
    rows = rows_of(report)
    columns = list(dict.fromkeys(column for values in rows.values() for column in values))
    lines = ["| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    lines += [
        f"| {name} | " + " | ".join(cell(values.get(c, "")) for c in columns) + " |" for name, values in rows.items()
    ]
    return "\n".join([*lines, "", caption(report)])


def missing(name: str) -> str:
    """Which command measures what is not there yet. Raises ValueError for a name that no benchmark writes."""
    stem = name.rpartition("/")[2]
    command = f"python benchmarks/ops/bench_{stem}.py --out benchmarks/results/{name}.json"
    if stem == "standard_bf16":
        command = "python benchmarks/serving/standard.py"
    if stem == "standard_mla":
        command = "python benchmarks/serving/standard.py --prefix mla --model benchmarks/models/deepseek-v2-lite"
    if stem == "standard_dense":
        options = "--prefix dense --model benchmarks/models/qwen3-8b --engine quantization=fp8"
        command = f"python benchmarks/serving/standard.py {options}"
    if stem in ("standard_fp8", "standard_fp8kv"):
        options = "--engine quantization=fp8" + " --engine kv_cache_dtype=fp8" * stem.endswith("kv")
        command = f"python benchmarks/serving/standard.py --prefix {stem.removeprefix('standard_')} {options}"
    if stem in ("breakdown", "breakdown_fp8"):
        fp8 = "--engine quantization=fp8 --batches 1 32 128 256 " * stem.endswith("fp8")
        command = f"python benchmarks/serving/breakdown.py {fp8}--out benchmarks/results/{name}.json"
    if stem == "attention_fp8":
        command = f"python benchmarks/ops/bench_attention.py --kv fp8 --out benchmarks/results/{name}.json"
    if stem == "mla_fp8":
        command = f"python benchmarks/ops/bench_mla.py --only decode --kv fp8 --out benchmarks/results/{name}.json"
    if stem == "layers_dsv3":
        command = f"python benchmarks/serving/layers.py --engine quantization=fp8 --out benchmarks/results/{name}.json"
    if not (ROOT / command.split()[1]).exists():
        raise ValueError(f"no benchmark writes benchmarks/results/{name}.json")
    device = {"h100": "an H100", "h200": "an H200", "cpu": "a CPU"}.get(name.partition("/")[0], name.partition("/")[0])
    return f"Not measured on {device} yet: run `{command}`, then `python benchmarks/tables.py`."


def section(match: re.Match[str]) -> str:
    path = ROOT / "benchmarks" / "results" / f"{match[2]}.json"
    text = table(json.loads(path.read_text())) if path.exists() else missing(match[2])
    return f"{match[1]}{text}\n{match[3]}"


def main() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text()
        new = re.sub(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", section, text, flags=re.S)
        if new != text:
            path.write_text(new)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()

"""Writes the tables of the documents from the committed results: `python benchmarks/tables.py`.

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is a file under benchmarks/results. Where that
file does not exist yet, the text in between stays: it says which command measures.
"""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent

Rows = dict[str, dict[str, Any]]


def rows_of(report: dict[str, Any]) -> Rows:
    """Rows of named columns, whichever way a benchmark wrote its medians."""
    if "results" in report:
        return sampling_rows(report["results"])
    if "table" in report:
        return dict(report["table"])
    if "cases" in report:
        return {name: {"us": case["median"], "floor": case["floor"]} for name, case in report["cases"].items()}
    medians = report["median"]
    if any(isinstance(value, dict) for value in medians.values()):
        return dict(medians)
    floors = report.get("floor", {})
    return {name: {"median": value, "floor": floors.get(name, "")} for name, value in medians.items()}


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


def section(match: re.Match[str]) -> str:
    path = ROOT / "benchmarks" / "results" / f"{match[2]}.json"
    return f"{match[1]}{table(json.loads(path.read_text()))}\n{match[3]}" if path.exists() else match[0]


def main() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text()
        new = re.sub(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", section, text, flags=re.S)
        if new != text:
            path.write_text(new)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()

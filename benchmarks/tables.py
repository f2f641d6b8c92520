"""Writes the tables of the documents from the committed results: `python benchmarks/tables.py`.

A table stands between `<!-- table NAME -->` and `<!-- end -->`; NAME is a file under benchmarks/results.
"""

from __future__ import annotations

import json
import pathlib
import re

ROOT = pathlib.Path(__file__).resolve().parent.parent


def table(name: str) -> str:
    report = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    medians: dict[str, dict[str, float]] = report["median"]
    cases = list(next(iter(medians.values())))
    lines = ["| | " + " | ".join(cases) + " |", "|---" * (len(cases) + 1) + "|"]
    for engine, values in medians.items():
        cells = [f"{values[c]:.4g}" if c in values else "" for c in cases]
        lines.append(f"| {engine} | " + " | ".join(cells) + " |")
    lines.append("")
    lines.append(f"{report['unit']}. {report['shapes']}. {report['device']}, torch {report['torch']}, medians of ")
    lines[-1] += f"{report['repeats']}, {report['date']}: `{report['command']}`"
    return "\n".join(lines)


def main() -> None:
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        text = path.read_text()
        pattern = r"(<!-- table (\S+) -->\n).*?(<!-- end -->)"
        new = re.sub(pattern, lambda m: f"{m[1]}{table(m[2])}\n{m[3]}", text, flags=re.S)
        if new != text:
            path.write_text(new)
            print(path.relative_to(ROOT))


if __name__ == "__main__":
    main()

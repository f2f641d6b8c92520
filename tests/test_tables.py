"""The documents' tables come from what benchmarks wrote, in whichever form, or say that nothing was measured."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FACTS = {"command": "python bench.py", "device": "H100", "torch": "2.11", "date": "2026-11-24", "unit": "us"}


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("tables", ROOT / "benchmarks" / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


CASES = [f"case {i}" for i in range(9)]
MOE_ROW = {"experts": 7.96, "us": 25.0, "chosen": "gossamer"}
REPORTS: dict[str, tuple[dict[str, Any], list[str]]] = {
    "bench_moe": (
        {"table": {"T=1": MOE_ROW}, "median": {"T=1": {"block": 25.0}}},
        ["| | experts | us | chosen |", "| T=1 | 7.96 | 25 | gossamer |"],
    ),
    "bench_attention": (
        {"cases": {"decode b1 1k": {"median": 4.0, "floor": 3.0, "all": [4.0]}}},
        ["| | us | floor | of floor |", "| decode b1 1k | 4 | 3 | 0.75 |"],
    ),
    "bench_linear": (
        {
            "median": {
                "library": dict.fromkeys(CASES, 3.0),
                "few_row_linear": dict.fromkeys(CASES, 2.0),
                "chain": {"c": 1.0},
            },
            "floor": dict.fromkeys(CASES, 1.5),
        },
        ["| | floor | library | few_row_linear | chain |", "| case 8 | 1.5 | 3 | 2 |  |", "| c |  |  |  | 1 |"],
    ),
    "bench_elementwise": (
        {"median": {"kernel": dict.fromkeys(CASES, 3.0)}, "floor": dict.fromkeys(CASES, 1.5)},
        ["| | floor | kernel |", "| case 0 | 1.5 | 3 |"],
    ),
    "standard": (
        {"median": {"decode.b1": 1234.5, "start.warm_s": 9.25}, "floor": {"decode.b1": 2000.0}},
        ["| | median | floor | of floor |", "| decode.b1 | 1234 | 2000 | 0.6172 |", "| start.warm_s | 9.25 |  |  |"],
    ),
    "cpu_peers": (
        {"median": {"a": {"x": 1.0, "y": 2.0}, "b": {"x": 3.0}}},
        ["| | x | y |", "| a | 1 | 2 |", "| b | 3 |  |"],
    ),
}


@pytest.mark.parametrize("name", REPORTS)
def test_forms_of_results(tables: ModuleType, name: str) -> None:
    report, lines = REPORTS[name]
    text = tables.table(FACTS | {"shapes": {"hidden": 2048}, "repeats": 3} | report)
    for line in lines:
        assert line in text
    assert text.endswith("us. hidden 2048. H100, torch 2.11, medians of 3, 2026-11-24: `python bench.py`")


def test_sampling(tables: ModuleType) -> None:
    fields = {"kind": "greedy", "logits": "peaked", "vocab": 100, "dtype": "torch.float32", "all": [2.0] * 9}
    results = [fields | {"rows": rows, "median": 2.0 * rows, "floor": 1.0 * rows} for rows in (1, 64)]
    text = tables.table(FACTS | {"results": results})
    assert "| | float32, 1 row | float32, 64 rows |" in text
    assert "| floor | 1 | 64 |" in text
    assert "| greedy, peaked | 2 | 128 |" in text
    assert "vocabulary 100. H100, torch 2.11, medians of 9" in text


def test_what_was_not_measured_says_so(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docs").mkdir()
    (tmp_path / "benchmarks" / "ops").mkdir(parents=True)
    (tmp_path / "benchmarks" / "ops" / "bench_moe.py").touch()
    (tmp_path / "README.md").write_text("Nothing here.\n")
    page = tmp_path / "docs" / "page.md"
    page.write_text("before\n<!-- table h100/moe -->\n<!-- end -->\nafter\n")
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    tables.main()
    command = "python benchmarks/ops/bench_moe.py --out benchmarks/results/h100/moe.json"
    assert f"\nNot measured on an H100 yet: run `{command}`, then" in page.read_text()
    results = tmp_path / "benchmarks" / "results" / "h100"
    results.mkdir(parents=True)
    report = FACTS | {"shapes": "x", "repeats": 3, "median": {"a": {"x": 1.0}}}
    (results / "moe.json").write_text(json.dumps(report))
    tables.main()
    assert "Not measured" not in page.read_text()
    assert "| a | 1 |" in page.read_text()
    page.write_text("<!-- table h100/nothing -->\n<!-- end -->\n")
    with pytest.raises(ValueError, match=r"no benchmark writes benchmarks/results/h100/nothing\.json"):
        tables.main()


@pytest.mark.parametrize("path", [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))], ids=lambda p: p.name)
def test_documents_are_up_to_date(tables: ModuleType, path: Path) -> None:
    text = path.read_text()
    assert re.sub(r"(<!-- table (\S+) -->\n).*?(<!-- end -->)", tables.section, text, flags=re.S) == text

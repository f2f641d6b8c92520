"""`gossamer bench`: workloads, figures, and both ways of measuring, on an engine without a model and a tiny one."""

from __future__ import annotations

import json
import statistics
from itertools import pairwise
from pathlib import Path

import pytest
from server_process import ServerProcess, write_byte_tokenizer

from gossamer.config import DeviceCeilings
from gossamer.core import EngineStats
from gossamer.server import cli
from gossamer.server.bench import BenchConfig
from gossamer.server.bench.report import Record, engine_figures, figures
from gossamer.server.bench.workload import make_workload
from gossamer.server.selftest import MODELS

LATENCIES = {f"{kind}_ms_{what}" for kind in ("ttft", "tpot", "itl", "e2e") for what in ("median", "p99")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(MODELS["MoE"] | {"dtype": "float32"}))
    return tmp_path


def test_workloads_are_seeded_and_share_only_their_prefix() -> None:
    bench = BenchConfig(input_len=50, output_len=7, prefix_len=20)
    one, again, other = (make_workload(bench, 5, 1000, seed) for seed in (1, 1, 2))
    assert one == again
    assert len({tuple(request.prompt[:20]) for request in one + other}) == 1
    assert len({tuple(request.prompt[20:]) for request in one + other}) == 10
    assert {(len(request.prompt), request.output_len, request.arrival) for request in one} == {(50, 7, 0.0)}


def test_chat_mix_and_poisson_arrivals_have_the_shape_they_promise() -> None:
    requests = make_workload(BenchConfig(dataset="sharegpt-like", request_rate=50.0), 3000, 1000, 0)
    assert 90 < statistics.median(len(r.prompt) for r in requests) < 160
    assert 330 < statistics.mean(len(r.prompt) for r in requests) < 470
    assert 150 < statistics.median(r.output_len for r in requests) < 230
    gaps = [b.arrival - a.arrival for a, b in pairwise(requests)]
    assert statistics.mean(gaps) == pytest.approx(0.02, rel=0.1)
    assert statistics.pstdev(gaps) == pytest.approx(0.02, rel=0.15)
    short = make_workload(BenchConfig(dataset="sharegpt-like"), 200, 1000, 0, max_model_len=100)
    assert max(len(r.prompt) + r.output_len for r in short) <= 100


def test_figures_of_known_times() -> None:
    records = [
        Record(10, 0.0, 3, [1.0, 1.5, 2.0]),
        Record(20, 1.0, 1, [4.0]),
        Record(30, 1.0, 0, [], error="no"),
    ]
    found = figures(records, 4.0)
    assert (found["requests"], found["failed"]) == (2, 1)
    assert (found["output_tokens_per_second"], found["total_tokens_per_second"]) == (1.0, 8.5)
    assert (found["ttft_ms_median"], found["ttft_ms_p99"]) == (2000, 3000)
    assert (found["tpot_ms_median"], found["itl_ms_median"], found["e2e_ms_median"]) == (500, 500, 2500)
    assert figures([], 1.0)["requests"] == 0


def test_engine_figures_are_differences_and_nothing_unmeasured() -> None:
    before = EngineStats(prefix_cache_queries=10, prefix_cache_hits=10, device_seconds=1.0, model_flops=5.0)
    after = EngineStats(
        prefix_cache_queries=30, prefix_cache_hits=15, device_seconds=3.0, model_flops=9.0, decode_seconds=3.0,
        decode_idle_seconds=1.0,
    )  # fmt: skip
    assert engine_figures(before, after, None) == {"prefix_hit_rate": 0.25, "device_idle_fraction": 0.25}
    assert engine_figures(before, after, DeviceCeilings(8.0, 1.0))["mfu"] == 0.25
    assert engine_figures(after, after, DeviceCeilings(8.0, 1.0)) == {}
    drafted = EngineStats(spec_decode_num_drafts=8, spec_decode_num_accepted_tokens=6)
    assert engine_figures(EngineStats(), drafted, None) == {"draft_acceptance_rate": 0.75}


@pytest.mark.parametrize("kind", ["throughput", "latency"])
def test_bench_of_a_tiny_model(kind: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = folder / "out.json"
    argv = ["bench", kind, str(folder), "--load-format", "dummy", "--input-len", "70", "--output-len", "6"]
    argv += ["--num-prompts", "4", "--max-concurrency", "2", "--num-repeats", "2", "--prefix-len", "64"]
    assert cli.main([*argv, "--output-json", str(out), "--count-experts", "--num-threads", "1"]) == 0
    report = json.loads(out.read_text())
    assert {"command", "git", "device", "torch", "triton", "date", "shapes", "repeats", "median", "all"} == set(report)
    assert report["repeats"] == len(report["all"]) == 2
    median = report["median"]
    assert set(median) >= LATENCIES | {"output_tokens_per_second", "device_idle_fraction", "prefix_hit_rate"}
    assert (median["requests"], median["failed"]) == (4, 0)
    assert median["prefix_hit_rate"] > 0.5
    assert 1 <= median["experts_touched"] <= 16
    assert "ttft_ms_median" in capsys.readouterr().out


def test_bench_of_a_server(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    model = write_byte_tokenizer(tmp_path / "tiny-model")
    with ServerProcess({"load": {"model": str(model), "seed": 2}}) as server:
        argv = ["bench", "serve", "--base-url", server.url, "--vocab-size", "200", "--input-len", "20"]
        argv += ["--output-len", "5", "--num-prompts", "6", "--max-concurrency", "3", "--num-repeats", "1"]
        assert cli.main([*argv, "--output-json", str(out)]) == 0
        assert cli.main([*argv, "no-such-model"]) == 2
    median = json.loads(out.read_text())["median"]
    assert (median["requests"], median["failed"]) == (6, 0)
    assert median["output_tokens_per_second"] == pytest.approx(30 / median["seconds"])
    assert set(median) >= LATENCIES


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ([], "throughput|latency|serve"),
        (["speed"], "throughput|latency|serve"),
        (["serve", "--base-url", "http://127.0.0.1:9"], "No server answers at http://127.0.0.1:9"),
        (["serve", "--base-url", "ftp://x"], "--base-url must be like"),
        (["throughput", "m", "--num-prompts", "0"], "--num-prompts must be at least 1"),
        (["throughput", "m", "--prefix-len", "2000"], "--prefix-len must be less than"),
        (["throughput", "m", "--request-rate", "-1"], "--request-rate must be more than 0"),
    ],
)
def test_mistakes_are_explained(argv: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", *argv]) == 2
    assert said in capsys.readouterr().err

"""CUDA graphs on the device: what is replayed is what would have run, in any order of first use, and failures are
survived where they can be. The tiny model's kernels compile here, so this file takes minutes on a cold cache."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from models.tiny_checkpoints import save_checkpoint

from gossamer.config import make_engine_config
from gossamer.core import SamplingParams
from gossamer.engine.build import build_engine
from gossamer.engine.engine import Engine
from gossamer.runtime.cuda_graph import GraphPool
from gossamer.runtime.cuda_runner import MAX_KEPT_LOGITS, CudaRunner, _in_one_piece

pytestmark = pytest.mark.gpu

PROMPTS = [[(7 * i + 13 * j) % 120 + 3 for i in range(n)] for j, n in enumerate((1, 5, 17, 40, 64, 33, 90, 21))]
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    before = torch.get_num_threads()
    yield save_checkpoint("qwen3_moe", tmp_path_factory.mktemp("model") / "qwen3_moe")
    torch.set_num_threads(before)


def build(folder: Path, **options: object) -> Engine:
    options = {
        "device": "cuda", "dtype": "float32", "max_model_len": 192, "max_num_seqs": 24, "num_threads": 1,
        "max_num_batched_tokens": 96, "kv_cache_memory_bytes": 16 << 20,
    } | options  # fmt: skip
    return build_engine(make_engine_config(model=str(folder), **options))[0]


def runner_of(engine: Engine) -> CudaRunner:
    assert isinstance(engine._executor, CudaRunner)
    return engine._executor


def drain(engine: Engine, params: SamplingParams = GREEDY, every: int = 0) -> list[list[int]]:
    """Tokens of all prompts, added at once or one every so many steps."""
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    waiting = list(enumerate(PROMPTS))
    step = 0
    while waiting or engine.has_work():
        while waiting and (not every or step % every == 0):
            i, prompt = waiting.pop(0)
            engine.add_request(str(i), prompt, params)
            if every:
                break
        for output in engine.step():
            tokens[int(output.request_id)] += output.token_ids
        step += 1
    return tokens


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[list[int]]:
    engine = build(folder, device="cpu")
    tokens = drain(engine)
    engine.shutdown()
    return tokens


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bucket", [1, 2, 8, 24])
def test_a_replayed_decode_step_is_the_eager_one_to_the_bit(folder: Path, bucket: int, dtype: str) -> None:
    engine = build(folder, dtype=dtype, overlap=False)  # nothing is in flight between steps
    runner = runner_of(engine)
    num_rows = max(1, bucket - 3)
    for i in range(num_rows):
        engine.add_request(str(i), PROMPTS[3][: 5 + i], SamplingParams(seed=i, max_tokens=40, ignore_eos=True))
    for _ in range(8):
        engine.step()
    with torch.inference_mode(), torch.cuda.stream(runner.stream):
        runner.warm_up_decode(bucket)
        positions = torch.arange(num_rows, dtype=torch.int32, device="cuda") + 8
        device = runner.inputs.device
        for name, values in (("row_positions", positions), ("seq_lens", positions + 1), ("output_index", positions)):
            device[name][:num_rows] = values
        for name in ("slots", "sample_slots"):
            device[name][:num_rows] = torch.arange(num_rows, dtype=torch.int32, device="cuda")
        before = runner.last_token.clone()
        eager = [t.clone() for t in runner._decode_step(bucket) if t is not None]
        runner.last_token.copy_(before)
        assert runner._graphs is not None
        replayed = [t for t in runner._graphs.replay(("decode", bucket)) if t is not None]
        torch.cuda.synchronize()
    assert len(replayed) == (4 if bucket <= MAX_KEPT_LOGITS else 3)
    for one, other in zip(eager, replayed, strict=True):
        assert torch.equal(one[:num_rows], other[:num_rows])
        assert bool(other.isfinite().all())
    engine.shutdown()


@pytest.mark.parametrize("every", [1, 3, 7])
def test_sizes_captured_while_others_run_leave_their_tokens_alone(
    folder: Path, expected: list[list[int]], every: int
) -> None:
    engine = build(folder)
    assert drain(engine, every=every) == expected
    assert drain(engine) == expected
    assert len(runner_of(engine)._graphs or ()) > 3
    engine.shutdown()


def test_host_sampled_steps_of_every_size(folder: Path) -> None:
    params = SamplingParams(temperature=0.0, frequency_penalty=0.8, logprobs=1, max_tokens=16, ignore_eos=True)
    cpu, gpu = build(folder, device="cpu"), build(folder)
    assert drain(gpu, params, every=2) == drain(cpu, params)
    for engine in (cpu, gpu):
        engine.shutdown()


@pytest.mark.parametrize("kind", ["raises", "invalidates"])
@pytest.mark.parametrize("first", [0, 1, 3])
def test_failed_captures_are_survived(
    folder: Path, expected: list[list[int]], kind: str, first: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The captures from number `first` to `first` + 2 end half way, by an exception or a forbidden call."""
    engine = build(folder)
    runner = runner_of(engine)
    assert runner._graphs is not None
    runner._graphs.clear()
    original, calls = runner.decoder.blocks[1].attention.project, iter(range(10**6))

    def project(*args: object) -> None:
        if torch.cuda.is_current_stream_capturing() and first <= next(calls) < first + 3:
            if kind == "raises":
                raise ValueError("planned")
            runner.last_token.tolist()
        original(*args)

    monkeypatch.setattr(runner.decoder.blocks[1].attention, "project", project)
    assert drain(engine) == expected
    assert drain(engine, every=2) == expected
    assert runner._uncaptured
    assert len(runner._graphs)
    engine.shutdown()


def test_graphs_of_a_pool_start_anew_after_the_first_one_failed() -> None:
    stream, x = torch.cuda.Stream(), torch.ones(8, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        graphs = GraphPool(torch.device("cuda"))

        def fails() -> torch.Tensor:
            y = x * 3
            raise ValueError(f"planned, {y.shape}")

        with pytest.raises(ValueError, match="planned"):
            graphs.capture(("decode", 1), partial(_in_one_piece, fails))
        graphs.capture(("decode", 1), partial(_in_one_piece, lambda: x * 2))
        result = graphs.replay(("decode", 1))
        torch.cuda.synchronize()
    assert isinstance(result, torch.Tensor)
    assert result.tolist() == [2.0] * 8


def test_the_engine_keeps_within_its_share_of_memory(folder: Path) -> None:
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info()
    engine = build(
        folder,
        gpu_memory_utilization=0.4,
        kv_cache_memory_bytes=None,
        max_model_len=128,
        max_num_seqs=256,
        max_num_batched_tokens=256,
    )
    for every in (0, 1):
        drain(engine, every=every)
    torch.cuda.synchronize()
    assert free - torch.cuda.mem_get_info()[0] <= 0.4 * free
    engine.shutdown()


LOST = """
import sys
import torch
from gossamer.config import make_engine_config
from gossamer.core import EngineDead, SamplingParams
from gossamer.engine.build import build_engine

options = {"kv_cache_memory_bytes": 1 << 20, "max_model_len": 192, "dtype": "float32", "enforce_eager": True}
engine, _ = build_engine(make_engine_config(model=sys.argv[1], device="cuda", **options))
runner = engine._executor
logits = runner.decoder.logits
steps = iter(range(100))


def broken(hidden):
    if next(steps) == 3:
        torch._assert_async(torch.zeros(1, device="cuda"))
    return logits(hidden)


runner.decoder.logits = broken
for i in range(3):
    engine.add_request(str(i), [5, 6, 7], SamplingParams(temperature=0.0, max_tokens=50, ignore_eos=True))
try:
    while engine.has_work():
        engine.step()
except EngineDead as error:
    print("dead:", error)
engine.shutdown()
sys.stdout.flush()
import os
os._exit(0)
"""


def test_a_kernels_fault_ends_the_engine(folder: Path) -> None:
    """In a process of its own, which cannot use the device any more."""
    done = subprocess.run([sys.executable, "-c", LOST, str(folder)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "dead: The GPU has failed" in done.stdout, done.stderr[-2000:]

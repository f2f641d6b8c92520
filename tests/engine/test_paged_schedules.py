"""Whatever the schedule, whatever requests share a step and whatever fails, the GPU's executor gives each request the
tokens that it gets alone. On a CPU, with graphs that only look like CUDA's."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from fake_graphs import CaptureFailed, FakeGraphs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from invariants import check_drained, check_scheduler
from models.tiny_checkpoints import save_checkpoint, save_nsa_checkpoint

from gossamer.config import make_engine_config
from gossamer.core import EngineDead, SamplingParams, ScheduledBatch, ScheduledRow, StepResult
from gossamer.engine.build import build_engine
from gossamer.engine.engine import Engine
from gossamer.runtime import cuda_runner
from gossamer.runtime.cuda_runner import CudaRunner
from gossamer.runtime.step_inputs import RING

LENGTH, PAGE = 100, 8
"""The longest context, no multiple of the page."""
PROMPTS = [[(7 * i + 13 * j) % 120 + 3 for i in range(n)] for j, n in enumerate((1, 5, 17, 40, 86, 33))]
PROMPTS += [[*PROMPTS[3], 9, 8], [*PROMPTS[3][:32], 50, 51, 52]]  # shared prefixes
ODD = {"max_tokens": 14, "ignore_eos": True}
PARAMS = [
    SamplingParams(temperature=0.0, **ODD),
    SamplingParams(temperature=0.9, seed=5, **ODD),
    SamplingParams(temperature=0.0, frequency_penalty=0.9, repetition_penalty=1.3, logprobs=2, **ODD),
    SamplingParams(temperature=0.7, seed=11, top_k=20, top_p=0.9, **ODD),
    SamplingParams(temperature=0.0, max_tokens=None, ignore_eos=True),  # to the very end of the context
    SamplingParams(temperature=1.0, seed=2, stop_token_ids=[*range(3, 120, 4)], min_tokens=3, max_tokens=14),
    SamplingParams(temperature=0.0, prompt_logprobs=1, **ODD),
    SamplingParams(temperature=1.0, seed=9, allowed_token_ids=[4, 8, 15, 16, 23, 42], presence_penalty=0.5, **ODD),
]


def build(folder: Path, *, paged: bool, graphs: FakeGraphs | None = None, **options: object) -> Engine:
    options = {"max_model_len": LENGTH, "page_size": PAGE, "dtype": "float32", "num_threads": 1} | options
    engine, _ = build_engine(make_engine_config(model=str(folder), device="cpu", **options), paged=paged)
    if graphs is not None:
        executor = engine._executor
        assert isinstance(executor, CudaRunner)
        executor._graphs = graphs
    return engine


def drain(engine: Engine, order: list[int], aborts: dict[int, int] | None = None) -> dict[int, list[int] | None]:
    """Tokens by request, None for one that failed. `aborts`: request to drop before which step; it keeps its tokens."""
    tokens: dict[int, list[int] | None] = {i: [] for i in order}
    for i in order:
        engine.add_request(str(i), PROMPTS[i], PARAMS[i])
    step = 0
    while engine.has_work():
        for i, at in (aborts or {}).items():
            if at == step:
                engine.abort(str(i))
        for output in engine.step():
            i = int(output.request_id)
            kept = tokens[i]
            tokens[i] = None if output.finish_reason == "error" or kept is None else [*kept, *output.token_ids]
        check_scheduler(engine.scheduler)
        step += 1
    check_drained(engine.scheduler)
    return tokens


@pytest.fixture(scope="module", params=["qwen3_moe", "deepseek_v2_groups", "glm_moe_dsa_shared", "nsa", "minimax_m3"])
def oracle(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, list[list[int]], int]]:
    """The model, the CPU engine's tokens of each request alone, bytes of a page."""
    before = torch.get_num_threads()
    folder = tmp_path_factory.mktemp("model") / request.param
    if request.param == "nsa":
        save_nsa_checkpoint("qwen3", folder, PAGE, shared_kv=False)
    else:
        save_checkpoint(request.param, folder)
    engine = build(folder, paged=False, enable_prefix_caching=False, overlap=False, max_num_batched_tokens=512)
    alone = [drain(engine, [i])[i] for i in range(len(PROMPTS))]
    pool = engine._executor.pool
    engine.shutdown()
    assert [len(tokens) for tokens in alone][4] == LENGTH - len(PROMPTS[4])
    yield folder, alone, pool.num_bytes // pool.tensor.shape[2]
    torch.set_num_threads(before)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(len(PROMPTS))),
    overlap=st.booleans(),
    prefix=st.booleans(),
    budget=st.integers(4, 96),
    seqs=st.integers(1, 5),
    spare_pages=st.integers(0, 20),
    aborts=st.dictionaries(st.integers(0, len(PROMPTS) - 1), st.integers(0, 30), max_size=3),
    graphs=st.sampled_from([None, (), (1, 2, 16), range(1, 200)]),
    kept_logits=st.sampled_from([0, 16]),
)
def test_each_request_gets_its_tokens(
    oracle: tuple[Path, list[list[int]], int],
    order: list[int],
    overlap: bool,
    prefix: bool,
    budget: int,
    seqs: int,
    spare_pages: int,
    aborts: dict[int, int],
    graphs: range | tuple[int, ...] | None,
    kept_logits: int,
) -> None:
    folder, alone, page_bytes = oracle
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_runner, "MAX_KEPT_LOGITS", kept_logits)
        engine = build(
            folder,
            paged=True,
            graphs=None if graphs is None else FakeGraphs(graphs),
            overlap=overlap,
            enable_prefix_caching=prefix,
            max_num_batched_tokens=max(budget, seqs),
            max_num_seqs=seqs,
            kv_cache_memory_bytes=page_bytes * (-(-LENGTH // PAGE) + spare_pages),
        )
        tokens = drain(engine, order, aborts)
        engine.shutdown()
    for i, expected in enumerate(alone):
        assert tokens[i] == (expected[: len(tokens[i] or [])] if i in aborts else expected)


def fail_sometimes(runner: CudaRunner, name: str, steps: set[int], after: bool) -> None:
    """Makes a method raise in its calls of these numbers, before it does anything or when all is done."""
    owner, attribute = (runner.inputs, name) if hasattr(runner.inputs, name) else (runner, name)
    method: Callable[..., object] = getattr(owner, attribute)
    calls = iter(range(10**9))

    def failing(*args: object, **kwargs: object) -> object:
        number = next(calls)
        if number in steps and not after:
            raise RuntimeError("planned")
        result = method(*args, **kwargs)
        if number in steps:
            raise RuntimeError("planned")
        return result

    setattr(owner, attribute, failing)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("name", ["release", "_extend_pages", "_mixed", "_decode", "finish"])
def test_a_failed_step_costs_others_nothing(
    oracle: tuple[Path, list[list[int]], int], name: str, after: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """Pages are few and reused at once: what the step after a failed one writes must reach nobody."""
    folder, alone, page_bytes = oracle
    engine = build(
        folder, paged=True, graphs=FakeGraphs(), max_num_batched_tokens=24, max_num_seqs=4,
        kv_cache_memory_bytes=page_bytes * 22,
    )  # fmt: skip
    steps = {3, 9}
    fail_sometimes(engine._executor, name, steps, after)
    with caplog.at_level(logging.CRITICAL):
        tokens = drain(engine, list(range(len(PROMPTS))))
    steps.clear()
    again = drain(engine, list(range(len(PROMPTS))))
    engine.shutdown()
    assert None in tokens.values()
    assert all(tokens[i] in (None, expected) for i, expected in enumerate(alone))
    assert [again[i] for i in range(len(PROMPTS))] == alone


def test_graphs_serve_the_steps_that_they_are_captured_for(oracle: tuple[Path, list[list[int]], int]) -> None:
    folder, alone, _ = oracle
    graphs = FakeGraphs()
    engine = build(folder, paged=True, graphs=graphs, max_num_seqs=4, max_num_batched_tokens=64)
    tokens = drain(engine, list(range(len(PROMPTS))))
    assert [tokens[i] for i in range(len(PROMPTS))] == alone
    assert graphs.num_replays > engine.stats().num_steps // 2
    assert graphs.sizes("decode") <= {1, 2, 4}
    assert graphs.sizes("mixed") <= {16, 32, 48, 64}
    engine.shutdown()
    assert not len(graphs)


def test_a_failed_capture_is_tried_once_and_said(
    oracle: tuple[Path, list[list[int]], int], caplog: pytest.LogCaptureFixture
) -> None:
    folder, alone, _ = oracle
    graphs = FakeGraphs(refused=[2, 32])
    engine = build(folder, paged=True, graphs=graphs, max_num_seqs=4, max_num_batched_tokens=64)
    tokens = drain(engine, list(range(len(PROMPTS))))
    assert [tokens[i] for i in range(len(PROMPTS))] == alone
    said = [record.getMessage() for record in caplog.records if "no CUDA graph" in record.getMessage()]
    assert sorted(said) == sorted({*said})
    assert any("decode steps of 2" in text for text in said)
    engine.shutdown()


def row(slot: int, position: int) -> ScheduledRow:
    return ScheduledRow(slot, position, 1, [], [0] if not position else [], True, position)


def test_more_steps_in_flight_than_host_memory_has_room_for_are_refused(
    oracle: tuple[Path, list[list[int]], int],
) -> None:
    engine = build(oracle[0], paged=True, max_num_seqs=2)
    runner = engine._executor
    futures = [runner.submit(ScheduledBatch(i, [], [row(0, i)])) for i in range(RING)]
    with pytest.raises(RuntimeError, match=f"{RING} steps are in flight"):
        runner.submit(ScheduledBatch(9, [], [row(0, RING)])).result()
    assert [future.result().step_id for future in futures] == list(range(RING))
    assert runner.submit(ScheduledBatch(9, [], [row(0, RING)])).result().step_id == 9
    engine.shutdown()


def test_a_lost_device_ends_the_engine(
    oracle: tuple[Path, list[list[int]], int], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build(oracle[0], paged=True, max_num_seqs=2)
    runner = engine._executor
    engine.add_request("a", PROMPTS[2], PARAMS[0])
    engine.add_request("b", PROMPTS[3], PARAMS[0])
    for _ in range(4):
        engine.step()

    def fault(*_: object) -> Future[StepResult]:
        raise CaptureFailed("an illegal memory access was encountered")

    monkeypatch.setattr(runner, "finish", fault)
    monkeypatch.setattr(runner, "_device_fault", lambda: CaptureFailed("an illegal memory access was encountered"))
    for _ in range(2):
        with pytest.raises(EngineDead):
            engine.step()
    engine.shutdown()


class FloatEvent:
    """An event at a time in seconds, compared as CUDA does: in float32 milliseconds."""

    def __init__(self, at: float) -> None:
        self.at = at

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, later: FloatEvent) -> float:
        return float(torch.tensor((later.at - self.at) * 1e3, dtype=torch.float32))


def test_the_device_clock_stays_exact_for_days(oracle: tuple[Path, list[list[int]], int]) -> None:
    engine = build(oracle[0], paged=True, max_num_seqs=2)
    runner = engine._executor
    runner._clock_time, runner._clock_event = 1000.0, FloatEvent(0.0)
    slots = [cuda_runner._Slot(torch.zeros(2, dtype=torch.int64), None, None) for _ in range(RING)]
    batch = ScheduledBatch(0, [], [row(0, 1)])
    now, free_since, worst = 0.0, None, 0.0
    for step in range(200):
        slot = slots[step % RING]
        busy, idle = 3e-3, 40e-6
        if step == 100:
            now, free_since = now + 4 * 86400, None  # nobody asked for anything
        slot.start, slot.end = FloatEvent(now), FloatEvent(now + busy)
        result = runner.finish(batch, slot, None, None, 0.0)
        if free_since is not None and step > 101:
            worst = max(worst, abs(result.start_time - free_since - idle))
        free_since = result.start_time + result.device_seconds
        now += busy + idle + (20.0 if step % 50 == 49 else 0.0)
        if step % 50 == 49:
            free_since = None
    assert worst < 5e-6
    engine.shutdown()

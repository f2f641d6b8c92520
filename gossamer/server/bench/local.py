"""`gossamer bench throughput` and `latency`: the engine in this process, without tokenizer, server or sockets."""

import dataclasses
import time
from collections import deque
from collections.abc import Sequence

from gossamer.config import EngineConfig
from gossamer.core import SamplingParams
from gossamer.engine.build import build_engine
from gossamer.engine.engine import Engine
from gossamer.engine.info import EngineInfo
from gossamer.models.resolve import resolve_paths
from gossamer.server.bench import BenchConfig
from gossamer.server.bench.report import Figures, Record, engine_figures, figures, publish
from gossamer.server.bench.workload import BenchRequest, make_workload
from gossamer.server.progress import progress_on_terminal


def run_local(kind: str, bench: BenchConfig, config: EngineConfig) -> dict[str, float]:
    """Builds the engine, warms it up with one run, measures, prints and returns the medians."""
    if kind == "latency":
        at_once = bench.max_concurrency or 1
        num_prompts = bench.num_prompts or at_once
        bench = dataclasses.replace(bench, max_concurrency=at_once, num_prompts=num_prompts)
    with progress_on_terminal(not config.disable_progress) as on_progress:
        engine, info = build_engine(dataclasses.replace(config, load=resolve_paths(config.load)), on_progress)
    try:
        runs = [measure(engine, info, bench, repeat) for repeat in range(bench.num_repeats + 1)][1:]
    finally:
        engine.shutdown()
    return publish(runs, info.config.load.model, bench, info.device_name)


def measure(engine: Engine, info: EngineInfo, bench: BenchConfig, repeat: int) -> Figures:
    """The figures of one run, whose prompts are its own."""
    vocab_size = min(bench.vocab_size or info.model.vocab_size, info.model.vocab_size)
    seed = info.config.load.seed * 1000 + repeat
    requests = make_workload(bench, bench.num_prompts or 100, vocab_size, seed, info.limits.max_model_len)
    before, touched = engine.stats(), engine.experts_touched()
    start = time.perf_counter()
    records = drive(engine, requests, bench)
    seconds = time.perf_counter() - start
    found = figures(records, seconds) | engine_figures(before, engine.stats(), info.ceilings)
    after = engine.experts_touched()
    if touched is not None and after is not None and after[1] > touched[1]:
        found["experts_touched"] = (after[0] - touched[0]) / (after[1] - touched[1])
    return found


def drive(engine: Engine, requests: Sequence[BenchRequest], bench: BenchConfig) -> list[Record]:
    """Sends the requests when they are due, no more at once than allowed, and notes when their tokens come."""
    pending = deque(enumerate(requests))
    most = min(bench.max_concurrency or len(requests), engine.config.scheduler.max_num_queued)
    open_requests: dict[str, Record] = {}
    records = []
    start = time.perf_counter()
    while pending or engine.has_work():
        while pending and len(open_requests) < most and time.perf_counter() - start >= pending[0][1].arrival:
            index, request = pending.popleft()
            record = Record(len(request.prompt), time.perf_counter())
            params = SamplingParams(temperature=bench.temperature, max_tokens=request.output_len, ignore_eos=True)
            engine.add_request(str(index), request.prompt, params)
            open_requests[str(index)] = record
            records.append(record)
        if not engine.has_work():
            time.sleep(min(0.001, max(0.0, pending[0][1].arrival - (time.perf_counter() - start))))
            continue
        for output in engine.step():
            now = time.perf_counter()
            record = open_requests[output.request_id]
            record.num_tokens += len(output.token_ids)
            record.token_times += [now] * len(output.token_ids)
            record.error = output.error
            if output.finish_reason is not None:
                del open_requests[output.request_id]
    return records

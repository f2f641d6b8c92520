"""`gossamer bench serve`: loads any server with OpenAI's streaming completions."""

import asyncio
import contextlib
import time
from dataclasses import fields
from typing import Any

from gossamer.config import DeviceCeilings
from gossamer.core import EngineStats, StartupError
from gossamer.server.bench import BenchConfig
from gossamer.server.bench.report import Figures, Record, engine_figures, figures, publish
from gossamer.server.bench.workload import BenchRequest, make_workload
from gossamer.server.http_client import Endpoint

DEFAULT_VOCAB_SIZE = 10_000


def run_serve(bench: BenchConfig, model: str | None, api_key: str | None, seed: int) -> dict[str, float]:
    """Measures a running server, prints and returns the medians over the runs. Raises StartupError if none answers."""
    return asyncio.run(_run(bench, Endpoint(bench.base_url, api_key, "--base-url"), model, seed))


async def _run(bench: BenchConfig, endpoint: Endpoint, model: str | None, seed: int) -> dict[str, float]:
    model = await endpoint.model(model)
    runs = [await _measure(bench, endpoint, model, seed * 1000 + repeat) for repeat in range(bench.num_repeats + 1)]
    return publish(runs[1:], model, bench, bench.base_url)


async def _stats(endpoint: Endpoint) -> tuple[EngineStats, DeviceCeilings | None]:
    """What the server's /metrics say, as far as they say it."""
    found: dict[str, float] = {}
    with contextlib.suppress(OSError, ValueError):  # another engine's server need not have any
        async for line in endpoint.lines("/metrics"):
            name, _, value = line.partition("{")
            if value and not line.startswith("#"):
                found[name.partition(":")[2].removesuffix("_total")] = float(value.rsplit(" ", 1)[1])
    counters: Any = {field.name: found[field.name] for field in fields(EngineStats) if field.name in found}
    peaks = [found.get(f"device_peak_{unit}_per_second", 0.0) for unit in ("flops", "bytes")]
    return EngineStats(**counters), DeviceCeilings(*peaks) if all(peaks) else None


async def _measure(bench: BenchConfig, endpoint: Endpoint, model: str, seed: int) -> Figures:
    requests = make_workload(bench, bench.num_prompts or 100, bench.vocab_size or DEFAULT_VOCAB_SIZE, seed)
    gate = asyncio.Semaphore(bench.max_concurrency or len(requests))
    before, _ = await _stats(endpoint)
    start = time.perf_counter()

    async def send(request: BenchRequest) -> Record:
        await asyncio.sleep(start + request.arrival - time.perf_counter())
        async with gate:
            return await _complete(endpoint, model, request, bench.temperature)

    records = await asyncio.gather(*(send(request) for request in requests))
    seconds = time.perf_counter() - start
    after, ceilings = await _stats(endpoint)
    failed = [record.error for record in records if record.error]
    if len(failed) == len(records):
        raise StartupError(f"Every request failed, the first with: {failed[0]}")
    return figures(records, seconds) | engine_figures(before, after, ceilings)


async def _complete(endpoint: Endpoint, model: str, request: BenchRequest, temperature: float) -> Record:
    """One streamed completion. A piece of text counts as one arrival; the number of tokens is the server's own."""
    record = Record(len(request.prompt), time.perf_counter())
    body = {"model": model, "prompt": request.prompt, "max_tokens": request.output_len, "temperature": temperature}
    body |= {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    try:
        async for event in endpoint.events("/v1/completions", body):
            if event.get("choices"):
                record.token_times.append(time.perf_counter())
            if event.get("usage"):
                record.num_tokens = event["usage"]["completion_tokens"]
    except (OSError, ValueError, LookupError) as error:
        record.error = str(error) or type(error).__name__
    return record

"""`gossamer bench serve`: loads any server with OpenAI's streaming completions, with the standard library alone."""

import asyncio
import contextlib
import json
import ssl
import time
import urllib.parse
from collections.abc import AsyncIterator
from typing import Any

from gossamer.core import DeviceCeilings, EngineStats, StartupError
from gossamer.server.bench import BenchConfig
from gossamer.server.bench.report import Figures, Record, engine_figures, figures, publish
from gossamer.server.bench.workload import BenchRequest, make_workload

DEFAULT_VOCAB_SIZE = 10_000
MAX_LINE_BYTES = 1 << 22
COUNTERS = (
    *("prefix_cache_queries", "prefix_cache_hits", "decode_seconds", "decode_idle_seconds"),
    *("device_seconds", "model_flops", "model_bytes"),
)


class Endpoint:
    """One server. Requests are HTTP/1.0, so that an answer ends with its connection and comes without chunks."""

    def __init__(self, base_url: str, api_key: str | None) -> None:
        url = urllib.parse.urlsplit(base_url)
        if url.scheme not in ("http", "https") or url.hostname is None:
            raise StartupError(f"--base-url must be like http://127.0.0.1:8000; got {base_url!r}.")
        self._host, self._tls = url.hostname, url.scheme == "https"
        self._port = url.port or (443 if self._tls else 80)
        self._path = url.path.rstrip("/").removesuffix("/v1")
        self._headers = f"Host: {url.netloc}\r\n" + (f"Authorization: Bearer {api_key}\r\n" if api_key else "")

    async def lines(self, path: str, body: dict[str, Any] | None = None) -> AsyncIterator[str]:
        """The lines of the answer, as they come. Raises ConnectionError with the server's words unless it is 200."""
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{'POST' if content else 'GET'} {self._path}{path} HTTP/1.0\r\n{self._headers}"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        tls = ssl.create_default_context() if self._tls else None
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=tls, limit=MAX_LINE_BYTES)
        try:
            writer.write(head.encode() + content)
            status = (await reader.readline()).decode(errors="replace").split(" ", 2)
            while (await reader.readline()).strip():
                pass
            if status[1:2] != ["200"]:
                raise ConnectionError(f"{path}: {' '.join(status[1:]).strip()} {(await reader.read(500)).decode()}")
            async for line in reader:
                yield line.decode().rstrip()
        finally:
            writer.close()

    async def stats(self) -> tuple[EngineStats, DeviceCeilings | None]:
        """What its /metrics say, as far as they say it."""
        found: dict[str, float] = {}
        with contextlib.suppress(OSError, ValueError):  # another engine's server need not have any
            async for line in self.lines("/metrics"):
                name, _, value = line.partition("{")
                if value and not line.startswith("#"):
                    found[name.partition(":")[2].removesuffix("_total")] = float(value.rsplit(" ", 1)[1])
        stats = EngineStats()
        for name in COUNTERS:
            setattr(stats, name, found.get(name, 0.0))
        peaks = [found.get(f"device_peak_{unit}_per_second", 0.0) for unit in ("flops", "bytes")]
        return stats, DeviceCeilings(*peaks) if all(peaks) else None


def run_serve(bench: BenchConfig, model: str | None, api_key: str | None, seed: int) -> dict[str, float]:
    """Measures a running server, prints and returns the medians over the runs. Raises StartupError if none answers."""
    return asyncio.run(_run(bench, Endpoint(bench.base_url, api_key), model, seed))


async def _run(bench: BenchConfig, endpoint: Endpoint, model: str | None, seed: int) -> dict[str, float]:
    try:
        listed = json.loads("".join([line async for line in endpoint.lines("/v1/models")]))
        model = model or str(listed["data"][0]["id"])
    except (OSError, ValueError, LookupError) as error:
        raise StartupError(
            f"No server answers at {bench.base_url}: {error}\nStart one: gossamer serve MODEL."
        ) from error
    runs = [await _measure(bench, endpoint, model, seed * 1000 + repeat) for repeat in range(bench.num_repeats + 1)]
    return publish(runs[1:], model, bench, bench.base_url)


async def _measure(bench: BenchConfig, endpoint: Endpoint, model: str, seed: int) -> Figures:
    requests = make_workload(bench, bench.num_prompts or 100, bench.vocab_size or DEFAULT_VOCAB_SIZE, seed)
    gate = asyncio.Semaphore(bench.max_concurrency or len(requests))
    before, _ = await endpoint.stats()
    start = time.perf_counter()

    async def send(request: BenchRequest) -> Record:
        await asyncio.sleep(start + request.arrival - time.perf_counter())
        async with gate:
            return await _complete(endpoint, model, request, bench.temperature)

    records = await asyncio.gather(*(send(request) for request in requests))
    seconds = time.perf_counter() - start
    after, ceilings = await endpoint.stats()
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
        async for line in endpoint.lines("/v1/completions", body):
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                record.error = str(event["error"])
            elif event.get("choices"):
                record.token_times.append(time.perf_counter())
            if event.get("usage"):
                record.num_tokens = event["usage"]["completion_tokens"]
    except (OSError, ValueError, LookupError) as error:
        record.error = str(error) or type(error).__name__
    return record

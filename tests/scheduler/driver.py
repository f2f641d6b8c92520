"""Drives a scheduler and a fake executor by hand, and holds all that comes out against the oracle."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field

from fakes import DeviceFailed, FakeExecutor, expected
from invariants import check_drained, check_scheduler

from gossamer.config import CacheConfig, EngineConfig, LoadConfig, SchedulerConfig
from gossamer.core import Request, SamplingParams, ScheduledBatch, StepResult, TokenLogprobs, TokenOutput
from gossamer.scheduler.scheduler import Scheduler

EOS = 7


def prompt(length: int, first: int = 1) -> list[int]:
    return [(first + i) % 29 for i in range(length)]


def grants(driver: Driver) -> dict[str, int]:
    """Tokens per request of the next batch, which stays in flight."""
    batch = driver.schedule()
    return {r.request_id: row.num_tokens for r, row in zip(batch.requests, batch.rows, strict=True)}


@dataclass
class Tracked:
    """A request as the test knows it, and what it has received."""

    request: Request
    tokens: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs] | None = None
    num_logprobs: int = 0
    end: str | None = None
    stop_reason: int | None = None
    error: str | None = None


class Driver:
    """At most `depth` batches in flight. A batch executes when it is scheduled and is committed some time later."""

    def __init__(
        self,
        *,
        depth: int = 1,
        num_pages: int = 20,
        page_size: int = 4,
        max_num_seqs: int = 4,
        budget: int = 16,
        chunked: bool = True,
        cached: bool = True,
        max_len: int | None = None,
        drafts: bool = False,
    ) -> None:
        self.depth = depth
        self.chunked = chunked
        self.max_len = max_len or num_pages * page_size
        self.budget = budget if chunked else max(budget, self.max_len)
        config = EngineConfig(
            load=LoadConfig(max_model_len=self.max_len, num_speculative_tokens=int(drafts)),
            cache=CacheConfig(page_size=page_size, enable_prefix_caching=cached),
            scheduler=SchedulerConfig(
                max_num_seqs=max_num_seqs, max_num_batched_tokens=self.budget, enable_chunked_prefill=chunked
            ),
        )
        self.scheduler = Scheduler(config, num_pages)
        self.executor = FakeExecutor(num_pages, page_size, max_num_seqs, drafts=drafts)
        self.in_flight: list[tuple[ScheduledBatch, Future[StepResult]]] = []
        self.tracked: dict[str, Tracked] = {}
        self._void_before = 0

    @property
    def unfinished(self) -> list[Tracked]:
        return [tracked for tracked in self.tracked.values() if tracked.end is None]

    def add(
        self,
        prompt: list[int],
        params: SamplingParams | None = None,
        *,
        max_tokens: int = 4,
        seed: int = 0,
        arrival_time: float | None = None,
        cache_salt: str | None = None,
    ) -> Request:
        params = params or SamplingParams(max_tokens=max_tokens, ignore_eos=True)
        own_stops = frozenset(params.stop_token_ids or ())
        number = len(self.tracked)
        request = Request(
            request_id=f"r{number}",
            prompt_token_ids=prompt,
            params=params,
            max_tokens=params.max_tokens or max_tokens,
            seed=seed,
            stop_token_ids=own_stops if params.ignore_eos else own_stops | {EOS},
            arrival_time=float(number) if arrival_time is None else arrival_time,
            cache_salt=cache_salt,
        )
        self.scheduler.add(request)
        self.tracked[request.request_id] = Tracked(request)
        return request

    def abort(self, request: Request) -> None:
        pages = list(request.page_ids)
        pool = self.scheduler._sequences.pool
        references = [pool.num_references(page) for page in pages]
        assert self.scheduler.abort(request.request_id)
        assert not self.scheduler.abort(request.request_id)
        assert [pool.num_references(page) for page in pages] == [n - 1 for n in references]
        self.tracked[request.request_id].end = "abort"
        check_scheduler(self.scheduler)

    def schedule(self, *, fail: bool = False) -> ScheduledBatch | None:
        oldest = min(
            (tracked.request for tracked in self.unfinished),
            key=lambda r: (r.arrival_time, r.arrival_index),
            default=None,
        )
        was_running = oldest is not None and oldest.slot >= 0
        batch = self.scheduler.schedule()
        check_scheduler(self.scheduler)
        assert not was_running or oldest.slot >= 0, "the oldest request was preempted"
        if batch is None:
            assert self.in_flight or oldest is None, "nothing in flight, and still no progress"
            return None
        assert 0 < batch.num_tokens <= self.budget
        assert len(batch.rows) == len(batch.requests)
        assert self.chunked or all(row.samples for row in batch.rows)
        self.executor.fail_next = int(fail)
        self.in_flight.append((batch, self.executor.submit(batch)))
        return batch

    def commit(self) -> list[TokenOutput]:
        batch, future = self.in_flight.pop(0)
        error = future.exception()
        void = batch.step_id < self._void_before
        if error is None:
            outputs = self.scheduler.commit(batch, future.result())
        else:
            assert void or isinstance(error, DeviceFailed), repr(error)
            outputs = self._fail(batch, void)
        assert not (void and outputs)
        for output in outputs:
            self._receive(self.tracked[output.request_id], output)
        check_scheduler(self.scheduler)
        return outputs

    def step(self) -> list[TokenOutput]:
        """As the engine does it: keep `depth` batches in flight, commit the oldest."""
        while len(self.in_flight) < self.depth and self.schedule() is not None:
            pass
        return self.commit() if self.in_flight else []

    def drain(self) -> None:
        """Runs to the end, then checks every outcome and that nothing is left."""
        for _ in range(5000):
            if not self.scheduler.has_work:
                break
            self.step()
        check_drained(self.scheduler)
        for tracked in self.tracked.values():
            self._check_outcome(tracked)

    def _fail(self, batch: ScheduledBatch, void: bool) -> list[TokenOutput]:
        victims = {t.request.request_id for t in self.unfinished if t.request in batch.requests}
        outputs = self.scheduler.fail(batch, "boom")
        assert {output.request_id for output in outputs} == (set() if void else victims)
        if not void:
            assert not self.scheduler._sequences.running
            assert not self.scheduler._sequences.prefix_cache
            self._void_before = self.in_flight[-1][0].step_id + 1 if self.in_flight else 0
        return outputs

    def _receive(self, tracked: Tracked, output: TokenOutput) -> None:
        assert tracked.end is None, "output after the end"
        assert output.num_cached_tokens == max(tracked.request.num_cached_tokens, 0)
        if output.prompt_logprobs is not None:
            assert tracked.tokens == []
            tracked.prompt_logprobs = output.prompt_logprobs
        tracked.num_logprobs += len(output.logprobs or ())
        tracked.tokens += output.token_ids
        tracked.end, tracked.stop_reason, tracked.error = output.finish_reason, output.stop_reason, output.error

    def _check_outcome(self, tracked: Tracked) -> None:
        r = tracked.request
        want = expected(r.prompt_token_ids, r.params, r.seed, r.stop_token_ids, r.max_tokens)
        if tracked.end in ("abort", "error"):
            assert tracked.tokens == want.token_ids[: len(tracked.tokens)]
            assert (tracked.error == "boom") == (tracked.end == "error")
        else:
            assert tracked.tokens == want.token_ids
            assert (tracked.end, tracked.stop_reason) == (want.finish_reason, want.stop_reason)
        if tracked.tokens and r.params.prompt_logprobs is not None:
            assert tracked.prompt_logprobs == want.prompt_logprobs
            assert r.num_cached_tokens == 0
        else:
            assert tracked.prompt_logprobs is None
        assert tracked.num_logprobs == (len(tracked.tokens) if r.params.logprobs is not None else 0)

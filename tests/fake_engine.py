"""An engine without a model, for tests of everything around it: token i of a request is `prompt[i % len(prompt)] + 1`.

The tests put this folder on PYTHONPATH and name `fake_engine:build` as the engine process's factory. Control token
ids at the start of a prompt make it misbehave on purpose.
"""

from __future__ import annotations

import os
import time
from collections import deque

from gossamer.config import EngineConfig, ModelConfig
from gossamer.core import (
    EngineOverloaded,
    EngineStats,
    InvalidRequest,
    RequestLimits,
    SamplingParams,
    StartupError,
    TokenLogprobs,
    TokenOutput,
)
from gossamer.engine.info import EngineInfo, ProgressCallback

VOCAB = 260
MAX_LEN = 4096
PAGE = 64
NUM_PAGES = 256

CRASH_LOOP = 250
"""Raises out of `step`: the engine must say Fatal and leave."""
FAIL_STEP = 251
"""This request alone ends with an error."""
EXIT = 252
REFUSE_OVERLOADED = 253
REFUSE_INTERNAL = 254


class FakeEngine:
    def __init__(self, config: EngineConfig) -> None:
        self.limits = RequestLimits(vocab_size=VOCAB, max_model_len=MAX_LEN)
        self._running: dict[str, tuple[list[int], SamplingParams, int]] = {}
        self._waiting: deque[tuple[str, list[int], SamplingParams]] = deque()
        self._max_running = config.scheduler.max_num_seqs or 8
        self._max_queued = config.scheduler.max_num_queued
        self._stats = EngineStats(num_pages=NUM_PAGES)
        # A dial that EngineConfig already has: milliseconds a step takes.
        self._step_seconds = config.load.seed / 1000

    def add_request(self, request_id, prompt_token_ids, params, *, cache_salt=None, arrival_time=None):
        if prompt_token_ids[0] == REFUSE_OVERLOADED or len(self._waiting) >= self._max_queued:
            raise EngineOverloaded("The queue is full.", retry_after=7)
        if prompt_token_ids[0] == REFUSE_INTERNAL:
            raise RuntimeError("on purpose")
        if request_id in self._running:
            raise InvalidRequest(f"request id {request_id} is in use", "request_id")
        self.limits.check(prompt_token_ids, params)
        self._waiting.append((request_id, prompt_token_ids, params))

    def abort(self, request_id):
        before = len(self._waiting)
        self._waiting = deque(item for item in self._waiting if item[0] != request_id)
        return self._running.pop(request_id, None) is not None or len(self._waiting) < before

    def has_work(self):
        return bool(self._running or self._waiting)

    def step(self):
        while self._waiting and len(self._running) < self._max_running:
            request_id, prompt, params = self._waiting.popleft()
            self._running[request_id] = (prompt, params, 0)
            self._stats.prefix_cache_queries += len(prompt)
        if self._step_seconds:
            time.sleep(self._step_seconds)
        self._stats.num_steps += 1
        return [self._advance(request_id) for request_id in list(self._running)]

    def _advance(self, request_id):
        prompt, params, done = self._running[request_id]
        if prompt[0] == CRASH_LOOP:
            raise RuntimeError("the loop breaks on purpose")
        if prompt[0] == EXIT:
            os._exit(9)
        if prompt[0] == FAIL_STEP:
            del self._running[request_id]
            return TokenOutput(request_id, [], finish_reason="error", error="the step failed on purpose")
        token = (prompt[done % len(prompt)] + 1) % VOCAB
        self._stats.num_generation_tokens += 1
        limit = params.max_tokens or MAX_LEN - len(prompt)
        finish, stop_reason = None, None
        if token in (params.stop_token_ids or ()):
            finish, stop_reason = "stop", token
        elif done + 1 >= limit:
            finish = "length"
        if finish is None:
            self._running[request_id] = (prompt, params, done + 1)
        else:
            del self._running[request_id]
        logprobs = None
        if params.logprobs is not None:
            ids = [token, *((token + i) % VOCAB for i in range(params.logprobs))]
            logprobs = [
                TokenLogprobs(ids, [-0.5] + [-0.5 - i for i in range(params.logprobs)], [1, *range(1, len(ids))])
            ]
        return TokenOutput(request_id, [token], finish, stop_reason, num_cached_tokens=0, logprobs=logprobs)

    def stats(self):
        self._stats.num_running = len(self._running)
        self._stats.num_waiting = len(self._waiting)
        self._stats.num_pages_in_use = sum(-(-(len(p) + n) // PAGE) for p, _, n in self._running.values())
        return self._stats

    def shutdown(self):
        self._running.clear()


def build(config: EngineConfig, on_progress: ProgressCallback) -> tuple[FakeEngine, EngineInfo]:
    match config.load.model:
        case "fails":
            raise StartupError("The model folder is empty.\nGive --model a folder with weights.")
        case "breaks":
            raise ValueError("a bug in the loader")
        case "dies":
            os._exit(3)
    on_progress("loading weights", 0.5)
    on_progress("loading weights", 1.0)
    engine = FakeEngine(config)
    model = ModelConfig("fake", VOCAB, 8, 8, 1, 1, 1, 8, MAX_LEN)
    return engine, EngineInfo(config, model, engine.limits, NUM_PAGES, [("weights", 1)], "fake")


def build_failing(config: EngineConfig, on_progress: ProgressCallback) -> tuple[FakeEngine, EngineInfo]:
    raise StartupError("The model folder is empty.\nGive --model a folder with weights.")


def build_slowly(config: EngineConfig, on_progress: ProgressCallback) -> tuple[FakeEngine, EngineInfo]:
    time.sleep(60)
    return build(config, on_progress)

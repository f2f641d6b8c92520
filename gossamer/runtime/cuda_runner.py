"""The executor of a GPU: no step waits for the host, and a decode step is one graph launch.

`submit` enqueues a step and returns; its future waits for the device when it is asked for the result, in the engine's
thread, while the worker already enqueues the next. On CPU tensors, without streams and graphs, tests prove it.
"""

import logging
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from gossamer.config import EngineConfig
from gossamer.core import AdmittedSequence, EngineDead, ScheduledBatch, ScheduledRow, StepResult
from gossamer.kv_cache.pool import KVPool
from gossamer.layers.attention.base import Attend, Chunks, PagedPlan
from gossamer.models.decoder import ATTENTION_KINDS, Decoder
from gossamer.ops.dispatch import device_users
from gossamer.ops.sampling import argmax
from gossamer.runtime.cuda_graph import GraphPool, decode_buckets, round_up, token_buckets
from gossamer.runtime.device_sampler import DeviceSampler
from gossamer.runtime.drafts import pairs, single_rows, token_after, verify
from gossamer.runtime.executor import Logprobs, PromptLogprobs, step_result
from gossamer.runtime.sampler import Sampler, prompt_logprobs
from gossamer.runtime.step_inputs import RING, StepInputs

logger = logging.getLogger(__name__)

MAX_PIECEWISE_TOKENS = 512
"""Mixed steps of up to this many tokens run as piecewise graphs; longer ones hide their launches."""
MAX_KEPT_LOGITS = 16
"""Decode graphs of up to this many rows keep their logits; larger ones would hold gigabytes together."""
WARM_UP_CONTEXT = 1 << 17
"""Tokens of context announced to the widest step on padding: what grows with them has reached its bound."""
CLOCK_SECONDS = 10.0
"""The device's clock is read against an event at most this old: its differences are float32 milliseconds."""

_Computed = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor, torch.Tensor | None]
"""Hidden states of all tokens and of the rows that sample, the latter's logits if they were kept, sampled tokens;
with a draft layer, in a decode step, those of the batch's rows alone and the tokens behind their drafts."""


@dataclass(slots=True)
class _Slot:
    """Host memory and events of one step in flight."""

    tokens: torch.Tensor
    start: torch.cuda.Event | None
    end: torch.cuda.Event | None
    in_use: bool = False
    """Its step's result was not read yet."""


class CudaRunner:
    """Runs batches in order on one device. `config` is resolved."""

    def __init__(self, decoder: Decoder, config: EngineConfig) -> None:
        max_num_seqs, max_num_tokens = config.scheduler.max_num_seqs or 1, config.scheduler.max_num_batched_tokens or 1
        self._max_num_tokens, self._max_model_len = max_num_tokens, config.load.max_model_len or 1
        self.decoder = decoder
        self.device = device = decoder.fmt.device
        self._on_gpu = device.type == "cuda"
        max_pages = -(-self._max_model_len // config.cache.page_size)
        self._drafts = decoder.drafter is not None
        self._width = 1 + self._drafts
        max_rows = max_num_seqs * self._width
        self.inputs = StepInputs(max_rows, max_num_tokens, max_num_seqs, max_pages, device, drafts=self._drafts)
        vocab_size = decoder.config.vocab_size
        self.device_sampler = DeviceSampler(max_num_seqs, vocab_size, max_rows, device)
        self.sampler = Sampler(vocab_size, max_num_seqs, device, self.device_sampler.draw)
        # Last tokens, drafts, and what nobody reads; one slot more than there are is that of padding.
        self._tokens = torch.zeros(3, max_num_seqs + 1, dtype=torch.int64, device=device)
        self.last_token, self.draft_token, self._unread = self._tokens[:, :max_num_seqs]
        self._sequences: list[AdmittedSequence | None] = [None] * max_num_seqs
        self._buckets = decode_buckets(max_num_seqs)
        self._token_buckets = token_buckets(min(MAX_PIECEWISE_TOKENS, max_num_tokens))
        eager = config.enforce_eager or config.ops_backend == "reference"
        self._graphs = GraphPool(device) if self._on_gpu and not eager else None
        self._uncaptured: set[tuple[str, int]] = set()
        self._workspace = ATTENTION_KINDS[decoder.config.attention].workspace(decoder.config, max_rows, device)
        self.stream = torch.cuda.Stream(device) if self._on_gpu else None
        device_users.add(self)
        tokens = torch.zeros(RING, max_rows, dtype=torch.int64, pin_memory=self._on_gpu)
        self._ring = [_Slot(row, self._event(), self._event()) for row in tokens]
        self._num_steps = 0
        self.pool: KVPool | None = None
        self._clock_time, self._clock_event = time.monotonic(), self._event()
        if self._clock_event is not None:
            self._clock_event.record(self.stream)
            self._clock_event.synchronize()
            self._clock_time = time.monotonic()

    def _event(self) -> torch.cuda.Event | None:
        return torch.cuda.Event(enable_timing=True) if self._on_gpu else None

    def attach(self, pool: KVPool, *, capture: bool = True) -> None:
        """Sets the KV cache. `capture` makes the widest decode step's graph, in whose memory others then find room."""
        self.detach()
        self.pool = pool
        if self._on_gpu:
            torch.cuda.synchronize(self.device)  # the pool was zeroed on another stream
        if capture and self._graphs is not None:
            with torch.inference_mode(), self._on_stream():
                self._ready("decode", self._buckets[-1])

    def detach(self) -> None:
        """Gives the KV cache up, and with it every graph."""
        if self._graphs is not None:
            self._graphs.clear()
        self._uncaptured.clear()
        self.pool = None

    @property
    def num_graph_sizes(self) -> int:
        """How many batch sizes of decode steps and token counts of mixed ones get graphs; 0 without graphs."""
        return 0 if self._graphs is None else len(self._buckets) + len(self._token_buckets)

    def submit(self, batch: ScheduledBatch) -> Future[StepResult]:
        try:
            with torch.inference_mode(), self._on_stream():
                return self._launch(batch)
        except Exception as error:  # the engine fails this batch and goes on
            future: Future[StepResult] = Future()
            future.set_exception(self.diagnose(error))
            return future

    def diagnose(self, error: Exception) -> Exception:
        """The error itself; EngineDead if the device is lost, for after a kernel's fault no call ever works again."""
        lost = self._device_fault()
        if lost is None:
            return error
        dead = EngineDead(f"The GPU has failed and this process cannot use it any more; restart it.\n{lost}")
        dead.__cause__ = error
        return dead

    def _device_fault(self) -> Exception | None:
        try:
            if self._on_gpu:
                torch.cuda.synchronize(self.device)
        except Exception as fault:
            return fault
        return None

    def shutdown(self) -> None:
        if self._device_fault() is None and self._graphs is not None:
            self._graphs.clear()

    def _on_stream(self) -> AbstractContextManager[object]:
        return torch.cuda.stream(self.stream) if self.stream is not None else nullcontext()

    def _launch(self, batch: ScheduledBatch) -> Future[StepResult]:
        slot = self._ring[self._num_steps % RING]
        if slot.in_use:
            raise RuntimeError(f"{RING} steps are in flight: read their results first")
        self._num_steps += 1
        host_start = time.monotonic()
        for sequence in batch.admitted:
            self.inputs.release(sequence.slot)
            self._sequences[sequence.slot] = sequence
            self.sampler.admit(sequence)
            self.device_sampler.admit(sequence)
        self.device_sampler.flush()
        rows = single_rows(batch.rows) if self._drafts else batch.rows
        sampling = [row for row in rows if row.samples]
        on_host = self.device_sampler.needs_host_path(sampling)
        plan = None
        # A whole decode step drafts on what the device sampled.
        if batch.num_decode_rows < len(batch.rows) or (on_host and self._drafts):
            (hidden, last, logits, sampled, bonus), plan = self._mixed(rows, slot.start)
        else:
            hidden, last, logits, sampled, bonus = self._decode(rows, len(batch.rows), slot.start)
        logprobs: Logprobs = None
        if on_host:
            logits = self.decoder.logits(last) if logits is None else logits
            sampled, logprobs = self.sampler.sample(logits[: len(sampling)], sampling)
            slots = self.inputs.device["sample_slots"][: len(sampling)]
            self.last_token.index_copy_(0, slots.long(), sampled.clamp_min(0))
        num_sampling = sum(row.samples for row in batch.rows)
        if self._drafts and plan is not None:
            ends = self.inputs.device["sample_rows"][: len(sampling)].long()
            sampled, bonus = self._draft(hidden, sampled, num_sampling, plan, ends)
            logprobs = None if logprobs is None else [logprobs[i] for i in pairs(sampling)[0]]
        slot.tokens[:num_sampling].copy_(sampled[:num_sampling], non_blocking=True)
        if bonus is not None:
            slot.tokens[len(slot.tokens) // 2 :][:num_sampling].copy_(bonus[:num_sampling], non_blocking=True)
        _record(slot.end)
        prompt = prompt_logprobs(self.decoder, self.sampler, self._sequences, hidden, batch.rows)
        slot.in_use = True
        return _StepFuture(slot, lambda: self.finish(batch, slot, logprobs, prompt, host_start), self.diagnose)

    def _decode(self, rows: list[ScheduledRow], num_slots: int, start: torch.cuda.Event | None) -> _Computed:
        bucket = round_up(num_slots, self._buckets)
        if bucket is None:
            raise ValueError(f"{num_slots} decode rows are more than --max-num-seqs {self._buckets[-1]}")
        if self._graphs is None or not self._ready("decode", bucket):
            self.inputs.load_decode(rows, num_slots * self._width)
            _record(start)
            return self._decode_step(num_slots)
        self.inputs.load_decode(rows, bucket * self._width)
        _record(start)
        result: _Computed = self._graphs.replay(("decode", bucket))
        return result

    def _decode_step(self, bucket: int) -> _Computed:
        """One step over the rows of the first `bucket` slots of the static inputs."""
        device, num_rows = self.inputs.device, bucket * self._width
        slots = device["slots"][:num_rows]
        plan = self._plan(device["row_positions"][:num_rows], slots, num_rows, num_rows, Chunks())
        ids = torch.full_like(slots, -1)
        if self._drafts:
            ids[1::2] = self.draft_token[slots[1::2].clamp_min(0).long()]
        hidden = self.decoder.forward_paged(ids, self.last_token, plan, self._pool())
        logits, sampled = self._sample(hidden, num_rows)
        if self._drafts:
            return hidden, hidden, None, *self._draft(hidden, sampled, bucket, plan, None)
        return hidden, hidden, logits if bucket <= MAX_KEPT_LOGITS else None, sampled, None

    def _draft(
        self, hidden: torch.Tensor, sampled: torch.Tensor, num_slots: int, plan: PagedPlan, ends: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Ends a step: verifies its drafts and makes the next. Returns tokens and bonus tokens of its slots.

        `sampled` by the rows that sample, whose tokens are those at `ends` (None: all) of `hidden`. The draft layer
        runs on every token, whoever drafts: its KV goes into the pages that the model's goes into.
        """
        device, following = self.inputs.device, sampled.clamp_min(0).int()
        if ends is not None:
            following = device["next_ids"][: len(hidden)].index_copy_(0, ends, following)
        drafted = self.decoder.draft_paged(hidden, following, self.last_token, plan, self._pool())
        if not num_slots:
            return sampled, sampled
        firsts, seconds = device["firsts"][:num_slots].long(), device["seconds"][:num_slots].long()
        slots = device["sample_slots"].index_select(0, firsts).long()
        slots = slots.masked_fill(slots < 0, self._tokens.shape[1] - 1)
        verdict = verify(sampled, firsts, seconds, self._tokens[1].index_select(0, slots))
        chosen = verdict.chosen if ends is None else ends.index_select(0, verdict.chosen)
        drafts = argmax(self.decoder.logits(drafted.index_select(0, chosen)))
        self._tokens[0].index_copy_(0, slots, verdict.last.clamp_min(0))
        self._tokens[1].index_copy_(0, slots, drafts)
        return sampled.index_select(0, firsts), verdict.bonus

    def _ready(self, kind: str, bucket: int) -> bool:
        """Whether the graph of a size exists, captured now if it was never tried; else its steps run without."""
        if self._graphs is None or (kind, bucket) in self._uncaptured:
            return False
        try:
            if (kind, bucket) not in self._graphs:
                (self.warm_up_decode if kind == "decode" else self.warm_up_mixed)(bucket)
        except Exception as error:
            if self._device_fault() is not None:
                raise
            logger.warning("no CUDA graph for %s steps of %d, which will run slower: %s", kind, bucket, error)
            self._uncaptured.add((kind, bucket))
            return False
        return True

    def _mixed(self, rows: list[ScheduledRow], start: torch.cuda.Event | None) -> tuple[_Computed, PagedPlan]:
        num_tokens = sum(row.num_tokens for row in rows)
        bucket = round_up(num_tokens, self._token_buckets)
        has_graph = bucket is not None and self._ready("mixed", bucket)
        if bucket is None or not has_graph:
            # Triton compiles anew for sizes that 16 does not divide.
            bucket = min(-(-num_tokens // 16) * 16, self._max_num_tokens)
        following = [token_after(row, self._sequences[row.slot]) for row in rows] if self._drafts else None
        self.inputs.load_mixed(rows, bucket, following)
        _record(start)
        num_decode = sum(row.is_decode for row in rows)
        if self._drafts:
            ids, slots = self.inputs.device["input_ids"][:num_decode], self.inputs.device["slots"][:num_decode]
            ids.copy_(torch.where(ids == -2, self.draft_token[slots.long()].int(), ids))
        num_sampling = sum(row.samples for row in rows)
        plan = self._token_plan(bucket, num_decode, len(rows), Chunks.of(rows[num_decode:]))
        sample_rows = self.inputs.device["sample_rows"]
        held = [self._sequences[row.slot] for row in rows[num_decode:]]
        if not (has_graph or self._drafts or any(s and s.params.prompt_logprobs is not None for s in held)):
            # As many as some decode step has, so that there are no more sizes than those.
            plan.kept = sample_rows[: round_up(max(num_sampling, 1), self._buckets)]
        if has_graph and self._graphs is not None:
            hidden: torch.Tensor = self._graphs.replay(("mixed", bucket), plan)
        else:
            hidden = self._forward(bucket, plan)
        last = hidden[sample_rows[:num_sampling]] if plan.kept is None else hidden[:num_sampling]
        drawn = self._sample(last, num_sampling) if num_sampling else (None, self.last_token[:0])
        return (hidden, last, *drawn, None), plan

    def _sample(self, hidden: torch.Tensor, num_rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits and tokens of the rows to sample. Without drafts the tokens also become their slots' last."""
        logits = self.decoder.logits(hidden)
        device = self.inputs.device
        slots, index = device["sample_slots"][:num_rows], device["output_index"][:num_rows]
        last_token = self._unread if self._drafts else self.last_token
        return logits, self.device_sampler.sample(logits, slots, index, last_token)

    def _forward(self, num_tokens: int, plan: PagedPlan) -> torch.Tensor:
        ids = self.inputs.device["input_ids"][:num_tokens]
        return self.decoder.forward_paged(ids, self.last_token, plan, self._pool())

    def _token_plan(self, num_tokens: int, num_decode: int, num_rows: int, chunks: Chunks) -> PagedPlan:
        device = self.inputs.device
        positions, slots = device["positions"][:num_tokens], device["token_slots"][:num_tokens]
        return self._plan(positions, slots, num_decode, num_rows, chunks)

    def _plan(
        self, positions: torch.Tensor, token_slots: torch.Tensor, num_decode: int, num_rows: int, chunks: Chunks,
    ) -> PagedPlan:  # fmt: skip
        device = self.inputs.device
        return PagedPlan(
            num_decode=num_decode, positions=positions, token_slots=token_slots, slots=device["slots"][:num_rows],
            seq_lens=device["seq_lens"][:num_rows], cu_seqlens_q=device["cu_seqlens_q"][: num_rows - num_decode + 1],
            page_table=self.inputs.page_table, max_seq_len=self._max_model_len,
            workspace=self._workspace, chunks=chunks,
            single=not self._drafts and num_decode == num_rows == len(positions),
        )  # fmt: skip

    def _pool(self) -> KVPool:
        if self.pool is None:
            raise RuntimeError("attach a KV pool before the first step")
        return self.pool

    def warm_up_decode_eagerly(self, bucket: int) -> None:
        """Runs a decode step of padding: compiles its kernels."""
        self.inputs.pad(bucket * self._width, 0)
        self._decode_step(bucket)

    def warm_up_decode(self, bucket: int) -> None:
        """Captures the graph of a decode batch size, after a run of padding that compiles its kernels."""
        self.warm_up_decode_eagerly(bucket)
        if self._graphs is not None and ("decode", bucket) not in self._graphs:
            self._graphs.capture(("decode", bucket), partial(_in_one_piece, partial(self._decode_step, bucket)))

    def warm_up_prefill(self, num_tokens: int, halvings: int = 0) -> None:
        """Runs one step of padding with this many tokens: compiles its kernels, takes its memory.

        Sparse attention's are those of the longest context, halved so many times.
        """
        num_rows = len(self._sequences) * self._width
        self.inputs.pad(num_rows, num_tokens)
        context = min(self._max_model_len * len(self._sequences), WARM_UP_CONTEXT)
        chunks = Chunks(num_tokens, context, (0, max(1, self._max_model_len >> halvings)))
        plan = self._token_plan(num_tokens, 0, 1, chunks)
        hidden = self._forward(num_tokens, plan)
        _, sampled = self._sample(hidden[:num_rows], min(num_tokens, num_rows))
        if self._drafts:
            ends = self.inputs.device["sample_rows"][: len(sampled)].long()
            self._draft(hidden, sampled, min(num_tokens, len(self._sequences)), plan, ends)

    def warm_up_mixed(self, bucket: int) -> None:
        """Captures the graphs of a token count, after a run of padding that compiles its kernels."""
        self.warm_up_prefill(bucket)
        if self._graphs is not None and ("mixed", bucket) not in self._graphs:
            ids, plan = self.inputs.device["input_ids"][:bucket], self._token_plan(bucket, 0, 0, Chunks())
            pieces = partial(self.decoder.pieces, ids, self.last_token, plan, self._pool())
            self._graphs.capture(("mixed", bucket), pieces)

    def finish(
        self, batch: ScheduledBatch, slot: _Slot, logprobs: Logprobs, prompt: PromptLogprobs, host_start: float
    ) -> StepResult:
        """Waits for a step and reads what it left in host memory."""
        seconds, start_time = time.monotonic() - host_start, host_start
        if slot.start is not None and slot.end is not None and self._clock_event is not None:
            slot.end.synchronize()
            seconds = slot.start.elapsed_time(slot.end) / 1e3
            elapsed = self._clock_event.elapsed_time(slot.start) / 1e3
            start_time = self._clock_time + elapsed
            if elapsed > CLOCK_SECONDS:
                self._clock_event, slot.end = slot.end, self._clock_event
                self._clock_time = start_time + seconds
        tokens = slot.tokens.tolist()
        bonus = tokens[len(tokens) // 2 :] if self._drafts else None
        return step_result(batch, tokens, logprobs, prompt, seconds, start_time, bonus)


class _StepFuture(Future[StepResult]):
    """Resolved by whoever asks for it, by waiting for the device: no thread of its own, no hand-over."""

    def __init__(
        self, slot: _Slot, finish: Callable[[], StepResult], diagnose: Callable[[Exception], Exception]
    ) -> None:
        super().__init__()
        self._slot, self._finish, self._diagnose = slot, finish, diagnose

    def result(self, timeout: float | None = None) -> StepResult:
        self._resolve()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._resolve()
        return super().exception(timeout)

    def _resolve(self) -> None:
        if self.done():
            return
        try:
            self.set_result(self._finish())
        except Exception as error:  # a kernel's fault surfaces here
            self.set_exception(self._diagnose(error))
        self._slot.in_use = False


def _in_one_piece(step: Callable[[], Any], result: list[Any]) -> Iterator[Attend]:
    """A step of which nothing stays outside its graph, for GraphPool.capture."""
    result.append(step())
    yield from ()


def _record(event: torch.cuda.Event | None) -> None:
    if event is not None:
        event.record()

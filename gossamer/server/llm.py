"""Offline inference: `LLM(model).generate(prompts)` runs the engine in this process, without server or sockets."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from gossamer.config import EngineConfig, make_engine_config
from gossamer.core import EngineDead, EngineStats, InvalidRequest, RequestFailed, SamplingParams
from gossamer.engine.build import build_engine
from gossamer.models.hf_folder import default_sampling
from gossamer.models.resolve import resolve_paths
from gossamer.server.outputs import OutputMode, OutputProcessor, RequestOutput
from gossamer.server.progress import count_on_terminal, progress_on_terminal
from gossamer.server.tokenizer import Tokenizer, load_tokenizer

FED_AT_ONCE = 32
"""Samples that the engine gets at least between two of its steps, of a call with many."""

Prompt = str | Mapping[str, Any]
"""Text, {"prompt": text} or {"prompt_token_ids": ids}, the mappings with an optional "cache_salt"."""


@dataclass(slots=True)
class _Job:
    """A validated prompt."""

    text: str | None
    token_ids: list[int]
    params: SamplingParams
    cache_salt: str | None


class LLM:
    """A model and its engine.

    Args:
        model: folder, .gguf file or hub id.
        config: stands for model and options.
        chat_template: file with a Jinja template to use instead of the model's own.
        skip_tokenizer_init: do without a tokenizer; prompts are then token ids, and outputs have no text.
        options: any field of EngineConfig and its sections, such as max_model_len or dtype.
    Raises: StartupError, saying what is wrong and how to mend it.

    Usable as a context manager. Not thread-safe; AsyncLLM serves concurrent callers.
    """

    def __init__(
        self, model: str = "", *, config: EngineConfig | None = None, chat_template: str | None = None,
        skip_tokenizer_init: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        config = config or make_engine_config(model=model, **options)
        load = resolve_paths(config.load)
        config = dataclasses.replace(config, load=load)
        self._default_sampling = default_sampling(load)
        # First: a wrong --tokenizer or --chat-template should not cost the time that the weights take.
        self._tokenizer: Tokenizer | None = None
        if not skip_tokenizer_init:
            self._tokenizer = load_tokenizer(load.tokenizer or load.model, chat_template)
        self._show_progress = not config.disable_progress
        with progress_on_terminal(self._show_progress) as on_progress:
            self._engine, self.info = build_engine(config, on_progress)
        self._ids = itertools.count()

    def generate(
        self, prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, use_tqdm: bool = True,
    ) -> list[RequestOutput]:  # fmt: skip
        """Completes every prompt; results come in the order of the prompts.

        Args:
            prompts: one prompt or a list of them.
            sampling_params: one for all prompts, or one each; default get_default_sampling_params().
            use_tqdm: show a progress bar if it takes more than two seconds.
        Raises: InvalidRequest, before anything is queued, if any of the prompts cannot be served.
        """
        listed: list[Prompt] = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        if sampling_params is None:
            sampling_params = self._default_sampling
        spread = [sampling_params] * len(listed) if isinstance(sampling_params, SamplingParams) else sampling_params
        if len(spread) != len(listed):
            raise InvalidRequest(
                f"There are {len(listed)} prompts but {len(spread)} sampling_params. Give one, or one for each prompt.",
                "sampling_params",
            )
        jobs = [self._job(i, prompt, params) for i, (prompt, params) in enumerate(zip(listed, spread, strict=True))]
        results: dict[int, RequestOutput] = {}
        show_progress = use_tqdm and self._show_progress
        with (
            count_on_terminal("Generating", len(jobs), show_progress) as show,
            contextlib.closing(self._run(jobs, "final")) as steps,
        ):
            for step in steps:
                results.update(step)
                show(len(results))
        return [results[index] for index in range(len(jobs))]

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Generator[str, None, None]:
        """The text of a prompt's first output, as it comes. Closing the generator ends the request.

        Raises: InvalidRequest if the prompt cannot be served, RequestFailed if a step of it failed.
        """
        params = sampling_params or self._default_sampling
        with contextlib.closing(self._run([self._job(0, prompt, params)], "delta")) as steps:
            for _, output in itertools.chain.from_iterable(steps):
                yield from (choice.text for choice in output.outputs)
                if output.error is not None:
                    raise RequestFailed(output.error)

    def chat(
        self, messages: list[dict[str, Any]] | list[list[dict[str, Any]]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None, use_tqdm: bool = True, *,
        add_generation_prompt: bool = True, tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:  # fmt: skip
        """Continues one conversation, or each of a list of them, in the model's chat template.

        Raises: InvalidRequest for malformed messages or a model without a chat template.
        """
        conversations: list[Any] = messages if messages and isinstance(messages[0], list) else [messages]
        options: dict[str, Any] = {"tools": tools, "chat_template_kwargs": chat_template_kwargs}
        options["add_generation_prompt"] = add_generation_prompt
        apply = self.get_tokenizer().apply_chat_template
        prompts = [{"prompt_token_ids": apply(conversation, **options)} for conversation in conversations]
        return self.generate(prompts, sampling_params, use_tqdm)

    def get_default_sampling_params(self) -> SamplingParams:
        """A copy of what `generate` uses if it is given no parameters: those that the model recommends."""
        return dataclasses.replace(self._default_sampling)

    def get_tokenizer(self) -> Tokenizer:
        """Raises: InvalidRequest with skip_tokenizer_init."""
        if self._tokenizer is None:
            raise InvalidRequest("There is no tokenizer (skip_tokenizer_init): give prompt_token_ids.", "prompt")
        return self._tokenizer

    def stats(self) -> EngineStats:
        """Totals since the start: tokens, prefix hits, FLOPs and bytes, busy and idle time of the device."""
        return self._engine.stats()

    def experts_touched(self) -> tuple[int, int] | None:
        """Distinct experts, summed over MoE layers and steps, and the number of terms; None without count_experts."""
        return self._engine.experts_touched()

    def shutdown(self) -> None:
        """Stops the engine. Further calls of `generate` raise EngineDead."""
        self._engine.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def _job(self, index: int, prompt: Prompt, params: SamplingParams) -> _Job:
        # Cheap checks first: a prompt is encoded only for parameters that can be served.
        self._engine.limits.check_params(params)
        parts: Mapping[str, Any] = prompt if isinstance(prompt, Mapping) else {"prompt": prompt}
        unknown = set(parts) - {"prompt", "prompt_token_ids", "cache_salt"}
        if unknown:
            raise InvalidRequest(f"Prompt {index} has the unknown key {min(map(str, unknown))!r}.", "prompt")
        text, token_ids, salt = (parts.get(key) for key in ("prompt", "prompt_token_ids", "cache_salt"))
        if token_ids is None and isinstance(text, str):
            token_ids = self.get_tokenizer().encode(text)
        if not isinstance(token_ids, Sequence) or set(map(type, token_ids)) - {int}:
            raise InvalidRequest(
                f'Prompt {index} must be a string, {{"prompt": text}} or {{"prompt_token_ids": list of int}}; '
                f"got {type(prompt).__name__}.",
                "prompt",
            )
        return _Job(text, list(token_ids), params, salt)

    def _run(self, jobs: list[_Job], mode: OutputMode) -> Generator[list[tuple[int, RequestOutput]], None, None]:
        """After each step of the engine, what is new: a job's index with its output."""
        for job in jobs:
            self._engine.limits.check(job.token_ids, job.params)
        processor = OutputProcessor(self._tokenizer)
        index_of: dict[str, int] = {}
        samples: deque[tuple[str, SamplingParams, _Job]] = deque()
        for index, job in enumerate(jobs):
            request_id = f"llm-{next(self._ids)}"
            index_of[request_id] = index
            children = processor.add_request(request_id, job.text, job.token_ids, job.params, mode=mode)
            samples.extend((child, params, job) for child, params in children)
        try:
            while processor.num_unfinished:
                self._feed(samples)
                states, to_abort = processor.process(self._engine.step())
                for child in to_abort:
                    self._engine.abort(child)
                outputs = [state.take() for state in states]
                yield [(index_of[output.request_id], output) for output in outputs]
        finally:
            # After an error or Ctrl-C too, the engine is left empty and usable.
            for request_id in index_of:
                for child in processor.abort(request_id):
                    self._engine.abort(child)
            with contextlib.suppress(EngineDead):
                while self._engine.has_work():
                    self._engine.step()

    def _feed(self, samples: deque[tuple[str, SamplingParams, _Job]]) -> None:
        """Queues no more samples than the engine's queue takes, so that it never has to refuse one.

        Nor more than some, or what two steps admit, at a time: the device need not wait for the last of many, and
        while it computes one step the next is to be in flight.
        """
        scheduler = self._engine.config.scheduler
        room = min(scheduler.max_num_queued - self._engine.stats().num_waiting, len(samples))
        room = min(room, max(FED_AT_ONCE, 2 * (scheduler.max_num_seqs or 1)))
        fed, tokens = 0, 2 * (scheduler.max_num_batched_tokens or 0)
        while fed < room and (fed < FED_AT_ONCE or tokens > 0):
            child, params, job = samples.popleft()
            self._engine.add_request(child, job.token_ids, params, cache_salt=job.cache_salt)
            fed, tokens = fed + 1, tokens - len(job.token_ids)

"""Offline inference: order, validation before queueing, feeding, clean-up; then the default model for real."""

from __future__ import annotations

import dataclasses
import io
from collections import deque
from contextlib import closing

import pytest
from test_tokenizer import hf_folder, model_file

from gossamer.config import EngineConfig, ModelConfig
from gossamer.core import (
    EngineDead,
    EngineOverloaded,
    EngineStats,
    InvalidRequest,
    RequestFailed,
    RequestLimits,
    SamplingParams,
    StartupError,
    TokenOutput,
)
from gossamer.engine.info import EngineInfo
from gossamer.server import llm as llm_module
from gossamer.server.llm import LLM

QUEUE = 4


class StubEngine:
    """Echoes the prompt, one token a step, for two requests at once; refuses what its queue cannot take."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.limits = RequestLimits(vocab_size=300, max_model_len=128)
        self.waiting: deque = deque()
        self.running: dict = {}
        self.added: list[tuple] = []
        self.aborted: list[str] = []
        self.steps = 0
        self.interrupt_at: int | None = None
        self.stopped = False

    def add_request(self, request_id, prompt_token_ids, params, *, cache_salt=None, arrival_time=None):
        if len(self.waiting) >= self.config.scheduler.max_num_queued:
            raise EngineOverloaded("full")
        self.limits.check(prompt_token_ids, params)
        self.added.append((request_id, params.seed, cache_salt))
        self.waiting.append((request_id, list(prompt_token_ids), params))

    def abort(self, request_id):
        self.aborted.append(request_id)
        self.waiting = deque(entry for entry in self.waiting if entry[0] != request_id)
        return self.running.pop(request_id, None) is not None

    def has_work(self):
        return bool(self.waiting or self.running)

    def step(self):
        if self.stopped:
            raise EngineDead("The engine has been shut down.")
        self.steps += 1
        if self.steps == self.interrupt_at:
            raise KeyboardInterrupt
        while self.waiting and len(self.running) < 2:
            request_id, prompt, params = self.waiting.pop()  # unfair on purpose: results must be put in order
            self.running[request_id] = (prompt, 0, params)
        outputs = []
        for request_id, (prompt, done, params) in list(self.running.items()):
            last = done + 1 >= min(len(prompt), params.max_tokens)
            outputs.append(TokenOutput(request_id, [prompt[done]], "length" if last else None))
            self.running[request_id] = (prompt, done + 1, params)
            if last:
                del self.running[request_id]
        return outputs

    def stats(self):
        return EngineStats(num_running=len(self.running), num_waiting=len(self.waiting))

    def shutdown(self):
        self.stopped = True


@pytest.fixture
def llm(tmp_path, monkeypatch):
    def build(config, on_progress=None):
        engine = StubEngine(config)
        model = ModelConfig("stub", 300, 8, 8, 1, 1, 1, 8, 128)
        return engine, EngineInfo(config, model, engine.limits, 1)

    monkeypatch.setattr(llm_module, "build_engine", build)
    template = (
        "{% for m in messages %}{{ m.role }}:{{ m.content }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
    )
    folder = hf_folder(tmp_path, "byte_level", chat_template=template, add_bos_token=False, add_eos_token=False)
    (folder / "config.json").write_text("{}")
    with LLM(str(folder), load_format="dummy", max_num_queued=QUEUE) as made:
        yield made
    assert made._engine.stopped


LONG = SamplingParams(max_tokens=60)


def test_default_sampling_is_the_models(llm: LLM, tmp_path) -> None:
    assert llm.get_default_sampling_params() == SamplingParams()
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.5}')
    with LLM(str(tmp_path), load_format="dummy") as other:
        mine = other.get_default_sampling_params()
        assert mine == SamplingParams(temperature=0.5)
        mine.temperature = 0.0
        assert other.get_default_sampling_params().temperature == 0.5
    with LLM(str(tmp_path), load_format="dummy", generation_config="none") as other:
        assert other.get_default_sampling_params() == SamplingParams()


def test_results_come_in_the_order_of_the_prompts(llm: LLM) -> None:
    prompts = [f"hello {i:02d}!" for i in range(40)]
    outputs = llm.generate(prompts, LONG)
    assert [o.outputs[0].text for o in outputs] == prompts
    assert [o.prompt for o in outputs] == prompts
    assert all(o.finished for o in outputs)
    assert len({o.request_id for o in outputs}) == 40


def test_kinds_of_prompt(llm: LLM) -> None:
    ids = llm.get_tokenizer().encode("hello you")
    mixed = ["hello you", {"prompt": "hello you"}, {"prompt_token_ids": ids, "cache_salt": "s"}]
    assert [o.outputs[0].text for o in llm.generate(mixed, LONG)] == ["hello you"] * 3
    assert [o.prompt for o in llm.generate(mixed, LONG)] == ["hello you", "hello you", None]
    assert llm._engine.added[2][2] == "s"
    for one in mixed:
        assert len(llm.generate(one, LONG)) == 1
    assert llm.generate([]) == []
    assert len(llm.generate("hello " * 20)[0].outputs[0].token_ids) == 16


def test_one_set_of_parameters_per_prompt(llm: LLM) -> None:
    outputs = llm.generate(["hello a", "hello b"], [SamplingParams(max_tokens=1), SamplingParams(max_tokens=2)])
    assert [len(o.outputs[0].token_ids) for o in outputs] == [1, 2]
    with pytest.raises(InvalidRequest, match="2 prompts but 1 sampling_params"):
        llm.generate(["a", "b"], [SamplingParams()])


def test_samples_share_a_request_even_if_the_queue_cannot_hold_them_all(llm: LLM) -> None:
    params = SamplingParams(n=QUEUE + 3, seed=5, max_tokens=4)
    outputs = llm.generate(["hello", "x"], params)
    assert [len(o.outputs) for o in outputs] == [QUEUE + 3] * 2
    assert [seed for _, seed, _ in llm._engine.added] == [5 + i for i in range(QUEUE + 3)] * 2


@pytest.mark.parametrize(("budget", "max_num_seqs", "fed"), [(200, 64, 50), (100, 64, 32), (800, 20, 40)])
def test_the_prompts_of_two_steps_are_queued_before_the_first(
    llm: LLM, budget: int, max_num_seqs: int, fed: int
) -> None:
    """Else the device waits between steps: the second is to be in flight while the first runs."""
    engine = llm._engine
    scheduler = dataclasses.replace(
        engine.config.scheduler, max_num_queued=1000, max_num_batched_tokens=budget, max_num_seqs=max_num_seqs
    )
    engine.config = dataclasses.replace(engine.config, scheduler=scheduler)
    seen, step = [], engine.step
    engine.step = lambda: seen.append(len(engine.added)) or step()
    llm.generate([{"prompt_token_ids": [65] * 8}] * 150, SamplingParams(max_tokens=1))
    assert seen[:2] == [fed, 2 * fed]
    assert len(engine.added) == 150


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("", "empty"),
        ({"prompt_token_ids": [1, 300]}, "out of range"),
        ({"prompt_token_ids": [1] * 128}, "context length"),
        ({"prompt_token_ids": ["a"]}, "must be a string"),
        ({"prompt_token_ids": [True]}, "must be a string"),
        ({"prompts": "x"}, "unknown key 'prompts'"),
        ({}, "must be a string"),
        (5, "must be a string"),
        ([1, 2], "must be a string"),
    ],
    ids=str,
)
def test_one_bad_prompt_queues_nothing(llm: LLM, bad, message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        llm.generate(["hello", bad])
    with pytest.raises(InvalidRequest, match="temperature"):
        llm.generate("hello", SamplingParams(temperature=-1))
    assert llm._engine.added == []


def test_stop_strings_abort_in_the_engine(llm: LLM) -> None:
    outputs = llm.generate(["hello world and more", "x"], SamplingParams(stop=" wor", max_tokens=30))
    assert outputs[0].outputs[0].text == "hello"
    assert outputs[0].outputs[0].stop_reason == " wor"
    assert len(llm._engine.aborted) == 1
    assert not llm._engine.has_work()


def test_ctrl_c_leaves_the_engine_empty_and_usable(llm: LLM) -> None:
    llm._engine.interrupt_at = 3
    with pytest.raises(KeyboardInterrupt):
        llm.generate([f"hello {i}" for i in range(20)], LONG)
    assert not llm._engine.has_work()
    assert llm._engine.aborted
    assert llm.generate("hello", LONG)[0].outputs[0].text == "hello"


def test_streams_and_goes_on_after_a_stream_was_closed(llm: LLM) -> None:
    pieces = llm.stream("hello you", LONG)
    assert "".join(pieces) == "hello you"
    with closing(llm.stream("hello " * 9, LONG)) as stream:
        assert next(stream)
        assert llm._engine.has_work()
    assert not llm._engine.has_work()
    assert "".join(llm.stream({"prompt": "xy"}, LONG)) == "xy"


def test_ctrl_c_ends_a_stream_alone(llm: LLM) -> None:
    llm._engine.interrupt_at = 3
    stream = llm.stream("hello " * 9, LONG)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert not llm._engine.has_work()
    assert "".join(llm.stream("xy", LONG)) == "xy"


def test_an_error_of_a_stream_reaches_the_reader(llm: LLM, monkeypatch) -> None:
    with pytest.raises(InvalidRequest, match="max_tokens"):
        list(llm.stream("abc", SamplingParams(max_tokens=5000)))
    with pytest.raises(InvalidRequest, match="unknown key 'prompts'"):
        list(llm.stream({"prompts": "abc"}))
    step = llm._engine.step
    failed = {"finish_reason": "error", "error": "the step failed"}
    monkeypatch.setattr(llm._engine, "step", lambda: [dataclasses.replace(out, **failed) for out in step()])
    with pytest.raises(RequestFailed, match="the step failed"):
        list(llm.stream("abc", LONG))
    monkeypatch.undo()
    assert "".join(llm.stream("a", LONG)) == "a"
    llm.shutdown()
    with pytest.raises(EngineDead):
        list(llm.stream("abc"))


def test_chat(llm: LLM) -> None:
    one = [{"role": "user", "content": "hello"}]
    assert llm.chat(one, LONG)[0].outputs[0].text == "user:hello>"
    two = llm.chat([one, [*one, *one]], LONG, add_generation_prompt=False)
    assert [o.outputs[0].text for o in two] == ["user:hello", "user:hellouser:hello"]
    with pytest.raises(InvalidRequest, match="non-empty list"):
        llm.chat([], LONG)


def test_after_shutdown(llm: LLM) -> None:
    llm.shutdown()
    with pytest.raises(EngineDead):
        llm.generate("hello")


def test_wrong_options_fail_before_anything_is_loaded(llm: LLM, tmp_path) -> None:
    with pytest.raises(StartupError, match="Did you mean 'max_model_len'"):
        LLM(str(tmp_path), max_model_length=5)
    with pytest.raises(StartupError, match="--chat-template"):
        LLM(str(tmp_path), load_format="dummy", chat_template=str(tmp_path / "none.jinja"))
    with pytest.raises(StartupError):
        LLM(str(tmp_path / "missing"))


def test_progress_shows_only_when_it_takes_long(llm: LLM, monkeypatch) -> None:
    stderr = io.StringIO()
    monkeypatch.setattr("sys.stderr", stderr)
    llm.generate(["hello"] * 3)
    assert stderr.getvalue() == ""
    monkeypatch.setattr("gossamer.server.progress.COUNT_AFTER_SECONDS", 0.0)
    llm.generate(["hello"] * 3, use_tqdm=False)
    assert stderr.getvalue() == ""
    llm.generate(["hello"] * 3)
    assert "3/3" in stderr.getvalue()


def test_the_default_model_answers() -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=12)
    with LLM(str(model_file()), max_model_len=512, num_threads=1, dtype="float32", quantization="none") as real:
        question = [{"role": "user", "content": "What is the capital of France?"}]
        answer = real.chat(question, greedy)[0].outputs[0]
        assert answer.text == "The capital of France is Paris."
        assert answer.finish_reason == "stop"
        assert answer.token_ids[-1] in real.info.model.eos_token_ids
        sampled = SamplingParams(temperature=0.9, top_p=0.9, seed=11, max_tokens=12, logprobs=2)
        alone = real.generate("Once upon a time", sampled)[0].outputs[0]
        crowd = real.generate(["The capital of France is", "Once upon a time", "1, 2, 3,"], [greedy, sampled, greedy])
        assert crowd[1].outputs[0].token_ids == alone.token_ids
        assert crowd[0].outputs[0].text.startswith(" Paris")
        assert crowd[2].outputs[0].text.startswith(" 4, 5")
        assert len(alone.logprobs) == len(alone.token_ids)
        assert "".join(real.get_tokenizer().token_text(i) for i in alone.token_ids) == alone.text

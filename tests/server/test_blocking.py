"""The blocking front with a real engine process whose model is a fake: it answers each letter with the next."""

import signal
import subprocess
import threading
from contextlib import closing
from pathlib import Path

import pytest
from server_process import FAKE_ENGINE, TESTS, write_byte_tokenizer

from gossamer.config import make_engine_config
from gossamer.core import EngineDead, InvalidRequest, SamplingParams, StartupError
from gossamer.server.blocking import BlockingLLM, EngineBackend


@pytest.fixture
def start(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    model = write_byte_tokenizer(tmp_path / "model")
    # The fake takes `seed` milliseconds for a step.

    def start(**options):
        return BlockingLLM(make_engine_config(**{"model": str(model), **options}), factory=FAKE_ENGINE)

    return start


def test_streams_and_goes_on_after_a_stream_was_closed(start):
    with start(seed=1) as llm:
        assert "".join(llm.stream("abc", SamplingParams(max_tokens=7))) == "bcdbcdb"
        with closing(llm.stream("abc", SamplingParams(max_tokens=4000))) as pieces:
            assert next(pieces).startswith("b")
        assert "".join(llm.stream("xy", SamplingParams(max_tokens=2))) == "yz"


def test_an_error_of_the_request_reaches_the_reader(start):
    with start() as llm:
        with pytest.raises(InvalidRequest, match="max_tokens"):
            list(llm.stream("abc", SamplingParams(max_tokens=5000)))
        assert "".join(llm.stream("a", SamplingParams(max_tokens=1))) == "b"


def test_chat_applies_the_template(start):
    with start() as llm:
        backend = EngineBackend(llm, "name")
        pieces = backend.stream([{"role": "user", "content": "hi"}], SamplingParams(max_tokens=8, ignore_eos=True))
        # The prompt is <|im_start|>user, a new line, hi, ...; the first answer is a special token and not shown.
        assert "".join(pieces) == "vtfs\x0bij"


def test_close_is_final_and_safe_twice(start):
    llm = start()
    llm.close()
    llm.close()
    assert llm._llm._client._process.poll() is not None


def test_a_failed_start_leaves_nothing_running(start, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_byte_tokenizer(Path("fails"))
    started = []
    spawn = subprocess.Popen

    def spawn_and_keep(*args, **options):
        started.append(spawn(*args, **options))
        return started[-1]

    monkeypatch.setattr("subprocess.Popen", spawn_and_keep)
    with pytest.raises(StartupError, match="The model folder is empty"):
        start(model="fails")
    assert [process.poll() is None for process in started] == [False]


def test_ctrl_c_ends_the_stream_alone(start):
    with start(seed=20) as llm:
        stream = llm.stream("abc", SamplingParams(max_tokens=4000))
        next(stream)
        timer = threading.Timer(0.3, signal.raise_signal, (signal.SIGINT,))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            list(stream)
        timer.join()
        assert not llm._llm._processor.num_unfinished
        assert "".join(llm.stream("xy", SamplingParams(max_tokens=2))) == "yz"


def test_a_dead_engine_ends_the_stream(start):
    with start(seed=20) as llm:
        stream = llm.stream("abc", SamplingParams(max_tokens=4000))
        next(stream)
        llm._llm._client._process.kill()
        with pytest.raises(EngineDead):
            list(stream)

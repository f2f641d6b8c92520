from __future__ import annotations

import asyncio
import json
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import zmq

from gossamer.config import make_engine_config
from gossamer.core import EngineDead, EngineStats, SamplingParams, StartupError, TokenOutput
from gossamer.engine import messages
from gossamer.engine.client import WATCH_SECONDS, EngineClient

TESTS = Path(__file__).parents[1]
FACTORY = "fake_engine:build"


@pytest.fixture(autouse=True)
def fake_engine_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


class Session:
    """An engine process with the fake engine, and what it has said so far."""

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self.messages: list[messages.FromEngine] = []
        self.deaths: list[str] = []
        client.listen(self.messages.append, self.deaths.append)

    def tokens(self, request_id: str) -> list[int]:
        return [t for output in self.outputs(request_id) for t in output.token_ids]

    def outputs(self, request_id: str) -> list[TokenOutput]:
        steps = [m for m in self.messages if isinstance(m, messages.Outputs)]
        return [output for step in steps for output in step.outputs if output.request_id == request_id]

    def refusals(self) -> list[messages.Refused]:
        return [m for m in self.messages if isinstance(m, messages.Refused)]

    def stats(self) -> EngineStats:
        return [m for m in self.messages if isinstance(m, messages.Outputs)][-1].stats

    def finished(self, request_id: str) -> bool:
        return any(output.finish_reason for output in self.outputs(request_id))


async def until(condition, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.005)


def with_engine(scenario, **options) -> None:
    """Runs `scenario(session)` against a fresh engine process."""

    async def main():
        client = EngineClient(make_engine_config(**options), factory=FACTORY, log_level="error")
        try:
            await client.wait_ready()
            await scenario(Session(client))
        finally:
            await client.shutdown()
        assert client._process.returncode is not None
        assert not client._directory.exists()

    asyncio.run(main())


async def canary(session: Session) -> None:
    """The golden request: after whatever happened, neighbours are served and no page is held."""
    name = f"canary-{len(session.messages)}"
    session.client.add_request(name, [10, 20, 30], SamplingParams(max_tokens=5), None)
    await until(lambda: session.finished(name))
    assert session.tokens(name) == [11, 21, 31, 11, 21]
    await until(lambda: session.stats().num_pages_in_use == 0)


def test_startup_reports_progress_and_info():
    async def main():
        client = EngineClient(make_engine_config(seed=3), factory=FACTORY)
        seen = []
        info = await client.wait_ready(lambda stage, fraction: seen.append((stage, fraction)))
        assert info.config == make_engine_config(seed=3)
        assert info.limits.vocab_size == 260
        assert info.ledger == [("weights", 1)]
        assert seen == [("loading weights", 0.5), ("loading weights", 1.0)]
        await client.shutdown()
        assert client._process.returncode == 0

    asyncio.run(main())


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("fails", "The model folder is empty.\nGive --model a folder with weights."),
        ("breaks", "ValueError: a bug in the loader"),
        ("dies", "exit status 3"),
    ],
)
def test_startup_failure_is_explained(model, words):
    async def main():
        client = EngineClient(make_engine_config(model=model), factory=FACTORY, log_level="critical")
        with pytest.raises(StartupError) as failure:
            await client.wait_ready()
        assert words in str(failure.value)
        await client.shutdown()

    asyncio.run(main())


def test_requests_run_together_and_aborts_free_pages():
    async def scenario(session):
        for i in range(4):
            session.client.add_request(f"r{i}", [i, i + 10], SamplingParams(max_tokens=6), None)
        await until(lambda: all(session.finished(f"r{i}") for i in range(4)))
        for i in range(4):
            assert session.tokens(f"r{i}") == [i + 1, i + 11] * 3
            assert session.outputs(f"r{i}")[-1].finish_reason == "length"
        session.client.add_request("long", [1], SamplingParams(max_tokens=4000), None)
        await until(lambda: len(session.tokens("long")) > 3)
        assert session.stats().num_pages_in_use == 1
        session.client.abort(["long", "unknown"])
        await until(lambda: session.stats().num_pages_in_use == 0, 1.0)
        assert not session.finished("long")
        await canary(session)

    with_engine(scenario, seed=5)


def test_refusals_name_the_cause():
    async def scenario(session):
        session.client.add_request("a", [9999], SamplingParams(), None)
        session.client.add_request("b", [253], SamplingParams(), None)
        session.client.add_request("c", [254], SamplingParams(), None)
        await until(lambda: len(session.refusals()) == 3)
        bad, busy, broken = session.refusals()
        assert (bad.request_id, bad.status, bad.param) == ("a", 400, "prompt")
        assert (busy.request_id, busy.status, busy.retry_after) == ("b", 503, 7)
        assert (broken.request_id, broken.status) == ("c", 500)
        await canary(session)

    with_engine(scenario)


def test_failed_step_ends_one_request_only():
    async def scenario(session):
        session.client.add_request("bad", [251], SamplingParams(), None)
        session.client.add_request("good", [1, 2], SamplingParams(max_tokens=4), None)
        await until(lambda: session.finished("good") and session.finished("bad"))
        assert session.outputs("bad")[-1].error == "the step failed on purpose"
        assert session.tokens("good") == [2, 3, 2, 3]
        await canary(session)

    with_engine(scenario)


@pytest.mark.parametrize(
    ("token", "words"), [(250, "the loop breaks on purpose"), (252, "exit status 9")], ids=["exception", "exit"]
)
def test_broken_loop_is_reported_within_a_second(token, words):
    async def scenario(session):
        session.client.add_request("r", [token], SamplingParams(), None)
        await until(lambda: session.deaths, 1.0)
        assert len(session.deaths) == 1
        assert words in session.deaths[0]
        assert not session.client.alive
        assert session.client._process.returncode != 0
        with pytest.raises(EngineDead, match=words):
            session.client.add_request("s", [1], SamplingParams(), None)
        session.client.abort(["r"])

    with_engine(scenario)


def test_killed_engine_is_noticed_within_a_second():
    async def scenario(session):
        session.client.add_request("r", [1], SamplingParams(max_tokens=4000), None)
        await until(lambda: session.tokens("r"))
        os.kill(session.client.pid, signal.SIGKILL)
        await until(lambda: session.deaths, 1.0)
        assert "SIGKILL" in session.deaths[0]

    with_engine(scenario, seed=5)


def test_no_message_is_lost_while_the_event_loop_is_busy():
    async def scenario(session):
        session.client.add_request("r", [1], SamplingParams(max_tokens=12), None)
        while not session.finished("r"):
            time.sleep(1.05 * WATCH_SECONDS)  # a message and the end of the wait for it come together
            await asyncio.sleep(0.001)
        assert len(session.tokens("r")) == 12

    with_engine(scenario, seed=100)


def test_garbage_at_either_socket_is_dropped():
    """FAULTS 36: random bytes, a pickle, valid msgpack of the wrong shape, many frames, a frame of a gigabyte."""

    class Bomb:
        def __reduce__(self):
            return os._exit, (66,)

    async def scenario(session):
        directory = session.client._directory
        assert directory.stat().st_mode & 0o777 == 0o700
        garbage = [
            b"",
            b"\xc1" * 100,
            pickle.dumps(Bomb()),
            msgspec.msgpack.encode({"type": "add", "request_id": 5}),
            msgspec.msgpack.encode({"type": "nonsense"}),
            b"\x91" * 100_000,
            messages.encode(messages.AddRequest("x", [2**70 % 2**63] * 3, SamplingParams()))[:-4],
        ]
        context = zmq.Context()
        pushes = [context.socket(zmq.PUSH) for _ in range(2)]
        for push, name in zip(pushes, ("requests", "outputs"), strict=True):
            push.connect(f"ipc://{directory / name}")
            for frame in garbage:
                push.send(frame)
            push.send_multipart([b"two", b"frames"])
            push.send(bytes(messages.MAX_FRAME_BYTES + 1), copy=False)
            raw = socket.socket(socket.AF_UNIX)
            raw.connect(str(directory / name))
            raw.sendall(b"GET / HTTP/1.1\r\n\r\n" + os.urandom(1000))
            raw.close()
        await asyncio.sleep(0.3)
        for push in pushes:
            push.close(linger=0)
        context.term()
        assert session.client._decoder.num_dropped >= len(garbage)
        assert not session.deaths
        await canary(session)

    with_engine(scenario)


def test_engine_leaves_when_its_parent_is_killed():
    """The parent is killed with SIGKILL, so only the closing pipe can tell the engine."""
    program = (
        "import asyncio, sys\n"
        "from gossamer.config import make_engine_config\n"
        "from gossamer.engine.client import EngineClient\n"
        "async def main():\n"
        f"    client = EngineClient(make_engine_config(), factory={FACTORY!r})\n"
        "    await client.wait_ready()\n"
        "    print(client.pid, client._directory, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid, directory = parent.stdout.readline().decode().split()
        parent.kill()
    deadline = time.monotonic() + 2.0
    while _running(int(pid)):
        assert time.monotonic() < deadline, "the engine outlived its parent"
        time.sleep(0.02)
    assert not Path(directory).exists()


def _running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_group_leave_the_engine_to_its_parent(number):
    async def scenario(session):
        session.client.add_request("r", [1], SamplingParams(max_tokens=4000), None)
        await until(lambda: session.tokens("r"))
        os.kill(session.client.pid, number)
        session.client.abort(["r"])
        await canary(session)

    with_engine(scenario)


def test_shutdown_kills_an_engine_that_does_not_listen():
    async def main():
        client = EngineClient(make_engine_config(seed=10_000), factory=FACTORY)
        await client.wait_ready()
        client.listen(lambda message: None, lambda why: None)
        client.add_request("slow", [1], SamplingParams(), None)
        await asyncio.sleep(0.2)
        started = time.monotonic()
        await client.shutdown(timeout=0.5)
        assert time.monotonic() - started < 2.0
        assert client._process.returncode == -signal.SIGKILL
        await client.shutdown()

    asyncio.run(main())


def test_messages_survive_the_wire():
    params = SamplingParams(temperature=0.5, stop=["a"], logit_bias={3: 1.5}, seed=-7)
    message = messages.AddRequest("id", [1, 2], params, "salt", 1.5)
    assert messages.FrameDecoder(messages.ToEngine).decode([messages.encode(message)]) == message
    outputs = messages.Outputs([TokenOutput("id", [5], "stop", 5)], EngineStats(num_running=2))
    assert messages.FrameDecoder(messages.FromEngine).decode([messages.encode(outputs)]) == outputs


def test_config_line_is_json_of_one_line():
    start = messages.StartConfig(
        engine=make_engine_config(model="a\nb"), requests_address="ipc://r", outputs_address="ipc://o"
    )
    line = msgspec.json.encode(start)
    assert b"\n" not in line
    assert json.loads(line)["engine"]["load"]["model"] == "a\nb"
    assert msgspec.json.decode(line, type=messages.StartConfig) == start

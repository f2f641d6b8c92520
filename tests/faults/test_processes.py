"""Processes that die, cannot start, or stop answering (FAULTS 27, 28, and start-up)."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
from server_process import FAKE_ENGINE, TESTS, ServerProcess, error_of, write_byte_tokenizer

from gossamer.config import make_engine_config
from gossamer.core import EngineDead
from gossamer.server import async_llm


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_byte_tokenizer(tmp_path_factory.mktemp("models") / "tiny-model"))


def engine_config(model: str, **load) -> dict:
    return {"load": {"model": model, "seed": 10} | load}


def test_killed_engine(model):
    """FAULTS 27: 5xx within two seconds for whoever waits, not ready, then a non-zero exit."""
    with ServerProcess(engine_config(model)) as server, ThreadPoolExecutor(2) as pool:
        body = {"prompt": "HAL", "max_tokens": 4000}
        whole = pool.submit(server.post, "/v1/completions", body)
        stream = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body | {"stream": True}, timeout=30)
        server.wait_running(2)
        os.kill(server.engine_pid, signal.SIGKILL)
        started = time.monotonic()
        answer = whole.result()
        assert answer.status_code == 503
        assert "SIGKILL" in error_of(answer)["message"]
        assert "event: error\ndata: " in stream.result().text
        assert time.monotonic() - started < 2.0
        assert server.http.get("/health").status_code == 503
        assert server.http.get("/live").status_code == 200
        assert server.post("/v1/completions", body).status_code == 503
        assert server.process.wait(10) == 2
        assert "The engine process has died (killed by SIGKILL)" in server.stderr
        assert "Traceback" not in server.stderr


def test_engine_that_breaks_itself(model):
    with ServerProcess(engine_config(model)) as server:
        answer = server.post("/v1/completions", {"prompt": [250]})
        assert answer.status_code == 503
        assert server.http.get("/health").status_code == 503
        assert server.process.wait(10) == 2


def test_killed_server_takes_the_engine_along(model):
    """FAULTS 27."""
    with ServerProcess(engine_config(model)) as server:
        engine = server.engine_pid
        server.process.kill()
        server.process.wait()
        deadline = time.monotonic() + 2.0
        while Path(f"/proc/{engine}").exists() and "Z" not in Path(f"/proc/{engine}/stat").read_text().split()[2]:
            assert time.monotonic() < deadline, "the engine outlived the server"
            time.sleep(0.01)


def test_stopped_engine_is_not_ready(model, monkeypatch):
    """FAULTS 28: a process that is there but does not move; ready again when it does."""
    monkeypatch.setattr(async_llm, "STALL_SECONDS", 1.2)
    monkeypatch.setenv("PYTHONPATH", str(TESTS))

    async def until(ready, llm):
        deadline = time.monotonic() + 5
        while llm.is_ready != ready:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.02)

    async def main():
        config = make_engine_config(model=model)
        async with async_llm.AsyncLLM(config=config, factory=FAKE_ENGINE, log_level="critical") as llm:
            await asyncio.sleep(1.5)
            await llm.check_health()
            os.kill(llm._client.pid, signal.SIGSTOP)
            await until(False, llm)
            with pytest.raises(EngineDead, match="does not answer"):
                await llm.check_health()
            os.kill(llm._client.pid, signal.SIGCONT)
            await until(True, llm)

    asyncio.run(main())


def test_port_in_use_is_said_before_anything_loads(model):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        started = time.monotonic()
        with ServerProcess(engine_config(model), {"port": port}, wait=False) as server:
            assert server.process.wait(10) == 2
            server._reader.join()
            assert f"Port {port} on 127.0.0.1 is in use." in server.stderr
            assert "--port" in server.stderr
            assert len(server.lines) <= 5
            assert time.monotonic() - started < 5


def test_bad_timeout(model):
    with ServerProcess(engine_config(model), {"send_timeout": 0}, wait=False) as server:
        assert server.process.wait(10) == 2
        server._reader.join()
        assert "--send-timeout must be more than 0" in server.stderr


def test_tokenizer_that_cannot_be_read(model, tmp_path):
    """Said at once, not after the engine has loaded."""
    folder = write_byte_tokenizer(tmp_path / "broken")
    (folder / "tokenizer.json").write_text("{")
    with ServerProcess(engine_config(str(folder)), factory="fake_engine:build_slowly", wait=False) as server:
        assert server.process.wait(15) == 2
        server._reader.join()
        assert "tokenizer.json" in server.stderr
        assert len(server.lines) <= 5


def test_bad_host(model):
    with ServerProcess(engine_config(model), {"host": "no.such.host.invalid"}, wait=False) as server:
        assert server.process.wait(30) == 2
        server._reader.join()
        assert "--host" in server.stderr
        assert len(server.lines) <= 5


def test_model_that_cannot_load(model):
    """The engine's own words reach the user, and nobody is left running."""
    factory = "fake_engine:build_failing"
    with ServerProcess(engine_config(model), factory=factory, wait=False) as server:
        assert server.process.wait(20) == 2
        server._reader.join()
        assert server.stderr == "gossamer: The model folder is empty.\nGive --model a folder with weights."


def test_signal_while_loading(model):
    with ServerProcess(engine_config(model), factory="fake_engine:build_slowly", wait=False) as server:
        time.sleep(1.5)
        assert server.process.poll() is None
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(5) == 0
        assert time.monotonic() - started < 2
        assert "Traceback" not in server.stderr


def test_requests_while_loading(model):
    """The port answers at once: alive, not ready, and requests are told to come back."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    with ServerProcess(engine_config(model), {"port": port}, factory="fake_engine:build_slowly", wait=False):
        deadline = time.monotonic() + 10
        while True:
            try:
                assert httpx.get(f"http://127.0.0.1:{port}/live").status_code == 200
                break
            except httpx.ConnectError:
                assert time.monotonic() < deadline
                time.sleep(0.02)
        for method, path in (("GET", "/health"), ("GET", "/v1/models"), ("POST", "/v1/completions")):
            answer = httpx.request(method, f"http://127.0.0.1:{port}{path}", json={"prompt": "a"})
            assert answer.status_code == 503
            assert answer.headers["Retry-After"] == "1"
            assert error_of(answer)["code"] == "loading"

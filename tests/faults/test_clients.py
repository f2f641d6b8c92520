"""Clients that are slow, leave, or come in crowds; keys; signals (FAULTS 3, 4, 22, 23, 24, 29)."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from server_process import ServerProcess, error_of, write_byte_tokenizer

RECEIVE_TIMEOUT = 0.6
SEND_TIMEOUT = 0.6


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_byte_tokenizer(tmp_path_factory.mktemp("models") / "tiny-model"))


@pytest.fixture(scope="module")
def server(model):
    engine = {"load": {"model": model, "seed": 5}, "scheduler": {"max_num_seqs": 4, "max_num_queued": 4}}
    options = {"receive_timeout": RECEIVE_TIMEOUT, "send_timeout": SEND_TIMEOUT, "api_key": "sesame"}
    with ServerProcess(engine, options | {"log_level": "error"}) as process:
        process.http.headers["Authorization"] = "Bearer sesame"
        yield process
        assert "ASGI" not in process.stderr


def raw_request(body: dict | bytes, path: str = "/v1/completions", length: int | None = None) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sesame\r\n"
    return (head + f"Content-Length: {len(data) if length is None else length}\r\n\r\n").encode() + data


def receive_answer(sock: socket.socket) -> bytes:
    """One answer, head and body, as its Content-Length says."""

    def more() -> bytes:
        received = sock.recv(4096)
        assert received, "the server closed the connection in the middle of an answer"
        return received

    data = b""
    while b"\r\n\r\n" not in data:
        data += more()
    head, _, body = data.partition(b"\r\n\r\n")
    length = next(
        int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length")
    )
    while len(body) < length:
        body += more()
    return head + b"\r\n\r\n" + body


LONG = {"prompt": "HAL", "max_tokens": 4000}


def test_slow_headers(server):
    """FAULTS 3: on a new connection, and on one that has been used before."""
    for preamble in (b"", b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n"):
        with server.connect() as sock:
            if preamble:
                sock.sendall(preamble)
                assert b"200 OK" in receive_answer(sock)
            started = time.monotonic()
            sock.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-Slow: ")
            server.canary()
            answer = receive_answer(sock)
            assert b" 408 " in answer.split(b"\r\n")[0]
            assert RECEIVE_TIMEOUT * 0.9 < time.monotonic() - started < RECEIVE_TIMEOUT + 1
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "timeout_error"


def test_slow_body(server):
    """FAULTS 3: a byte now and then does not help."""
    with server.connect() as sock:
        sock.sendall(raw_request(b'{"prompt"', length=100))
        stop = threading.Event()

        def trickle():
            while not stop.wait(0.1):
                try:
                    sock.sendall(b" ")
                except OSError:
                    return

        dripping = threading.Thread(target=trickle)
        dripping.start()
        try:
            server.canary()
            assert b" 408 " in receive_answer(sock).split(b"\r\n")[0]
        finally:
            stop.set()
            dripping.join()
    server.canary()


@pytest.mark.parametrize("key", [None, "Bearer", "Bearer wrong", "Bearer sesam", "Bearer sesame2", "sesame", "Basic x"])
def test_missing_or_wrong_key(server, key):
    """FAULTS 4."""
    headers = {} if key is None else {"Authorization": key}
    with httpx.Client(base_url=server.url, headers=headers) as http:
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"):
            answer = http.post(path, json={"prompt": "a"})
            assert answer.status_code == 401
            assert error_of(answer)["code"] == "invalid_api_key"
        for path in ("/v1/models", "/v1/models/default", "/v1/nothing", "/v1"):
            assert http.get(path).status_code == 401
        for path in ("/health", "/metrics", "/version", "/live"):
            assert http.get(path).status_code == 200
    assert server.http.get("/v1/models").status_code == 200
    server.canary()


def test_key_is_not_shown(server):
    assert "sesame" not in server.stderr
    assert "Authorization: Bearer $GOSSAMER_API_KEY" in server.stderr


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_in_decode(server, stream):
    """FAULTS 22."""
    with server.connect() as sock:
        sock.sendall(raw_request(LONG | {"stream": stream}))
        if stream:
            assert b"data:" in sock.recv(4096) + sock.recv(4096)
        server.wait_running(1)
    started = time.monotonic()
    server.wait_idle(1.0)
    assert time.monotonic() - started < 1.0
    server.canary()


@pytest.mark.parametrize("stream", [True, False])
def test_disconnect_while_queued(server, stream):
    """FAULTS 22: four run, the fifth waits and leaves first."""
    aborted = server.metric("vllm:request_success_total", finished_reason="abort")
    running = [server.connect() for _ in range(4)]
    for sock in running:
        sock.sendall(raw_request(LONG | {"stream": True}))
    server.wait_running(4)
    with server.connect() as queued:
        queued.sendall(raw_request(LONG | {"stream": stream}))
        wait_until(lambda: server.metric("vllm:num_requests_waiting") == 1)
    wait_until(lambda: server.metric("vllm:num_requests_waiting") == 0)
    assert server.metric("vllm:num_requests_running") == 4
    for sock in running:
        sock.close()
    server.wait_idle()
    assert server.metric("vllm:request_success_total", finished_reason="abort") == aborted + 5
    server.canary()


def test_disconnect_of_several_samples(server):
    with server.connect() as sock:
        sock.sendall(raw_request(LONG | {"prompt": ["a", "b"], "n": 2, "stream": True}))
        server.wait_running(4)
    server.wait_idle()
    server.canary()


def test_client_stops_reading(model):
    """FAULTS 23: the stream backs up into the server, which gives up on it."""
    options = {"send_timeout": SEND_TIMEOUT, "log_level": "warning"}
    with ServerProcess({"load": {"model": model}}, options) as server, socket.socket() as sock:
        before = server.rss()
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", server.port))
        sock.sendall(raw_request(LONG | {"stream": True, "logprobs": 20, "n": 8, "seed": 1}))
        server.wait_running(8)
        server.wait_for("read nothing of its answer", 15.0)
        server.wait_idle()
        assert server.rss() - before < 100 << 20
        server.canary()


def test_slow_reader_gets_everything(server):
    """Less than SEND_TIMEOUT between reads: nothing is lost, though the server merges what waits."""
    with server.http.stream("POST", "/v1/completions", json={"prompt": "HAL", "max_tokens": 150, "stream": True}) as s:
        text, finish = "", None
        for i, line in enumerate(s.iter_lines()):
            if i % 20 == 0:
                time.sleep(0.05)
            if line.startswith("data: {"):
                choice = json.loads(line[6:])["choices"][0]
                text += choice["text"]
                finish = choice["finish_reason"]
    assert text == "IBM" * 50
    assert finish == "length"


def test_overload(server):
    """FAULTS 24: eight fit (four run, four wait); the others are told to come back, and those admitted finish."""
    body = {"prompt": "HAL", "max_tokens": 60}

    def ask(_):
        return httpx.post(f"{server.url}/v1/completions", json=body, headers=server.http.headers, timeout=30)

    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(ask, range(24)))
    statuses = [answer.status_code for answer in answers]
    assert set(statuses) == {200, 503}
    assert statuses.count(200) >= 8
    for answer in answers:
        if answer.status_code == 503:
            assert int(answer.headers["Retry-After"]) >= 1
            assert error_of(answer)["type"] == "overloaded_error"
        else:
            assert answer.json()["choices"][0]["text"] == "IBM" * 20
    server.canary()


@pytest.mark.parametrize("stream", [True, False])
def test_engine_refusals_keep_their_status(server, stream):
    """Even of a stream: its status is sent with the first token, not before."""
    busy = server.post("/v1/completions", {"prompt": [253], "stream": stream})
    assert busy.status_code == 503
    assert busy.headers["Retry-After"] == "7"
    broken = server.post("/v1/completions", {"prompt": [254], "stream": stream})
    assert broken.status_code == 500
    assert error_of(broken)["type"] == "server_error"
    server.canary()


def test_failed_step_is_an_error_of_its_request_only(server):
    """FAULTS 26."""
    with ThreadPoolExecutor(1) as pool:
        good = pool.submit(server.post, "/v1/completions", {"prompt": "HAL", "max_tokens": 30})
        bad = server.post("/v1/completions", {"prompt": [251], "max_tokens": 30})
        assert bad.status_code == 500
        assert "on purpose" in error_of(bad)["message"]
        assert good.result().json()["choices"][0]["text"] == "IBM" * 10
    server.canary()


def test_error_after_the_stream_has_begun(server):
    """One of two prompts fails at once, maybe before and maybe after the other's first token was sent."""
    slow = {"prompt": [[72], [72, 65], [251]], "max_tokens": 50, "stream": True}
    answer = server.post("/v1/completions", slow)
    if answer.status_code == 200:
        *_, last = [event for event in answer.text.split("\n\n") if event]
        kind, _, data = last.partition("\n")
        assert kind == "event: error"
        assert "on purpose" in json.loads(data.removeprefix("data: "))["error"]["message"]
    else:
        assert answer.status_code == 500
    server.canary()


def test_sigterm_drains(model):
    """FAULTS 29."""
    with ServerProcess({"load": {"model": model, "seed": 5}}) as server, ThreadPoolExecutor(2) as pool:
        body = {"prompt": "HAL", "max_tokens": 120}
        whole = pool.submit(server.post, "/v1/completions", body)
        stream = pool.submit(httpx.post, f"{server.url}/v1/completions", json=body | {"stream": True}, timeout=30)
        server.wait_running(2)
        engine = server.engine_pid
        server.process.send_signal(signal.SIGTERM)
        assert whole.result().json()["choices"][0]["text"] == "IBM" * 40
        assert stream.result().text.endswith("data: [DONE]\n\n")
        assert server.process.wait(5) == 0
        assert not process_exists(engine)
        assert "Traceback" not in server.stderr


def test_draining_is_bounded(model):
    """Who is not done by then is told so."""
    engine, options = {"load": {"model": model, "seed": 20}}, {"drain_timeout": 1.0}
    with ServerProcess(engine, options) as server, server.connect() as sock, server.connect() as streaming:
        sock.sendall(raw_request(LONG))
        streaming.sendall(raw_request(LONG | {"stream": True}))
        server.wait_running(2)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert b" 503 " in receive_answer(sock).split(b"\r\n")[0]
        received = b""
        while more := streaming.recv(1 << 16):
            received += more
        assert b"event: error" in received
        assert b"shutting down" in received
        assert server.process.wait(5) == 0
        assert time.monotonic() - started < 4
        assert "Traceback" not in server.stderr


def test_second_sigterm_leaves_at_once(model):
    """FAULTS 29."""
    with ServerProcess({"load": {"model": model, "seed": 20}}) as server, server.connect() as sock:
        sock.sendall(raw_request(LONG))
        server.wait_running(1)
        engine = server.engine_pid
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.process.poll() is None
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(2) == 1
        assert time.monotonic() - started < 1.5
        assert not process_exists(engine)
        assert "Traceback" not in server.stderr


def process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def wait_until(condition, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)

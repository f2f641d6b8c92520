import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gossamer.core import GossamerError, InvalidRequest, SamplingParams, StartupError
from gossamer.server.chat_repl import ChatLoop, HttpBackend

PARAMS = SamplingParams(temperature=0.0, max_tokens=16)


class FakeBackend:
    """Answers with the number of messages; raises what it is told to after the first piece."""

    def __init__(self, fails_with=None):
        self.asked = []
        self.closed = 0
        self.fails_with = fails_with

    def stream(self, messages, params):
        self.asked.append([dict(message) for message in messages])
        try:
            yield "answer "
            if self.fails_with is not None:
                error, self.fails_with = self.fails_with, None
                raise error
            yield str(len(messages))
        finally:
            self.closed += 1


def converse(backend, *lines, system=None):
    """Runs the loop over these lines; an exception in their place is raised by the reader. Returns what it wrote."""
    script = iter([*lines, EOFError()])
    written = []

    def read():
        line = next(script)
        if isinstance(line, BaseException):
            raise line
        return line

    ChatLoop(backend.stream, PARAMS, system, read=read, write=written.append).run()
    return "".join(written)


def test_the_conversation_grows():
    backend = FakeBackend()
    assert converse(backend, "one", "two") == "answer 1\nanswer 3\n\n"
    assert backend.asked[1] == [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "answer 1"},
        {"role": "user", "content": "two"},
    ]


def test_reset_keeps_the_system_message():
    backend = FakeBackend()
    converse(backend, "one", "/reset", "two", system="be brief")
    assert backend.asked[1] == [{"role": "system", "content": "be brief"}, {"role": "user", "content": "two"}]


def test_exit_help_blank_lines_and_unknown_commands():
    backend = FakeBackend()
    text = converse(backend, "", "/help", "/rest", "/exit", "never asked")
    assert "/exit" in text
    assert "Did you mean /reset?" in text
    assert backend.asked == []


def test_a_path_is_not_a_command():
    backend = FakeBackend()
    converse(backend, "/usr/bin is what?")
    assert backend.asked[0][0]["content"] == "/usr/bin is what?"


def test_ctrl_c_stops_the_answer_and_keeps_it():
    backend = FakeBackend(fails_with=KeyboardInterrupt())
    text = converse(backend, "one", "two")
    assert "answer  (stopped)\n" in text
    assert backend.asked[1][1] == {"role": "assistant", "content": "answer "}
    assert backend.closed == 2


def test_ctrl_c_at_the_prompt_stays():
    backend = FakeBackend()
    assert "Ctrl-D" in converse(backend, KeyboardInterrupt(), "one")
    assert len(backend.asked) == 1


def test_a_question_that_is_refused_is_forgotten():
    backend = FakeBackend(fails_with=InvalidRequest("too long", "messages"))
    text = converse(backend, "one", "two")
    assert "too long" in text
    assert backend.asked[1] == [{"role": "user", "content": "two"}]


class Handler(BaseHTTPRequestHandler):
    """A minimal server of OpenAI's chat API."""

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.answer(200, {"data": [{"id": "some-model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.bodies.append((self.path, body, self.headers.get("Authorization")))
        if body["messages"][-1]["content"] == "refuse":
            self.answer(400, {"error": {"message": "no room", "type": "invalid_request_error"}})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        chunks = [{"choices": [{"delta": {"role": "assistant"}}]}, {"choices": [{"delta": {"content": "Pa"}}]}]
        if body["messages"][-1]["content"] == "break":
            chunks.append({"error": {"message": "engine died"}})
        if body["messages"][-1]["content"] == "hang up":
            self.wfile.write(b"data: " + json.dumps(chunks[1]).encode() + b"\n\n")
            return
        chunks += [{"choices": [{"delta": {"content": "ris"}}]}, {"choices": []}]
        for chunk in chunks:
            self.wfile.write(b"data: " + json.dumps(chunk).encode() + b"\n\n")
        self.wfile.write(b"data: [DONE]\n\n")

    def answer(self, status, body):
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())


@pytest.fixture
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.bodies = []
    server.handle_error = lambda *_: None  # a client that leaves early is no error
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def question(text):
    return [{"role": "user", "content": text}]


@pytest.mark.parametrize("suffix", ["", "/", "/v1"])
def test_http_backend_streams(server, suffix):
    backend = HttpBackend(f"http://127.0.0.1:{server.server_port}{suffix}", api_key="key")
    assert backend.name == "some-model"
    assert "".join(backend.stream(question("capital?"), PARAMS)) == "Paris"
    path, body, key = server.bodies[0]
    assert (path, key) == ("/v1/chat/completions", "Bearer key")
    assert body == {
        "model": "some-model",
        "messages": question("capital?"),
        "stream": True,
        "temperature": 0.0,
        "max_tokens": 16,
    }


def test_http_backend_passes_the_servers_errors_on(server):
    backend = HttpBackend(f"127.0.0.1:{server.server_port}")
    with pytest.raises(GossamerError, match="400: no room"):
        list(backend.stream(question("refuse"), PARAMS))
    with pytest.raises(GossamerError, match="engine died"):
        list(backend.stream(question("break"), PARAMS))


def test_half_an_answer_is_not_taken_for_a_whole_one(server):
    backend = HttpBackend(f"127.0.0.1:{server.server_port}")
    pieces = backend.stream(question("hang up"), PARAMS)
    assert next(pieces) == "Pa"
    with pytest.raises(GossamerError, match="broke before the end"):
        next(pieces)


def test_a_server_that_hangs_up_without_a_word():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        closing = threading.Thread(target=lambda: listener.accept()[0].close())
        closing.start()
        with pytest.raises(StartupError, match=r"No server answers at .*"):
            HttpBackend(f"http://127.0.0.1:{listener.getsockname()[1]}")
        closing.join()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:99999", "http://[::1", "http://127.0.0.1:port", "http://", "ftp://a"]
)
def test_an_address_that_is_none_is_explained(url):
    with pytest.raises(StartupError, match=r"--url must be like http://127\.0\.0\.1:8000"):
        HttpBackend(url)


def test_http_backend_can_be_stopped_halfway(server):
    backend = HttpBackend(f"127.0.0.1:{server.server_port}")
    stream = backend.stream(question("capital?"), PARAMS)
    next(stream)
    stream.close()
    assert "".join(backend.stream(question("capital?"), PARAMS)) == "Paris"


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "http://", "ftp://x"])
def test_http_backend_without_a_server(url):
    with pytest.raises(StartupError, match="--url"):
        HttpBackend(url)

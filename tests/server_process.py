"""A real server process on a free port, for tests: started, spoken to with httpx or raw sockets, killed."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

TESTS = Path(__file__).parent
FAKE_ENGINE = "fake_engine:build"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

_PROGRAM = """
import sys, msgspec
from gossamer.config import EngineConfig, ServerConfig
from gossamer.core import GossamerError
from gossamer.server.app import run_server
server, engine, factory = sys.argv[1:4]
try:
    run_server(msgspec.json.decode(server, type=ServerConfig), msgspec.json.decode(engine, type=EngineConfig),
               factory=factory)
except GossamerError as error:
    print("gossamer:", error, file=sys.stderr)
    sys.exit(2)
"""


def byte_char(byte: int) -> str:
    """The character by which byte-level BPE spells a byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return chr(byte) if byte in printable else chr(256 + others.index(byte))


def write_byte_tokenizer(folder: Path) -> Path:
    """A model folder without weights whose token ids 0 to 255 are the bytes; four special tokens follow."""
    folder.mkdir(parents=True, exist_ok=True)
    backend = Tokenizer(models.BPE(vocab={byte_char(b): b for b in range(256)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|pad|>"]
    backend.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
    backend.save(str(folder / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|pad|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 260}))
    return folder


class ServerProcess:
    """`with ServerProcess(engine, server) as s:` waits until the server is ready and kills it at the end."""

    def __init__(
        self,
        engine: dict[str, Any],
        server: dict[str, Any] | None = None,
        *,
        factory: str = FAKE_ENGINE,
        wait: bool = True,
    ) -> None:
        self.engine, self.server, self.factory, self._wait = engine, {"port": 0} | (server or {}), factory, wait
        self.lines: list[str] = []

    def __enter__(self) -> ServerProcess:
        arguments = [json.dumps(self.server), json.dumps(self.engine), self.factory]
        self.process = subprocess.Popen(
            [sys.executable, "-c", _PROGRAM, *arguments],
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": str(TESTS)},
            text=True,
        )
        self._reader = threading.Thread(target=self._read_stderr, daemon=True)
        self._reader.start()
        if self._wait:
            self.url = self.wait_for(r"(http://\S+:\d+) \(ready", 60.0)
            self.port = int(self.url.rpartition(":")[2])
            self.http = httpx.Client(base_url=self.url, timeout=30.0)
        return self

    def __exit__(self, *exc: object) -> None:
        if hasattr(self, "http"):
            self.http.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()
        self._reader.join(5)
        if self.process.stderr is not None:
            self.process.stderr.close()

    def _read_stderr(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append(line.rstrip("\n"))

    @property
    def stderr(self) -> str:
        return "\n".join(self.lines)

    def wait_for(self, pattern: str, seconds: float = 5.0) -> str:
        """The first group of `pattern` in what the server has printed, as soon as it has."""
        deadline = time.monotonic() + seconds
        while True:
            found = re.search(pattern, self.stderr)
            if found:
                return found.group(1) if found.groups() else found.group()
            assert self.process.poll() is None, f"the server left: {self.stderr}"
            assert time.monotonic() < deadline, f"never printed {pattern!r}: {self.stderr}"
            time.sleep(0.01)

    @property
    def engine_pid(self) -> int:
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        for pid in children:
            if b"gossamer.engine.process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
        raise AssertionError("no engine process")

    def rss(self) -> int:
        """Bytes of memory that the API process holds."""
        return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def metric(self, name: str, **labels: str) -> float:
        wanted = [f'{key}="{value}"' for key, value in labels.items()]
        for line in self.http.get("/metrics").text.splitlines():
            head, _, value = line.rpartition(" ")
            if head.split("{")[0] == name and all(label in head for label in wanted):
                return float(value)
        raise AssertionError(f"no metric {name} {labels}")

    def connect(self, timeout: float = 10.0) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), timeout)

    def post(self, path: str, body: Any, **options: Any) -> httpx.Response:
        if isinstance(body, bytes):
            return self.http.post(path, content=body, **options)
        return self.http.post(path, json=body, **options)

    def wait_running(self, count: int, seconds: float = 5.0) -> None:
        deadline = time.monotonic() + seconds
        while self.metric("vllm:num_requests_running") != count:
            assert time.monotonic() < deadline, f"never {count} requests running"
            time.sleep(0.01)

    def wait_idle(self, seconds: float = 1.0) -> None:
        """Waits until no request holds a page, as must be after every fault."""
        deadline = time.monotonic() + seconds
        while self.metric("gossamer:kv_cache_pages_in_use") or self.metric("vllm:num_requests_running"):
            assert time.monotonic() < deadline, "pages are still in use"
            time.sleep(0.01)

    def canary(self) -> None:
        """The golden request of the fake engine, whose answer is the prompt with every byte one higher."""
        answer = self.post("/v1/completions", {"prompt": "HAL", "max_tokens": 6})
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == "IBMIBM"
        self.wait_idle()


def error_of(response: httpx.Response) -> dict[str, Any]:
    """The error of a response, whose shape must be OpenAI's."""
    body = response.json()
    assert set(body) == {"error"}
    assert set(body["error"]) == {"message", "type", "param", "code"}
    assert body["error"]["message"]
    return body["error"]

"""The read-answer loop of `gossamer chat`, over an engine of its own or a running server.

The loop knows neither: it asks a backend for the pieces of an answer. Ctrl-C closes that stream, which stops the
answer and frees its pages; the conversation goes on.
"""

import contextlib
import dataclasses
import http.client
import importlib
import json
import sys
import urllib.parse
from collections.abc import Callable, Generator
from typing import Any, Protocol

from gossamer.core import GossamerError, SamplingParams, StartupError
from gossamer.server.cli_options import closest

COMMANDS = {
    "/reset": "forget the conversation",
    "/exit": "leave (so does Ctrl-D)",
    "/help": "this list",
}
Message = dict[str, str]
CONNECT_TIMEOUT_SECONDS = 600.0


class ChatBackend(Protocol):
    """Answers a conversation. `stream` yields the answer in pieces; closing the generator stops it."""

    name: str

    def stream(self, messages: list[Message], params: SamplingParams) -> Generator[str, None, None]: ...


class ChatLoop:
    """One conversation. `read` returns the next line or raises EOFError; `write` shows text at once."""

    def __init__(
        self,
        backend: ChatBackend,
        params: SamplingParams,
        system: str | None = None,
        *,
        read: Callable[[], str],
        write: Callable[[str], None],
    ) -> None:
        self.backend = backend
        self.params = params
        self.system: list[Message] = [{"role": "system", "content": system}] if system else []
        self.messages: list[Message] = list(self.system)
        self.read = read
        self.write = write

    def run(self) -> None:
        """Returns when the user leaves."""
        while True:
            try:
                line = self.read().strip()
            except EOFError:
                self.write("\n")
                return
            except KeyboardInterrupt:
                self.write("\n(/exit or Ctrl-D leaves)\n")
                continue
            if line == "/exit":
                return
            if line.startswith("/") and line[1:].isalpha():
                self._command(line)
            elif line:
                self._turn(line)

    def _command(self, line: str) -> None:
        if line == "/reset":
            self.messages = list(self.system)
            self.write("(new conversation)\n")
        elif line == "/help":
            self.write("".join(f"{name:<8}{what}\n" for name, what in COMMANDS.items()))
        else:
            near = closest(line, COMMANDS)
            self.write(f"Unknown command {line}. " + (f"Did you mean {near}?\n" if near else "/help lists them.\n"))

    def _turn(self, text: str) -> None:
        """Asks and shows. An answer that was stopped stays in the conversation; a question that failed does not."""
        self.messages.append({"role": "user", "content": text})
        pieces: list[str] = []
        try:
            with contextlib.closing(self.backend.stream(self.messages, self.params)) as stream:
                for piece in stream:
                    pieces.append(piece)
                    self.write(piece)
        except KeyboardInterrupt:
            self.write(" (stopped)")
        except GossamerError as error:
            self.messages.pop()
            self.write(f"{error}\n/reset starts a new conversation.\n")
            return
        self.write("\n")
        self.messages.append({"role": "assistant", "content": "".join(pieces)})


def run_on_terminal(backend: ChatBackend, params: SamplingParams, system: str | None) -> None:
    """Runs the loop on stdin and stdout: with a prompt and line editing on a terminal, else one line per question."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # a Python built without readline: input() still works
            importlib.import_module("readline")  # gives input() line editing and recall
        print(f"Chatting with {backend.name}. /help lists the commands; Ctrl-C stops an answer.")

    def read() -> str:
        if interactive:
            return input("> ")
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line

    def write(text: str) -> None:
        print(text, end="", flush=True)

    ChatLoop(backend, params, system, read=read, write=write).run()


class HttpBackend:
    """A running server that speaks OpenAI's API: ours or another's."""

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None) -> None:
        """Asks the server for its models. Raises StartupError if it does not answer."""
        parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise StartupError(f"--url {url}: not an address; give one like http://127.0.0.1:8000")
        self.url = url
        self._connect = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        self._host, self._port = parts.hostname, parts.port
        self._base = parts.path.rstrip("/").removesuffix("/v1") + "/v1"
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        listed = json.loads(self._request("GET", "/models").read())
        self.name = model or str(listed["data"][0]["id"])

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> http.client.HTTPResponse:
        connection = self._connect(self._host, self._port, timeout=CONNECT_TIMEOUT_SECONDS)
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, self._base + path, data, self._headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise StartupError(
                f"--url {self.url}: no answer ({error}).\nStart a server with `gossamer serve`, or correct the address."
            ) from error
        if response.status != 200:
            raise GossamerError(f"{self.url} answered {response.status}: {_error_message(response.read())}")
        return response

    def stream(self, messages: list[Message], params: SamplingParams) -> Generator[str, None, None]:
        body = {"model": self.name, "messages": messages, "stream": True, **_changed(params)}
        response = self._request("POST", "/chat/completions", body)
        try:
            for line in response:
                if not line.startswith(b"data:"):
                    continue
                data = line[5:].strip()
                if data == b"[DONE]":
                    return
                chunk = json.loads(data)
                if "error" in chunk:
                    raise GossamerError(_error_message(data))
                for choice in chunk["choices"]:
                    yield choice["delta"].get("content") or ""
        except (OSError, http.client.HTTPException) as error:
            raise GossamerError(f"The connection to {self.url} broke: {error}") from error
        finally:
            response.close()


def _changed(params: SamplingParams) -> dict[str, Any]:
    """The fields that differ from our defaults, so that any OpenAI server understands the request, and the two whose
    defaults differ between servers."""
    default = SamplingParams()
    values = {item.name: getattr(params, item.name) for item in dataclasses.fields(SamplingParams)}
    always = ("temperature", "max_tokens")
    return {name: value for name, value in values.items() if name in always or value != getattr(default, name)}


def _error_message(body: bytes) -> str:
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return body.decode(errors="replace")[:200]

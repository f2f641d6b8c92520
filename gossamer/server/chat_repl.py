"""The read-answer loop of `gossamer chat`, over an engine of its own or a running server.

The loop knows neither: it asks a function for the pieces of an answer. Ctrl-C closes that stream, which stops the
answer and frees its pages; the conversation goes on.
"""

import asyncio
import contextlib
import dataclasses
import importlib
import sys
from collections.abc import Callable, Generator
from functools import partial
from typing import Any

from gossamer.core import GossamerError, SamplingParams
from gossamer.server.cli_options import closest
from gossamer.server.http_client import Endpoint

COMMANDS = {"/reset": "forget the conversation", "/exit": "leave (so does Ctrl-D)", "/help": "this list"}
Message = dict[str, str]
Stream = Callable[[list[Message], SamplingParams], Generator[str, None, None]]
"""Answers a conversation in pieces; closing the generator stops it."""


class ChatLoop:
    """One conversation. `read` returns the next line or raises EOFError; `write` shows text at once."""

    def __init__(
        self, stream: Stream, params: SamplingParams, system: str | None = None, *, read: Callable[[], str],
        write: Callable[[str], None],
    ) -> None:  # fmt: skip
        self.stream = stream
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
            with contextlib.closing(self.stream(self.messages, self.params)) as stream:
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


def run_on_terminal(name: str, stream: Stream, params: SamplingParams, system: str | None) -> None:
    """Runs the loop on stdin and stdout: with a prompt and line editing on a terminal, else one line per question."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # a Python built without readline: input() still works
            importlib.import_module("readline")  # gives input() line editing and recall
        print(f"Chatting with {name}. /help lists the commands; Ctrl-C stops an answer.")

    read, write = partial(input, "> " if interactive else ""), partial(print, end="", flush=True)
    ChatLoop(stream, params, system, read=read, write=write).run()


class HttpBackend:
    """A running server that speaks OpenAI's API: ours or another's."""

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None) -> None:
        """Asks the server for its models. Raises StartupError if it does not answer."""
        self._endpoint = Endpoint(url, api_key, "--url")
        self.name = asyncio.run(self._endpoint.model(model))

    def stream(self, messages: list[Message], params: SamplingParams) -> Generator[str, None, None]:
        body = {"model": self.name, "messages": messages, "stream": True, **_changed(params)}
        source = self._endpoint.events("/v1/chat/completions", body)

        async def following() -> dict[str, Any] | None:
            return await anext(source, None)

        try:
            with asyncio.Runner() as runner:
                try:
                    while (event := runner.run(following())) is not None:
                        for choice in event.get("choices") or ():
                            yield choice["delta"].get("content") or ""
                finally:  # closed with this generator, or where Ctrl-C interrupts it
                    runner.run(source.aclose())
        except (OSError, ValueError) as error:
            raise GossamerError(f"{self._endpoint.url}: {error}") from error


def _changed(params: SamplingParams) -> dict[str, Any]:
    """The fields that differ from our defaults, so that any OpenAI server understands the request, and the two whose
    defaults differ between servers."""
    default = SamplingParams()
    values = {item.name: getattr(params, item.name) for item in dataclasses.fields(SamplingParams)}
    always = ("temperature", "max_tokens")
    return {name: value for name, value in values.items() if name in always or value != getattr(default, name)}

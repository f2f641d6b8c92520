"""A client of any server with OpenAI's API, for `gossamer chat --url` and `bench serve`: the standard library alone."""

import asyncio
import contextlib
import json
import ssl
import urllib.parse
from collections.abc import AsyncGenerator
from typing import Any

from gossamer.core import StartupError

MAX_LINE_BYTES = 1 << 22


class Endpoint:
    """One server. Requests are HTTP/1.0, so that an answer ends with its connection and comes without chunks."""

    def __init__(self, url: str, api_key: str | None, flag: str) -> None:
        """`flag` is what gave the address. Raises StartupError if it is none."""
        try:
            parts = urllib.parse.urlsplit(url if "//" in url else f"http://{url}")
            port, host = parts.port, parts.hostname
        except ValueError:
            port = host = None
        if host is None or parts.scheme not in ("http", "https"):
            raise StartupError(f"{flag} must be like http://127.0.0.1:8000; got {url!r}.")
        self.url, self._flag = url, flag
        self._host, self._tls = host, parts.scheme == "https"
        self._port = port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = f"Host: {parts.netloc}\r\n" + (f"Authorization: Bearer {api_key}\r\n" if api_key else "")

    async def lines(self, path: str, body: dict[str, Any] | None = None) -> AsyncGenerator[str, None]:
        """The lines of the answer, as they come. Raises ConnectionError with the server's words unless it is 200."""
        content = b"" if body is None else json.dumps(body).encode()
        head = f"{'POST' if content else 'GET'} {self._path}{path} HTTP/1.0\r\n{self._headers}"
        head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        tls = ssl.create_default_context() if self._tls else None
        reader, writer = await asyncio.open_connection(self._host, self._port, ssl=tls, limit=MAX_LINE_BYTES)
        try:
            writer.write(head.encode() + content)
            status = (await reader.readline()).decode(errors="replace").split(" ", 2)
            if len(status) < 2:
                raise ConnectionError(f"{path}: the connection was closed without an answer")
            while (await reader.readline()).strip():
                pass
            if status[1].strip() != "200":
                words = _error_message((await reader.read()).decode(errors="replace"))
                raise ConnectionError(f"{path} answered {status[1].strip()}: {words}")
            async for line in reader:
                yield line.decode().rstrip()
        finally:
            writer.close()

    async def events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The events of a streamed answer. Raises ConnectionError for one that is an error, as for the answer."""
        async with contextlib.aclosing(self.lines(path, body)) as lines:
            async for line in lines:
                if not line.startswith("data:"):
                    continue
                if line[5:].strip() == "[DONE]":
                    return
                event = json.loads(line[5:])
                if "error" in event:
                    raise ConnectionError(_error_message(line[5:]))
                yield event
        raise ConnectionError(f"{path}: the connection broke before the end of the answer")

    async def model(self, name: str | None) -> str:
        """`name`, or the model that the server lists first. Raises StartupError if it does not answer."""
        try:
            listed = json.loads("".join([line async for line in self.lines("/v1/models")]))
            return name or str(listed["data"][0]["id"])
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise StartupError(
                f"No server answers at {self.url} ({self._flag}): {error}\n"
                "Start one with `gossamer serve MODEL`, or correct the address."
            ) from error


def _error_message(body: str) -> str:
    try:
        error = json.loads(body)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, KeyError, TypeError):
        return body[:200]

"""Renders chat messages with a checkpoint's Jinja template, in a sandbox.

Message text that spells a special token must stay text. `Guard` marks such spellings before rendering, so that
afterwards they can be told from the template's own.
"""

import json
import re
import secrets
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from gossamer.core import InvalidRequest

_GENERATION = re.compile(r"(\{%[-+]?\s*)(end)?generation\b")
_RESERVED = ("messages", "tools", "add_generation_prompt", "raise_exception", "strftime_now")


class ChatTemplate:
    """The templates of one checkpoint, by name: `tool_use` renders requests with tools, `default` all others.

    `special_tokens` (bos_token, eos_token, ...) are visible to the templates. Raises jinja2.TemplateSyntaxError.
    """

    def __init__(self, sources: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        # `{% generation %}` marks the assistant's tokens for training; here its body is rendered as it is.
        plain = {name: _GENERATION.sub(_as_condition, source) for name, source in sources.items()}
        self._templates = {name: environment.from_string(source) for name, source in plain.items()}
        self._special_tokens = dict(special_tokens)

    def render(
        self, messages: list[dict[str, Any]], *, tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True, options: Mapping[str, Any] | None = None,
    ) -> str:  # fmt: skip
        """The prompt text. `options` are further template variables (enable_thinking, ...).

        Raises: InvalidRequest where the template refuses the messages, with the template's own words.
        """
        for name in options or ():
            if name in _RESERVED or name in self._special_tokens:
                raise InvalidRequest(f"chat_template_kwargs may not set {name!r}.", "chat_template_kwargs")
        template = self._templates.get("tool_use" if tools else "default") or self._templates.get("default")
        if template is None:
            template = next(iter(self._templates.values()))
        variables = self._special_tokens | dict(options or {})
        try:
            return template.render(
                messages=messages, tools=tools, add_generation_prompt=add_generation_prompt, **variables
            )
        except Exception as e:  # a template is a program: anything may go wrong in it
            raise InvalidRequest(f"The chat template does not accept these messages: {e}", "messages") from e


def normalize_messages(messages: Any) -> list[dict[str, Any]]:
    """Checks the shape of OpenAI-style messages and flattens content parts to text, one line each.

    Raises: InvalidRequest, naming the message.
    """
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must be a non-empty list.", "messages")
    out = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InvalidRequest(f"messages[{i}] must be an object with a string 'role'.", "messages")
        out.append({**message, "content": _flatten(message.get("content"), f"messages[{i}].content")})
    return out


def _flatten(content: Any, where: str) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidRequest(f"{where} must be a string or a list of parts.", "messages")
    texts = []
    for part in content:
        if not isinstance(part, Mapping) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InvalidRequest(f"{where} has a part of type {kind!r}; only text parts are supported.", "messages")
        texts.append(part["text"])
    return "\n".join(texts)


class Guard:
    """Finds and marks spellings of special tokens inside a request's own strings."""

    def __init__(self, special_texts: Iterable[str]) -> None:
        texts = sorted(set(special_texts), key=lambda t: (-len(t), t))
        self.pattern = re.compile("|".join(map(re.escape, texts))) if texts else None
        self._beginnings = {t[:n] for t in texts for n in range(1, len(t))}
        self._longest = max(map(len, texts), default=0)

    def apply(self, value: Any, mark: str) -> Any:
        """A copy of nested lists and dicts in which `mark` stands inside every spelling, behind its first character."""
        if isinstance(value, str):
            return self._mark(value, mark)
        if isinstance(value, Mapping):
            return {self.apply(key, mark): self.apply(entry, mark) for key, entry in value.items()}
        if isinstance(value, list | tuple):
            return [self.apply(entry, mark) for entry in value]
        return value

    def _mark(self, text: str, mark: str) -> str:
        if self.pattern is None:
            return text
        text = self.pattern.sub(lambda m: m.group()[0] + mark + m.group()[1:], text)
        # A string may end in the beginning of a spelling that the next string completes.
        for n in range(min(self._longest - 1, len(text)), 0, -1):
            if text[-n:] in self._beginnings:
                return text[: len(text) - n + 1] + mark + text[len(text) - n + 1 :]
        return text


def new_mark() -> str:
    """A random text between private-use characters, which no client can have written."""
    return f"\ue000{secrets.randbits(64)}\ue001"


def _as_condition(found: re.Match[str]) -> str:
    return f"{found[1]}{'endif' if found[2] else 'if true'}"


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    # Jinja's own filter escapes for HTML, which would change what the model reads.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)

"""The tokenizer of a model: text to ids and back, chat templates, special tokens. Torch-free and quick to load."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jinja2
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from gossamer.core import InvalidRequest, StartupError
from gossamer.server.chat_template import ChatTemplate, Guard, new_mark, normalize_messages
from gossamer.server.gguf_tokenizer import read_gguf_tokenizer
from gossamer.server.tokenizer_files import TokenizerParts, read_hf_tokenizer


def load_tokenizer(model_path: str | Path, chat_template: str | Path | None = None) -> Tokenizer:
    """Loads the tokenizer of a Hugging Face folder or a .gguf file.

    Args:
        model_path: a folder with tokenizer.json, a .gguf file, or a folder with one .gguf file.
        chat_template: file with a Jinja template to use instead of the model's own.
    Raises: StartupError, saying what is missing and which flag mends it.
    """
    path = Path(model_path)
    if path.is_dir() and not (path / "tokenizer.json").is_file():
        weights = sorted(path.glob("*.gguf"))
        path = weights[0] if weights else path
    if path.is_dir():
        parts = read_hf_tokenizer(path)
    elif path.is_file():
        parts = read_gguf_tokenizer(path)
    else:
        raise StartupError(f"There is no tokenizer at {path}.\nName the model's folder or file with --tokenizer.")
    if chat_template is None:
        return Tokenizer(parts)
    try:
        parts.chat_templates = {"default": Path(chat_template).read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as e:
        raise StartupError(f"Cannot read --chat-template {chat_template}: {e}.") from e
    try:
        ChatTemplate(parts.chat_templates, parts.special_tokens)
    except jinja2.TemplateError as e:
        raise StartupError(f"--chat-template {chat_template} is not a valid Jinja template: {e}.") from e
    return Tokenizer(parts)


class Tokenizer:
    """Encodes and decodes with the ids of the checkpoint's own tokenizer. Methods may be called from any thread."""

    def __init__(self, parts: TokenizerParts) -> None:
        self._backend = parts.backend
        self._parts = parts
        self._token_texts: dict[int, str] = {}
        added = parts.backend.get_added_tokens_decoder()
        self._special = {token.content: i for i, token in added.items() if token.special}
        self.special_ids = frozenset(self._special.values())
        self.bos_token_id = parts.bos_token_id
        self.vocab_size: int = parts.backend.get_vocab_size(with_added_tokens=True)

    def encode(self, text: str, add_special_tokens: bool = True, parse_special: bool = True) -> list[int]:
        """Token ids of a text.

        `add_special_tokens` surrounds it as the checkpoint does (often with a BOS). Without `parse_special`, text
        that spells a special token is encoded as the text it is.
        """
        text = _well_formed(text)
        if parse_special:
            ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        else:
            ids = self._plain.encode(text)
        return [*self._parts.prefix_ids, *ids, *self._parts.suffix_ids] if add_special_tokens else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def id_to_token(self, token_id: int) -> str | None:
        """The vocabulary's own spelling of a token, None for an id that it does not have."""
        token: str | None = self._backend.id_to_token(token_id)
        return token

    def token_text(self, token_id: int) -> str:
        """The text that a token adds in the middle of other text, special tokens included."""
        text = self._token_texts.get(token_id)
        if text is None:
            # Some decoders drop a leading space, which belongs to the token: decode behind another one.
            anchor, anchor_text = self._anchor
            text = self.decode([*anchor, token_id], skip_special_tokens=False)[len(anchor_text) :]
            self._token_texts[token_id] = text
        return text

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True,
        tools: list[dict[str, Any]] | None = None, chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:  # fmt: skip
        """Token ids of a conversation. Text of the request that spells special tokens is encoded as text.

        Raises: InvalidRequest for malformed messages, a refusing template, or a model without one.
        """
        messages = normalize_messages(messages)
        template = self._template
        mark = new_mark()
        messages, tools, options = self._guard.apply([messages, tools, dict(chat_template_kwargs or {})], mark)
        try:
            text = template.render(messages, tools=tools, add_generation_prompt=add_generation_prompt, options=options)
        except InvalidRequest as e:
            raise InvalidRequest(str(e).replace(mark, ""), e.param) from e
        if mark not in text:
            return self.encode(text, add_special_tokens=False)
        # Only the special tokens without a mark are real.
        text = _well_formed(text)
        if self._guard.pattern is not None:
            text = self._guard.pattern.sub(lambda m: self._plain.stand_ins[m.group()], text)
        return self._plain.encode(text.replace(mark, ""))

    @cached_property
    def _template(self) -> ChatTemplate:
        """Raises InvalidRequest where there is none that works."""
        if not self._parts.chat_templates:
            raise InvalidRequest(
                "This model has no chat template. Use completions instead of chat, or start with --chat-template FILE.",
                "messages",
            )
        try:
            return ChatTemplate(self._parts.chat_templates, self._parts.special_tokens)
        except jinja2.TemplateError as e:
            raise InvalidRequest(
                f"The model's chat template is not valid: {e}. Replace it with --chat-template FILE.", "messages"
            ) from e

    @cached_property
    def _guard(self) -> Guard:
        return Guard(self._special)

    @cached_property
    def _plain(self) -> _PlainEncoder:
        return _PlainEncoder(self._backend)

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        ids = self.encode("a", add_special_tokens=False)
        return ids, self.decode(ids, skip_special_tokens=False)


class _PlainEncoder:
    """A second tokenizer over the same vocabulary that knows no special tokens, only stand-ins for them.

    A stand-in is a random text, so only our own code can write it. It is an added token with the flags of the special
    token that it stands for, so the text around it is treated exactly as around the original.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = Backend(backend.model)
        if backend.normalizer is not None:
            self._backend.normalizer = backend.normalizer
        if backend.pre_tokenizer is not None:
            self._backend.pre_tokenizer = backend.pre_tokenizer
        nonce = new_mark()
        self.stand_ins: dict[str, str] = {}
        self._real_ids: dict[int, int] = {}
        tokens: dict[str, tuple[AddedToken, int]] = {}
        for token_id, token in sorted(backend.get_added_tokens_decoder().items()):
            content: str = token.content
            if token.special:
                self.stand_ins[token.content] = content = f"{nonce}{token_id}\ue001"
            flags = {name: getattr(token, name) for name in ("single_word", "lstrip", "rstrip", "normalized")}
            tokens[content] = (AddedToken(content, special=False, **flags), token_id)
        self._backend.add_tokens([token for token, _ in tokens.values()])
        for content, (_, token_id) in tokens.items():
            stand_in_id: int | None = self._backend.token_to_id(content)
            if stand_in_id is not None:
                self._real_ids[stand_in_id] = token_id

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._backend.encode(text, add_special_tokens=False).ids
        return [self._real_ids.get(i, i) for i in ids]


_SURROGATE = re.compile("[\ud800-\udfff]")


def _well_formed(text: str) -> str:
    """Text that has a UTF-8 form: JSON can spell lone surrogates, which have none."""
    return _SURROGATE.sub("\ufffd", text) if not text.isascii() else text

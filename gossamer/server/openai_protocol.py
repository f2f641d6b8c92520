"""The requests of OpenAI's API, with vLLM's extensions, as types that are decoded strictly.

Every field of that API is known here. One that Gossamer does not implement is accepted only with its neutral value,
so that nothing a client asks for is silently ignored.
"""

import dataclasses
import difflib
import re
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import msgspec
from msgspec import UNSET, Raw, UnsetType

from gossamer.core import InvalidRequest, SamplingParams
from gossamer.server.errors import ApiError

MAX_SEQUENCES = 256
"""Most continuations of one HTTP request: prompts times n."""
MAX_CACHE_SALT = 128
MAX_NEUTRAL_BYTES = 256
_SAMPLING_FIELDS = frozenset(item.name for item in dataclasses.fields(SamplingParams))

T = TypeVar("T")
Q = TypeVar("Q", bound="_Request")

TemplateOptions = Annotated[dict[str, str | int | float | bool | None], msgspec.Meta(max_length=32)]
"""Variables of a chat template, such as enable_thinking. Scalars: a template may loop over anything else."""

_COMMON_NEUTRAL: dict[str, tuple[bytes, ...]] = {
    "priority": (b"0",),
    "bad_words": (b"[]",),
    "response_format": (b'{"type":"text"}',),
    "logits_processors": (b"[]",),
    "vllm_xargs": (b"{}",),
    "use_beam_search": (b"false",),
    "length_penalty": (b"1", b"1.0"),
    "spaces_between_special_tokens": (b"true",),
    "return_tokens_as_token_ids": (b"false",),
    **dict.fromkeys(("request_id", "structured_outputs", "kv_transfer_params", "truncate_prompt_tokens"), ()),
    **dict.fromkeys(("guided_json", "guided_regex", "guided_choice", "guided_grammar"), ()),
}


class _Request(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    neutral: ClassVar[dict[str, tuple[bytes, ...]]] = {}
    """Fields that are known but not implemented -> the JSON values, besides null, that ask for nothing."""

    def check(self) -> None:
        """Raises InvalidRequest for fields that are not implemented or contradict each other."""
        for name, values in self.neutral.items():
            if not _is_neutral(getattr(self, name, UNSET), values):
                raise InvalidRequest(f"{name} is not supported. Leave it out.", name, "unsupported_parameter")


def decoder_of(kind: type[Q]) -> msgspec.json.Decoder[Q]:
    """A decoder of a request type that knows its `neutral` fields, too."""
    fields = [(name, Raw | UnsetType, UNSET) for name in kind.neutral]
    return msgspec.json.Decoder(msgspec.defstruct(kind.__name__, fields, bases=(kind,), kw_only=True))


class StreamOptions(msgspec.Struct, forbid_unknown_fields=True):
    include_usage: bool = False
    include_obfuscation: bool = False
    continuous_usage_stats: bool = False


class GenerationRequest(_Request, kw_only=True):
    """What completions and chat completions share. None means the default, which may be the model's."""

    neutral = _COMMON_NEUTRAL
    model: str | None = None
    n: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[int, float] | None = None
    # vLLM's extensions
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    min_tokens: int | None = None
    ignore_eos: bool = False
    stop_token_ids: list[int] | None = None
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    allowed_token_ids: list[int] | None = None
    prompt_logprobs: int | None = None
    add_special_tokens: bool | None = None
    return_token_ids: bool | None = None
    cache_salt: str | None = None
    # Inert: they ask nothing of the answer.
    user: str | None = None
    metadata: Raw | UnsetType = UNSET
    store: bool | None = None

    def _sampling(self, defaults: SamplingParams, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        names = _SAMPLING_FIELDS.intersection(self.__struct_fields__)
        own = {name: value for name in names if (value := getattr(self, name)) is not None}
        return dataclasses.replace(defaults, **own | {"max_tokens": max_tokens, "logprobs": logprobs})

    def check(self) -> None:
        super().check()
        if self.stream_options is not None:
            if not self.stream:
                raise InvalidRequest("stream_options needs stream: true.", "stream_options")
            for name in ("include_obfuscation", "continuous_usage_stats"):
                if getattr(self.stream_options, name):
                    raise InvalidRequest(f"stream_options.{name} is not supported.", f"stream_options.{name}")
        salt = self.cache_salt
        if salt is not None and not (0 < len(salt) <= MAX_CACHE_SALT and salt.isascii() and salt.isprintable()):
            raise InvalidRequest(f"cache_salt must be 1 to {MAX_CACHE_SALT} printable ASCII characters.", "cache_salt")

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class CompletionRequest(GenerationRequest, kw_only=True):
    """POST /v1/completions. `parse_special_tokens` lets the prompt's text spell special tokens: ours."""

    neutral = _COMMON_NEUTRAL | {"best_of": (b"1",), "suffix": (b'""',), "prompt_embeds": ()}
    prompt: str | list[str | int | list[int]]
    logprobs: int | None = None
    echo: bool | None = None
    parse_special_tokens: bool = False

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        return self._sampling(defaults, 16 if self.max_tokens is None else self.max_tokens, self.logprobs)

    def check(self) -> None:
        super().check()
        if self.echo and self.stream and self.logprobs is not None and (self.n or 1) > 1:
            # The prompt is scored once, with the first sample; the others may stream before.
            raise InvalidRequest("echo with logprobs and n > 1 cannot be streamed.", "echo")

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one entry each. Raises InvalidRequest if they are empty, mixed or too many."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        kinds = {type(item) for item in prompt}
        if len(kinds) != 1:
            what = "mixes text and token ids" if kinds else "is empty"
            raise InvalidRequest(f"prompt {what}. Give a string, strings, token ids, or lists of token ids.", "prompt")
        if kinds == {int}:
            return [[item for item in prompt if isinstance(item, int)]]
        if len(prompt) * (self.n or 1) > MAX_SEQUENCES:
            raise InvalidRequest(
                f"{len(prompt)} prompts with n={self.n or 1} are more than {MAX_SEQUENCES} sequences; "
                "send several requests.",
                "prompt",
            )
        return [item for item in prompt if not isinstance(item, int)]


class ContentPart(msgspec.Struct, forbid_unknown_fields=True):
    type: Literal["text"]
    text: str


class ChatMessage(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    # What a client sends back from an earlier answer; other values than null need tools or audio.
    refusal: None = None
    tool_calls: list[None] | None = None
    function_call: None = None
    audio: None = None
    annotations: Raw | UnsetType = UNSET
    reasoning: None = None
    reasoning_content: None = None

    def as_template_input(self) -> dict[str, Any]:
        """What the chat template sees. `developer` is OpenAI's new word for `system`; templates know the old one."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        message = {"role": "system" if self.role == "developer" else self.role, "content": content or ""}
        if self.name is not None:
            message["name"] = self.name
        return message


class ChatRequest(GenerationRequest, kw_only=True):
    """POST /v1/chat/completions."""

    neutral = _COMMON_NEUTRAL | {
        "tools": (b"[]",),
        "tool_choice": (b'"none"', b'"auto"'),
        "functions": (b"[]",),
        "function_call": (b'"none"', b'"auto"'),
        "modalities": (b'["text"]',),
        "reasoning_effort": (b'"none"',),
        "include_reasoning": (b"true",),
        "verbosity": (b'"medium"',),
        "service_tier": (b'"auto"', b'"default"'),
        "echo": (b"false",),
        "continue_final_message": (b"false",),
        "documents": (b"[]",),
        "mm_processor_kwargs": (b"{}",),
        **dict.fromkeys(("audio", "prediction", "moderation", "web_search_options", "chat_template"), ()),
    }
    messages: list[ChatMessage]
    logprobs: bool | None = None
    top_logprobs: int | None = None
    max_completion_tokens: int | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: TemplateOptions | None = None
    # Inert: hints to OpenAI's own infrastructure.
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_options: Raw | UnsetType = UNSET
    prompt_cache_retention: Raw | UnsetType = UNSET

    def sampling(self, defaults: SamplingParams) -> SamplingParams:
        max_tokens = self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        return self._sampling(defaults, max_tokens, (self.top_logprobs or 0) if self.logprobs else None)

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs: true.", "top_logprobs")
        if not self.messages:
            raise InvalidRequest("messages is empty: give at least one message.", "messages")
        for i, message in enumerate(self.messages):
            if message.content is None and message.role != "assistant":
                raise InvalidRequest("A message needs content.", f"messages[{i}].content")


class TokenizeRequest(_Request, kw_only=True):
    """POST /tokenize: of a prompt or of a conversation."""

    neutral = {"continue_final_message": (b"false",), "chat_template": (), "tools": (b"[]",)}
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    parse_special_tokens: bool = False
    return_token_strs: bool | None = None
    chat_template_kwargs: TemplateOptions | None = None

    def check(self) -> None:
        super().check()
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequest("Give either prompt or messages.", "prompt")


class DetokenizeRequest(_Request, kw_only=True):
    """POST /detokenize."""

    tokens: list[int]
    model: str | None = None


def _is_neutral(value: object, neutral: tuple[bytes, ...]) -> bool:
    if not isinstance(value, Raw):
        return True
    raw = bytes(value)
    if raw == b"null":
        return True
    try:
        return len(raw) <= MAX_NEUTRAL_BYTES and msgspec.json.encode(msgspec.json.decode(raw)) in neutral
    except (msgspec.DecodeError, UnicodeDecodeError):
        # A Raw field's numbers and text were not looked at when the body was decoded.
        return False


_PATH = re.compile(r"`\$\.?([^`]*)`$")
_FIELD = re.compile(r"field `([^`]{1,64})")


def decode_body(body: bytes, decoder: msgspec.json.Decoder[T]) -> T:
    """Decodes a JSON body. Raises ApiError 400, with the name of the field at fault where there is one."""
    try:
        return decoder.decode(body)
    except msgspec.ValidationError as exc:
        text = str(exc)
        path, named = _PATH.search(text), _FIELD.search(text)
        parts = [path.group(1) if path else "", named.group(1) if named else ""]
        param = ".".join(part for part in parts if part) or None
        known = getattr(decoder.type, "__struct_fields__", ())
        near = difflib.get_close_matches(named.group(1), known, n=1) if named and "unknown" in text and not path else ()
        hint = f" Did you mean `{near[0]}`?" if near else ""
        raise ApiError(400, f"Invalid request: {text[:500]}.{hint}", param=param) from None
    except (msgspec.DecodeError, UnicodeDecodeError) as exc:
        raise ApiError(400, f"The body is not valid JSON: {str(exc)[:200]}.", code="invalid_json") from None
    except RecursionError:
        raise ApiError(400, "The body's JSON is nested too deeply.", code="invalid_json") from None

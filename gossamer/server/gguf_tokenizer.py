"""Builds a tokenizer from a GGUF file's metadata, so that a model in one file needs nothing beside it.

Two kinds exist: byte-level BPE (`gpt2`), whose pre-tokeniser the file only names, and SentencePiece BPE (`llama`),
whose merges follow from the scores of its pieces. Ids equal llama.cpp's; the tests compare them.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from gossamer.core import StartupError
from gossamer.models.gguf_file import read_gguf
from gossamer.server.tokenizer_files import TokenizerParts

_UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 2, 3, 4, 5, 6

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{%s}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEEPSEEK3 = (
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")


@dataclass(frozen=True, slots=True)
class _Pre:
    """A pre-tokeniser that `tokenizer.ggml.pre` can name: expressions applied one after the other, each splitting
    what the last left into matches and the text between them."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_LLAMA3 = _Pre((_CL100K % "1,3",), ignore_merges=True, add_bos=True)
_CL100K_PLAIN = _Pre((_CL100K % "1,3",))
_QWEN2 = _Pre((_CL100K % "1",))
_DIGITS = _Pre((r"\p{N}", _GPT2))
_PLAIN = _Pre((_GPT2,))

PRE_TOKENIZERS: dict[str, _Pre] = {
    "default": _Pre(_DEFAULT),
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "exaone4"), _PLAIN),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"), _DIGITS),
    **dict.fromkeys(("llama3", "llama-v3", "llama-bpe", "falcon3", "pixtral"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe", "glm4", "chatglm-bpe"), _CL100K_PLAIN),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2", "hunyuan", "grok-2"), _QWEN2),
    "deepseek-v3": _Pre(_DEEPSEEK3),
    "tekken": _Pre((_TEKKEN,), ignore_merges=True, add_bos=True),
}


def read_gguf_tokenizer(path: Path) -> TokenizerParts:
    """Raises StartupError, naming what is missing or unsupported."""
    return tokenizer_from_metadata(read_gguf(path).metadata, path)


def tokenizer_from_metadata(metadata: dict[str, Any], path: Path) -> TokenizerParts:
    get = _Metadata(metadata, path)
    kind = get("model", str)
    tokens = [text or f"[EMPTY_{i}]" for i, text in enumerate(get("tokens", list))]
    types = get("token_type", list, [1] * len(tokens))
    vocab = {text: i for i, text in enumerate(tokens)}
    if len(vocab) != len(tokens) or len(types) != len(tokens):
        raise get.error("its token lists are inconsistent (duplicates or different lengths). Download it again.")
    if kind == "gpt2":
        backend, add_bos = _byte_level(get, vocab)
    elif kind == "llama":
        backend, add_bos = _sentencepiece(get, tokens, types, vocab), True
    else:
        raise get.error(
            f"its tokenizer is of kind {kind!r}; gpt2 and llama are supported.\n"
            "Name a folder with the model's tokenizer.json with --tokenizer."
        )
    special = [t for t, kind in zip(tokens, types, strict=True) if kind in (_CONTROL, _UNKNOWN)]
    user = [t for t, kind in zip(tokens, types, strict=True) if kind == _USER_DEFINED]
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in special])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t in user])
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: get.special_id(key, len(tokens)) for name, key in names.items()}
    bos, end = ids["bos_token"], ids["eos_token"]
    return TokenizerParts(
        backend=backend,
        prefix_ids=[bos] if bos is not None and get("add_bos_token", bool, add_bos) else [],
        suffix_ids=[end] if end is not None and get("add_eos_token", bool, False) else [],
        bos_token_id=bos,
        special_tokens={name: tokens[i] for name, i in ids.items() if i is not None},
        chat_templates=_chat_templates(metadata),
    )


class _Metadata:
    """Typed access to the `tokenizer.ggml.*` keys."""

    def __init__(self, metadata: dict[str, Any], path: Path) -> None:
        self._metadata = metadata
        self._path = path

    def __call__(self, key: str, kind: type, default: Any = None) -> Any:
        value = self._metadata.get(f"tokenizer.ggml.{key}", default)
        if value is None:
            raise self.error(f"it has no tokenizer.ggml.{key}.\nName a tokenizer with --tokenizer.")
        if type(value) is not kind:
            raise self.error(f"its tokenizer.ggml.{key} is not of type {kind.__name__}.")
        return value

    def special_id(self, key: str, num_tokens: int) -> int | None:
        value = self._metadata.get(f"tokenizer.ggml.{key}_token_id")
        return value if type(value) is int and 0 <= value < num_tokens else None

    def error(self, message: str) -> StartupError:
        return StartupError(f"Cannot build a tokenizer from {self._path}: {message}")


def _byte_level(get: _Metadata, vocab: dict[str, int]) -> tuple[Backend, bool]:
    name = get("pre", str, "default")
    pre = PRE_TOKENIZERS.get(name)
    if pre is None:
        raise get.error(
            f"its pre-tokeniser {name!r} is not known here; supported: {', '.join(sorted(PRE_TOKENIZERS))}.\n"
            "Name a folder with the model's tokenizer.json with --tokenizer."
        )
    merges = [tuple(merge.split(" ", 1)) for merge in get("merges", list)]
    try:
        backend = Backend(models.BPE(vocab, merges, ignore_merges=pre.ignore_merges))
    except Exception as e:  # the Rust side raises plain Exception
        raise get.error(f"{e}.") from e
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    backend.decoder = decoders.ByteLevel()
    return backend, pre.add_bos


def _sentencepiece(get: _Metadata, tokens: list[str], types: list[int], vocab: dict[str, int]) -> Backend:
    scores = get("scores", list)
    # Control and byte tokens take no part in merging, or plain text that spells one would turn into it.
    pieces = {text for text, kind in zip(tokens, types, strict=True) if kind not in (_UNKNOWN, _CONTROL, _BYTE)}
    merges = [
        (-scores[vocab[text]], len(text[:cut]), text[:cut], text[cut:])
        for text in pieces
        for cut in range(1, len(text))
        if text[:cut] in pieces and text[cut:] in pieces
    ]
    merges.sort()
    unknown = next((t for t, kind in zip(tokens, types, strict=True) if kind == _UNKNOWN), None)
    backend = Backend(
        models.BPE(
            vocab,
            [(left, right) for _, _, left, right in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=_BYTE in types,
        )
    )
    prefix = get("add_space_prefix", bool, True)
    spaces = normalizers.Replace(" ", "▁")
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _chat_templates(metadata: dict[str, Any]) -> dict[str, str]:
    named = {"default": metadata.get("tokenizer.chat_template")}
    for name in metadata.get("tokenizer.chat_templates") or ():
        named[name] = metadata.get(f"tokenizer.chat_template.{name}")
    return {name: source for name, source in named.items() if isinstance(source, str)}

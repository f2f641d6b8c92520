"""Reads a tokenizer from a Hugging Face folder.

What a checkpoint says about its tokenizer is spread over five files of several generations; the result is one
`TokenizerParts`, the same that a GGUF file's metadata yields.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from gossamer.core import StartupError
from gossamer.models.hf_folder import read_json

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


@dataclass(slots=True)
class TokenizerParts:
    """A tokenizer backend and what the checkpoint says about using it.

    `prefix_ids` and `suffix_ids` are what `add_special_tokens` puts around a text. `special_tokens` maps names that
    chat templates use (bos_token, ...) to texts. `chat_templates` maps names to Jinja sources.
    """

    backend: Backend
    prefix_ids: list[int] = field(default_factory=list)
    suffix_ids: list[int] = field(default_factory=list)
    bos_token_id: int | None = None
    special_tokens: dict[str, str] = field(default_factory=dict)
    chat_templates: dict[str, str] = field(default_factory=dict)


def read_hf_tokenizer(folder: Path) -> TokenizerParts:
    """Raises StartupError if the folder has no usable tokenizer.json."""
    file = folder / "tokenizer.json"
    if not file.is_file():
        found = sorted(p.name for p in folder.iterdir() if "token" in p.name or p.suffix == ".gguf")
        raise StartupError(
            f"{folder} has no tokenizer.json (found: {', '.join(found) or 'no tokenizer at all'}).\n"
            "Save the model with a fast tokenizer (transformers: AutoTokenizer ... save_pretrained), or name a folder "
            "that has one with --tokenizer."
        )
    try:
        backend = Backend.from_file(str(file))
    except Exception as e:  # the Rust side raises plain Exception
        raise StartupError(f"{file} is not a tokenizer this version can read: {e}.") from e
    backend.no_padding()
    backend.no_truncation()
    config = _read_json(folder / "tokenizer_config.json")
    _add_missing_tokens(backend, config, file)
    special = _special_tokens(config, _read_json(folder / "special_tokens_map.json"))
    ids = {name: backend.token_to_id(text) for name, text in special.items()}
    prefix, suffix = _surroundings(backend, config, ids)
    return TokenizerParts(
        backend=backend, prefix_ids=prefix, suffix_ids=suffix, bos_token_id=ids.get("bos_token"),
        special_tokens=special, chat_templates=_chat_templates(folder, config),
    )  # fmt: skip


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, empty if there is no such file."""
    return read_json(path) if path.is_file() else {}


def _add_missing_tokens(backend: Backend, config: dict[str, Any], file: Path) -> None:
    """Older checkpoints list added tokens in tokenizer_config.json alone."""
    listed = config.get("added_tokens_decoder") or {}
    try:
        tokens = sorted((int(key), str(entry["content"]), entry) for key, entry in listed.items())
    except (AttributeError, LookupError, TypeError, ValueError) as e:
        raise StartupError(f"The added_tokens_decoder beside {file} is damaged: {e!r}. Download it again.") from e
    for token_id, text, entry in tokens:
        if backend.id_to_token(token_id) is not None:
            continue
        flags = {n: bool(entry.get(n, False)) for n in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        backend.add_tokens([AddedToken(text, **flags)])
        if backend.token_to_id(text) != token_id:
            raise StartupError(
                f"tokenizer_config.json gives the token {text!r} the id {token_id}, but {file} would give it "
                f"{backend.token_to_id(text)}: the files do not belong together. Download them again."
            )


def _special_tokens(config: dict[str, Any], token_map: dict[str, Any]) -> dict[str, str]:
    special: dict[str, str] = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name, token_map.get(name))
        text = value.get("content") if isinstance(value, dict) else value
        if isinstance(text, str):
            special[name] = text
    return special


def _surroundings(backend: Backend, config: dict[str, Any], ids: dict[str, int | None]) -> tuple[list[int], list[int]]:
    """The ids that the post-processor puts before and after a text; explicit flags in the config override it."""
    plain = backend.encode("a", add_special_tokens=False).ids
    full = backend.encode("a", add_special_tokens=True).ids
    start = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), 0)
    prefix, suffix = full[:start], full[start + len(plain) :]
    bos, eos = ids.get("bos_token"), ids.get("eos_token")
    if isinstance(config.get("add_bos_token"), bool) and bos is not None:
        prefix = [bos] if config["add_bos_token"] else [i for i in prefix if i != bos]
    if isinstance(config.get("add_eos_token"), bool) and eos is not None:
        suffix = [eos] if config["add_eos_token"] else [i for i in suffix if i != eos]
    return prefix, suffix


def _chat_templates(folder: Path, config: dict[str, Any]) -> dict[str, str]:
    """By name; a file of its own wins over the entry in tokenizer_config.json, which is a string or a list."""
    entry = config.get("chat_template")
    templates: dict[str, str] = {}
    if isinstance(entry, str):
        templates["default"] = entry
    elif isinstance(entry, list):
        templates = {t["name"]: t["template"] for t in entry if isinstance(t, dict) and "name" in t and "template" in t}
    file = folder / "chat_template.jinja"
    if file.is_file():
        templates["default"] = file.read_text(encoding="utf-8")
    elif not templates:
        legacy = _read_json(folder / "chat_template.json").get("chat_template")
        if isinstance(legacy, str):
            templates["default"] = legacy
    return templates

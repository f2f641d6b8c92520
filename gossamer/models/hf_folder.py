"""A Hugging Face model folder: its JSON files and the headers of its safetensors shards, without torch.

A folder comes from outside, so everything in it is checked before use; pickled weights are never opened.
"""

import dataclasses
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from gossamer.config import LoadConfig
from gossamer.core import InvalidRequest, RequestLimits, SamplingParams, StartupError
from gossamer.models.shapes import Shape

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_JSON_BYTES = 64 << 20
RECOMMENDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True, slots=True)
class SafetensorsHeaders:
    """Where each tensor of a checkpoint lies, its shape and its safetensors dtype (`F32`, `BF16`, ...)."""

    files: Mapping[str, Path] = field(repr=False)
    shapes: Mapping[str, Shape] = field(repr=False)
    dtypes: Mapping[str, str] = field(repr=False)


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; StartupError if it is unreadable, too large, not JSON or not an object."""
    try:
        size = path.stat().st_size
        if size > MAX_JSON_BYTES:
            raise StartupError(f"{path} has {size} bytes; a JSON file of a model has at most {MAX_JSON_BYTES}.")
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise StartupError(f"Cannot read {path}: {e.strerror or e}.") from e
    except (ValueError, RecursionError) as e:
        raise StartupError(f"{path} is not valid JSON: {e}.\nDownload it again.") from e
    if not isinstance(value, dict):
        raise StartupError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


def default_sampling(load: LoadConfig) -> SamplingParams:
    """What a request that leaves a parameter open gets: the recommendation in the model's generation_config.json, or
    SamplingParams' own default. `load.model` is a local path."""
    path = Path(load.model) / "generation_config.json"
    if load.generation_config == "none" or not path.is_file():
        return SamplingParams()
    published = read_json(path)
    params = SamplingParams(**{name: published[name] for name in RECOMMENDED if published.get(name) is not None})
    try:
        RequestLimits(vocab_size=1, max_model_len=1).check_params(dataclasses.replace(params, max_tokens=None))
    except InvalidRequest as e:
        raise StartupError(f"{path}: {e}\nCorrect it, or start with --generation-config none.") from e
    return params


def tokenizer_end(folder: Path) -> tuple[int, ...]:
    """The id of the tokenizer's own eos_token, which config.json need not name; () if there is none."""
    files = [folder / name for name in ("tokenizer_config.json", "tokenizer.json")]
    if not all(file.is_file() for file in files):
        return ()
    config = read_json(files[0])
    token = config.get("eos_token")
    text = token.get("content") if isinstance(token, dict) else token
    listed = config.get("added_tokens_decoder")
    if not isinstance(listed, dict):
        added = read_json(files[1]).get("added_tokens") or ()
        listed = {entry.get("id"): entry for entry in added if isinstance(entry, dict)}
    named = [key for key, entry in listed.items() if isinstance(entry, dict) and entry.get("content") == text]
    return tuple(int(key) for key in named if text is not None and str(key).isdecimal())


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, all present; StartupError says what is missing or half downloaded."""
    index = folder / INDEX_NAME
    if index.exists():
        return _indexed_files(folder, index)
    if (folder / SINGLE_NAME).exists():
        return [folder / SINGLE_NAME]
    others = [p for p in sorted(folder.glob("*.safetensors")) if not p.name.startswith(("consolidated", "adapter_"))]
    files = [p for p in others if p.exists()]  # a link into the hub's cache may be broken
    if files and not any("-of-" in p.name for p in files):
        return files
    if files:
        raise StartupError(
            f"{folder} has shards ({files[0].name}, ...) but no {INDEX_NAME}: is it half downloaded?\n"
            "Download the model again."
        )
    pickled = next((p.name for pattern in PICKLED for p in sorted(folder.glob(pattern))), None)
    if pickled is not None:
        raise StartupError(
            f"{folder} has weights only as {pickled}: pickled files can run code and are never loaded.\n"
            "Convert the model to safetensors."
        )
    raise StartupError(
        f"{folder} has no weights: looked for {INDEX_NAME}, {SINGLE_NAME} and *.safetensors."
        f"{_incomplete_hint(folder)}\n"
        "Use --load-format dummy to run with random weights."
    )


def _indexed_files(folder: Path, index: Path) -> list[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise StartupError(f"{index} has no weight_map.\nDownload it again.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise StartupError(f"{index} names the shard {name[:80]!r}, which is not a safetensors file beside it.")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        raise StartupError(
            f"{folder} is half downloaded: {len(missing)} of {len(names)} shards are missing, the first is "
            f"{missing[0]}.{_incomplete_hint(folder)}\nFinish the download."
        )
    return [folder / name for name in names]


def _incomplete_hint(folder: Path) -> str:
    """Downloads in progress leave `*.incomplete` beside the files, or in the blobs folder of the hub's cache."""
    for place in (folder, folder / ".cache" / "huggingface" / "download", folder.parent.parent / "blobs"):
        if place.is_dir() and any(place.glob("*.incomplete")):
            return f" {place} has unfinished downloads (*.incomplete)."
    return ""


def read_headers(files: Iterable[Path]) -> SafetensorsHeaders:
    """Reads the headers of all shards. A truncated or damaged one, or a tensor in two of them, is a StartupError."""
    where, shapes, dtypes = dict[str, Path](), dict[str, Shape](), dict[str, str]()
    for path in files:
        try:
            with path.open("rb") as f:
                if f.read(23) == b"version https://git-lfs":
                    what = "is a Git LFS pointer, not the file itself"
                    raise StartupError(f"{path} {what}.\nRun `git lfs pull` in its folder.")
            with safe_open(path, framework="numpy") as shard:
                names: list[str] = shard.keys()
                for name in names:
                    if name in where:
                        raise StartupError(f"The tensor {name} is in both {where[name].name} and {path.name}.")
                    view = shard.get_slice(name)
                    where[name], shapes[name], dtypes[name] = path, tuple(view.get_shape()), view.get_dtype()
        except (SafetensorError, OSError) as e:
            raise StartupError(
                f"{path} is truncated or damaged: {e}.\n"
                f"It has {path.stat().st_size} bytes; compare with the published size and download it again."
            ) from e
    return SafetensorsHeaders(where, shapes, dtypes)

"""Finds a model: a local folder or file, a model id in the Hugging Face cache, or the hub where it can be reached."""

import dataclasses
import os
import re
from pathlib import Path

from gossamer.config import LoadConfig
from gossamer.core import StartupError
from gossamer.models.hf_folder import weight_files

DEFAULT_HUB_CACHE = Path("~/.cache/huggingface/hub")
_MODEL_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}(/[A-Za-z0-9][\w.-]{0,95})?")
_LATER_PART = re.compile(r"-(?!00001)\d{5}-of-\d{5}\.gguf$")
# No pickles, no formats that are not read: a repository may hold several copies of its weights.
_WANTED_METADATA = ["*.json", "*.jinja", "tokenizer.model"]
_WANTED_WEIGHTS = ["*.safetensors"]
_UNWANTED = ["consolidated*", "*/*"]


def resolve_paths(load: LoadConfig) -> LoadConfig:
    """`load` with local paths for the model and the tokenizer. Raises StartupError that says where it looked."""
    model = str(resolve_model(load.model, load.download_dir, load.load_format))
    tokenizer = load.tokenizer
    if tokenizer is not None:
        path = Path(tokenizer).expanduser()
        try:
            # A local folder needs no config.json beside its tokenizer.
            path = path if os.path.exists(path) else resolve_model(tokenizer, load.download_dir, "dummy")
        except StartupError as e:
            raise StartupError(str(e).replace("The model", "--tokenizer:", 1)) from e
        tokenizer = str(path)
    return dataclasses.replace(load, model=model, tokenizer=tokenizer)


def resolve_model(model: str, hub_cache: str | Path | None = None, load_format: str = "auto") -> Path:
    """The folder or .gguf file that `model` names. With load_format "dummy", a folder without weights will do.

    Order: an existing path; a complete snapshot in `hub_cache` (default ~/.cache/huggingface/hub); a download into it.
    Raises StartupError that says where it looked.
    """
    if not model:
        raise StartupError("No model given.\nName a folder, a .gguf file, or a hub id such as Qwen/Qwen3-0.6B.")
    path = Path(model).expanduser()
    if os.path.exists(path):  # Path.exists raises for a name that is too long
        return _local(path, load_format)
    if model.startswith(("/", ".", "~")) or model.endswith(".gguf") or not _MODEL_ID.fullmatch(model):
        where = str(path.absolute())[:300]
        raise StartupError(f"The model {model[:200]!r} does not exist: no such file or folder ({where}).")
    cache = Path(hub_cache or DEFAULT_HUB_CACHE).expanduser()
    snapshot, problem = _cached(model, cache, load_format)
    return _local(snapshot or _download(model, cache, problem, load_format), load_format)


def _local(path: Path, load_format: str) -> Path:
    if path.is_file():
        if path.suffix != ".gguf":
            raise StartupError(f"{path} is a file, but not a .gguf file.\nGive the folder that holds the model.")
        return path
    # Of a split model the first part stands for all.
    files = [p for p in sorted(path.glob("*.gguf")) if not _LATER_PART.search(p.name)]
    has_config = (path / "config.json").exists()
    only_gguf = load_format == "auto" and bool(files) and not any(path.glob("*.safetensors*"))
    if has_config and load_format != "gguf" and not only_gguf:
        return path
    if len(files) == 1:
        return files[0]
    if files:
        names = ", ".join(p.name for p in files[:5])
        raise StartupError(f"{path} has {len(files)} GGUF models.\nGive the path of one of them: {names}.")
    looked_for = "a .gguf file" if load_format == "gguf" else "config.json or a .gguf file"
    raise StartupError(f"{path} is not a model folder: looked for {looked_for}.")


def _cached(model: str, cache: Path, load_format: str) -> tuple[Path | None, str]:
    """The snapshot of a model id and "", or None and why there is none."""
    repository = cache / f"models--{model.replace('/', '--')}"
    try:
        revision = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None, f"it is not in the cache {cache}"
    snapshot = repository / "snapshots" / revision
    if Path(revision).name != revision or not (snapshot / "config.json").exists():
        return None, f"the cache {cache} has no config.json of it"
    if load_format != "dummy":
        try:
            weight_files(snapshot)
        except StartupError as e:
            return None, str(e).splitlines()[0].rstrip(".")
    return snapshot, ""


def _download(model: str, cache: Path, problem: str, load_format: str) -> Path:
    """Downloads a snapshot with the hub's own progress bars."""
    try:
        # Takes half a second to import and is needed only here.
        from huggingface_hub import snapshot_download

        wanted = _WANTED_METADATA + ([] if load_format == "dummy" else _WANTED_WEIGHTS)
        return Path(snapshot_download(model, cache_dir=cache, allow_patterns=wanted, ignore_patterns=_UNWANTED))
    except Exception as e:  # whatever the hub's client raises, the user needs the same answer
        reason = str(e).strip().splitlines()
        raise StartupError(
            f"The model {model!r} is not a local path, {problem},\n"
            f"and the hub cannot provide it: {type(e).__name__}: {reason[0][:200] if reason else ''}\n"
            "Check the spelling and the network, or give a local folder or .gguf file."
        ) from e

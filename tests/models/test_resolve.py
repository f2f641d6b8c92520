from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest

from gossamer.config import LoadConfig
from gossamer.core import StartupError
from gossamer.models.resolve import resolve_model, resolve_paths
from gossamer.models.source import inspect_model

Checkpoint = Callable[[str], Path]


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> str:
        raise ConnectionError("Network is unreachable\nlong traceback")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)


def cached(checkpoint: Path, cache: Path, revision: str = "0123abc") -> Path:
    """A model as the hub's client lays it out."""
    repository = cache / "models--org--tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    return Path(shutil.copytree(checkpoint, repository / "snapshots" / revision))


def test_local_folder_and_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = checkpoint("llama")
    assert resolve_model(str(folder)) == folder
    (tmp_path / "a.gguf").touch()
    assert resolve_model(str(tmp_path)) == tmp_path / "a.gguf" == resolve_model(str(tmp_path / "a.gguf"))
    (tmp_path / "b.gguf").touch()
    with pytest.raises(StartupError, match=r"2 GGUF models[\s\S]*a.gguf, b.gguf"):
        resolve_model(str(tmp_path))


def test_home_is_expanded(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "model")
    assert resolve_model("~/model") == Path(folder)


def test_model_id_from_the_cache(checkpoint: Checkpoint, tmp_path: Path) -> None:
    snapshot = cached(checkpoint("llama"), tmp_path)
    assert resolve_model("org/tiny", tmp_path) == snapshot
    assert inspect_model(LoadConfig(model="org/tiny", download_dir=str(tmp_path))).config.family == "llama"


def test_half_downloaded_snapshot_says_so(checkpoint: Checkpoint, tmp_path: Path) -> None:
    snapshot = cached(checkpoint("llama"), tmp_path)
    (snapshot / "model.safetensors").unlink()
    with pytest.raises(StartupError, match=r"has no weights[\s\S]*Network is unreachable"):
        resolve_model("org/tiny", tmp_path)
    assert resolve_model("org/tiny", tmp_path, "dummy") == snapshot


def test_broken_links_of_the_cache_count_as_missing(checkpoint: Checkpoint, tmp_path: Path) -> None:
    snapshot = cached(checkpoint("llama"), tmp_path)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(tmp_path / "blobs" / "gone")
    with pytest.raises(StartupError, match="has no weights"):
        resolve_model("org/tiny", tmp_path)


def test_reference_that_leaves_the_cache_is_not_followed(checkpoint: Checkpoint, tmp_path: Path) -> None:
    cached(checkpoint("llama"), tmp_path)
    shutil.copytree(checkpoint("llama"), tmp_path / "elsewhere")
    (tmp_path / "models--org--tiny" / "refs" / "main").write_text("../../../elsewhere")
    with pytest.raises(StartupError, match="cache"):
        resolve_model("org/tiny", tmp_path)


def test_offline(tmp_path: Path) -> None:
    with pytest.raises(StartupError) as error:
        resolve_model("org/unknown", tmp_path)
    message = str(error.value)
    assert all(part in message for part in ("org/unknown", str(tmp_path), "Network is unreachable"))
    assert "traceback" not in message
    assert len(message.splitlines()) <= 5


def test_download(checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def download(model: str, **options: Any) -> str:
        asked.update(options, model=model)
        return str(cached(checkpoint("llama"), tmp_path))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert resolve_model("org/tiny", tmp_path).parent.name == "snapshots"
    assert asked["model"] == "org/tiny"
    assert asked["cache_dir"] == tmp_path
    assert not any(pattern.endswith((".bin", ".pt")) or pattern == "*" for pattern in asked["allow_patterns"])


@pytest.mark.parametrize(
    "model", ["./none", "/none", "~/none", "a/b/c", "x y", "none.gguf", "org/../x", "-x", "a" * 9000]
)
def test_what_cannot_be_an_id_is_a_missing_path(model: str, tmp_path: Path) -> None:
    with pytest.raises(StartupError) as error:
        resolve_model(model, tmp_path)
    assert "does not exist" in str(error.value)
    assert len(str(error.value)) < 1000


def test_no_model_given() -> None:
    with pytest.raises(StartupError, match="No model given"):
        resolve_model("")


def test_a_tokenizer_is_a_folder_a_file_or_a_hub_id(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder, snapshot = checkpoint("llama"), cached(checkpoint("qwen2"), tmp_path)

    def resolved(tokenizer: str | None) -> str | None:
        load = LoadConfig(model=str(folder), tokenizer=tokenizer, download_dir=str(tmp_path))
        assert resolve_paths(load).model == str(folder)
        return resolve_paths(load).tokenizer

    assert resolved(None) is None
    assert resolved(str(tmp_path)) == str(tmp_path)
    assert resolved("org/tiny") == str(snapshot)
    with pytest.raises(StartupError, match="--tokenizer: '/none' does not exist"):
        resolved("/none")
    with pytest.raises(StartupError, match=r"--tokenizer: 'org/other' is not a local path[\s\S]*unreachable"):
        resolved("org/other")

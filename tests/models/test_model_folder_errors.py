from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_checkpoints import save_checkpoint

from gossamer.config import LoadConfig
from gossamer.core import StartupError
from gossamer.models.loader import inspect_model, iter_weights

Checkpoint = Callable[[str], Path]
INDEX = "model.safetensors.index.json"


def refusal(folder: Path, **options: Any) -> str:
    load = LoadConfig(model=str(folder), **options)
    with pytest.raises(StartupError) as error:
        list(iter_weights(inspect_model(load), load))
    message = str(error.value)
    assert len(message.splitlines()) <= 5
    return message


@pytest.fixture
def folder(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "model"))


@pytest.fixture(scope="module")
def sharded_master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint("llama", tmp_path_factory.mktemp("sharded"), max_shard_size="100KB")


@pytest.fixture
def sharded(sharded_master: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded_master, tmp_path / "model"))


def edit_tensors(folder: Path, edit: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_missing_folder_says_where_it_looked(tmp_path: Path) -> None:
    message = refusal(tmp_path / "nowhere")
    assert "does not exist" in message
    assert str(tmp_path / "nowhere") in message


def test_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)


def test_a_file_that_is_no_model(folder: Path) -> None:
    assert "not a .gguf file" in refusal(folder / "config.json")


@pytest.mark.parametrize(
    "text", ["", "{", '{"a": 1', "[1, 2]", '"llama"', "null", "{'a': 1}", "\x00\x01", "[" * 100_000]
)
def test_invalid_json(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)
    assert str(folder / "config.json") in refusal(folder)


def test_json_that_is_not_utf8(folder: Path) -> None:
    (folder / "config.json").write_bytes(b'{"a": "\xff\xfe"}')
    assert "not valid JSON" in refusal(folder)


def test_unknown_architecture_lists_the_known(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["FooForCausalLM"]}))
    message = refusal(folder)
    assert "FooForCausalLM" in message
    assert "Qwen3MoeForCausalLM" in message
    assert str(folder) in message


def test_half_downloaded(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    shards[1].unlink()
    message = refusal(sharded)
    assert "half downloaded" in message
    assert f"1 of {len(shards)} shards" in message
    assert shards[1].name in message
    (sharded / "abc.incomplete").touch()
    assert ".incomplete" in refusal(sharded)


def test_shards_without_their_index(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    assert INDEX in refusal(sharded)


def test_no_weights_at_all(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    message = refusal(folder)
    assert "model.safetensors" in message
    assert "--load-format dummy" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.ckpt"])
def test_pickled_weights_are_never_opened(folder: Path, name: str) -> None:
    (folder / "model.safetensors").unlink()
    (folder / name).write_bytes(b"\x80\x04cposix\nsystem\n.")
    message = refusal(folder)
    assert name in message
    assert "safetensors" in message


def test_index_that_points_elsewhere(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    for bad in ("../../etc/model.safetensors", "/etc/passwd", "weights.bin"):
        index["weight_map"]["lm_head.weight"] = bad
        (sharded / INDEX).write_text(json.dumps(index))
        assert bad in refusal(sharded)
    for empty in ({}, {"weight_map": []}, {"weight_map": {}}):
        (sharded / INDEX).write_text(json.dumps(empty))
        assert "weight_map" in refusal(sharded)


@pytest.mark.parametrize("keep", [0, 4, 100, 5000, -1])
def test_truncated_shard(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    message = refusal(folder)
    assert str(path) in message
    assert "truncated" in message


def test_shard_that_cannot_be_read(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert str(folder / "model.safetensors") in refusal(folder)


def test_git_lfs_pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    assert "git lfs pull" in refusal(folder)


def test_wrong_shape_names_tensor_and_both_shapes(folder: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    edit_tensors(folder, lambda t: t.update({name: torch.zeros(95, 64)}))
    message = refusal(folder)
    assert name in message
    assert "[95, 64]" in message
    assert "[96, 64]" in message


def test_missing_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.__delitem__("model.layers.2.self_attn.k_proj.weight"))
    assert "model.layers.2.self_attn.k_proj.weight" in refusal(folder)


def test_many_missing_tensors_are_counted(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 5}))
    message = refusal(folder)
    assert "18 tensors" in message
    assert "and 15 more" in message


def test_unexpected_tensor(folder: Path) -> None:
    edit_tensors(folder, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}))
    assert "model.layers.0.self_attn.q_proj.bias" in refusal(folder)


def test_ignorable_tensors(folder: Path, checkpoint: Checkpoint) -> None:
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(8), "mtp.layers.0.x.weight": torch.zeros(1)}
    edit_tensors(folder, lambda t: t.update(extra))
    load = LoadConfig(model=str(folder))
    assert inspect_model(load).plan == inspect_model(LoadConfig(model=str(checkpoint("llama")))).plan


def test_tied_head_that_was_stored_anyway(checkpoint: Checkpoint, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(checkpoint("qwen3"), tmp_path / "model"))
    edit_tensors(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    load = LoadConfig(model=str(folder))
    assert "lm_head.weight" not in dict(iter_weights(inspect_model(load), load))


@pytest.mark.parametrize("dtype", [torch.float64, torch.int8, torch.float8_e4m3fn])
def test_unsupported_dtype(folder: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    edit_tensors(folder, lambda t: t.update({name: t[name].to(dtype)}))
    message = refusal(folder)
    assert name in message
    assert "dtype" in message


def test_tensor_in_two_shards(sharded: Path) -> None:
    shards = sorted(sharded.glob("*.safetensors"))
    tensors = load_file(shards[0]) | load_file(shards[1])
    save_file(tensors, shards[0])
    assert "both" in refusal(sharded)


def test_checkpoint_dtype_is_read_off_the_tensors_if_the_config_is_silent(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    del config["dtype"]
    (folder / "config.json").write_text(json.dumps(config))
    assert inspect_model(LoadConfig(model=str(folder))).config.dtype == "float32"


def test_broken_generation_config(folder: Path) -> None:
    (folder / "generation_config.json").write_text("{")
    assert "generation_config.json" in refusal(folder)
    (folder / "generation_config.json").write_text('{"eos_token_id": "x"}')
    assert "generation_config.json" in refusal(folder)


def test_single_file_under_another_name(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "weights.safetensors")
    assert inspect_model(LoadConfig(model=str(folder))).kind == "safetensors"

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import BASE

from gossamer.config import LoadConfig, MoEConfig
from gossamer.core import StartupError
from gossamer.models.dummy import dummy_weight
from gossamer.models.loader import inspect_model, iter_weights
from gossamer.models.shapes import expected_shapes

Checkpoint = Callable[[str], Path]
MOE = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2, "dtype": "bfloat16"}


@pytest.fixture
def config_only(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(BASE | MOE))
    return tmp_path


def weights(load: LoadConfig) -> dict[str, torch.Tensor]:
    stream = dict(iter_weights(inspect_model(load), load))
    assert all(isinstance(weight, torch.Tensor) for weight in stream.values())
    return stream  # type: ignore[return-value]


def dummy(folder: Path, **options: object) -> LoadConfig:
    return LoadConfig(model=str(folder), load_format="dummy", **options)  # type: ignore[arg-type]


def test_dummy_stream(config_only: Path) -> None:
    load = dummy(config_only)
    stream = weights(load)
    assert {n: tuple(w.shape) for n, w in stream.items()} == expected_shapes(inspect_model(load).config)
    assert {w.dtype for w in stream.values()} == {torch.bfloat16}
    for name, weight in stream.items():
        if "norm" in name:
            assert torch.equal(weight, torch.ones_like(weight))
        else:
            std = 1.0 if name == "embed.weight" else weight.shape[-1] ** -0.5
            if name.endswith(".o.weight"):
                std /= (2 * BASE["num_hidden_layers"]) ** 0.5
            assert weight.float().std() == pytest.approx(std, rel=0.1)
            assert abs(weight.float().mean()) < 0.1 * std


def test_dummy_weights_depend_on_seed_and_name_only(config_only: Path) -> None:
    one, again, other = (weights(dummy(config_only, seed=seed, dtype="float32")) for seed in (1, 1, 2))
    gate = "layers.0.moe.experts.0.gate.weight"
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one[gate], other[gate])
    assert not torch.equal(one[gate], one[gate.replace("layers.0", "layers.1")])
    assert not torch.equal(one[gate], one[gate.replace("gate", "up")])
    assert torch.equal(dummy_weight(gate, (96, 64), 1, torch.float32), one[gate])


def test_dummy_router_spreads_tokens() -> None:
    router = dummy_weight("layers.0.moe.router.weight", (16, 256), 0, torch.float32)
    tokens = torch.randn(2000, 256, generator=torch.Generator().manual_seed(3))
    logits = tokens @ router.T
    assert logits.std() == pytest.approx(1.0, abs=0.15)
    counts = torch.bincount(logits.topk(2).indices.flatten(), minlength=16)
    assert counts.min() > 100
    assert counts.max() < 500


def test_dummy_of_a_gguf_file(default_gguf: Path) -> None:
    load = LoadConfig(model=str(default_gguf), load_format="dummy")
    source = inspect_model(load)
    assert (source.kind, source.quantization, source.config.num_layers) == ("dummy", "none", 30)


def test_upcycled_stream(checkpoint: Checkpoint) -> None:
    load = LoadConfig(model=str(checkpoint("llama")), upcycle_experts=4, upcycle_topk=2, seed=5)
    source = inspect_model(load)
    assert source.config.moe == MoEConfig(4, 2, 96, renormalize=True)
    assert source.stored_config.moe is None
    stream = weights(load)
    assert list(stream) == list(expected_shapes(source.config))
    original = weights(LoadConfig(model=str(checkpoint("llama"))))
    for layer in range(3):
        for part in ("gate", "up", "down"):
            copies = [stream[f"layers.{layer}.moe.experts.{e}.{part}.weight"] for e in range(4)]
            assert torch.equal(copies[0], original[f"layers.{layer}.mlp.{part}.weight"])
            assert all(copy is copies[0] for copy in copies)
    router = "layers.0.moe.router.weight"
    assert torch.equal(stream[router], weights(load)[router])
    reseeded = weights(LoadConfig(model=load.model, upcycle_experts=4, seed=6))
    assert not torch.equal(stream[router], reseeded[router])


def test_upcycled_quantised_experts_share_their_blocks(default_gguf: Path) -> None:
    load = LoadConfig(model=str(default_gguf), upcycle_experts=3)
    stream = dict(iter_weights(inspect_model(load), load))
    assert stream["layers.7.moe.experts.0.up.weight"] is stream["layers.7.moe.experts.2.up.weight"]


def test_upcycling_refuses_what_it_cannot_do(checkpoint: Checkpoint) -> None:
    with pytest.raises(StartupError, match="8 experts already"):
        inspect_model(LoadConfig(model=str(checkpoint("qwen3_moe")), upcycle_experts=4))
    with pytest.raises(StartupError, match="biases"):
        inspect_model(LoadConfig(model=str(checkpoint("llama_biased")), upcycle_experts=4))

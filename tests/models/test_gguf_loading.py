from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_builder import convert, metadata_of, write_gguf
from tiny_checkpoints import make_model

from gossamer.config import LoadConfig, ModelConfig, RopeConfig
from gossamer.core import StartupError
from gossamer.models.loader import inspect_model, iter_weights
from gossamer.models.shapes import expected_shapes
from gossamer.ops.weights import QuantizedTensor, Weight

Checkpoint = Callable[[str], Path]
ARCHITECTURES = {
    "llama": "llama",
    "llama_biased": "llama",
    "mixtral": "llama",
    "qwen2_full": "qwen2",
    "qwen3": "qwen3",
    "qwen3_moe": "qwen3moe",
    "olmoe": "olmoe",
}


def build(path: Path, name: str = "llama", changes: dict[str, Any] | None = None, **options: Any) -> Path:
    """The GGUF file of a tiny checkpoint; `changes` to its metadata, None removes a key."""
    model, architecture = make_model(name), ARCHITECTURES[name]
    metadata = metadata_of(model, architecture) | (changes or {})
    metadata = {key: value for key, value in metadata.items() if value is not None}
    tensors = convert(model, architecture) | options.pop("extra", {})
    return write_gguf(path / "model.gguf", architecture, metadata, tensors, **options)


def config_of(path: Path) -> ModelConfig:
    return inspect_model(LoadConfig(model=str(path))).config


def dense(weight: Weight) -> torch.Tensor:
    return weight.dequantize() if isinstance(weight, QuantizedTensor) else weight


def stream_of(path: Path) -> dict[str, Weight]:
    load = LoadConfig(model=str(path))
    return dict(iter_weights(inspect_model(load), load))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_gguf_equals_the_folder_it_came_from(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    changes = {"olmoe.attention.clamp_kqv": 0.9} if name == "olmoe" else {}
    path = build(tmp_path, name, changes)
    ours, folder = config_of(path), config_of(checkpoint(name))
    eps = pytest.approx(folder.rms_norm_eps, rel=1e-6)
    assert ours.rms_norm_eps == eps
    same = {f: getattr(ours, f) for f in ModelConfig.__slots__ if f not in ("rms_norm_eps", "clip_qkv")}
    expected = {f: getattr(folder, f) for f in same}
    if name == "mixtral":  # GGUF has no place for Mixtral's sliding window
        same["sliding_windows"] = expected["sliding_windows"] = ()
    assert same == expected
    assert (ours.clip_qkv or 0) == pytest.approx(folder.clip_qkv or 0)
    stream, reference = stream_of(path), stream_of(checkpoint(name))
    assert list(stream) == list(expected_shapes(ours))
    for key, weight in stream.items():
        assert torch.equal(dense(weight), dense(reference[key])), key


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q5_1"])
def test_rows_of_quantised_blocks_are_restored_whole(kind: str, tmp_path: Path) -> None:
    path = build(tmp_path, quantise={"attn_": kind, "ffn_": kind})
    quantised_type = gguf.GGMLQuantizationType[kind]
    reference = {
        name.removeprefix("model."): gguf.dequantize(gguf.quantize(p.detach().numpy(), quantised_type), quantised_type)
        for name, p in make_model("llama").named_parameters()
        if p.ndim == 2 and p.shape[1] % 32 == 0
    }
    for key, weight in stream_of(path).items():
        if ".attn." in key or ".mlp." in key:
            part = key.split(".")[-2]
            block = "self_attn" if ".attn." in key else "mlp"
            name = f"layers.{key.split('.')[1]}.{block}.{part}_proj.weight"
            assert isinstance(weight, QuantizedTensor)
            np.testing.assert_array_equal(weight.dequantize().numpy(), reference[name])


def test_stacked_quantised_experts(tmp_path: Path) -> None:
    path = build(tmp_path, "mixtral", quantise={"_exps": "Q8_0"})
    whole = make_model("mixtral").state_dict()["model.layers.1.mlp.experts.down_proj"].numpy()
    for expert in range(4):
        weight = stream_of(path)[f"layers.1.moe.experts.{expert}.down.weight"]
        assert isinstance(weight, QuantizedTensor)
        assert weight.shape == (64, 96)
        np.testing.assert_allclose(weight.dequantize().numpy(), whole[expert], atol=0.01)


def test_one_tensor_per_expert_as_older_files_have(tmp_path: Path) -> None:
    model = make_model("mixtral")
    tensors = convert(model, "llama")
    for name in [n for n in tensors if "_exps" in n]:
        for expert, array in enumerate(tensors.pop(name)):
            tensors[name.replace("_exps", f".{expert}")] = array
    old = write_gguf(tmp_path / "old.gguf", "llama", metadata_of(model, "llama"), tensors)
    new = build(tmp_path, "mixtral")
    reference = stream_of(new)
    assert all(torch.equal(dense(w), dense(reference[n])) for n, w in stream_of(old).items())


@pytest.mark.parametrize(
    ("types", "suggestion"),
    [
        ({}, "none"),
        ({"attn_": "Q8_0", "ffn_": "Q8_0"}, "int8"),
        ({"attn_": "Q8_0", "ffn_": "Q4_0"}, "int4"),
        ({"attn_": "Q4_1", "ffn_": "Q5_0"}, "int8"),
        ({"token_embd": "Q4_0"}, "none"),
        ({"blk.": "F16"}, "none"),
    ],
)
def test_suggested_quantization(types: dict[str, str], suggestion: str, tmp_path: Path) -> None:
    path = build(tmp_path, quantise=types)
    assert inspect_model(LoadConfig(model=str(path))).quantization == suggestion


def test_half_precision_tensors(tmp_path: Path) -> None:
    path = build(tmp_path, quantise={"attn_": "BF16", "ffn_": "F16"})
    stream = stream_of(path)
    reference = make_model("llama").state_dict()
    q, up = reference["model.layers.0.self_attn.q_proj.weight"], reference["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(dense(stream["layers.0.attn.q.weight"]), q.to(torch.bfloat16))
    assert torch.equal(dense(stream["layers.0.mlp.up.weight"]), up.to(torch.float16))
    assert config_of(path).dtype == "bfloat16"


def test_split_model(tmp_path: Path) -> None:
    model = make_model("llama")
    tensors, metadata = convert(model, "llama"), metadata_of(model, "llama")
    names = list(tensors)
    for number, part in enumerate((names[:10], names[10:])):
        write_gguf(
            tmp_path / f"m-{number + 1:05d}-of-00002.gguf",
            "llama",
            (metadata if number == 0 else {}) | {"split.no": number, "split.count": 2},
            {name: tensors[name] for name in part},
        )
    stream = stream_of(tmp_path)
    assert torch.equal(dense(stream["embed.weight"]), model.state_dict()["model.embed_tokens.weight"])
    with pytest.raises(StartupError, match="first part"):
        stream_of(tmp_path / "m-00002-of-00002.gguf")
    (tmp_path / "m-00002-of-00002.gguf").unlink()
    with pytest.raises(StartupError, match="half downloaded"):
        stream_of(tmp_path)


def llama3_factors(factor: float, original: float, theta: float, head_dim: int) -> Any:
    """What llama.cpp's converter stores for Llama 3's scaling."""
    out = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < original / 4:
            out.append(1.0)
        elif wavelength > original:
            out.append(factor)
        else:
            smooth = (original / wavelength - 1) / 3
            out.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(out, dtype=np.float32)


@pytest.mark.parametrize(
    ("factor", "original", "theta"), [(8.0, 8192, 5e5), (32.0, 8192, 5e5), (8.0, 64, 1e4), (4.0, 2048, 1e4)]
)
def test_llama3_scaling_is_recovered(factor: float, original: int, theta: float, tmp_path: Path) -> None:
    factors = llama3_factors(factor, original, theta, 16)
    path = build(tmp_path, changes={"llama.rope.freq_base": theta}, extra={"rope_freqs.weight": factors})
    rope = config_of(path).rope
    assert (rope.kind, rope.theta, rope.factor) == ("llama3", theta, factor)
    inv = theta ** (-np.arange(0, 16, 2) / 16)
    assert rope.original_max_position is not None
    smooth = np.clip((rope.original_max_position * inv / (2 * np.pi) - 1) / 3, 0, 1)
    np.testing.assert_allclose(1 / ((1 - smooth) / factor + smooth), factors, rtol=1e-4)


def test_other_frequency_factors_are_refused(tmp_path: Path) -> None:
    path = build(tmp_path, extra={"rope_freqs.weight": np.linspace(1, 3, 8, dtype=np.float32)})
    with pytest.raises(StartupError, match="rope_freqs"):
        config_of(path)


@pytest.mark.parametrize(
    ("changes", "rope"),
    [
        ({"llama.rope.scaling.type": "none"}, RopeConfig()),
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            RopeConfig(kind="linear", factor=4.0),
        ),
        ({"llama.rope.scale_linear": 2.0}, RopeConfig(kind="linear", factor=2.0)),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 64,
            },
            RopeConfig(kind="yarn", factor=4.0, original_max_position=64),
        ),
    ],
)
def test_rope_scaling(changes: dict[str, Any], rope: RopeConfig, tmp_path: Path) -> None:
    assert config_of(build(tmp_path, changes=changes)).rope == rope


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"llama.block_count": None}, "llama.block_count"),
        ({"llama.block_count": 2}, "blk.2."),
        ({"llama.block_count": 4}, "blk.3."),
        ({"llama.embedding_length": 128}, "shape"),
        ({"llama.attention.head_count": "four"}, "attention.head_count"),
        ({"llama.attention.value_length": 8}, "attention.value_length"),
        ({"llama.rope.dimension_count": 8}, "rope.dimension_count"),
        ({"llama.attention.sliding_window": 16}, "attention.sliding_window"),
        ({"llama.rope.scaling.type": "longrope", "llama.rope.scaling.factor": 2.0}, "longrope"),
        ({"llama.attention.head_count_kv": [2, 2, 1]}, "head_count_kv"),
        ({"llama.expert_shared_count": 1}, "expert_shared_count"),
        ({"llama.logit_scale": 0.5}, "logit_scale"),
        ({"split.count": 3}, "split"),
    ],
)
def test_metadata_that_is_wrong_or_not_implemented(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    path = build(tmp_path, changes=changes)
    with pytest.raises(StartupError) as error:
        inspect_model(LoadConfig(model=str(path)))
    assert named in str(error.value)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) <= 5


def test_metadata_by_layer_and_end_of_turn(tmp_path: Path) -> None:
    changes = {"llama.attention.head_count_kv": [2, 2, 2], "tokenizer.ggml.eot_token_id": 9}
    config = config_of(build(tmp_path, changes=changes))
    assert config.num_kv_heads == 2
    assert config.eos_token_ids == (2, 9)


def test_control_tokens_that_end_a_turn_by_name(tmp_path: Path) -> None:
    texts = [f"<{i}>" for i in range(128)]
    texts[5], texts[6] = "<|endoftext|>", "<|im_end|>"
    kinds = [3] * 6 + [1] * 122  # 6 is plain text that spells a control token
    changes = {"tokenizer.ggml.tokens": texts, "tokenizer.ggml.token_type": kinds}
    assert config_of(build(tmp_path, changes=changes)).eos_token_ids == (2, 5)


def test_unknown_architecture_and_types(tmp_path: Path) -> None:
    mamba = write_gguf(tmp_path / "a.gguf", "mamba", {"mamba.block_count": 1}, {"x": np.zeros(4, np.float32)})
    with pytest.raises(StartupError, match=r"'mamba'[\s\S]*qwen3moe"):
        config_of(mamba)
    integers = build(tmp_path, extra={"blk.0.attn_norm.weight": np.zeros(64, np.int32)})
    with pytest.raises(StartupError, match="I32"):
        config_of(integers)


def test_load_format_must_fit(tmp_path: Path) -> None:
    path = build(tmp_path)
    with pytest.raises(StartupError, match="--load-format"):
        inspect_model(LoadConfig(model=str(path), load_format="safetensors"))
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert inspect_model(LoadConfig(model=str(tmp_path))).path == path
    assert inspect_model(LoadConfig(model=str(tmp_path), load_format="gguf")).path == path


def test_default_model(default_gguf: Path) -> None:
    load = LoadConfig(model=str(default_gguf))
    start = time.perf_counter()
    source = inspect_model(load)
    inspected = time.perf_counter()
    config = source.config
    assert (config.family, config.num_layers, config.hidden_size, config.vocab_size) == ("llama", 30, 576, 49152)
    assert (config.num_q_heads, config.num_kv_heads, config.head_dim) == (9, 3, 64)
    assert (config.rope.theta, config.max_position_embeddings) == (100000.0, 8192)
    assert config.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_ids, source.quantization) == (1, (2, 0), "int4")
    shapes = {}
    for name, weight in iter_weights(source, load):
        shapes[name] = tuple(weight.shape)
        if isinstance(weight, QuantizedTensor) and weight.to_int4() is None:
            weight.dequantize()
    streamed = time.perf_counter()
    assert shapes == expected_shapes(config)
    # Generous bounds: 0.05 s and 0.5 s on one idle core.
    assert inspected - start < 1.0
    assert streamed - inspected < 5.0

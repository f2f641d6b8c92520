from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_checkpoints import BASE, CHECKPOINTS, make_model, save_checkpoint

from gossamer.config import LoadConfig, MLAConfig, MoEConfig, RopeConfig
from gossamer.core import StartupError
from gossamer.models.loader import inspect_model, iter_weights
from gossamer.models.registry import FAMILIES, family_of_hf
from gossamer.models.shapes import expected_shapes

Checkpoint = Callable[[str], Path]
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **BASE}


def from_hf(**changes: Any) -> Any:
    raw = {key: value for key, value in (CONFIG | changes).items() if value is not ...}
    return family_of_hf(raw).from_hf(raw)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_stream_has_exactly_the_expected_tensors(name: str, checkpoint: Checkpoint) -> None:
    load = LoadConfig(model=str(checkpoint(name)))
    source = inspect_model(load)
    stream = [(n, tuple(w.shape)) for n, w in iter_weights(source, load)]
    assert stream == list(expected_shapes(source.config).items())
    model = make_model(name)
    biases = [b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")]
    parameters = sum(p.numel() for p in [*model.parameters(), *biases])
    assert sum(torch.Size(shape).numel() for _, shape in stream) == parameters


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_common_fields(name: str, checkpoint: Checkpoint) -> None:
    config = inspect_model(LoadConfig(model=str(checkpoint(name)))).config
    hf = make_model(name).config
    assert config.family == hf.model_type
    assert (config.vocab_size, config.hidden_size, config.num_layers) == (128, 64, 3)
    assert (config.num_q_heads, config.num_kv_heads) == (hf.num_attention_heads, hf.num_key_value_heads)
    # Of latent attention transformers' head_dim is the rotated part alone.
    head_dim = config.rope.rotary_dim if config.mla else config.head_dim
    assert head_dim == (getattr(hf, "head_dim", None) or 16)
    assert config.max_position_embeddings == 256
    assert config.rms_norm_eps == hf.rms_norm_eps
    assert config.tie_word_embeddings == hf.tie_word_embeddings
    assert (config.bos_token_id, config.eos_token_ids) == (1, (2,))
    assert config.dtype == "float32"


TRAITS: dict[str, dict[str, Any]] = {
    "llama": {"qkv_bias": False, "o_bias": False, "mlp_bias": False, "qk_norm": "none", "sliding_windows": ()},
    "llama_biased": {"qkv_bias": True, "o_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama_linear": {"rope": RopeConfig(kind="linear", factor=4.0)},
    "llama_dynamic": {"rope": RopeConfig(kind="dynamic", factor=4.0, original_max_position=256)},
    "llama_llama3": {"rope": RopeConfig(kind="llama3", factor=8.0, original_max_position=64)},
    "llama_yarn": {"rope": RopeConfig(kind="yarn", factor=4.0, original_max_position=64)},
    "llama_yarn_all": {
        "rope": RopeConfig(
            kind="yarn",
            factor=8.0,
            original_max_position=32,
            beta_fast=16.0,
            beta_slow=2.0,
            mscale=0.8,
            mscale_all_dim=0.5,
            truncate=False,
        )
    },
    "mistral": {"sliding_windows": (16, 16, 16), "head_dim": 32},
    "mistral_full": {"sliding_windows": ()},
    "qwen2": {"qkv_bias": True, "o_bias": False, "sliding_windows": (None, 16, 16)},
    "qwen2_full": {"sliding_windows": ()},
    "qwen3": {"qk_norm": "head", "qkv_bias": False},
    "qwen3_biased": {"qkv_bias": True, "o_bias": True},
    "qwen3_moe": {"qk_norm": "head", "moe": MoEConfig(8, 2, 48, renormalize=True)},
    "qwen3_moe_mixed": {
        "moe": MoEConfig(8, 2, 48, renormalize=False, dense_layers=frozenset({0})),
        "sliding_windows": (16, 16, 16),
    },
    "mixtral": {"moe": MoEConfig(4, 2, 96, renormalize=True), "sliding_windows": (16, 16, 16)},
    "olmoe": {"qk_norm": "full", "clip_qkv": 0.9, "moe": MoEConfig(8, 2, 96, renormalize=False)},
    "deepseek_v2": {
        "attention": "mla",
        "mla": MLAConfig(32, 32, 16, 16, None, interleaved=True),
        "rope": RopeConfig(rotary_dim=16),
        "moe": MoEConfig(8, 3, 32, renormalize=False, num_shared=2, dense_layers=frozenset({0})),
    },
    "deepseek_v2_groups": {
        "mla": MLAConfig(32, 32, 16, 16, 24, interleaved=True),
        "rope": RopeConfig(
            kind="yarn",
            rotary_dim=16,
            factor=4.0,
            original_max_position=64,
            mscale=0.707,
            mscale_all_dim=0.707,
        ),
        "moe": MoEConfig(
            8,
            3,
            32,
            renormalize=False,
            num_groups=4,
            topk_groups=2,
            routed_scale=4.0,
            num_shared=1,
            dense_layers=frozenset({0}),
        ),
    },
    "deepseek_v3_halves": {
        "mla": MLAConfig(32, 32, 16, 16, 24, interleaved=False),
        "moe": MoEConfig(
            8,
            3,
            32,
            renormalize=False,
            score_func="sigmoid",
            choice_bias=True,
            num_groups=4,
            topk_groups=2,
            group_top=2,
            routed_scale=2.5,
            num_shared=1,
            dense_layers=frozenset({0}),
        ),
    },
    "glm4_moe": {
        "attention": "gqa",
        "qkv_bias": True,
        "o_bias": False,
        "qk_norm": "head",
        "rope": RopeConfig(rotary_dim=16),
    },
    "glm4_moe_groups": {"qkv_bias": False, "qk_norm": "none", "rope": RopeConfig(rotary_dim=4)},
    "olmoe_normalised": {"clip_qkv": None, "moe": MoEConfig(8, 2, 96, renormalize=True)},
}


@pytest.mark.parametrize("name", TRAITS)
def test_traits(name: str, checkpoint: Checkpoint) -> None:
    config = inspect_model(LoadConfig(model=str(checkpoint(name)))).config
    assert {key: getattr(config, key) for key in TRAITS[name]} == TRAITS[name]


@pytest.mark.parametrize("name", ["qwen3_moe_mixed", "mixtral", "olmoe", "deepseek_v2", "deepseek_v3", "glm4_moe"])
def test_fused_and_separate_experts_give_the_same_stream(name: str, checkpoint: Checkpoint, tmp_path: Path) -> None:
    fused = save_checkpoint(name, tmp_path, save_original_format=False)
    one, other = LoadConfig(model=str(checkpoint(name))), LoadConfig(model=str(fused))
    separate = dict(iter_weights(inspect_model(one), one))
    together = dict(iter_weights(inspect_model(other), other))
    assert separate.keys() == together.keys()
    assert inspect_model(one).plan != inspect_model(other).plan
    assert all(torch.equal(separate[key], together[key]) for key in separate)


def test_sharded_checkpoint(checkpoint: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint("qwen3", tmp_path, max_shard_size="100KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    sharded, whole = LoadConfig(model=str(tmp_path)), LoadConfig(model=str(checkpoint("qwen3")))
    expected = dict(iter_weights(inspect_model(whole), whole))
    for name, weight in iter_weights(inspect_model(sharded), sharded):
        assert torch.equal(weight, expected[name])


def test_old_spelling_of_rope_and_dtype() -> None:
    scaling = {
        "type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = from_hf(rope_theta=500000.0, rope_scaling=scaling, torch_dtype="bfloat16")
    assert config.rope == RopeConfig(theta=500000.0, kind="llama3", factor=32.0, original_max_position=8192)
    assert config.dtype == "bfloat16"


def test_yarn_extends_the_context() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    assert from_hf(rope_scaling=scaling).max_position_embeddings == 1024
    assert from_hf(rope_scaling=scaling, max_position_embeddings=1024).max_position_embeddings == 1024


def test_absent_keys_mean_what_transformers_says() -> None:
    assert from_hf(eos_token_id=..., bos_token_id=...).eos_token_ids == (2,)
    assert from_hf(num_key_value_heads=...).num_kv_heads == 4
    mistral = {"architectures": ["MistralForCausalLM"], "num_attention_heads": 8}
    assert from_hf(**mistral).sliding_windows == (4096,) * 3
    assert from_hf(**mistral, num_key_value_heads=...).num_kv_heads == 8
    assert from_hf(**mistral, sliding_window=None).sliding_windows == ()
    mixtral = {"architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
    assert from_hf(**mixtral).rope.theta == 1e6


def test_token_ids_outside_the_vocabulary_are_dropped() -> None:
    config = from_hf(eos_token_id=[2, 5, 500, -1, 2], bos_token_id=-1)
    assert config.eos_token_ids == (2, 5)
    assert config.bos_token_id is None


def test_model_type_decides_without_architectures() -> None:
    assert from_hf(architectures=..., model_type="qwen2").family == "qwen2"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "MixtralForCausalLM"),
        ({"architectures": [["nested"]]}, "architecture"),
        ({"architectures": ..., "model_type": "t5"}, "t5"),
        ({"architectures": ..., "model_type": ...}, "model_type"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "longrope"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [1, 2]}}, "mrope"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0, "mrope_section": [1]}}, "mrope_section"),
        ({"rope_scaling": {"type": "linear"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": "2"}}, "factor"),
        ({"rope_scaling": {"type": "linear", "factor": float("nan")}}, "factor"),
        ({"rope_scaling": "linear"}, "rope_parameters"),
        ({"rope_scaling": {"type": ["linear"]}}, "rope_type"),
        (
            {"rope_scaling": {"type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}},
            "low_freq_factor",
        ),
        ({"rope_theta": 0}, "rope_theta"),
        ({"hidden_size": ...}, "hidden_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": 64.0}, "hidden_size"),
        ({"hidden_size": 0}, "hidden_size"),
        ({"hidden_size": 66}, "num_attention_heads"),
        ({"vocab_size": True}, "vocab_size"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_hidden_layers": 2**40}, "num_hidden_layers"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"head_dim": 15}, "head_dim"),
        ({"rms_norm_eps": None}, None),
        ({"rms_norm_eps": -1.0}, "rms_norm_eps"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ({"eos_token_id": "2"}, "eos_token_id"),
        ({"eos_token_id": [2, None]}, "eos_token_id"),
        ({"dtype": 3}, "dtype"),
        ({"sliding_window": 16}, "sliding_window"),
        ({"layer_types": ["sliding_attention"] * 3}, "layer_types"),
        ({"architectures": ["MistralForCausalLM"], "layer_types": ["full_attention"] * 3}, "layer_types"),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": ["sliding_attention"] * 3}, "sliding_window"),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": ["linear_attention"] * 3}, "linear_attention"),
        ({"architectures": ["Qwen2ForCausalLM"], "layer_types": ["full_attention"]}, "layer_types"),
        ({"architectures": ["MixtralForCausalLM"]}, "num_local_experts"),
        (
            {"architectures": ["MixtralForCausalLM"], "num_local_experts": 2, "num_experts_per_tok": 3},
            "num_experts_per_tok",
        ),
        (
            {
                "architectures": ["Qwen3MoeForCausalLM"],
                "num_experts": 4,
                "moe_intermediate_size": 32,
                "mlp_only_layers": [7],
            },
            "mlp_only_layers",
        ),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(changes: dict[str, Any], named: str | None) -> None:
    if named is None:
        from_hf(**changes)
        return
    with pytest.raises(StartupError) as error:
        from_hf(**changes)
    assert named in str(error.value)
    assert len(str(error.value).splitlines()) <= 5


def test_decoder_sparse_step() -> None:
    config = from_hf(
        architectures=["Qwen3MoeForCausalLM"],
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        num_hidden_layers=5,
        decoder_sparse_step=2,
        mlp_only_layers=[1],
    )
    assert config.moe is not None
    assert config.moe.dense_layers == frozenset({0, 1, 2, 4})


def test_layer_types_place_the_windows() -> None:
    config = from_hf(
        architectures=["Qwen3ForCausalLM"],
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    )
    assert config.sliding_windows == (8, None, 8)


def test_registry_names_are_distinct() -> None:
    assert len({f.model_type for f in FAMILIES}) == len({f.architecture for f in FAMILIES}) == len(FAMILIES)


def test_generation_config_and_tokenizer_add_end_tokens(tmp_path: Path) -> None:
    def ends(backend: dict[str, Any], config: dict[str, Any], **options: Any) -> tuple[int, ...]:
        (tmp_path / "tokenizer.json").write_text(json.dumps(backend))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return inspect_model(LoadConfig(model=str(tmp_path), load_format="dummy", **options)).config.eos_token_ids

    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2], "temperature": 0.6}))
    added = {"added_tokens": [{"id": 3, "content": "<end>"}, {"id": 4, "content": "<other>"}]}
    assert ends({}, {}) == (2, 7)
    assert ends(added, {"eos_token": "<end>"}) == (2, 7, 3)
    assert ends(added, {"eos_token": {"content": "<other>"}}) == (2, 7, 4)
    assert ends(added, {"eos_token": "<end>", "added_tokens_decoder": {"5": {"content": "<end>"}}}) == (2, 7, 5)
    assert ends({}, {"eos_token": "<end>", "added_tokens_decoder": {"x": {"content": "<end>"}, "6": 0}}) == (2, 7)
    assert ends(added, {"eos_token": "<end>"}, tokenizer=str(tmp_path / "other")) == (2, 7)

"""The DeepSeek family's published formats and sizes, and what its configs may not say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from fp8_checkpoints import save_fp8_checkpoint
from safetensors.torch import load_file, save_file
from test_fp8_checkpoints import error, prompt_logprobs, tokens
from tiny_checkpoints import BASE, CHECKPOINTS, make_model, save_checkpoint

from gossamer.config import LoadConfig, make_engine_config
from gossamer.core import StartupError
from gossamer.layers.experts import StackedExperts
from gossamer.layers.linear import WeightFormat
from gossamer.models.dummy import dummy_weights
from gossamer.models.loader import inspect_model, iter_weights
from gossamer.models.registry import family_of_hf
from gossamer.models.shapes import expected_shapes

LATENT = {"kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
V3 = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 8,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "moe_layer_freq": 1,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "vocab_size": 129280,
    "max_position_embeddings": 163840,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    **LATENT,
}
KIMI_K2 = V3 | {
    "model_type": "kimi_k2",
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 384,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.827,
    "vocab_size": 163840,
    "num_nextn_predict_layers": 0,
}
V2_LITE = {
    "architectures": ["DeepseekV2ForCausalLM"],
    "hidden_size": 2048,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "greedy",
    "scoring_func": "softmax",
    "norm_topk_prob": False,
    "first_k_dense_replace": 1,
    "q_lora_rank": None,
    "vocab_size": 102400,
    "max_position_embeddings": 163840,
    "rope_scaling": V3["rope_scaling"] | {"mscale": 0.707, "mscale_all_dim": 0.707},
    **LATENT,
}
V2 = V2_LITE | {
    "hidden_size": 5120,
    "intermediate_size": 12288,
    "moe_intermediate_size": 1536,
    "num_hidden_layers": 60,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_routed_experts": 160,
    "n_group": 8,
    "topk_group": 3,
    "topk_method": "group_limited_greedy",
    "q_lora_rank": 1536,
    "routed_scaling_factor": 16.0,
}
V32 = V3 | {
    "architectures": ["DeepseekV32ForCausalLM"],
    "index_head_dim": 128,
    "index_n_heads": 64,
    "index_topk": 2048,
}
GLM_5 = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "hidden_size": 6144,
    "intermediate_size": 12288,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 78,
    "num_attention_heads": 64,
    "num_key_value_heads": 64,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "n_group": 1,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "first_k_dense_replace": 3,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 2048,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "vocab_size": 154880,
    "max_position_embeddings": 202752,
    "index_head_dim": 128,
    "index_n_heads": 32,
    "index_topk": 2048,
    "indexer_rope_interleave": True,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
}
GLM_4_5_AIR = {
    "architectures": ["Glm4MoeForCausalLM"],
    "hidden_size": 4096,
    "intermediate_size": 10944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 46,
    "num_attention_heads": 96,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "attention_bias": True,
    "partial_rotary_factor": 0.5,
    "n_routed_experts": 128,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "first_k_dense_replace": 1,
    "num_nextn_predict_layers": 1,
    "vocab_size": 151552,
    "max_position_embeddings": 131072,
}


def config_of(raw: dict[str, Any]) -> Any:
    return family_of_hf(raw).from_hf(raw)


@pytest.mark.parametrize(
    ("raw", "billions"),
    [
        (V2_LITE, 15.706),
        (V2, 235.741),
        (V3, 671.026),
        (V32, 671.878),
        (KIMI_K2, 1026.408),
        (GLM_4_5_AIR, 106.852),
        (GLM_5, 743.911),
    ],
    ids=["v2_lite", "v2", "v3", "v3_2", "kimi_k2", "glm_4_5_air", "glm_5"],
)
def test_published_configs_have_the_published_sizes(raw: dict[str, Any], billions: float) -> None:
    size = sum(math.prod(shape) for shape in expected_shapes(config_of(raw)).values())
    assert size / 1e9 == pytest.approx(billions, abs=1e-3)


@pytest.mark.parametrize(
    ("raw", "changes", "named"),
    [
        (V3, {"n_group": 7}, "n_group 7"),
        (V3, {"topk_group": 9}, "topk_group 9"),
        (V3, {"n_group": 64, "topk_group": 1}, "num_experts_per_tok 8"),
        (V3, {"scoring_func": "softmax"}, "scoring_func"),
        (V3, {"topk_method": "greedy"}, "topk_method"),
        (V3, {"moe_layer_freq": 2}, "moe_layer_freq"),
        (V3, {"attention_bias": True}, "attention_bias"),
        (V3, {"qk_rope_head_dim": 63}, "qk_rope_head_dim 63"),
        (V3, {"kv_lora_rank": None}, "kv_lora_rank"),
        (V3, {"first_k_dense_replace": -1}, "first_k_dense_replace"),
        (V32, {"q_lora_rank": None}, "q_lora_rank"),
        (V32, {"index_head_dim": 32}, "index_head_dim 32"),
        (V32, {"indexer_rope_interleave": True}, "indexer_rope_interleave"),
        (V32, {"rope_interleave": False}, "rope_interleave"),
        (V32, {"mlp_layer_types": ["dense"] * 61}, "mlp_layer_types"),
        (GLM_5, {"layer_types": ["full_attention"] * 78}, "layer_types"),
        (GLM_5, {"indexer_types": ["shared"] + ["full"] * 77}, "the first full"),
        (GLM_5, {"index_topk_pattern": "FS"}, "78 full or shared"),
        (GLM_5, {"index_topk_pattern": "F" + "X" * 77}, "full or shared"),
        (V2, {"norm_topk_prob": True}, "norm_topk_prob"),
        (V2, {"topk_method": "noaux_tc"}, "topk_method"),
        (GLM_4_5_AIR, {"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        (GLM_4_5_AIR, {"partial_rotary_factor": "half"}, "partial_rotary_factor"),
    ],
)
def test_what_is_not_implemented_is_refused(raw: dict[str, Any], changes: dict[str, Any], named: str) -> None:
    with pytest.raises(StartupError, match=named):
        config_of(raw | changes)


@pytest.mark.parametrize("name", ["indexed_attention", "deepseek_sparse_attention"])
def test_indexed_layers_have_two_names(name: str) -> None:
    assert config_of(GLM_5 | {"layer_types": [name] * 78}).attention == "dsa"


@pytest.mark.parametrize(
    ("changes", "shared"),
    [
        ({}, ()),
        ({"indexer_types": ["full", "full", "shared", "shared"]}, (2, 3)),
        ({"index_topk_pattern": "FSSF"}, (1, 2)),
        ({"index_topk_freq": 2}, (2,)),
        ({"index_topk_freq": 3, "index_skip_topk_offset": 1}, (1, 2)),
        ({"index_topk_freq": 0}, ()),
    ],
    ids=str,
)
def test_layers_that_share_a_choice(changes: dict[str, Any], shared: tuple[int, ...]) -> None:
    raw = GLM_5 | {"num_hidden_layers": 4} | changes
    assert config_of(raw).index.shared == {*shared}
    config = transformers.GlmMoeDsaConfig(**{k: v for k, v in raw.items() if k != "architectures"})
    assert [kind == "shared" for kind in config.indexer_types] == [i in shared for i in range(4)]
    names = [name for name in expected_shapes(config_of(raw)) if "index_w" in name]
    assert names == [f"layers.{i}.attn.index_w.weight" for i in range(4) if i not in shared]


@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v32", "glm_moe_dsa", "glm4_moe"])
def test_layers_of_multi_token_prediction_are_left_aside(name: str, tmp_path: Path) -> None:
    save_checkpoint(name, tmp_path)
    load, path = LoadConfig(model=str(tmp_path)), tmp_path / "model.safetensors"
    expected = dict(iter_weights(inspect_model(load), load))
    stored = load_file(path)
    layer = BASE["num_hidden_layers"]
    more = {n.replace(f"layers.{layer - 1}.", f"layers.{layer}."): t.clone() for n, t in stored.items()}
    more |= {f"model.layers.{layer}.eh_proj.weight": torch.ones(64, 128)}
    save_file(more | stored, path, metadata={"format": "pt"})
    raw = json.loads((tmp_path / "config.json").read_text())
    for key in ("num_nextn_predict_layers", "num_mtp_layers"):
        raw.pop(key, None)
    (tmp_path / "config.json").write_text(json.dumps(raw | {"num_nextn_predict_layers": 1}))
    found = dict(iter_weights(inspect_model(load), load))
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    (tmp_path / "config.json").write_text(json.dumps(raw))
    with pytest.raises(StartupError, match="unexpectedly"):
        inspect_model(load)


# Parts of merged projections and of the shared experts end where blocks of 128 rows do; or they do not.
ALIGNED = {"hidden_size": 256, "moe_intermediate_size": 128, "num_hidden_layers": 2, "qk_nope_head_dim": 32}
ALIGNED |= {"qk_rope_head_dim": 32, "kv_lora_rank": 64, "v_head_dim": 32}
# Blocks of 128 rows end where the indexer's parts do. Few tokens are left out, for whom noise of activations decides.
INDEXED = ALIGNED | {"q_lora_rank": 128, "index_head_dim": 128, "index_topk": 60}
RAGGED = {"hidden_size": 192, "num_hidden_layers": 2, "moe_intermediate_size": 80, "kv_lora_rank": 40}


@pytest.mark.parametrize("format", ["block", "channel", "tensor"])
@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("deepseek_v2", ALIGNED),
        ("deepseek_v3", ALIGNED),
        ("deepseek_v3", RAGGED),
        ("deepseek_v32", INDEXED),
        ("glm_moe_dsa", RAGGED),
    ],
)
def test_fp8_checkpoints(name: str, shapes: dict[str, Any], format: str, tmp_path: Path) -> None:
    values = save_fp8_checkpoint(tmp_path / "fp8", name, format, shapes)
    dense = tmp_path / "dense"
    dense.mkdir()
    raw = json.loads((tmp_path / "fp8" / "config.json").read_text())
    del raw["quantization_config"]
    (dense / "config.json").write_text(json.dumps(raw | {"dtype": "float32"}))
    save_file({n: t.contiguous() for n, t in values.items()}, dense / "model.safetensors", metadata={"format": "pt"})
    model = transformers.AutoModelForCausalLM.from_pretrained(dense, attn_implementation="eager").eval()
    ids = torch.randint(3, 128, (70,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        logprobs = torch.log_softmax(model(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
    exact = prompt_logprobs(dense, paged=False)
    assert float((exact - logprobs).abs().max()) < 1e-3
    # Every tensor's scales, the indexer's too: without FP8 activations the values are all that counts.
    dequantised = prompt_logprobs(tmp_path / "fp8", paged=False, quantization="none")
    assert float((dequantised - exact).abs().max()) < 1e-3
    for paged in (False, True):
        found = prompt_logprobs(tmp_path / "fp8", paged=paged)
        assert float((found - exact).abs().mean()) < 0.3 * float(exact.std())
        assert tokens(tmp_path / "fp8", paged=paged)


def test_shared_experts_are_the_last_of_the_stack() -> None:
    raw = {"architectures": ["DeepseekV2ForCausalLM"], **BASE, **CHECKPOINTS["deepseek_v2"][1]}
    config = config_of(raw)
    stack = StackedExperts("layers.1.moe", config.moe, "auto")
    weights = dict(dummy_weights(config, 0, torch.float32))
    for name in stack.names:
        stack.load(name, weights[name], WeightFormat(torch.float32, torch.device("cpu")))
    assert stack.w_gate_up is not None
    assert stack.w_down is not None
    x = torch.randn(5, 64)
    ids, ones = torch.tensor([[8, 9]], dtype=torch.int32).expand(5, -1), torch.ones(5, 2)
    found = stack(x, ones.contiguous(), ids.contiguous())
    gate, up, down = (weights[f"layers.1.moe.shared.{part}.weight"] for part in ("gate", "up", "down"))
    expected = (torch.nn.functional.silu(x @ gate.t()) * (x @ up.t())) @ down.t()
    assert error(found, expected) < 1e-6


def test_shared_experts_that_share_fp8_blocks_are_refused(tmp_path: Path) -> None:
    save_fp8_checkpoint(tmp_path, "deepseek_v2", "block", ALIGNED | {"moe_intermediate_size": 96})
    with pytest.raises(StartupError, match="straddle"):
        tokens(tmp_path, paged=True)


def test_dummy_tokens_spread_over_experts_and_groups() -> None:
    raw = V3 | {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 512, "n_routed_experts": 64}
    raw |= {"num_attention_heads": 4, "num_key_value_heads": 4, "moe_intermediate_size": 32, "intermediate_size": 64}
    config = config_of(raw | {"q_lora_rank": 48, "kv_lora_rank": 32})
    from gossamer.kv_cache.pool import KVPool
    from gossamer.layers.attention import mla
    from gossamer.layers.attention.base import AttentionBatch
    from gossamer.layers.moe import ExpertUse, MoELayer
    from gossamer.models.decoder import Decoder

    cpu = torch.device("cpu")
    decoder = Decoder(config, WeightFormat(torch.float32, cpu), 256)
    decoder.load(dummy_weights(config, 0, torch.float32))
    layers = [block.mlp for block in decoder.blocks if isinstance(block.mlp, MoELayer)]
    for layer in layers:
        layer.use = ExpertUse(64, cpu)
    pool = KVPool(4, mla.kv_layout(config, "float32"), 4, 64, cpu)
    ids = torch.randint(0, 512, (256,), generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        decoder.forward(ids, torch.arange(256), AttentionBatch(0, [0], [256], [[0, 1, 2, 3]], 64), pool)
    (use,) = [layer.use for layer in layers]
    assert int(use.touched[0]) == 64
    assert float(use.tokens.float().max()) < 4 * 256 * 8 / 64


@pytest.mark.parametrize(("name", "kind"), [("deepseek_v3", "mla"), ("glm_moe_dsa_shared", "dsa")])
def test_an_engine_runs_from_a_config_alone(name: str, kind: str, tmp_path: Path) -> None:
    """Dummy weights of both attention kinds' shapes, FP8 included."""
    config = make_model(name).config
    config.save_pretrained(tmp_path)
    options = {"load_format": "dummy", "quantization": "fp8", "dtype": "bfloat16"}
    from gossamer.engine.build import build_engine

    engine, info = build_engine(
        make_engine_config(model=str(tmp_path), max_model_len=64, kv_cache_memory_bytes=1 << 20, **options), paged=True
    )
    assert info.model.attention == kind
    engine.shutdown()

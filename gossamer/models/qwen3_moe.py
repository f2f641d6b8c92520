"""Qwen3-MoE (30B-A3B, 235B-A22B): Qwen3's attention with routed experts in some or all layers."""

from typing import Any

from gossamer.config import ModelConfig
from gossamer.core import StartupError
from gossamer.models.hf_config import ConfigReader, decoder_config, routed_experts, uniform_windows
from gossamer.models.weight_names import HF_WEIGHTS, hf_experts

WEIGHTS = HF_WEIGHTS | hf_experts("mlp", "gate_proj", "up_proj", "down_proj")


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """A layer is dense if `mlp_only_layers` names it or if it is not a multiple of `decoder_sparse_step`, from 1."""
    values = {"num_key_value_heads": 4, "sliding_window": 4096} | config
    if values.get("use_sliding_window") is not True:
        values["sliding_window"] = None
    reader = ConfigReader(values)
    bias = reader.flag("attention_bias")
    traits = {"renormalize": reader.flag("norm_topk_prob"), "dense_layers": _dense_layers(reader)}
    moe = routed_experts(reader, top_k=8, width="moe_intermediate_size", **traits)
    windows = uniform_windows(reader)
    return decoder_config(
        reader, "qwen3_moe", qkv_bias=bias, o_bias=bias, qk_norm="head", moe=moe, sliding_windows=windows
    )


def _dense_layers(reader: ConfigReader) -> frozenset[int]:
    num_layers, step = reader.integer("num_hidden_layers"), reader.integer("decoder_sparse_step", 1)
    named = reader.get("mlp_only_layers") or []
    if not isinstance(named, list) or any(type(i) is not int or not 0 <= i < num_layers for i in named):
        raise StartupError(f"mlp_only_layers must list layer indices below {num_layers}; got {str(named)[:80]}.")
    return frozenset(named) | {i for i in range(num_layers) if (i + 1) % step}

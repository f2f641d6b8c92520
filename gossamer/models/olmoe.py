"""OLMoE 1B-7B: routed experts in every layer, one RMSNorm over all of q and one over all of k."""

from typing import Any

from gossamer.config import ModelConfig, MoEConfig
from gossamer.models.hf_config import ConfigReader, decoder_config, num_experts, uniform_windows
from gossamer.models.weight_names import HF_WEIGHTS, hf_experts

DEFAULTS = {"eos_token_id": 50279, "rms_norm_eps": 1e-5}
WEIGHTS = HF_WEIGHTS | hf_experts("mlp", "gate_proj", "up_proj", "down_proj")


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """`clip_qkv` bounds q, k and v after their norms; `intermediate_size` is an expert's."""
    reader = ConfigReader(DEFAULTS | config)
    bias = reader.flag("attention_bias")
    reader.require("sliding_window", ())
    moe = MoEConfig(
        num_experts=num_experts(reader),
        top_k=reader.integer("num_experts_per_tok", 8),
        intermediate_size=reader.integer("intermediate_size"),
        renormalize=reader.flag("norm_topk_prob"),
    )
    return decoder_config(
        reader,
        "olmoe",
        qkv_bias=bias,
        o_bias=bias,
        qk_norm="full",
        clip_qkv=reader.optional_number("clip_qkv"),
        moe=moe,
        sliding_windows=uniform_windows(reader),
    )

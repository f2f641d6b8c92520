"""OLMoE 1B-7B: routed experts in every layer, one RMSNorm over all of q and one over all of k."""

from typing import Any

from gossamer.config import ModelConfig
from gossamer.models.hf_config import ConfigReader, decoder_config, routed_experts, uniform_windows
from gossamer.models.weight_names import HF_WEIGHTS, hf_experts

WEIGHTS = HF_WEIGHTS | hf_experts("mlp", "gate_proj", "up_proj", "down_proj")


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """`clip_qkv` bounds q, k and v after their norms; `intermediate_size` is an expert's."""
    reader = ConfigReader({"eos_token_id": 50279, "rms_norm_eps": 1e-5} | config)
    bias = reader.flag("attention_bias")
    reader.require("sliding_window", ())
    clip = reader.optional_number("clip_qkv")
    moe = routed_experts(reader, top_k=8, renormalize=reader.flag("norm_topk_prob"))
    windows = uniform_windows(reader)
    traits = {"qkv_bias": bias, "o_bias": bias, "qk_norm": "full", "clip_qkv": clip, "sliding_windows": windows}
    return decoder_config(reader, "olmoe", moe=moe, **traits)

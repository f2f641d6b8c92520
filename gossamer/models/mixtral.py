"""Mixtral 8x7B and 8x22B: Mistral with routed experts in every layer."""

from typing import Any

from gossamer.config import ModelConfig
from gossamer.models.hf_config import ConfigReader, decoder_config, routed_experts, uniform_windows
from gossamer.models.weight_names import HF_WEIGHTS, hf_experts

WEIGHTS = HF_WEIGHTS | hf_experts("block_sparse_moe", gate="w1", up="w3", down="w2")


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """The top-k weights are always renormalised; `intermediate_size` is an expert's."""
    defaults = {"bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 8, "rms_norm_eps": 1e-5, "rope_theta": 1e6}
    reader = ConfigReader(defaults | config)
    moe = routed_experts(reader, top_k=2, renormalize=True)
    return decoder_config(reader, "mixtral", moe=moe, sliding_windows=uniform_windows(reader))

"""Qwen3 (dense): an RMSNorm over each head of q and k instead of Qwen2's biases."""

from typing import Any

from gossamer.config import ModelConfig
from gossamer.models.hf_config import ConfigReader, decoder_config, layered_windows


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """`attention_bias` covers q, k, v and o."""
    reader = ConfigReader({"head_dim": 128, "sliding_window": 4096} | config)
    bias = reader.flag("attention_bias")
    return decoder_config(
        reader, "qwen3", qkv_bias=bias, o_bias=bias, qk_norm="head", sliding_windows=layered_windows(reader)
    )

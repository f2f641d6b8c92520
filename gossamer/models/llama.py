"""Llama 2 and 3.x, and the models that keep its architecture (SmolLM2, TinyLlama, ...)."""

from typing import Any

from gossamer.config import ModelConfig
from gossamer.models.hf_config import ConfigReader, decoder_config, uniform_windows


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """`attention_bias` covers q, k, v and o; `mlp_bias` all three projections."""
    reader = ConfigReader({"bos_token_id": 1, "eos_token_id": 2} | config)
    bias, mlp_bias = reader.flag("attention_bias"), reader.flag("mlp_bias")
    reader.require("sliding_window", ())
    windows = uniform_windows(reader)
    return decoder_config(reader, "llama", qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias, sliding_windows=windows)

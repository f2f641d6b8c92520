"""Qwen2 and Qwen2.5: biases on q, k and v, and a sliding window from some layer on."""

from typing import Any

from gossamer.config import ModelConfig
from gossamer.models.hf_config import ConfigReader, decoder_config, layered_windows


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """The biases are part of the architecture; no key of the config mentions them."""
    reader = ConfigReader({"sliding_window": 4096} | config)
    return decoder_config(reader, "qwen2", qkv_bias=True, sliding_windows=layered_windows(reader))

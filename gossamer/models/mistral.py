"""Mistral 7B and its successors of the same architecture: Llama with a sliding window and a free head size."""

from typing import Any

from gossamer.config import ModelConfig
from gossamer.models.hf_config import ConfigReader, decoder_config, uniform_windows


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """An absent `sliding_window` means 4096 (the first release had one), an explicit null means none."""
    defaults = {"bos_token_id": 1, "eos_token_id": 2, "num_key_value_heads": 8, "sliding_window": 4096}
    reader = ConfigReader(defaults | config)
    return decoder_config(reader, "mistral", sliding_windows=uniform_windows(reader))

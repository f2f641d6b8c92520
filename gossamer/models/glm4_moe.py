"""GLM-4.5 and 4.6: grouped-query attention that rotates a part of each head, and DeepSeek-V3's routing."""

import dataclasses
from typing import Any

from gossamer.config import ModelConfig
from gossamer.models.deepseek import HF_MOE, mtp_layers, noaux_routing
from gossamer.models.hf_config import ConfigReader, decoder_config, partial_rotary
from gossamer.models.weight_names import HF_WEIGHTS

WEIGHTS = HF_WEIGHTS | HF_MOE


def from_hf(config: dict[str, Any]) -> ModelConfig:
    """`attention_bias` covers q, k and v; half of each head rotates unless `partial_rotary_factor` says otherwise."""
    values = {"first_k_dense_replace": 1, "n_shared_experts": 1, "num_experts_per_tok": 8, "rms_norm_eps": 1e-5}
    values, factor = partial_rotary(values | config, 0.5)
    reader = ConfigReader(values)
    model = decoder_config(
        reader, "glm4_moe", moe=noaux_routing(reader), qkv_bias=reader.flag("attention_bias"),
        qk_norm="head" if reader.flag("use_qk_norm") else "none", num_mtp_layers=mtp_layers(reader),
    )  # fmt: skip
    rotary_dim = int(model.head_dim * factor)
    return dataclasses.replace(model, rope=dataclasses.replace(model.rope, rotary_dim=rotary_dim))

"""Which module implements which architecture: one line per family."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gossamer.config import ModelConfig
from gossamer.core import StartupError
from gossamer.models import deepseek, glm4_moe, llama, minimax_m3, mistral, mixtral, olmoe, qwen2, qwen3, qwen3_moe
from gossamer.models.weight_names import HF_WEIGHTS, WeightMap


@dataclass(frozen=True, slots=True)
class Family:
    """`model_type` and `architecture` as in config.json, `gguf` as in `general.architecture`."""

    model_type: str
    architecture: str
    from_hf: Callable[[dict[str, Any]], ModelConfig]
    weights: WeightMap = field(default_factory=lambda: HF_WEIGHTS)
    gguf: str | None = None


FAMILIES = (
    Family("deepseek_v2", "DeepseekV2ForCausalLM", deepseek.v2_from_hf, deepseek.WEIGHTS),
    Family("deepseek_v3", "DeepseekV3ForCausalLM", deepseek.v3_from_hf, deepseek.WEIGHTS),
    Family("deepseek_v32", "DeepseekV32ForCausalLM", deepseek.v32_from_hf, deepseek.WEIGHTS),
    Family("glm_moe_dsa", "GlmMoeDsaForCausalLM", deepseek.glm5_from_hf, deepseek.WEIGHTS),
    Family("glm4_moe", "Glm4MoeForCausalLM", glm4_moe.from_hf, glm4_moe.WEIGHTS),
    Family("llama", "LlamaForCausalLM", llama.from_hf, gguf="llama"),
    Family("minimax_m3", "MiniMaxM3SparseForCausalLM", minimax_m3.from_hf, minimax_m3.WEIGHTS),
    Family("minimax_m3_vl", "MiniMaxM3SparseForConditionalGeneration", minimax_m3.from_hf, minimax_m3.WEIGHTS),
    Family("minimax_m3_vl_text", "MiniMaxM3VLForCausalLM", minimax_m3.from_hf, minimax_m3.WEIGHTS),
    Family("mistral", "MistralForCausalLM", mistral.from_hf),
    Family("mixtral", "MixtralForCausalLM", mixtral.from_hf, mixtral.WEIGHTS),
    Family("olmoe", "OlmoeForCausalLM", olmoe.from_hf, olmoe.WEIGHTS, gguf="olmoe"),
    Family("qwen2", "Qwen2ForCausalLM", qwen2.from_hf, gguf="qwen2"),
    Family("qwen3", "Qwen3ForCausalLM", qwen3.from_hf, gguf="qwen3"),
    Family("qwen3_moe", "Qwen3MoeForCausalLM", qwen3_moe.from_hf, qwen3_moe.WEIGHTS, gguf="qwen3moe"),
)
BY_MODEL_TYPE = {family.model_type: family for family in FAMILIES}
BY_ARCHITECTURE = {family.architecture: family for family in FAMILIES}


def family_of_hf(config: Mapping[str, Any]) -> Family:
    """The family of a config.json, by `architectures[0]` or, where that is absent, by `model_type`."""
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        key, name, known = "architecture", str(architectures[0]), BY_ARCHITECTURE
    else:
        key, name, known = "model_type", str(config.get("model_type")), BY_MODEL_TYPE
    if name not in known:
        raise StartupError(f"The {key} {name[:80]!r} is not supported.\nSupported: {', '.join(sorted(known))}.")
    return known[name]


def family_of_gguf(architecture: str, num_experts: int) -> Family:
    """The family of a GGUF file. Mixtral is stored as `llama` with experts, Mistral as `llama` without."""
    if architecture == "llama" and num_experts:
        return BY_MODEL_TYPE["mixtral"]
    for family in FAMILIES:
        if family.gguf == architecture:
            return family
    known = sorted(family.gguf for family in FAMILIES if family.gguf)
    raise StartupError(f"The GGUF architecture {architecture[:80]!r} is not supported.\nSupported: {', '.join(known)}.")

"""Translates a GGUF file's metadata into the keys of a Hugging Face config, so that each family is written once.

What GGUF cannot say (tied embeddings, biases) is read off its tensors; what no family implements is refused.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.core import StartupError
from gossamer.models.gguf_file import GGUFFile, read_gguf
from gossamer.models.hf_config import ConfigReader
from gossamer.models.registry import Family, family_of_gguf

_SPLIT = re.compile(r"-(\d{5})-of-(\d{5})\.gguf$")
# The routers of these are renormalised by definition: GGUF states it only where it differs.
_RENORMALISED = {"llama": True, "qwen3moe": True, "olmoe": False}
# Control tokens that end a turn in some family, for files that name only one of their end tokens.
_ENDS = {
    "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|eom_id|>", "<|end|>", "<end_of_turn>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
}  # fmt: skip
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "attention.causal": (True,), "attention.scale": (), "attention.sliding_window": (0,), "attn_logit_softcapping": (),
    "final_logit_softcapping": (), "logit_scale": (1.0,), "residual_scale": (1.0,), "embedding_scale": (1.0,),
    "expert_gating_func": (1,), "expert_group_count": (0, 1), "expert_shared_count": (0,),
    "expert_weights_scale": (0.0, 1.0), "rope.scaling.yarn_ext_factor": (1.0, -1.0),
    "rope.scaling.yarn_log_multiplier": (0.0,),
}  # fmt: skip


def open_gguf(path: Path) -> list[GGUFFile]:
    """The file, or all parts of a split model of which `path` is the first; metadata is that of the first."""
    first = read_gguf(path)
    count = first.metadata.get("split.count", 1)
    if type(count) is not int or not 0 <= count <= 10000:
        raise StartupError(f"{path}: split.count must be an integer, got {count!r}.")
    if count <= 1:
        return [first]
    match = _SPLIT.search(path.name)
    if match is None or int(match[1]) != 1 or int(match[2]) != count:
        raise StartupError(
            f"{path} is part of a model split into {count} files.\n"
            f"Give the first part, named ...-00001-of-{count:05d}.gguf, with the others beside it."
        )
    stem = path.name[: match.start()]
    parts = [path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf") for number in range(1, count + 1)]
    missing = [part.name for part in parts if not part.exists()]
    if missing:
        raise StartupError(f"{path} is half downloaded: {len(missing)} of {count} parts are missing: {missing[0]}.")
    return [first, *(read_gguf(part) for part in parts[1:])]


def hf_config_of_gguf(files: list[GGUFFile]) -> tuple[Family, dict[str, Any]]:
    """The family and the config.json that the model had before it became a GGUF file."""
    metadata = files[0].metadata
    shapes = {name: tensor.shape for file in files for name, tensor in file.tensors.items()}
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str):
        raise StartupError("The GGUF file does not name its general.architecture.")
    prefix = f"{architecture}."
    meta = ConfigReader(
        {key.removeprefix(prefix): value for key, value in metadata.items() if key.startswith(prefix)}, prefix
    )
    num_experts = meta.integer("expert_count", 0, minimum=0)
    family = family_of_gguf(architecture, num_experts)
    for key, neutral in _NEUTRAL.items():
        meta.require(key, neutral)
    if "token_embd.weight" not in shapes:
        raise StartupError("The GGUF file has no token_embd.weight: is it a whole model?")
    num_heads, hidden_size = _uniform(meta, "attention.head_count"), meta.integer("embedding_length")
    head_dim = meta.integer("attention.key_length", hidden_size // num_heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        meta.require(key, (head_dim,))
    config: dict[str, Any] = {
        "vocab_size": shapes["token_embd.weight"][0], "hidden_size": hidden_size,
        "intermediate_size": _uniform(meta, "feed_forward_length"), "num_hidden_layers": meta.integer("block_count"),
        "num_attention_heads": num_heads, "num_key_value_heads": _uniform(meta, "attention.head_count_kv", num_heads),
        "head_dim": head_dim, "max_position_embeddings": meta.integer("context_length"),
        "rms_norm_eps": meta.number("attention.layer_norm_rms_epsilon"),
        "rope_parameters": _rope(meta, files, head_dim), "tie_word_embeddings": "output.weight" not in shapes,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"), "eos_token_id": _end_tokens(metadata),
        "sliding_window": None, "attention_bias": "blk.0.attn_q.bias" in shapes and family.model_type != "qwen2",
        "mlp_bias": "blk.0.ffn_down.bias" in shapes, "clip_qkv": meta.optional_number("attention.clamp_kqv"),
        "dtype": "float32" if all(t.ggml_type == "F32" for f in files for t in f.tensors.values()) else "bfloat16",
    }  # fmt: skip
    if num_experts:
        config |= {
            "num_experts": num_experts,
            "num_experts_per_tok": meta.integer("expert_used_count"),
            "moe_intermediate_size": meta.integer("expert_feed_forward_length", config["intermediate_size"]),
            "norm_topk_prob": meta.flag("expert_weights_norm", _RENORMALISED[architecture]),
            "mlp_only_layers": list(range(meta.integer("leading_dense_block_count", 0, minimum=0))),
        }
    return family, config


def _uniform(meta: ConfigReader, key: str, default: int | None = None) -> int:
    """An integer that GGUF may also give layer by layer; models whose layers differ are refused."""
    value = meta.get(key)
    if isinstance(value, list) and value and all(v == value[0] for v in value):
        return ConfigReader({key: value[0]}).integer(key)
    return meta.integer(key, default)


def _end_tokens(metadata: Mapping[str, Any]) -> list[Any]:
    """End of sequence, of turn and of message, and control tokens that end a turn by name: each ends an answer."""
    ends = [metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    tokens, types = (metadata.get(f"tokenizer.ggml.{name}") for name in ("tokens", "token_type"))
    if isinstance(tokens, list) and isinstance(types, list):
        ends += [i for i, (text, kind) in enumerate(zip(tokens, types, strict=False)) if kind == 3 and text in _ENDS]
    return [token for token in ends if token is not None]


def _rope(meta: ConfigReader, files: list[GGUFFile], head_dim: int) -> dict[str, Any]:
    theta = meta.number("rope.freq_base", 10000.0)
    for name in ("rope_factors_long.weight", "rope_factors_short.weight"):
        if any(name in file.tensors for file in files):
            raise StartupError(f"The GGUF file has {name}: LongRoPE is not supported.")
    for file in files:
        if "rope_freqs.weight" in file.tensors:
            return _llama3(_factors(file, head_dim), theta, head_dim)
    kind = meta.get("rope.scaling.type") or ("linear" if meta.get("rope.scale_linear") else "none")
    if kind == "none":
        return {"rope_type": "default", "rope_theta": theta}
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": theta}
    factor_key = "rope.scaling.factor" if meta.get("rope.scaling.factor") is not None else "rope.scale_linear"
    rope["factor"] = meta.number(factor_key)
    if kind == "yarn":
        rope["original_max_position_embeddings"] = meta.optional_integer("rope.scaling.original_context_length")
        rope["beta_fast"] = meta.optional_number("rope.scaling.yarn_beta_fast")
        rope["beta_slow"] = meta.optional_number("rope.scaling.yarn_beta_slow")
        extra = meta.number("rope.scaling.attn_factor", meta.number("rope.scaling.yarn_attn_factor", 1.0))
        if extra != 1.0:
            rope["attention_factor"] = extra * (1.0 + 0.1 * float(np.log(max(rope["factor"], 1.0))))
    return rope


def _factors(file: GGUFFile, head_dim: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    tensor = file.tensors["rope_freqs.weight"]
    if tensor.ggml_type != "F32" or tensor.shape != (head_dim // 2,):
        raise StartupError(f"rope_freqs.weight must be F32 of {head_dim // 2} elements, one per rotated pair.")
    return file.blocks("rope_freqs.weight").view(np.float32).astype(np.float64)


def _llama3(factors: np.ndarray[Any, np.dtype[np.float64]], theta: float, head_dim: int) -> dict[str, Any]:
    """Recovers Llama 3's parameters from the per-frequency divisors that llama.cpp stores instead.

    Every published model has low_freq_factor 1 and high_freq_factor 4. The original length follows from any divisor
    between 1 and the factor; the recovered parameters must reproduce all divisors, or the file is refused.
    """
    factor = float(factors.max())
    if np.all(factors == 1.0):
        return {"rope_type": "default", "rope_theta": theta}
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    candidates = [8192.0]
    between = (factors > 1.0 + 1e-6) & (factors < factor * (1 - 1e-6))
    if between.any() and factors.min() > 0:
        smooth = (1 / factors[between] - 1 / factor) / (1 - 1 / factor)
        candidates += [round(float(x)) for x in wavelengths[between] * (3 * smooth + 1)]
    for original in candidates:
        smooth = np.clip((original / wavelengths - 1) / 3, 0.0, 1.0)
        if np.allclose(factors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4, atol=0):
            found = {"rope_theta": theta, "factor": factor, "original_max_position_embeddings": int(original)}
            return found | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    raise StartupError("rope_freqs.weight is not a Llama 3 scaling with low and high factors 1 and 4: not supported.")

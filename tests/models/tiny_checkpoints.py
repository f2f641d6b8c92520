"""Tiny random checkpoints of every family, written by transformers itself: what users' folders look like."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from gossamer.models.registry import family_of_hf
from gossamer.models.shapes import canonical_weights

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

BASE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def _rope(kind: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10000.0, **parameters}}


LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 16,
    "v_head_dim": 16,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "first_k_dense_replace": 1,
}
V3 = {**LATENT, "q_lora_rank": 24, "n_group": 4, "topk_group": 2, "n_shared_experts": 1, "routed_scaling_factor": 2.5}
# Many index heads: tokens whose products are all below zero tie, and ties may be broken otherwise.
INDEX = {"index_n_heads": 24, "index_head_dim": 32}
# Blocks of one page and a limit that is often reached; the first layer sees and multiplies all.
M3 = {
    "head_dim": 16,
    "intermediate_size": 32,
    "dense_intermediate_size": 96,
    "shared_intermediate_size": 48,
    "num_local_experts": 8,
    "num_experts_per_tok": 3,
    "rotary_dim": 8,
    "swiglu_limit": 1.5,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_block_size": 16,
    "index_topk_blocks": 3,
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32.0, "beta_slow": 1.0}
MOE = {"num_experts": 8, "num_experts_per_tok": 2}
# name -> (prefix of the transformers classes, config on top of BASE)
CHECKPOINTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama_biased": ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "llama_linear": ("Llama", _rope("linear", factor=4.0)),
    "llama_dynamic": ("Llama", _rope("dynamic", factor=4.0)),
    "llama_llama3": (
        "Llama",
        _rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64),
    ),
    "llama_yarn": ("Llama", _rope("yarn", factor=4.0, original_max_position_embeddings=64)),
    "llama_yarn_all": (
        "Llama",
        _rope(
            "yarn",
            factor=8.0,
            original_max_position_embeddings=32,
            beta_fast=16.0,
            beta_slow=2.0,
            mscale=0.8,
            mscale_all_dim=0.5,
            truncate=False,
        ),
    ),
    "llama_yarn_factor": (
        "Llama",
        _rope("yarn", factor=4.0, original_max_position_embeddings=64, attention_factor=1.3),
    ),
    "mistral": ("Mistral", {"sliding_window": 16, "head_dim": 32}),
    "mistral_full": ("Mistral", {"sliding_window": None, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}),
    "qwen2_full": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 32, "tie_word_embeddings": True}),
    "qwen3_biased": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3_moe": ("Qwen3Moe", {"head_dim": 32, "moe_intermediate_size": 48, "norm_topk_prob": True, **MOE}),
    "qwen3_moe_mixed": (
        "Qwen3Moe",
        {
            "head_dim": 16,
            "moe_intermediate_size": 48,
            "mlp_only_layers": [0],
            "norm_topk_prob": False,
            "use_sliding_window": True,
            "sliding_window": 16,
            **MOE,
        },
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}),
    "olmoe": ("Olmoe", {"clip_qkv": 0.9, "norm_topk_prob": False, **MOE}),
    "deepseek_v2": ("DeepseekV2", {**LATENT, "q_lora_rank": None, "n_shared_experts": 2, "topk_method": "greedy"}),
    "deepseek_v2_groups": (
        "DeepseekV2",
        {
            **LATENT,
            **_rope("yarn", mscale=0.707, mscale_all_dim=0.707, **YARN),
            "q_lora_rank": 24,
            "n_shared_experts": 1,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 4.0,
        },
    ),
    "deepseek_v3": ("DeepseekV3", V3),
    "deepseek_v3_yarn": ("DeepseekV3", {**V3, **_rope("yarn", mscale=1.0, mscale_all_dim=1.0, **YARN)}),
    "deepseek_v3_halves": ("DeepseekV3", {**V3, "rope_interleave": False, "norm_topk_prob": False}),
    "kimi_k2": ("DeepseekV3", {**V3, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 0}),
    "deepseek_v32": ("DeepseekV32", {**V3, **INDEX, "index_topk": 28}),
    "deepseek_v32_yarn": (
        "DeepseekV32",
        {**V3, **INDEX, **_rope("yarn", mscale=1.0, mscale_all_dim=1.0, **YARN), "index_topk": 40},
    ),
    "deepseek_v32_all": ("DeepseekV32", {**V3, **INDEX, "index_topk": 2048}),
    "glm_moe_dsa": ("GlmMoeDsa", {**V3, **INDEX, "n_group": 1, "topk_group": 1, "index_topk": 24}),
    "glm_moe_dsa_shared": (
        "GlmMoeDsa",
        {**V3, **INDEX, "index_topk": 40, "indexer_types": ["full", "shared", "full"], "qk_nope_head_dim": 48},
    ),
    "glm4_moe": (
        "Glm4Moe",
        {
            "head_dim": 32,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "attention_bias": True,
            "use_qk_norm": True,
        },
    ),
    "glm4_moe_groups": (
        "Glm4Moe",
        {
            "head_dim": 16,
            "moe_intermediate_size": 32,
            "n_routed_experts": 8,
            "num_experts_per_tok": 2,
            "n_group": 2,
            "topk_group": 1,
            "partial_rotary_factor": 0.25,
            "first_k_dense_replace": 2,
            "routed_scaling_factor": 1.5,
        },
    ),
    "minimax_m3": ("MiniMaxM3VL", M3),
    "minimax_m3_sparse": (
        "MiniMaxM3VL",
        {**M3, "layer_types": ["minimax_m3_sparse"] * 3, "shared_intermediate_size": 64, "index_local_blocks": 2},
    ),
    "minimax_m3_full": ("MiniMaxM3VL", {**M3, "layer_types": ["full_attention"] * 3, "swiglu_limit": 7.0}),
    "olmoe_normalised": ("Olmoe", {"norm_topk_prob": True, "num_key_value_heads": 4, **MOE}),
}


def page_options(name: str) -> dict[str, int]:
    """Of an engine: MiniMax-M3's blocks are of 16 tokens here, fewer than a page has by default."""
    return {"page_size": 16} if name.startswith("minimax_m3") else {}


def make_model(name: str, **overrides: Any) -> Any:
    """A random model whose every parameter matters: norms are not all ones, biases not zero, attention not flat."""
    prefix, extra = CHECKPOINTS[name]
    kind = getattr(transformers, f"{prefix}TextConfig", None) or getattr(transformers, f"{prefix}Config")
    config = kind(**{**BASE, **extra, **overrides})
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    norm = 0.0 if prefix == "MiniMaxM3VL" else 1.0  # its norms multiply by 1 + w
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("norm.weight"):
                parameter.copy_(norm + 0.2 * torch.randn_like(parameter))
            else:
                parameter.normal_(0.0, 0.2)
        for buffer_name, buffer in model.named_buffers():
            if buffer_name.endswith("e_score_correction_bias"):  # all below zero, as far apart as scores are
                buffer.copy_(-1.0 - torch.rand_like(buffer))
    return model


def save_checkpoint(name: str, folder: Path, **save_options: Any) -> Path:
    make_model(name).save_pretrained(folder, **save_options)
    return folder


SUCCESSOR = 37
"""In a predictable checkpoint token t is followed by (t + 37) mod vocab_size, and the draft layer knows it."""


def _make_predictable(tensors: dict[str, torch.Tensor], noise: float) -> None:
    """Blocks add `noise` times what they did; the head of a token is the embedding of the one that it follows; of the
    two that the draft layer joins it looks at the embedding alone."""
    embed = torch.randn(tensors["model.embed_tokens.weight"].shape, generator=torch.Generator().manual_seed(3))
    hidden = embed.shape[1]
    for name in tensors:
        if "o_proj" in name or "down_proj" in name:
            tensors[name] = noise * tensors[name]
        elif name.endswith(("model.norm.weight", "shared_head.norm.weight", "enorm.weight")):
            tensors[name] = torch.ones(hidden)
        elif name.endswith("eh_proj.weight"):
            tensors[name] = torch.cat((torch.eye(hidden), noise * tensors[name][:, hidden:]), 1)
    tensors["model.embed_tokens.weight"], tensors["lm_head.weight"] = embed, embed.roll(SUCCESSOR, 0).contiguous()


def add_mtp_layer(folder: Path, noise: float | None = None) -> dict[str, torch.Tensor]:
    """Gives a saved checkpoint a multi-token-prediction layer as published; returns all of its tensors.

    A block like the last, the norms and the projection that feed it, and the copies of embedding and head that real
    checkpoints carry: damaged ones, for nothing may read them. With `noise` it is predictable: exactly at 0.
    """
    path, config = folder / "model.safetensors", json.loads((folder / "config.json").read_text())
    tensors, last = load_file(path), config["num_hidden_layers"] - 1
    hidden, generator = config["hidden_size"], torch.Generator().manual_seed(7)
    shapes = {n.split(f"layers.{last}.")[1]: t.shape for n, t in tensors.items() if f"layers.{last}." in n}
    shapes |= dict.fromkeys(("enorm.weight", "hnorm.weight", "shared_head.norm.weight"), (hidden,))
    shapes["eh_proj.weight"] = (hidden, 2 * hidden)
    for name, shape in shapes.items():
        drawn = torch.randn(shape, generator=generator)
        drawn = 1.0 + 0.2 * drawn if name.endswith("norm.weight") else 0.2 * drawn
        tensors[f"model.layers.{last + 1}.{name}"] = drawn.abs().neg() if "correction_bias" in name else drawn
    for name, source in (("embed_tokens", "model.embed_tokens"), ("shared_head.head", "lm_head")):
        tensors[f"model.layers.{last + 1}.{name}.weight"] = torch.full_like(tensors[f"{source}.weight"], torch.nan)
    if noise is not None:
        _make_predictable(tensors, noise)
    save_file(tensors, path, metadata={"format": "pt"})
    config.pop("num_mtp_layers", None)
    (folder / "config.json").write_text(json.dumps(config | {"num_nextn_predict_layers": 1}))
    return tensors


def save_nsa_checkpoint(name: str, folder: Path, block: int, *, shared_kv: bool) -> Path:
    """One of the above with the config and the weights that make it NSA's: no published family has them."""
    save_checkpoint(name, folder)
    nsa = {"block_size": block, "compress_width": 24, "num_blocks": 6, "window_size": 24, "shared_kv": shared_kv}
    config = json.loads((folder / "config.json").read_text()) | {"native_sparse_attention": nsa}
    (folder / "config.json").write_text(json.dumps(config))
    tensors, family = load_file(folder / "model.safetensors"), family_of_hf(config)
    torch.manual_seed(1)
    for weight in canonical_weights(family.from_hf(config)):
        stored = family.weights[weight.template][0].name.format(i=weight.layer, e=weight.expert)
        if ".attn." in weight.name and stored not in tensors:
            # Wide enough that the compressed branch, the choice and the gates all matter.
            tensors[stored] = torch.randn(weight.shape) * (3 * weight.shape[-1] ** -0.5 if len(weight.shape) > 1 else 1)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder

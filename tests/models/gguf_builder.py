"""Writes GGUF files with the gguf package, in the layout of llama.cpp's converter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

Arrays = dict[str, np.ndarray[Any, Any]]

HF_TO_GGUF = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
}


def interleave(rows: np.ndarray[Any, Any], num_heads: int) -> np.ndarray[Any, Any]:
    """Row order of llama.cpp's rotary embedding: the two halves of each head become neighbours."""
    halves = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(rows.shape)


def convert(model: Any, architecture: str) -> Arrays:
    """A transformers model's tensors under GGUF names, fp32."""
    config, out = model.config, {}
    for name, parameter in model.state_dict().items():
        array = parameter.numpy()
        stem, _, kind = name.rpartition(".")
        layer = ""
        if stem.startswith("model.layers."):
            _, _, index, stem = stem.split(".", 3)
            layer = f"blk.{index}."
        if architecture == "llama" and stem in ("self_attn.q_proj", "self_attn.k_proj"):
            heads = config.num_attention_heads if stem.endswith("q_proj") else config.num_key_value_heads
            array = interleave(array, heads)
        if kind == "gate_up_proj":
            half = array.shape[1] // 2
            out[f"{layer}ffn_gate_exps.weight"] = np.ascontiguousarray(array[:, :half])
            out[f"{layer}ffn_up_exps.weight"] = np.ascontiguousarray(array[:, half:])
        elif kind == "down_proj":
            out[f"{layer}ffn_down_exps.weight"] = array
        elif not (name == "lm_head.weight" and config.tie_word_embeddings):
            out[f"{layer}{HF_TO_GGUF[stem]}.{kind}"] = array
    return out


def metadata_of(model: Any, architecture: str) -> dict[str, Any]:
    c = model.config
    values: dict[str, Any] = {
        "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size,
        "block_count": c.num_hidden_layers,
        "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads,
        "attention.head_count_kv": c.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": float(c.rms_norm_eps),
        "rope.freq_base": float(c.rope_parameters["rope_theta"]),
        "rope.dimension_count": getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
    }
    if getattr(c, "head_dim", None):
        values |= {"attention.key_length": c.head_dim, "attention.value_length": c.head_dim}
    if getattr(c, "num_experts_per_tok", None):
        values |= {
            "expert_count": getattr(c, "num_experts", None) or c.num_local_experts,
            "expert_used_count": c.num_experts_per_tok,
        }
        if architecture == "qwen3moe":
            values["expert_feed_forward_length"] = c.moe_intermediate_size
    named = {f"{architecture}.{key}": value for key, value in values.items()}
    return named | {"tokenizer.ggml.bos_token_id": 1, "tokenizer.ggml.eos_token_id": 2}


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Arrays,
    quantise: Mapping[str, str] | None = None,
) -> Path:
    """`quantise` maps a part of a tensor's name to the ggml type of the matrices whose names contain it."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in metadata.items():
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        else:
            writer.add_string(key, value)
    for name, array in tensors.items():
        kind = next((t for part, t in (quantise or {}).items() if part in name and array.ndim > 1), None)
        if kind is None:
            writer.add_tensor(name, array)
        else:
            ggml_type = gguf.GGMLQuantizationType[kind]
            writer.add_tensor(name, gguf.quantize(array, ggml_type), raw_dtype=ggml_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

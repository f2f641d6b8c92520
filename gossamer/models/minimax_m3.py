"""MiniMax-M3's text model: grouped-query attention to blocks that an indexer chooses, clamped SwiGLU, norms of 1 + w.

Of a checkpoint with a vision tower the text model is read, under the published names or those of `transformers`.
"""

import dataclasses
import logging
from typing import Any

from gossamer.config import IndexConfig, ModelConfig, MoEConfig, SparseConfig
from gossamer.core import StartupError
from gossamer.models.hf_config import ConfigReader, decoder_config, layer_types, partial_rotary
from gossamer.models.weight_names import HF_WEIGHTS, Place, hf_experts, places

_LOGGER = logging.getLogger(__name__)
_LAYER, _SHARED = "model.layers.{i}.", "model.layers.{i}.block_sparse_moe.shared_experts."
_PUBLISHED = (
    HF_WEIGHTS
    | hf_experts("block_sparse_moe", "w1", "w3", "w2")
    | {"layers.{i}.moe.router.bias": (Place(f"{_LAYER}block_sparse_moe.e_score_correction_bias"),)}
    | places({f"layers.{{i}}.moe.shared.{name}": f"{_SHARED}{name}_proj" for name in ("gate", "up", "down")})
    | places({f"layers.{{i}}.attn.index_{x}": f"{_LAYER}self_attn.index_{x}_proj" for x in "qk"})
    | places({f"layers.{{i}}.attn.index_{x}_norm": f"{_LAYER}self_attn.index_{x}_norm" for x in "qk"})
)


def _found_at(place: Place) -> dict[Place, None]:
    """A published name, and what `transformers` makes of it: gate and up fused; each alone or beside a vision tower."""
    held = place.name.replace("block_sparse_moe.e_score", "mlp.gate.e_score").replace("block_sparse_moe.", "mlp.")
    held, part = held.replace("attn.index_", "attn.indexer."), place.part
    for number, name in enumerate(("mlp.gate_proj", "mlp.up_proj", "experts.gate_proj", "experts.up_proj")):
        if name in held:
            held, part = held.replace(name, f"{name.partition('.')[0]}.gate_up_proj"), (number % 2, 2)
    names = [(place.name, place.part), (f"language_model.{place.name}", place.part), (held, part)]
    names.append((held.replace("model.", "model.language_model.", 1), part))
    return dict.fromkeys(dataclasses.replace(place, name=name, part=p) for name, p in names)


WEIGHTS = {ours: tuple(p for place in stored for p in _found_at(place)) for ours, stored in _PUBLISHED.items()}

# Keys that change the mathematics, with the values that are implemented.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "qk_norm_type": ("per_head",), "scoring_func": ("sigmoid",), "hidden_act": ("silu", "swigluoai"),
    "n_shared_experts": (1,), "attention_bias": (False,), "use_qk_norm": (True,), "use_gemma_norm": (True,),
    "use_routing_bias": (True,),
}  # fmt: skip
_SPARSE_REQUIRED = {"use_sparse_attention": (True,), "sparse_init_block": (0,), "sparse_score_type": ("max",)}
_INDEX = {
    "index_n_heads": ("sparse_num_index_heads", 4), "index_head_dim": ("sparse_index_dim", 128),
    "index_block_size": ("sparse_block_size", 128), "index_topk_blocks": ("sparse_topk_blocks", 16),
    "index_local_blocks": ("sparse_local_block", 1),
}  # fmt: skip


def from_hf(config: dict[str, Any]) -> ModelConfig:
    if isinstance(text := config.get("text_config"), dict):
        _LOGGER.warning("The vision tower of the checkpoint is left aside: the model reads text alone.")
        tied = {"tie_word_embeddings": bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))}
        config = config | {key: value for key, value in text.items() if value is not None} | tied
    sparse = config.get("sparse_attention_config") or {}
    index = {ours: sparse.get(theirs, config.get(ours, default)) for ours, (theirs, default) in _INDEX.items()}
    values, rotary_factor = partial_rotary({"rope_theta": 5e6, "num_experts_per_tok": 4} | config | index, 1.0)
    reader, sparse_reader = ConfigReader(values), ConfigReader(sparse, "sparse_attention_config.")
    for each, required in ((reader, _REQUIRED), (sparse_reader, _SPARSE_REQUIRED)):
        for key, supported in required.items():
            each.require(key, supported)
    dense = _layers(reader, "mlp_layer_types", ("sparse", "dense"), config.get("moe_layer_freq"), 1)
    freq = sparse.get("sparse_attention_freq")
    full = _layers(reader, "layer_types", ("minimax_m3_sparse", "full_attention"), freq, 0)
    if not all(flag for i, flag in enumerate(sparse.get("sparse_disable_index_value") or []) if i not in full):
        raise StartupError("sparse_attention_config.sparse_disable_index_value must be set for every sparse layer.")
    width, shared = reader.integer("intermediate_size"), reader.integer("shared_intermediate_size")
    moe = MoEConfig(
        reader.integer("num_local_experts"), reader.integer("num_experts_per_tok"), width, score_func="sigmoid",
        choice_bias=True, routed_scale=reader.number("routed_scaling_factor", 2.0), dense_layers=dense,
        num_shared=0 if shared % width else shared // width, shared_width=shared if shared % width else None,
    )  # fmt: skip
    model = decoder_config(
        ConfigReader(values | {"hidden_act": None, "intermediate_size": reader.integer("dense_intermediate_size")}),
        "minimax_m3_vl_text", moe=moe, norm_offset=True, qk_norm="head",
        swiglu=(reader.number("swiglu_alpha", 1.702), reader.number("swiglu_limit", 7.0)),
    )  # fmt: skip
    rotary_dim = int(model.head_dim * rotary_factor)
    reader.require("rotary_dim", (rotary_dim,))
    model = dataclasses.replace(model, rope=dataclasses.replace(model.rope, rotary_dim=rotary_dim))
    return model if len(full) == model.num_layers else _indexed(model, reader, rotary_dim, full)


def _indexed(model: ModelConfig, reader: ConfigReader, rotary_dim: int, full: frozenset[int]) -> ModelConfig:
    """Layers of full attention are those whose window is the whole context."""
    block, local = reader.integer("index_block_size"), reader.integer("index_local_blocks")
    num_blocks = reader.integer("index_topk_blocks", minimum=local + 1)
    index = IndexConfig(reader.integer("index_n_heads"), reader.integer("index_head_dim"), num_blocks, shared=full)
    if block & (block - 1) or index.num_heads != model.num_kv_heads or index.head_dim < rotary_dim:
        raise StartupError(
            f"index_block_size {block} must be a power of two, index_n_heads {index.num_heads} num_key_value_heads and "
            f"index_head_dim {index.head_dim} at least as wide as what rotates."
        )
    sparse = SparseConfig(block, num_blocks, first=0, local=local, dense_below=block * num_blocks)
    windows = tuple(model.max_position_embeddings if i in full else None for i in range(model.num_layers))
    return dataclasses.replace(
        model, attention="msa", sparse=sparse, index=index, sliding_windows=windows if full else ()
    )


def _layers(reader: ConfigReader, key: str, kinds: tuple[str, str], flags: object, default: int) -> frozenset[int]:
    """Layers of the second of two kinds: by their names or, as published, by flags of the first."""
    num_layers = reader.integer("num_hidden_layers")
    flags = flags if isinstance(flags, list) else [default] * num_layers
    names = reader.get(key) or [kinds[not flag] for flag in flags]
    names = layer_types(ConfigReader({"num_hidden_layers": num_layers, key: names}), kinds, key)
    return frozenset(layer for layer, name in enumerate(names) if name == kinds[1])

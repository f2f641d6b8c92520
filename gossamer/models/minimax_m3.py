"""MiniMax-M3's text model: grouped-query attention to blocks that an indexer chooses, clamped SwiGLU, norms of 1 + w.

Of a checkpoint with a vision tower the text model is read, under the published names or those of `transformers`.
"""

import dataclasses
import logging
from typing import Any

from gossamer.config import IndexConfig, ModelConfig, MoEConfig, SparseConfig
from gossamer.core import StartupError
from gossamer.models.hf_config import ConfigReader, decoder_config, partial_rotary
from gossamer.models.weight_names import HF_WEIGHTS, Place, WeightMap, hf_experts

_LOGGER = logging.getLogger(__name__)

# Keys that change the mathematics, with the value that is implemented.
_REQUIRED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swigluoai"),
    "qk_norm_type": ("per_head",),
    "scoring_func": ("sigmoid",),
}
_REQUIRED |= dict.fromkeys(("use_qk_norm", "use_gemma_norm", "use_routing_bias"), (True,))
_REQUIRED |= {"n_shared_experts": (1,), "attention_bias": (False,)}
_SPARSE_REQUIRED = {"use_sparse_attention": (True,), "sparse_init_block": (0,), "sparse_score_type": ("max",)}
_SPARSE_KEYS = {
    "index_n_heads": "sparse_num_index_heads",
    "index_head_dim": "sparse_index_dim",
    "index_block_size": "sparse_block_size",
    "index_topk_blocks": "sparse_topk_blocks",
    "index_local_blocks": "sparse_local_block",
}


def _weights() -> WeightMap:
    layer, found = "model.layers.{i}.", {**HF_WEIGHTS, **hf_experts("block_sparse_moe", "w1", "w3", "w2")}
    gates = "block_sparse_moe.", "mlp.gate."
    found["layers.{i}.moe.router.bias"] = tuple(Place(f"{layer}{gate}e_score_correction_bias") for gate in gates)
    for ours, theirs in (("mlp", ("mlp",)), ("moe.shared", ("block_sparse_moe.shared_experts", "mlp.shared_experts"))):
        for part, name in enumerate(("gate", "up", "down")):
            alone = [Place(f"{layer}{block}.{name}_proj.weight") for block in theirs]
            fused = [Place(f"{layer}{theirs[-1]}.gate_up_proj.weight", part=(part, 2))] if name != "down" else []
            found[f"layers.{{i}}.{ours}.{name}.weight"] = (*alone, *fused)
    for ours, stored in ((f"{x}{end}", f"{x}{end or '_proj'}") for x in "qk" for end in ("", "_norm")):
        names = [f"{layer}self_attn.{group}{stored}.weight" for group in ("index_", "indexer.")]
        found[f"layers.{{i}}.attn.index_{ours}.weight"] = tuple(map(Place, names))
    return {ours: tuple(p for place in stored for p in _prefixed(place)) for ours, stored in found.items()}


def _prefixed(place: Place) -> list[Place]:
    """Alone, as published beside a vision tower, and as `transformers` holds it there."""
    names = [place.name, f"language_model.{place.name}", place.name.replace("model.", "model.language_model.", 1)]
    return [dataclasses.replace(place, name=name) for name in dict.fromkeys(names)]


WEIGHTS = _weights()


_DEFAULTS = {
    "hidden_size": 6144, "intermediate_size": 3072, "dense_intermediate_size": 12288, "shared_intermediate_size": 3072,
    "num_hidden_layers": 60, "num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 200064,
    "max_position_embeddings": 524288, "num_local_experts": 128, "num_experts_per_tok": 4, "rope_theta": 5e6,
    "index_n_heads": 4, "index_head_dim": 128, "index_block_size": 128, "index_topk_blocks": 16,
    "index_local_blocks": 1,
}  # fmt: skip


def from_hf(config: dict[str, Any]) -> ModelConfig:
    if isinstance(text := config.get("text_config"), dict):
        _LOGGER.warning("The vision tower of the checkpoint is left aside: the model reads text alone.")
        tied = bool(config.get("tie_word_embeddings") or text.get("tie_word_embeddings"))
        outer = {key: config[key] for key in ("dtype", "torch_dtype", "quantization_config") if key in config}
        config = outer | text | {"tie_word_embeddings": tied}
    raw_sparse = config.get("sparse_attention_config") or {}
    published = {ours: raw_sparse[theirs] for ours, theirs in _SPARSE_KEYS.items() if theirs in raw_sparse}
    values, rotary_factor = partial_rotary(_DEFAULTS | config | published, 1.0)
    reader, sparse_reader = ConfigReader(values), ConfigReader(raw_sparse, "sparse_attention_config.")
    for each, required in ((reader, _REQUIRED), (sparse_reader, _SPARSE_REQUIRED)):
        for key, supported in required.items():
            each.require(key, supported)
    dense_mlps = _layers(reader, "mlp_layer_types", ("sparse", "dense"), config.get("moe_layer_freq"), default=1)
    freq = raw_sparse.get("sparse_attention_freq")
    full = _layers(reader, "layer_types", ("minimax_m3_sparse", "full_attention"), freq, default=0)
    values_left_out = raw_sparse.get("sparse_disable_index_value") or []
    if not all(flag for layer, flag in enumerate(values_left_out) if layer not in full):
        raise StartupError("sparse_attention_config.sparse_disable_index_value must be set for every sparse layer.")
    swiglu = reader.number("swiglu_alpha", 1.702), reader.number("swiglu_limit", 7.0)
    width, shared = reader.integer("intermediate_size"), reader.integer("shared_intermediate_size")
    shares: dict[str, Any] = {"shared_width": shared} if shared % width else {"num_shared": shared // width}
    moe = MoEConfig(
        reader.integer("num_local_experts"), reader.integer("num_experts_per_tok"), width, score_func="sigmoid",
        choice_bias=True, routed_scale=reader.number("routed_scaling_factor", 2.0), dense_layers=dense_mlps, **shares,
    )  # fmt: skip
    model = decoder_config(
        ConfigReader(values | {"hidden_act": None, "intermediate_size": reader.integer("dense_intermediate_size")}),
        "minimax_m3_vl_text", moe=moe, swiglu=swiglu, norm_offset=True, qk_norm="head",
    )  # fmt: skip
    rotary_dim = int(model.head_dim * rotary_factor)
    reader.require("rotary_dim", (rotary_dim,))
    model = dataclasses.replace(model, rope=dataclasses.replace(model.rope, rotary_dim=rotary_dim))
    return model if len(full) == model.num_layers else _indexed(model, reader, full)


def _indexed(model: ModelConfig, reader: ConfigReader, full: frozenset[int]) -> ModelConfig:
    """Layers of full attention are those whose window is the whole context."""
    block, local = reader.integer("index_block_size"), reader.integer("index_local_blocks")
    num_blocks = reader.integer("index_topk_blocks", minimum=local + 1)
    index = IndexConfig(reader.integer("index_n_heads"), reader.integer("index_head_dim"), num_blocks, shared=full)
    if block & (block - 1) or index.num_heads != model.num_kv_heads or index.head_dim < (model.rope.rotary_dim or 0):
        raise StartupError(
            f"index_block_size {block} must be a power of two, index_n_heads {index.num_heads} num_key_value_heads and "
            f"index_head_dim {index.head_dim} at least as wide as what rotates."
        )
    sparse = SparseConfig(block, num_blocks, first=0, local=local, dense_below=block * num_blocks)
    whole = model.max_position_embeddings
    windows = tuple(whole if layer in full else None for layer in range(model.num_layers)) if full else ()
    return dataclasses.replace(model, attention="msa", sparse=sparse, index=index, sliding_windows=windows)


def _layers(
    reader: ConfigReader, key: str, kinds: tuple[str, str], flags: list[int] | None, default: int
) -> frozenset[int]:
    """Layers of the second of two kinds: by their names or, as published, by flags of the first."""
    num_layers = reader.integer("num_hidden_layers")
    flags = flags if flags is not None else [default] * num_layers
    names = reader.get(key) or [kinds[0] if flag else kinds[1] for flag in flags]
    if not isinstance(names, list) or len(names) != num_layers or not {*map(str, names)} <= {*kinds}:
        raise StartupError(f"{key} must be {num_layers} of {' and '.join(kinds)}; got {str(names)[:80]}.")
    return frozenset(layer for layer, name in enumerate(names) if name == kinds[1])

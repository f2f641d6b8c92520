"""DeepSeek-V2 (Lite), V3, R1, V3.2, and what shares V3's architecture (Kimi-K2, GLM-5): latent attention.

`HF_MOE` and `grouped_routing` serve other families with V3's routing too.
"""

import dataclasses
from typing import Any

from gossamer.config import IndexConfig, MLAConfig, ModelConfig, MoEConfig
from gossamer.core import StartupError
from gossamer.models.hf_config import ConfigReader, decoder_config
from gossamer.models.weight_names import HF_WEIGHTS, Place, hf_experts, places

_MLP, _ATTENTION = "model.layers.{i}.mlp.", "model.layers.{i}.self_attn."
HF_MOE = (
    hf_experts("mlp", "gate_proj", "up_proj", "down_proj")
    | places({f"layers.{{i}}.moe.shared.{n}": f"{_MLP}shared_experts.{n}_proj" for n in ("gate", "up", "down")})
    | {"layers.{i}.moe.router.bias": (Place(f"{_MLP}gate.e_score_correction_bias"),)}
    | places({f"layers.{{i}}.mtp.{n}": f"model.layers.{{i}}.{n}" for n in ("enorm", "hnorm", "eh_proj")})
    | places({"layers.{i}.mtp.norm": "model.layers.{i}.shared_head.norm"})
)
_NAMES = {"kv_a": "kv_a_proj_with_mqa", "kv_a_norm": "kv_a_layernorm", "q_a_norm": "q_a_layernorm"}
_NAMES |= {name: f"{name}_proj" for name in ("q_a", "q_b", "kv_b")}
_NAMES |= {"index_q": "indexer.wq_b", "index_k": "indexer.wk", "index_k_norm": "indexer.k_norm"}
_NAMES |= {"index_w": "indexer.weights_proj"}
WEIGHTS = HF_WEIGHTS | HF_MOE | places({f"layers.{{i}}.attn.{a}": f"{_ATTENTION}{b}" for a, b in _NAMES.items()})

_V3 = {"n_group": 8, "topk_group": 4, "num_experts_per_tok": 8, "routed_scaling_factor": 2.5}
_V3 |= {"first_k_dense_replace": 3, "n_shared_experts": 1}


def grouped_routing(config: ConfigReader, **traits: Any) -> MoEConfig:
    """Routed and shared experts under the keys that these families have in common."""
    config.require("moe_layer_freq", (1,))
    num_experts, num_groups = config.integer("n_routed_experts"), config.integer("n_group", 1)
    kept, top_k = config.integer("topk_group", 1), config.integer("num_experts_per_tok")
    if num_experts % num_groups or kept > num_groups or top_k > kept * (num_experts // num_groups):
        raise StartupError(
            f"n_group {num_groups}, topk_group {kept} and num_experts_per_tok {top_k} do not fit {num_experts} experts."
        )
    fields: dict[str, Any] = {
        "num_experts": num_experts, "top_k": top_k, "intermediate_size": config.integer("moe_intermediate_size"),
        "num_groups": num_groups, "topk_groups": kept, "routed_scale": config.number("routed_scaling_factor", 1.0),
        "num_shared": config.integer("n_shared_experts"),
        "dense_layers": frozenset(range(config.integer("first_k_dense_replace", minimum=0))),
    }  # fmt: skip
    return MoEConfig(**(fields | traits))


def noaux_routing(config: ConfigReader) -> MoEConfig:
    """DeepSeek-V3's: sigmoid scores, a bias that balances the choice, groups by the sum of their two best."""
    config.require("scoring_func", ("sigmoid",))
    config.require("topk_method", ("noaux_tc",))
    renormalize = config.flag("norm_topk_prob", True)
    return grouped_routing(config, score_func="sigmoid", choice_bias=True, group_top=2, renormalize=renormalize)


def v2_from_hf(config: dict[str, Any]) -> ModelConfig:
    """Softmax scores that are never renormalised; a group is as good as its best expert. V2-Lite has no groups."""
    reader = ConfigReader({"first_k_dense_replace": 0, "n_shared_experts": 2, "topk_method": "greedy"} | config)
    reader.require("scoring_func", ("softmax",))
    reader.require("topk_method", ("greedy", "group_limited_greedy"))
    reader.require("norm_topk_prob", (False,))
    moe = grouped_routing(reader, renormalize=False)
    if reader.get("topk_method") == "greedy":
        moe = dataclasses.replace(moe, num_groups=1, topk_groups=1)
    return _latent(config, "deepseek_v2", moe, interleaved=True)


def v3_from_hf(config: dict[str, Any]) -> ModelConfig:
    reader = ConfigReader(_V3 | config)
    return _latent(config, "deepseek_v3", noaux_routing(reader), interleaved=reader.flag("rope_interleave", True))


def v32_from_hf(config: dict[str, Any]) -> ModelConfig:
    """V3 with an indexer in every layer, which rotates halves where the rest rotates neighbours."""
    return _indexed(_V3 | {"index_n_heads": 64} | config, "deepseek_v32", interleaved=False, shared=frozenset())


def glm5_from_hf(config: dict[str, Any]) -> ModelConfig:
    """Layers may share a choice: by their names, a pattern of F and S, or every so many (arXiv:2603.12201)."""
    reader = ConfigReader(config)
    kinds, layers = config.get("indexer_types") or config.get("index_topk_pattern"), reader.integer("num_hidden_layers")
    if kinds is None:
        every, skip = reader.integer("index_topk_freq", 1, 0) or 1, reader.integer("index_skip_topk_offset", 2, 0)
        kinds = ["S" if max(i - skip + 1, 0) % every else "F" for i in range(layers)]
    kinds = [{"full": "F", "shared": "S"}.get(str(kind), str(kind)) for kind in kinds]
    if len(kinds) != layers or kinds[0] != "F" or not {*kinds} <= {"F", "S"}:
        raise StartupError(f"indexer_types must be {layers} full or shared, the first full; got {str(kinds)[:80]}.")
    shared = frozenset(i for i, kind in enumerate(kinds) if kind == "S")
    defaults = {"n_group": 1, "topk_group": 1, "rms_norm_eps": 1e-5, "index_n_heads": 32}
    return _indexed(_V3 | defaults | config, "glm_moe_dsa", interleaved=True, shared=shared)


_INDEXED = ("indexed_attention", "deepseek_sparse_attention")  # newer and older configs


def _indexed(config: dict[str, Any], family: str, *, interleaved: bool, shared: frozenset[int]) -> ModelConfig:
    reader = ConfigReader(config)
    layers = reader.integer("num_hidden_layers")
    dense = min(reader.integer("first_k_dense_replace", minimum=0), layers)
    reader.require("mlp_layer_types", (["dense"] * dense + ["sparse"] * (layers - dense),))
    reader.require("layer_types", tuple([name] * layers for name in _INDEXED))
    reader.require("indexer_rope_interleave", (interleaved,))
    reader.require("rope_interleave", (True,))
    model = _latent(config, family, noaux_routing(reader), interleaved=True)
    dim = reader.integer("index_head_dim", 128)
    index = IndexConfig(reader.integer("index_n_heads"), dim, reader.integer("index_topk", 2048), interleaved, shared)
    if model.mla is None or model.mla.q_lora_rank is None or dim < model.mla.rope_dim:
        raise StartupError(f"The indexer needs q_lora_rank, and index_head_dim {dim} of at least qk_rope_head_dim.")
    return dataclasses.replace(model, attention="dsa", index=index)


def mtp_layers(config: ConfigReader) -> int:
    """Multi-token-prediction layers behind the last layer, as published or as transformers 5.24 spells it."""
    key = "num_mtp_layers" if config.get("num_nextn_predict_layers") is None else "num_nextn_predict_layers"
    return config.integer(key, 0, minimum=0)


def _latent(config: dict[str, Any], family: str, moe: MoEConfig, *, interleaved: bool) -> ModelConfig:
    """What the two have in common. `head_dim` in a config.json is at times that of the rotary part alone."""
    reader = ConfigReader(config)
    reader.require("attention_bias", (False,))
    reader.require("mlp_bias", (False,))
    mla = MLAConfig(
        kv_lora_rank=reader.integer("kv_lora_rank"),
        nope_dim=reader.integer("qk_nope_head_dim"),
        rope_dim=reader.integer("qk_rope_head_dim"),
        v_dim=reader.integer("v_head_dim"),
        q_lora_rank=reader.optional_integer("q_lora_rank"),
        interleaved=interleaved,
    )
    if mla.rope_dim % 2:
        raise StartupError(f"qk_rope_head_dim {mla.rope_dim} is odd: a rotary embedding needs pairs.")
    head_dim = mla.nope_dim + mla.rope_dim
    num_heads = reader.integer("num_attention_heads")
    shared = ConfigReader(config | {"head_dim": head_dim, "num_key_value_heads": num_heads})
    traits = {"attention": "mla", "mla": mla, "moe": moe, "head_dim": head_dim, "num_mtp_layers": mtp_layers(reader)}
    model = decoder_config(shared, family, **traits)
    return dataclasses.replace(model, rope=dataclasses.replace(model.rope, rotary_dim=mla.rope_dim))

"""Typed, checked reading of a Hugging Face config, shared by the model families.

A key that changes the mathematics and is not implemented must be refused, never ignored: every error here names the
key, the value and what is supported. `source.py` adds the file's name.
"""

import math
from collections.abc import Collection, Mapping
from typing import Any, TypeVar

from gossamer.config import ModelConfig, MoEConfig, NSAConfig, RopeConfig, SparseConfig
from gossamer.core import StartupError
from gossamer.models.checkpoint_fp8 import fp8_scheme

MAX_INT = 2**31 - 1

# Keys of a rope dict that each kind reads; the universal ones carry no information for the kinds that skip them.
_ROPE_UNIVERSAL = {"type", "rope_type", "rope_theta", "original_max_position_embeddings", "finetuned"}
_ROPE_KEYS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}
_NSA_KEYS = (
    "block_size", "compress_block_size", "compress_stride", "compress_width", "num_blocks", "num_first_blocks",
    "num_local_blocks", "window_size", "shared_kv",
)  # fmt: skip
WINDOWED = ("full_attention", "sliding_attention")
T = TypeVar("T")


class ConfigReader:
    """Read access to a config dict. A key that is absent takes the default; one of the wrong type is a StartupError."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self._values = values
        self._prefix = prefix

    def get(self, key: str) -> Any:
        return self._values.get(key)

    def integer(self, key: str, default: int | None = None, minimum: int = 1) -> int:
        return self._required(key, self.optional_integer(key, minimum), default)

    def optional_integer(self, key: str, minimum: int = 1) -> int | None:
        value = self._values.get(key)
        if value is None:
            return None
        if type(value) is not int or not minimum <= value <= MAX_INT:
            raise self._wrong(key, f"an integer from {minimum} to {MAX_INT}")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        return self._required(key, self.optional_number(key), default)

    def optional_number(self, key: str) -> float | None:
        """A finite number above zero, or None."""
        value = self._values.get(key)
        if value is None:
            return None
        if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:
            raise self._wrong(key, "a finite number above 0")
        return float(value)

    def flag(self, key: str, default: bool = False) -> bool:
        value = self._values.get(key)
        if value is None:
            return default
        if type(value) is not bool:
            raise self._wrong(key, "true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...]:
        """One id or a list of them; () if absent."""
        value = self._values.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if any(type(token) is not int for token in ids):
            raise self._wrong(key, "a token id or a list of token ids")
        return tuple(ids)

    def require(self, key: str, supported: Collection[Any]) -> None:
        """Refuses a key that is present with a value other than the supported ones. Absent and null always pass."""
        value = self._values.get(key)
        if value is not None and value not in supported:
            choices = " or ".join(map(repr, supported)) or "no value"
            raise self._wrong(key, f"{choices}; anything else is not supported")

    def _required(self, key: str, value: T | None, default: T | None) -> T:
        value = default if value is None else value
        if value is None:
            raise StartupError(f"{self._prefix}{key} is missing.")
        return value

    def _wrong(self, key: str, expected: str) -> StartupError:
        shown = repr(self._values.get(key))
        return StartupError(f"{self._prefix}{key} must be {expected}; got {shown[:80]}.")


def decoder_config(config: ConfigReader, family: str, **traits: Any) -> ModelConfig:
    """The fields that all families share, with the family's own `traits` (ModelConfig fields) on top.

    Refuses what no family implements: other activations, quantisation other than FP8, partial rotary embeddings.
    """
    fp8_scheme(config.get("quantization_config"))  # refuses what is not FP8
    config.require("hidden_act", ("silu",))
    hidden_size = config.integer("hidden_size")
    num_q_heads = config.integer("num_attention_heads")
    num_kv_heads = config.integer("num_key_value_heads", num_q_heads)
    head_dim = config.optional_integer("head_dim")
    if head_dim is None:
        if hidden_size % num_q_heads:
            raise StartupError(f"hidden_size {hidden_size} is not divisible by num_attention_heads {num_q_heads}.")
        head_dim = hidden_size // num_q_heads
    if num_q_heads % num_kv_heads:
        raise StartupError(f"num_attention_heads {num_q_heads} is not divisible by num_key_value_heads {num_kv_heads}.")
    if head_dim % 2:
        raise StartupError(f"head_dim {head_dim} is odd: a rotary embedding needs pairs.")
    moe = traits.get("moe")
    if moe is not None and moe.top_k > moe.num_experts:
        raise StartupError(f"num_experts_per_tok {moe.top_k} is more than the {moe.num_experts} experts of a layer.")
    max_position = config.integer("max_position_embeddings")
    rope = rope_config(config, max_position)
    if rope.kind == "yarn":
        # YaRN checkpoints give the length they were trained on; the context they are made for is factor times longer.
        max_position = max(max_position, int(rope.factor * (rope.original_max_position or 0)))
    vocab_size = config.integer("vocab_size")
    bos = [token for token in config.token_ids("bos_token_id") if 0 <= token < vocab_size]
    fields: dict[str, Any] = {
        "intermediate_size": config.integer("intermediate_size"), "num_layers": config.integer("num_hidden_layers"),
        "family": family, "vocab_size": vocab_size, "hidden_size": hidden_size, "num_q_heads": num_q_heads,
        "num_kv_heads": num_kv_heads, "head_dim": head_dim, "max_position_embeddings": max_position,
        "rms_norm_eps": config.number("rms_norm_eps", 1e-6), "rope": rope, "dtype": checkpoint_dtype(config),
        "tie_word_embeddings": config.flag("tie_word_embeddings"), "bos_token_id": bos[0] if bos else None,
        "eos_token_ids": merge_token_ids(vocab_size, config.token_ids("eos_token_id")),
    }  # fmt: skip
    return ModelConfig(**(fields | traits | native_sparse_attention(config, traits)))


def native_sparse_attention(config: ConfigReader, traits: Mapping[str, Any]) -> dict[str, Any]:
    """Traits under a config's `native_sparse_attention`, a key of ours: no published family has one yet."""
    name = "native_sparse_attention"
    raw = config.get(name)
    if raw is None:
        return {}
    if not isinstance(raw, dict) or (unknown := raw.keys() - _NSA_KEYS):
        problem = f"has no {min(unknown)[:80]!r}" if isinstance(raw, dict) else "must be an object"
        raise StartupError(f"{name} {problem}; its keys are {', '.join(_NSA_KEYS)}.")
    if "mla" in traits or traits.get("sliding_windows"):
        raise StartupError(f"{name} goes with grouped-query attention without other windows.")
    reader = ConfigReader(raw, prefix=f"{name}.")
    block = reader.integer("block_size", 64, minimum=8)
    if block & (block - 1):
        raise StartupError(f"{name}.block_size must be a power of two; got {block}.")
    reader.require("compress_block_size", (block // 2,))
    reader.require("compress_stride", (block // 4,))
    first, local = reader.integer("num_first_blocks", 1), reader.integer("num_local_blocks", 2)
    num_blocks = reader.integer("num_blocks", 16, minimum=first + local + 1)
    window = reader.integer("window_size", 512)
    return {
        "attention": "nsa",
        "sparse": SparseConfig(block, num_blocks, first, local),
        "nsa": NSAConfig(reader.integer("compress_width"), reader.flag("shared_kv", True)),
        "sliding_windows": (window,) * (config.integer("num_hidden_layers") + traits.get("num_mtp_layers", 0)),
    }


def partial_rotary(config: dict[str, Any], default: float) -> tuple[dict[str, Any], float]:
    """The config without its `partial_rotary_factor`, which families that rotate a part of each head read here."""
    rope = config.get("rope_parameters")
    inner = dict(rope) if isinstance(rope, dict) else {}
    given = inner.pop("partial_rotary_factor", None), config.get("partial_rotary_factor"), default
    factor = next(each for each in given if each is not None)
    if not isinstance(factor, float | int) or not 0 < factor <= 1:
        raise StartupError(f"partial_rotary_factor must be a number above 0 and up to 1; got {str(factor)[:80]!r}.")
    return config | {"partial_rotary_factor": None, "rope_parameters": inner}, factor


def merge_token_ids(vocab_size: int, *groups: tuple[int, ...]) -> tuple[int, ...]:
    """The distinct ids in order of appearance. Ids outside the vocabulary can never be sampled and are dropped."""
    return tuple(dict.fromkeys(token for group in groups for token in group if 0 <= token < vocab_size))


def checkpoint_dtype(config: ConfigReader) -> str:
    """`dtype`, or `torch_dtype` as older checkpoints spell it."""
    value = config.get("dtype") or config.get("torch_dtype") or "bfloat16"
    if not isinstance(value, str):
        raise StartupError(f"dtype must be the name of a type; got {str(value)[:80]!r}.")
    return value.removeprefix("torch.")


def uniform_windows(config: ConfigReader) -> tuple[int | None, ...]:
    """`sliding_window` for every layer, for families without layer types; () if there is none."""
    window = config.optional_integer("sliding_window")
    kind = "full_attention" if window is None else "sliding_attention"
    if config.get("layer_types") is not None and any(t != kind for t in layer_types(config, WINDOWED)):
        raise StartupError(f"layer_types must be {kind!r} for every layer of this architecture.")
    return () if window is None else (window,) * config.integer("num_hidden_layers")


def layered_windows(config: ConfigReader) -> tuple[int | None, ...]:
    """Qwen's windows: `layer_types`, or else the layers from `max_window_layers` on, under `use_sliding_window`."""
    num_layers = config.integer("num_hidden_layers")
    window = config.optional_integer("sliding_window") if config.flag("use_sliding_window") else None
    if config.get("layer_types") is not None:
        slides = [kind == "sliding_attention" for kind in layer_types(config, WINDOWED)]
    else:
        first = config.integer("max_window_layers", 28, minimum=0)
        slides = [window is not None and layer >= first for layer in range(num_layers)]
    if not any(slides):
        return ()
    if window is None:
        raise StartupError("layer_types has sliding_attention, but sliding_window is off or missing.")
    return tuple(window if slide else None for slide in slides)


def layer_types(config: ConfigReader, kinds: tuple[str, str], key: str = "layer_types") -> list[str]:
    types, num_layers = config.get(key), config.integer("num_hidden_layers")
    if not isinstance(types, list) or len(types) != num_layers or not {*map(str, types)} <= {*kinds}:
        raise StartupError(f"{key} must be {num_layers} names, each {' or '.join(kinds)}; got {str(types)[:80]}.")
    return types


def rope_config(config: ConfigReader, max_position: int) -> RopeConfig:
    """Reads `rope_parameters` (transformers 5) or `rope_scaling` with `rope_theta` beside it (earlier)."""
    raw = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(raw, dict):
        raise StartupError(f"rope_parameters must be an object; got {str(raw)[:80]!r}.")
    config.require("partial_rotary_factor", (1.0,))
    kind = raw.get("rope_type", raw.get("type", "default"))
    if not isinstance(kind, str) or kind not in _ROPE_KEYS:
        raise StartupError(f"rope_type {str(kind)[:80]!r} is not supported; supported: {', '.join(_ROPE_KEYS)}.")
    rope = ConfigReader(raw, prefix="rope_parameters.")
    rope.require("partial_rotary_factor", (1.0,))
    known = {"partial_rotary_factor", *_ROPE_UNIVERSAL, *_ROPE_KEYS[kind]}
    for key, value in raw.items():
        if key not in known and value is not None:
            raise StartupError(f"rope_parameters.{str(key)[:80]} is not supported with rope_type {kind!r}.")
    theta = rope.optional_number("rope_theta") or config.number("rope_theta", 10000.0)
    original = config.optional_integer("original_max_position_embeddings") or rope.integer(
        "original_max_position_embeddings", max_position
    )
    fields: dict[str, Any] = {"kind": kind}
    if kind == "yarn":
        found = {key: rope.optional_number(key) for key in _ROPE_KEYS[kind] if key != "truncate"}
        fields |= {"factor": max_position / original, "truncate": rope.flag("truncate", True)}
        fields |= {key: value for key, value in found.items() if value is not None}
    else:
        fields |= {key: rope.number(key) for key in _ROPE_KEYS[kind]}
    if kind == "llama3" and not fields["low_freq_factor"] < fields["high_freq_factor"]:
        low, high = fields["low_freq_factor"], fields["high_freq_factor"]
        raise StartupError(f"rope_parameters.low_freq_factor {low} must be less than high_freq_factor {high}.")
    if kind not in ("default", "linear"):
        # A dynamic stretch is relative to the config's own length, whatever the rope dict says beside it.
        fields["original_max_position"] = max_position if kind == "dynamic" else original
    return RopeConfig(theta=theta, **fields)


def routed_experts(config: ConfigReader, top_k: int, width: str = "intermediate_size", **traits: Any) -> MoEConfig:
    """The experts of a config with that default of `num_experts_per_tok` and their width under the key `width`.

    Their number is in `num_experts` as published, or `num_local_experts` as transformers 5 and Mixtral write it.
    """
    num_experts = config.integer("num_experts" if config.get("num_experts") is not None else "num_local_experts")
    top_k = config.integer("num_experts_per_tok", top_k)
    return MoEConfig(num_experts, top_k, config.integer(width), **traits)

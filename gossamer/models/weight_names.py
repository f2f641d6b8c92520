"""The canonical weight stream: which tensors a decoder has, their shapes, and where a checkpoint keeps them.

The decoder is fed canonical names only. A family or a file format supplies a declarative map from each canonical
template to the places where it may lie; `plan_weights` checks it against a checkpoint's headers before any data is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gossamer.config import ModelConfig
from gossamer.core import StartupError

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a weight lies: the tensor `name`, or a piece of it.

    `stacked`: the tensor holds all experts and its leading index is the expert. `part` (p, n): rows of n weights of
    equal size lie fused one after the other, and this is number p.
    """

    name: str
    stacked: bool = False
    part: tuple[int, int] | None = None


WeightMap = Mapping[str, tuple[Place, ...]]
"""Canonical template -> alternatives, the first one that the checkpoint has is taken. `{i}` layer, `{e}` expert."""


class CanonicalWeight(NamedTuple):
    template: str
    layer: int
    expert: int
    shape: Shape

    @property
    def name(self) -> str:
        return self.template.format(i=self.layer, e=self.expert)


class PlannedWeight(NamedTuple):
    """A canonical weight and the piece of a stored tensor that it is."""

    name: str
    shape: Shape
    stored_name: str
    expert: int | None
    rows: tuple[int, int] | None


def places(names: Mapping[str, str]) -> dict[str, tuple[Place, ...]]:
    """A WeightMap of whole tensors."""
    return {template: (Place(name),) for template, name in names.items()}


def canonical_weights(config: ModelConfig) -> Iterator[CanonicalWeight]:
    """Every weight of the decoder in the order of the stream: embedding, layer by layer, final norm, head."""
    hidden, vocab = config.hidden_size, config.vocab_size
    yield CanonicalWeight("embed.weight", 0, 0, (vocab, hidden))
    for layer in range(config.num_layers):
        yield from _attention(config, layer)
        yield CanonicalWeight("layers.{i}.mlp_norm.weight", layer, 0, (hidden,))
        if config.moe is not None and layer not in config.moe.dense_layers:
            yield from _experts(config, layer)
        else:
            yield from _mlp(config, layer)
    yield CanonicalWeight("final_norm.weight", 0, 0, (hidden,))
    if not config.tie_word_embeddings:
        yield CanonicalWeight("lm_head.weight", 0, 0, (vocab, hidden))


def expected_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Canonical names and shapes, in the order of the stream."""
    return {weight.name: weight.shape for weight in canonical_weights(config)}


def _attention(c: ModelConfig, layer: int) -> Iterator[CanonicalWeight]:
    q_size, kv_size = c.num_q_heads * c.head_dim, c.num_kv_heads * c.head_dim
    yield CanonicalWeight("layers.{i}.attn_norm.weight", layer, 0, (c.hidden_size,))
    for name, rows in (("q", q_size), ("k", kv_size), ("v", kv_size)):
        yield CanonicalWeight(f"layers.{{i}}.attn.{name}.weight", layer, 0, (rows, c.hidden_size))
        if c.qkv_bias:
            yield CanonicalWeight(f"layers.{{i}}.attn.{name}.bias", layer, 0, (rows,))
    if c.qk_norm != "none":
        whole = c.qk_norm == "full"
        yield CanonicalWeight("layers.{i}.attn.q_norm.weight", layer, 0, (q_size if whole else c.head_dim,))
        yield CanonicalWeight("layers.{i}.attn.k_norm.weight", layer, 0, (kv_size if whole else c.head_dim,))
    yield CanonicalWeight("layers.{i}.attn.o.weight", layer, 0, (c.hidden_size, q_size))
    if c.o_bias:
        yield CanonicalWeight("layers.{i}.attn.o.bias", layer, 0, (c.hidden_size,))


def _mlp(c: ModelConfig, layer: int) -> Iterator[CanonicalWeight]:
    for name, rows, columns in (
        ("gate", c.intermediate_size, c.hidden_size),
        ("up", c.intermediate_size, c.hidden_size),
        ("down", c.hidden_size, c.intermediate_size),
    ):
        yield CanonicalWeight(f"layers.{{i}}.mlp.{name}.weight", layer, 0, (rows, columns))
        if c.mlp_bias:
            yield CanonicalWeight(f"layers.{{i}}.mlp.{name}.bias", layer, 0, (rows,))


def _experts(c: ModelConfig, layer: int) -> Iterator[CanonicalWeight]:
    if c.moe is None:
        return
    hidden, inner = c.hidden_size, c.moe.intermediate_size
    yield CanonicalWeight("layers.{i}.moe.router.weight", layer, 0, (c.moe.num_experts, hidden))
    for expert in range(c.moe.num_experts):
        yield CanonicalWeight("layers.{i}.moe.experts.{e}.gate.weight", layer, expert, (inner, hidden))
        yield CanonicalWeight("layers.{i}.moe.experts.{e}.up.weight", layer, expert, (inner, hidden))
        yield CanonicalWeight("layers.{i}.moe.experts.{e}.down.weight", layer, expert, (hidden, inner))


HF_WEIGHTS = places(
    {
        "embed.weight": "model.embed_tokens.weight",
        "final_norm.weight": "model.norm.weight",
        "lm_head.weight": "lm_head.weight",
        "layers.{i}.attn_norm.weight": "model.layers.{i}.input_layernorm.weight",
        "layers.{i}.mlp_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
        "layers.{i}.attn.q_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
        "layers.{i}.attn.k_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
    }
    | {
        f"layers.{{i}}.attn.{ours}.{kind}": f"model.layers.{{i}}.self_attn.{ours}_proj.{kind}"
        for ours in ("q", "k", "v", "o")
        for kind in ("weight", "bias")
    }
    | {
        f"layers.{{i}}.mlp.{ours}.{kind}": f"model.layers.{{i}}.mlp.{ours}_proj.{kind}"
        for ours in ("gate", "up", "down")
        for kind in ("weight", "bias")
    }
)
"""The names that Llama introduced and the other families kept."""


def hf_experts(block: str, gate: str, up: str, down: str) -> dict[str, tuple[Place, ...]]:
    """Experts of a Hugging Face checkpoint under `model.layers.{i}.<block>`, one tensor each as published, or all
    in one as transformers holds them in memory (and saves them with `save_original_format=False`)."""
    layer, fused = "model.layers.{i}.", "model.layers.{i}.mlp.experts."
    one, ours = f"{layer}{block}.experts.{{e}}.", "layers.{i}.moe."
    return {
        f"{ours}router.weight": tuple(Place(f"{layer}{b}.gate.weight") for b in dict.fromkeys((block, "mlp"))),
        f"{ours}experts.{{e}}.gate.weight": (
            Place(f"{one}{gate}.weight"),
            Place(f"{fused}gate_up_proj", stacked=True, part=(0, 2)),
        ),
        f"{ours}experts.{{e}}.up.weight": (
            Place(f"{one}{up}.weight"),
            Place(f"{fused}gate_up_proj", stacked=True, part=(1, 2)),
        ),
        f"{ours}experts.{{e}}.down.weight": (Place(f"{one}{down}.weight"), Place(f"{fused}down_proj", stacked=True)),
    }


def plan_weights(
    config: ModelConfig, weights: WeightMap, stored: Mapping[str, Shape], ignorable: re.Pattern[str]
) -> list[PlannedWeight]:
    """Finds every canonical weight among the stored tensors, or raises StartupError.

    Refused: a missing tensor, a wrong shape, and a tensor that nothing consumes unless `ignorable` matches its name
    (a checkpoint with more weights than the config asks for would compute something else than was trained).
    """
    plan: list[PlannedWeight] = []
    used: set[str] = set()
    missing: list[str] = []
    num_experts = config.moe.num_experts if config.moe else 0
    for weight in canonical_weights(config):
        alternatives = [
            (place, place.name.format(i=weight.layer, e=weight.expert)) for place in weights[weight.template]
        ]
        place, name = next(((p, n) for p, n in alternatives if n in stored), alternatives[0])
        if name not in stored:
            missing.append(name)
            continue
        rows = None
        expected = weight.shape
        if place.part is not None:
            index, count = place.part
            rows = (index * expected[0], (index + 1) * expected[0])
            expected = (count * expected[0], *expected[1:])
        if place.stacked:
            expected = (num_experts, *expected)
        if stored[name] != expected:
            raise StartupError(
                f"The tensor {name} has shape {list(stored[name])}, but the config implies {list(expected)}.\n"
                "The config and the weights do not belong together."
            )
        used.add(name)
        plan.append(PlannedWeight(weight.name, weight.shape, name, weight.expert if place.stacked else None, rows))
    _refuse("misses", missing)
    if config.tie_word_embeddings:
        used.update(place.name for place in weights["lm_head.weight"])
    _refuse("has, unexpectedly,", [n for n in stored if n not in used and not ignorable.search(n)])
    return plan


def _refuse(verb: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise StartupError(
            f"The checkpoint {verb} {'a tensor' if len(names) == 1 else f'{len(names)} tensors'} "
            f"for this architecture: {', '.join(names[:3])}{more}."
        )

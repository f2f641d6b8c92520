"""Where a checkpoint keeps each canonical weight: declarative maps, checked against its headers before any data.

A family (or a file format) maps every template of `shapes.py` to the places where it may lie; nothing else knows a
checkpoint's names.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from gossamer.config import ModelConfig
from gossamer.core import StartupError
from gossamer.models.shapes import Shape, canonical_weights


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


class PlannedWeight(NamedTuple):
    """A canonical weight and the piece of a stored tensor that it is."""

    name: str
    shape: Shape
    stored_name: str
    expert: int | None
    rows: tuple[int, int] | None


def places(modules: Mapping[str, str]) -> dict[str, tuple[Place, ...]]:
    """A WeightMap of modules whose weights and biases are whole tensors."""
    return {f"{a}.{kind}": (Place(f"{b}.{kind}"),) for a, b in modules.items() for kind in ("weight", "bias")}


NSA_MODULES = (
    "branch_gate",
    *(f"compress_{kind}.{part}" for kind in "kv" for part in ("position", "in_proj", "out_proj")),
    *(f"{branch}.{kind}_proj" for branch in ("window", "compressed") for kind in "kv"),
)
HF_WEIGHTS = places(
    {
        "embed": "model.embed_tokens",
        "final_norm": "model.norm",
        "lm_head": "lm_head",
        "layers.{i}.attn_norm": "model.layers.{i}.input_layernorm",
        "layers.{i}.mlp_norm": "model.layers.{i}.post_attention_layernorm",
        "layers.{i}.attn.q_norm": "model.layers.{i}.self_attn.q_norm",
        "layers.{i}.attn.k_norm": "model.layers.{i}.self_attn.k_norm",
    }
    | {f"layers.{{i}}.attn.{name}": f"model.layers.{{i}}.self_attn.{name}_proj" for name in "qkvo"}
    | {f"layers.{{i}}.mlp.{name}": f"model.layers.{{i}}.mlp.{name}_proj" for name in ("gate", "up", "down")}
    | {f"layers.{{i}}.attn.{name}": f"model.layers.{{i}}.self_attn.{name}" for name in NSA_MODULES}
)
"""The names that Llama introduced and the other families kept."""


def hf_experts(block: str, gate: str, up: str, down: str) -> dict[str, tuple[Place, ...]]:
    """Experts of a Hugging Face checkpoint under `model.layers.{i}.<block>`, one tensor each as published, or all
    in one as transformers holds them in memory (and saves them with `save_original_format=False`)."""
    layer, fused = "model.layers.{i}.", "model.layers.{i}.mlp.experts."
    one, ours = f"{layer}{block}.experts.{{e}}.", "layers.{i}.moe."
    stacked = {
        gate: Place(f"{fused}gate_up_proj", stacked=True, part=(0, 2)),
        up: Place(f"{fused}gate_up_proj", stacked=True, part=(1, 2)),
        down: Place(f"{fused}down_proj", stacked=True),
    }
    return {f"{ours}router.weight": tuple(Place(f"{layer}{b}.gate.weight") for b in dict.fromkeys((block, "mlp")))} | {
        f"{ours}experts.{{e}}.{name}.weight": (Place(f"{one}{theirs}.weight"), stacked[theirs])
        for name, theirs in (("gate", gate), ("up", up), ("down", down))
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
        candidates = weights.get(weight.template, ())
        alternatives = [(place, place.name.format(i=weight.layer, e=weight.expert)) for place in candidates]
        if not alternatives:
            raise StartupError(f"This checkpoint format has no place for {weight.name}, which the config implies.")
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
    mtp = tuple(f"model.layers.{config.num_layers + i}." for i in range(config.num_mtp_layers))
    others = [n for n in stored if n not in used and not n.startswith(mtp)]
    _refuse("has, unexpectedly,", [n for n in others if not ignorable.search(n)])
    return plan


def _refuse(verb: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(name if name.isprintable() else repr(name[:80]) for name in names[:3])
        count = "a tensor" if len(names) == 1 else f"{len(names)} tensors"
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise StartupError(f"The checkpoint {verb} {count} for this architecture: {shown}{more}.")

"""Turns a dense checkpoint's stream into that of an MoE whose experts are copies of its MLP.

The output equals the dense model's whatever the router does, so routing, permutation and expert parallelism can be
proved with real weights.
"""

import re
from collections.abc import Iterable, Iterator

import torch

from gossamer.config import ModelConfig
from gossamer.models.dummy import dummy_weight
from gossamer.ops.weights import Weight

_MLP = re.compile(r"^layers\.(\d+)\.mlp\.(gate|up|down)\.weight$")


def upcycle(
    dense: Iterable[tuple[str, Weight]], config: ModelConfig, seed: int, dtype: torch.dtype
) -> Iterator[tuple[str, Weight]]:
    """The stream of `config` (with its MoEConfig) from the dense model's; all experts of a layer share one tensor."""
    moe = config.moe
    if moe is None:
        raise ValueError("upcycle needs a config with experts")
    held: dict[str, Weight] = {}
    for name, weight in dense:
        match = _MLP.match(name)
        if match is None:
            yield name, weight
            continue
        held[match[2]] = weight
        if len(held) < 3:
            continue
        prefix = f"layers.{match[1]}.moe."
        router = f"{prefix}router.weight"
        yield router, dummy_weight(router, (moe.num_experts, config.hidden_size), seed, dtype)
        for expert in range(moe.num_experts):
            for part in ("gate", "up", "down"):
                yield f"{prefix}experts.{expert}.{part}.weight", held[part]
        held = {}

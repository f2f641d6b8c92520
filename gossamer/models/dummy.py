"""Weights that no checkpoint has: seeded random ones for `--load-format dummy`, and the experts of an upcycled model.

A weight depends on the seed, its own name and the kind of device it is drawn on only: every rank and order of loading
draws the same. Activations keep their scale from layer to layer, so that tokens spread over the experts.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator
from statistics import NormalDist

import torch

from gossamer.config import ModelConfig, MoEConfig, zipf_exponent
from gossamer.models.shapes import Shape, expected_shapes
from gossamer.ops.weights import Weight

BIAS_STD = 0.02
# The likeliest expert under zipf: a top-k choice cannot take one more often than always.
MAX_POPULARITY = 0.98
_MLP = re.compile(r"^layers\.(\d+)\.mlp\.(gate|up|down)\.weight$")


def dummy_weights(
    config: ModelConfig, seed: int, dtype: torch.dtype, device: torch.device | str = "cpu", routing: str = "uniform"
) -> Iterator[tuple[str, torch.Tensor]]:
    """The canonical stream of a model that exists only as a config, drawn on `device`.

    `routing` is `uniform`, or `zipf:S`: the expert of rank r of a layer is chosen about in proportion to r^-S.
    """
    exponent = zipf_exponent(routing)
    # A tied embedding is the head too, whose logits want unit variance; but routers want to tell tokens apart.
    embed_std = config.hidden_size**-0.5 if config.tie_word_embeddings and config.moe is None else 1.0
    for name, shape in expected_shapes(config).items():
        std = embed_std if name == "embed.weight" else None
        if name.endswith(".o.weight"):
            # Attention averages over a sequence. Undamped, what its tokens have in common grows with every layer until
            # all of them choose the same experts.
            std = (2 * config.num_layers * shape[1]) ** -0.5
        weight = draw(torch.empty(shape, dtype=dtype, device=device), name, seed, std)
        if exponent and config.moe is not None:
            _add_popularity(weight, name, config.moe, seed, exponent)
        yield name, weight


def dummy_weight(name: str, shape: Shape, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """One weight by itself, on the CPU."""
    return draw(torch.empty(shape, dtype=dtype), name, seed)


def draw(out: torch.Tensor, name: str, seed: int, std: float | None = None) -> torch.Tensor:
    """Fills `out` in place and returns it: ones for a norm, N(0, std) else.

    std is 1 / sqrt(fan-in) for a matrix [rows, fan-in], so that inputs of unit variance give outputs of unit
    variance: a router's logits too, which chooses every expert about equally often.
    """
    if name.endswith("norm.weight"):
        return out.fill_(1.0)
    if std is None:
        std = out.shape[-1] ** -0.5 if out.ndim > 1 else BIAS_STD
    generator = torch.Generator(out.device).manual_seed(_number(f"{seed}:{name}"))
    return out.normal_(0.0, std, generator=generator)


def popularity(num_experts: int, top_k: int, exponent: float) -> list[float]:
    """The probability that a token chooses the expert of rank 1, 2, ...: min(cap, c r^-exponent), of sum top_k."""
    falling = [rank**-exponent for rank in range(1, num_experts + 1)]
    num_capped = 0
    scale = top_k / sum(falling)
    while num_capped < min(top_k, num_experts - 1) and scale * falling[num_capped] > MAX_POPULARITY:
        num_capped += 1
        scale = (top_k - num_capped * MAX_POPULARITY) / sum(falling[num_capped:])
    return [MAX_POPULARITY] * num_capped + [min(scale * f, MAX_POPULARITY) for f in falling[num_capped:]]


def expert_ranks(layer: int, num_experts: int, seed: int) -> list[int]:
    """The experts of a layer from the most to the least popular under zipf; every layer has its own order."""
    generator = torch.Generator().manual_seed(_number(f"{seed}:{layer}:ranks"))
    ranks: list[int] = torch.randperm(num_experts, generator=generator).tolist()
    return ranks


def _add_popularity(weight: torch.Tensor, name: str, moe: MoEConfig, seed: int, exponent: float) -> None:
    """Channel 0 becomes a constant that embeddings set, no block changes, and the routers read as a bias."""
    if name == "embed.weight":
        weight[:, 0] = 1.0
    elif name.endswith((".o.weight", ".down.weight", ".o.bias", ".down.bias")):
        weight[0] = 0.0
    elif name.endswith("router.weight"):
        layer = int(name.split(".")[1])
        # The norm divides the constant by sqrt(variance): 1 of the embedding, and for each block before about 0.36
        # (silu(a) b of unit a and b) times the experts' squared weights.
        variance = 1.0 + layer * 0.4 / moe.top_k
        chances = popularity(moe.num_experts, moe.top_k, exponent)
        bias = torch.tensor([NormalDist().inv_cdf(p) for p in chances]) * variance**0.5
        weight[expert_ranks(layer, moe.num_experts, seed), 0] = bias.to(weight)


def upcycle(
    dense: Iterable[tuple[str, Weight]], config: ModelConfig, seed: int, dtype: torch.dtype
) -> Iterator[tuple[str, Weight]]:
    """The stream of `config`, with its MoEConfig, from that of a dense checkpoint: experts are copies of its MLP.

    All experts of a layer share one tensor. The output equals the dense model's whatever the router, which is random,
    does, so routing, permutation and expert parallelism can be proved with real weights.
    """
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


def _number(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

"""Seeded random weights: what `--load-format dummy` runs, and the routers of an upcycled model.

A weight depends on the seed and its own name only, so every rank, order of loading and machine draws the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from gossamer.config import ModelConfig
from gossamer.models.shapes import Shape, expected_shapes

PROJECTION_STD = 0.02


def dummy_weights(config: ModelConfig, seed: int, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """The canonical stream of a model that exists only as a config."""
    for name, shape in expected_shapes(config).items():
        yield name, dummy_weight(name, shape, seed, dtype)


def dummy_weight(name: str, shape: Shape, seed: int, dtype: torch.dtype) -> torch.Tensor:
    """Ones for a norm, N(0, 0.02) for projections and biases, N(0, 1 / sqrt(hidden)) for a router.

    A router's input has unit variance, so its logits do too: tokens spread over the experts as in a trained model.
    """
    if name.endswith("norm.weight"):
        return torch.ones(shape, dtype=dtype)
    std = shape[-1] ** -0.5 if name.endswith("router.weight") else PROJECTION_STD
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.empty(shape, dtype=torch.float32).normal_(0.0, std, generator=generator).to(dtype)

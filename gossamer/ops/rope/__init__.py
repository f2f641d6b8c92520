"""Rotary position embedding (Su et al. 2021) in the rotate-half layout of Hugging Face checkpoints."""

from __future__ import annotations

import torch

from gossamer.ops.dispatch import require_reference
from gossamer.ops.rope import reference


def apply_rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """Rotates `x` [num_tokens, num_heads, head_dim] by per-token angles.

    `cos`, `sin`: [num_tokens, 1, head_dim] with both halves filled; the first half of `sin` carries the minus sign of
    rotate-half, so that y = x * cos + roll(x, head_dim / 2) * sin.
    """
    require_reference(x, backend, "apply_rope")
    return reference.apply_rope(x, cos, sin)

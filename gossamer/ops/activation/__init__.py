"""Gated activations of the MLP."""

from __future__ import annotations

import torch

from gossamer.ops.activation import reference
from gossamer.ops.dispatch import require_reference


def silu_mul(gate_up: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """silu(gate) * up for `gate_up` [num_tokens, 2 * D] = gate || up; returns [num_tokens, D]."""
    require_reference(gate_up, backend, "silu_mul")
    return reference.silu_mul(gate_up)

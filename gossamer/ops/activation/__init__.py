"""Gated activations of the MLP."""

from __future__ import annotations

import torch

from gossamer.ops.activation import reference
from gossamer.ops.dispatch import use_kernel


def silu_mul(gate_up: torch.Tensor, *, backend: str = "auto") -> torch.Tensor:
    """silu(gate) * up for `gate_up` [num_tokens, 2 * D] = gate || up; returns [num_tokens, D]."""
    if use_kernel(gate_up, backend, "silu_mul"):
        from gossamer.ops.activation import triton

        return triton.silu_mul(gate_up)
    return reference.silu_mul(gate_up)

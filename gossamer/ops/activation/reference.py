"""Torch reference of the gated activations."""

import torch
import torch.nn.functional as F


def gated_activation(gate: torch.Tensor, up: torch.Tensor, swiglu: tuple[float, float] | None) -> torch.Tensor:
    if swiglu is None:
        return F.silu(gate).mul_(up)
    alpha, limit = swiglu
    gate = gate.clamp(max=limit)
    return torch.sigmoid(alpha * gate).mul_(gate).mul_(up.clamp(-limit, limit) + 1.0)


def silu_mul(gate_up: torch.Tensor, swiglu: tuple[float, float] | None = None) -> torch.Tensor:
    gate, up = gate_up.chunk(2, -1)
    return gated_activation(gate, up, swiglu)

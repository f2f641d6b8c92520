"""The gated MLP: down(silu(gate(x)) * up(x)), gate and up as one product."""

from __future__ import annotations

import torch

from gossamer.layers.linear import Linear
from gossamer.ops.activation import silu_mul


class GatedMLP:
    """`prefix` is the canonical name of the MLP or of one expert."""

    def __init__(self, prefix: str, backend: str, *, bias: bool = False) -> None:
        self.gate_up = Linear([f"{prefix}.gate", f"{prefix}.up"], bias=bias)
        self.down = Linear([f"{prefix}.down"], bias=bias)
        self.linears = [self.gate_up, self.down]
        self._backend = backend

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(silu_mul(self.gate_up(x), backend=self._backend))

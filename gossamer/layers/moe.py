"""The routed-experts layer: router, top-k choice, grouped expert MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gossamer.config import MoEConfig
from gossamer.layers.linear import Linear
from gossamer.layers.mlp import GatedMLP
from gossamer.ops.moe import grouped_mlp, route_topk


class MoELayer:
    """The router stays dense and in fp32 (TECHNIQUES 1): its ties and near-ties choose experts."""

    def __init__(self, config: MoEConfig, layer: int, backend: str) -> None:
        name = f"layers.{layer}.moe"
        self.router_name = f"{name}.router.weight"
        self.router: torch.Tensor | None = None
        self.experts = [GatedMLP(f"{name}.experts.{e}", backend) for e in range(config.num_experts)]
        self.linears: list[Linear] = [linear for expert in self.experts for linear in expert.linears]
        self._config = config
        self._backend = backend

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.router is None:
            raise RuntimeError(f"{self.router_name} used before it was loaded")
        config = self._config
        weights, ids = route_topk(
            F.linear(x.float(), self.router),
            config.top_k,
            renormalize=config.renormalize,
            score_func=config.score_func,
            backend=self._backend,
        )
        return grouped_mlp(x, weights, ids, self.experts, backend=self._backend)

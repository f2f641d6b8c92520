"""The routed-experts layer: router, top-k choice, grouped expert MLP."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gossamer.config import MoEConfig
from gossamer.layers.linear import Linear
from gossamer.layers.mlp import GatedMLP
from gossamer.ops.moe import grouped_mlp, route_topk


class ExpertUse:
    """Counts on the device which experts a layer chooses; safe inside a CUDA graph. Ids below 0 are padding."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.tokens = torch.zeros(num_experts, dtype=torch.int64, device=device)
        """Choices of each expert in all."""
        self.touched = torch.zeros(2, dtype=torch.int64, device=device)
        """Distinct experts per step summed over steps, and the number of steps."""

    def add(self, topk_ids: torch.Tensor) -> None:
        """topk_ids [num_tokens, top_k] of one step."""
        ids = topk_ids.flatten().long()
        counts = torch.zeros_like(self.tokens).scatter_add_(0, ids.clamp_min(0), (ids >= 0).long())
        self.tokens += counts
        self.touched += torch.stack([(counts > 0).sum(), torch.ones_like(self.touched[1])])


class MoELayer:
    """The router stays dense and in fp32 (TECHNIQUES 1): its ties and near-ties choose experts."""

    def __init__(self, config: MoEConfig, layer: int, backend: str) -> None:
        name = f"layers.{layer}.moe"
        self.router_name = f"{name}.router.weight"
        self.router: torch.Tensor | None = None
        self.experts = [GatedMLP(f"{name}.experts.{e}", backend) for e in range(config.num_experts)]
        self.linears: list[Linear] = [linear for expert in self.experts for linear in expert.linears]
        self.use: ExpertUse | None = None
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
        if self.use is not None:
            self.use.add(ids)
        return grouped_mlp(x, weights, ids, self.experts, backend=self._backend)

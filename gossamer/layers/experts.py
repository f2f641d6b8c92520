"""The experts of one MoE layer as two stacked tensors, the form that a GPU's grouped products take."""

from __future__ import annotations

import re

import torch

from gossamer.config import MoEConfig
from gossamer.layers.linear import Part, WeightFormat, dense
from gossamer.ops.moe import moe_mlp

_NAME = re.compile(r".*\.experts\.(\d+)\.(gate|up|down)\.weight")


class StackedExperts:
    """w_gate_up [num_experts, 2 * intermediate, hidden], rows of gate and up in turn; w_down [num_experts, hidden,
    intermediate]: the layout of `ops.moe.moe_mlp`.

    Both are allocated with the first tensor that comes and filled in place: a layer is never held twice.
    """

    def __init__(self, prefix: str, config: MoEConfig, backend: str) -> None:
        self.names = [
            f"{prefix}.experts.{e}.{part}.weight" for e in range(config.num_experts) for part in ("gate", "up", "down")
        ]
        self.w_gate_up: torch.Tensor | None = None
        self.w_down: torch.Tensor | None = None
        self._config = config
        self._backend = backend

    def load(self, name: str, part: Part, fmt: WeightFormat) -> None:
        """Takes one expert's matrix by canonical name."""
        match = _NAME.fullmatch(name)
        if match is None:
            raise ValueError(f"{name} is no expert's weight")
        expert, kind = int(match[1]), match[2]
        num_experts, width = self._config.num_experts, self._config.intermediate_size
        hidden = part.shape[0] if kind == "down" else part.shape[1]
        if self.w_gate_up is None or self.w_down is None:
            self.w_gate_up = torch.empty(num_experts, 2 * width, hidden, dtype=fmt.dtype, device=fmt.device)
            self.w_down = torch.empty(num_experts, hidden, width, dtype=fmt.dtype, device=fmt.device)
        if kind == "down":
            self.w_down[expert].copy_(dense(part, fmt))
        else:
            self.w_gate_up[expert].view(width, 2, hidden)[:, int(kind == "up")].copy_(dense(part, fmt))

    def tensors(self) -> list[torch.Tensor]:
        return [t for t in (self.w_gate_up, self.w_down) if t is not None]

    def __call__(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        if self.w_gate_up is None or self.w_down is None:
            raise RuntimeError(f"{self.names[0]} used before it was loaded")
        return moe_mlp(x, topk_weights, topk_ids, self.w_gate_up, self.w_down, backend=self._backend)

"""The routed-experts layer: router, top-k choice, grouped expert MLP."""

from functools import partial
from typing import Any

import torch

from gossamer.config import MoEConfig
from gossamer.layers.experts import StackedExperts
from gossamer.layers.linear import Linear
from gossamer.layers.mlp import GatedMLP
from gossamer.layers.residual import Pending, ResidualStream
from gossamer.ops.moe import grouped_mlp, router


class ExpertUse:
    """Counts on the device which experts a layer chooses; safe inside a CUDA graph. Other ids are padding."""

    def __init__(self, num_experts: int, device: torch.device) -> None:
        self.tokens = torch.zeros(num_experts, dtype=torch.int64, device=device)
        """Choices of each expert in all."""
        self.touched = torch.zeros(2, dtype=torch.int64, device=device)
        """Distinct experts per step summed over steps, and the number of steps."""

    def add(self, topk_ids: torch.Tensor) -> None:
        """topk_ids [num_tokens, top_k] of one step."""
        ids = topk_ids.flatten().long()
        last = self.tokens.numel() - 1
        valid = (ids >= 0) & (ids <= last)
        counts = torch.zeros_like(self.tokens).scatter_add_(0, ids.clamp(0, last), valid.long())
        self.tokens += counts
        distinct = (counts > 0).sum()
        self.touched += torch.stack([distinct, distinct.clamp_max(1)])  # a step of padding alone warms up: none


class MoELayer:
    """The router stays dense and in fp32 (TECHNIQUES 1): its ties and near-ties choose experts.

    `stacked` experts are two tensors, for grouped kernels; else each is an MLP of its own, which may be quantised.
    """

    def __init__(
        self, config: MoEConfig, layer: int, backend: str, *, stacked: bool = False,
        swiglu: tuple[float, float] | None = None,
    ) -> None:  # fmt: skip
        name = f"layers.{layer}.moe"
        self.router_name = f"{name}.router.weight"
        self.bias_name = f"{name}.router.bias" if config.choice_bias else None
        self.router: torch.Tensor | None = None
        self.bias: torch.Tensor | None = None
        self.stacked = StackedExperts(name, config, backend, swiglu) if stacked else None
        num_apart = 0 if stacked else config.num_experts
        self.experts = [GatedMLP(f"{name}.experts.{e}", backend, swiglu=swiglu) for e in range(num_apart)]
        # Stacked, shared experts of the others' width are the last of the stack and cost no launch; else an MLP.
        apart = config.shared_width or (config.num_shared and not stacked)
        self.shared = GatedMLP(f"{name}.shared", backend, swiglu=swiglu) if apart else None
        mlps = [*self.experts, *([self.shared] if self.shared else [])]
        self.linears: list[Linear] = [linear for mlp in mlps for linear in mlp.linears]
        self.use: ExpertUse | None = None
        self._arrivals: torch.Tensor | None = None
        self.num_experts = config.num_experts
        self._config = config
        self._backend = backend

    def of_stream(
        self, stream: ResidualStream, norm: torch.Tensor, token_slots: torch.Tensor
    ) -> torch.Tensor | Pending:
        """The layer of the normed residual stream: the router sees what the norm gives, FP8 experts its FP8 form."""
        stacked, options = self.stacked, self._options(norm.device)
        fp8 = stacked is not None and stacked.is_fp8
        weights, ids, x, quantized = stream.routed(
            norm, *self._router(), **options, token_slots=token_slots, quantize=fp8
        )
        if self.use is not None:
            self.use.add(ids)
        if stacked is None:
            return self._separate(x, weights, ids)
        inputs = (x, weights, ids, quantized)
        if self.shared is not None:
            return stacked(*inputs).add_(self.shared(x))
        fused = partial(stacked.add_rms_norm, *inputs, quantize=True) if fp8 else None
        return Pending(partial(stacked, *inputs), partial(stacked.add_rms_norm, *inputs), fused)

    def __call__(self, x: torch.Tensor, token_slots: torch.Tensor | None = None) -> torch.Tensor:
        """x [num_tokens, hidden]; int32 token_slots [num_tokens], -1 for padding, which then reads no expert."""
        options = self._options(x.device)
        weights, ids = router(x, *self._router(), **options, token_slots=token_slots, backend=self._backend)
        if self.use is not None:
            self.use.add(ids)
        if self.stacked is not None:
            routed = self.stacked(x, weights, ids)
            return routed if self.shared is None else routed.add_(self.shared(x))
        return self._separate(x, weights, ids)

    def _separate(self, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        routed = grouped_mlp(x, weights, ids, self.experts, backend=self._backend)
        return routed if self.shared is None else routed.add_(self.shared(x))

    def _router(self) -> tuple[torch.Tensor, int]:
        if self.router is None:
            raise RuntimeError(f"{self.router_name} used before it was loaded")
        return self.router, self._config.top_k

    def _options(self, device: torch.device) -> dict[str, Any]:
        if self._arrivals is None:
            self._arrivals = torch.zeros(16, dtype=torch.int32, device=device)
        config, names = self._config, ("renormalize", "score_func", "num_groups", "topk_groups", "group_top")
        options = {"bias": self.bias, "arrivals": self._arrivals, "scale": config.routed_scale}
        options["num_shared"] = 0 if self.stacked is None else config.num_shared
        return options | {name: getattr(config, name) for name in names}

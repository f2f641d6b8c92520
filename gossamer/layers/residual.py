"""The residual stream of a pre-norm model: what a sublayer adds waits until the next norm, which takes it in."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from gossamer.layers.linear import DenseWeight, Fp8Weight, Linear
from gossamer.ops.gemm import add_rms_norm_linear, use_fused_norm
from gossamer.ops.moe import add_rms_norm_router, router
from gossamer.ops.norm import add_rms_norm, add_rms_norm_fp8, rms_norm
from gossamer.ops.quantize_fp8 import Quantized, quantize_activation

# The sum costs a product of this many rows less than it costs the norm that follows.
ACCUMULATE_ROWS = 512


class Pending(NamedTuple):
    """What a sublayer adds, not computed yet: by itself, or together with the sum and the norm that follow it."""

    alone: Callable[[], torch.Tensor]
    add_rms_norm: Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]
    """Of residual (changed in place), norm weight and epsilon: the normed rows."""
    add_rms_norm_fp8: Callable[[torch.Tensor, torch.Tensor, float], Quantized] | None = None
    """Their FP8 form instead."""


class ResidualStream:
    """x [num_tokens, hidden], changed in place. Adding, norm and product are one launch where rows are few."""

    def __init__(self, x: torch.Tensor, eps: float, backend: str) -> None:
        self._x = x
        self._added: torch.Tensor | Pending | None = None
        self._eps = eps
        self._backend = backend

    @property
    def dtype(self) -> torch.dtype:
        return self._x.dtype

    def keep(self, rows: torch.Tensor) -> None:
        """Drops all other rows. Nothing may wait to be added."""
        self._x = self._x[rows]

    def add(self, delta: torch.Tensor | Pending) -> None:
        self._added = delta

    def add_product(self, linear: Linear, x: torch.Tensor) -> None:
        """Adds `linear` of x [num_tokens, in]; where rows are many the product itself adds to the stream."""
        held = linear.weight
        if isinstance(held, DenseWeight) and held.bias is None and x.shape[0] >= ACCUMULATE_ROWS:
            self._x.addmm_(x, held.weight.t())
        else:
            self.add(linear(x))

    def _take(self) -> torch.Tensor | None:
        added, self._added = self._added, None
        return added.alone() if isinstance(added, Pending) else added

    def normed(self, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm of the stream."""
        if isinstance(self._added, Pending):
            pending, self._added = self._added, None
            return pending.add_rms_norm(self._x, weight, self._eps)
        added = self._take()
        if added is None:
            return rms_norm(self._x, weight, self._eps, backend=self._backend)
        return add_rms_norm(added, self._x, weight, self._eps, backend=self._backend)

    def product(self, weight: torch.Tensor, linear: Linear) -> torch.Tensor:
        """`linear` of the normed stream."""
        held = linear.weight
        if isinstance(held, Fp8Weight) and held.folds(self._x.shape[0]):
            return self._folded(weight, held.weight, held.bias, (held.scale, held.ue8m0))
        if isinstance(held, Fp8Weight):
            pending = self._added
            if isinstance(pending, Pending) and pending.add_rms_norm_fp8 and not (held.per_token or held.ue8m0):
                self._added = None
                return held.quantized(*pending.add_rms_norm_fp8(self._x, weight, self._eps), self._x.dtype)
            added = self._take()
            q, scales, _ = add_rms_norm_fp8(
                self._x if added is None else added, None if added is None else self._x, weight, self._eps,
                per_token=held.per_token, ue8m0=held.ue8m0, backend=self._backend,
            )  # fmt: skip
            return held.quantized(q, scales, self._x.dtype)
        if isinstance(held, DenseWeight) and held.kernels and use_fused_norm(self._x.shape[0], held.weight):
            return self._folded(weight, held.weight, held.bias)
        return linear(self.normed(weight))

    def _folded(
        self, norm: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None,
        fp8: tuple[torch.Tensor, bool] | None = None,
    ) -> torch.Tensor:  # fmt: skip
        added = self._take()
        result, self._x, _ = add_rms_norm_linear(
            self._x if added is None else added, None if added is None else self._x, norm, self._eps, weight, bias,
            fp8=fp8, backend=self._backend,
        )  # fmt: skip
        return result

    def routed(
        self, weight: torch.Tensor, router_weight: torch.Tensor, top_k: int, *, quantize: bool, **options: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Quantized | None]:
        """`ops.moe.router` of the normed stream with its `options`, the normed rows, and their FP8 form."""
        added, backend = self._take(), self._backend
        if added is None:
            normed = self.normed(weight)
            quantized = quantize_activation(normed, backend=backend) if quantize else None
            return *router(normed, router_weight, top_k, backend=backend, **options), normed, quantized
        weights, ids, self._x, normed, quantized = add_rms_norm_router(
            added, self._x, weight, self._eps, router_weight, top_k, quantize=quantize, backend=backend, **options
        )
        return weights, ids, normed, quantized

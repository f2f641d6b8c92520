"""The residual stream of a pre-norm model: what a sublayer adds waits until the next norm, which takes it in."""

from __future__ import annotations

import torch

from gossamer.layers.linear import DenseWeight, Fp8Weight, Linear
from gossamer.ops.gemm import add_rms_norm_linear, use_fused_norm
from gossamer.ops.norm import add_rms_norm, add_rms_norm_fp8, rms_norm


class ResidualStream:
    """x [num_tokens, hidden], changed in place. Adding, norm and product are one launch where rows are few."""

    def __init__(self, x: torch.Tensor, eps: float, backend: str) -> None:
        self._x = x
        self._added: torch.Tensor | None = None
        self._eps = eps
        self._backend = backend

    def add(self, delta: torch.Tensor) -> None:
        self._added = delta

    def normed(self, weight: torch.Tensor) -> torch.Tensor:
        """RMSNorm of the stream."""
        added, self._added = self._added, None
        if added is None:
            return rms_norm(self._x, weight, self._eps, backend=self._backend)
        return add_rms_norm(added, self._x, weight, self._eps, backend=self._backend)

    def normed_fp8(
        self, weight: torch.Tensor, *, keep_normed: bool = True, per_token: bool = False, ue8m0: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """RMSNorm of the stream as `ops.norm.add_rms_norm_fp8` returns it."""
        added, self._added = self._added, None
        return add_rms_norm_fp8(
            self._x if added is None else added,
            None if added is None else self._x,
            weight,
            self._eps,
            keep_normed=keep_normed,
            per_token=per_token,
            ue8m0=ue8m0,
            backend=self._backend,
        )

    def product(self, weight: torch.Tensor, linear: Linear) -> torch.Tensor:
        """`linear` of the normed stream."""
        dense = linear.weight
        if isinstance(dense, Fp8Weight):
            q, scales, _ = self.normed_fp8(weight, keep_normed=False, per_token=dense.per_token, ue8m0=dense.ue8m0)
            return dense.quantized(q, scales, self._x.dtype)
        if not (isinstance(dense, DenseWeight) and dense.kernels and use_fused_norm(*self._x.shape)):
            return linear(self.normed(weight))
        added, self._added = self._added, None
        result, self._x, _ = add_rms_norm_linear(
            self._x if added is None else added,
            None if added is None else self._x,
            weight,
            self._eps,
            dense.weight,
            dense.bias,
            backend=self._backend,
        )
        return result

"""The gated MLP: down(silu(gate(x)) * up(x)), gate and up as one product; or with a clamped SwiGLU."""

import torch

from gossamer.layers.linear import Fp8Weight, Linear
from gossamer.layers.residual import ResidualStream
from gossamer.ops.activation import silu_mul, silu_mul_fp8


class GatedMLP:
    """`prefix` is the canonical name of the MLP or of one expert."""

    def __init__(
        self, prefix: str, backend: str, *, bias: bool = False, swiglu: tuple[float, float] | None = None
    ) -> None:
        self.gate_up = Linear([f"{prefix}.gate", f"{prefix}.up"], bias=bias)
        self.down = Linear([f"{prefix}.down"], bias=bias)
        self.linears = [self.gate_up, self.down]
        self._backend = backend
        self._swiglu = swiglu

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self._down(self.gate_up(x))

    def of_stream(self, stream: ResidualStream, norm: torch.Tensor, _: torch.Tensor) -> torch.Tensor:
        """The MLP of the normed residual stream."""
        return self._down(stream.product(norm, self.gate_up))

    def _down(self, gate_up: torch.Tensor) -> torch.Tensor:
        down, swiglu, backend = self.down.weight, self._swiglu, self._backend
        if isinstance(down, Fp8Weight):
            options = {"per_token": down.per_token, "ue8m0": down.ue8m0}
            return down.quantized(*silu_mul_fp8(gate_up, swiglu=swiglu, **options, backend=backend), gate_up.dtype)
        return down(silu_mul(gate_up, swiglu=swiglu, backend=backend))

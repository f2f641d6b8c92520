"""The experts of one MoE layer as two stacked tensors, the form that a GPU's grouped products take."""

import functools
import logging
import re
from typing import Any

import torch

from gossamer.config import MoEConfig
from gossamer.core import StartupError
from gossamer.layers.linear import Part, WeightFormat, dense, to_fp8
from gossamer.ops.gemm_fp8 import FP8_BLOCK, fp8_moe_mlp, fp8_moe_mlp_add_rms_norm, quantize_weight
from gossamer.ops.moe import moe_mlp, moe_mlp_add_rms_norm
from gossamer.ops.quantize_fp8 import Quantized
from gossamer.ops.weights import Fp8Tensor, QuantizedTensor

_LOGGER = logging.getLogger(__name__)
_NAME = re.compile(r".*\.experts\.(\d+)\.(gate|up|down)\.weight")


class StackedExperts:
    """w_gate_up [num_experts, 2 * intermediate, hidden], rows of gate and up in turn; w_down [num_experts, hidden,
    intermediate]: the layout of `ops.moe.moe_mlp`. Shared experts are the last ones.

    FP8 experts have scales of 128 x 128 blocks of gate, up and down each, as `ops.gemm_fp8.fp8_moe_mlp` wants them.
    All is allocated with the first tensor that comes and filled in place: a layer is never held twice.
    """

    def __init__(self, prefix: str, config: MoEConfig, backend: str, swiglu: tuple[float, float] | None = None) -> None:
        parts = ("gate", "up", "down")
        self.names = [f"{prefix}.experts.{e}.{part}.weight" for e in range(config.num_experts) for part in parts]
        self.names += [f"{prefix}.shared.{part}.weight" for part in parts if config.num_shared]
        self.w_gate_up: torch.Tensor | None = None
        self.w_down: torch.Tensor | None = None
        self.gate_up_scales: torch.Tensor | None = None
        self.down_scales: torch.Tensor | None = None
        self._config = config
        self._options: dict[str, Any] = {"swiglu": swiglu, "backend": backend}

    def load(self, name: str, part: Part, fmt: WeightFormat) -> None:
        """Takes one expert's matrix, or that of all shared experts, by canonical name."""
        match = _NAME.fullmatch(name)
        if match is not None:
            self._load(name, int(match[1]), match[2], part, fmt)
            return
        kind, width = name.split(".")[-2], self._config.intermediate_size
        for i in range(self._config.num_shared):  # a checkpoint holds them as one MLP
            if isinstance(part, QuantizedTensor):
                raise StartupError(f"{name} is {part.ggml_type}, which shared experts cannot be.")
            piece = part.narrow(int(kind == "down"), i * width, width)
            self._load(name, self._config.num_experts + i, kind, piece, fmt)

    def _load(self, name: str, expert: int, kind: str, part: Part, fmt: WeightFormat) -> None:
        weight = to_fp8(part, fmt) if fmt.quantization == "fp8" else dense(part, fmt)
        if isinstance(weight, Fp8Tensor) and weight.kind == "channel":
            _say_requantised()
            scaled = quantize_weight(weight.dequantize(), backend=fmt.backend)
            weight = Fp8Tensor(*scaled, (FP8_BLOCK, FP8_BLOCK), weight.ue8m0)
        data = weight.data if isinstance(weight, Fp8Tensor) else dense(weight, fmt)
        width = self._config.intermediate_size
        hidden = part.shape[0] if kind == "down" else part.shape[1]
        if self.w_gate_up is None or self.w_down is None:
            self._allocate(hidden, data.dtype, fmt.device)
        if self.w_gate_up is None or self.w_down is None or self.w_down.dtype != data.dtype:
            raise StartupError(f"{name} is {data.dtype}, other experts of its layer are not.\nUse --quantization none.")
        if kind == "down":
            self.w_down[expert].copy_(data)
        else:
            self.w_gate_up[expert].view(width, 2, hidden)[:, int(kind == "up")].copy_(data)
        if isinstance(weight, Fp8Tensor) and self.gate_up_scales is not None and self.down_scales is not None:
            place = self.down_scales[expert] if kind == "down" else self.gate_up_scales[expert, int(kind == "up")]
            place.copy_(weight.scale)  # a tensor's one scale is that of each block

    def _allocate(self, hidden: int, dtype: torch.dtype, device: torch.device) -> None:
        num_experts, width = self._config.num_experts + self._config.num_shared, self._config.intermediate_size
        self.w_gate_up = torch.empty(num_experts, 2 * width, hidden, dtype=dtype, device=device)
        self.w_down = torch.empty(num_experts, hidden, width, dtype=dtype, device=device)
        if dtype == torch.float8_e4m3fn:
            across, down = -(-width // FP8_BLOCK), -(-hidden // FP8_BLOCK)
            self.gate_up_scales = torch.empty(num_experts, 2, across, down, device=device)
            self.down_scales = torch.empty(num_experts, down, across, device=device)

    def tensors(self) -> list[torch.Tensor]:
        held = (self.w_gate_up, self.w_down, self.gate_up_scales, self.down_scales)
        return [t for t in held if t is not None]

    @property
    def is_fp8(self) -> bool:
        return self.gate_up_scales is not None

    def __call__(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, quantized: Quantized | None = None
    ) -> torch.Tensor:
        """quantized: x as 1 x 128 groups, of which FP8 experts take it."""
        w_gate_up, w_down, scales = self._weights()
        inputs = x, topk_weights, topk_ids, w_gate_up
        if scales is None:
            return moe_mlp(*inputs, w_down, **self._options)
        return fp8_moe_mlp(*inputs, scales[0], w_down, scales[1], quantized=quantized, **self._options)

    def add_rms_norm(
        self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, quantized: Quantized | None,
        residual: torch.Tensor, norm: torch.Tensor, eps: float, *, quantize: bool = False,
    ) -> Any:  # fmt: skip
        """The norm of residual + what the experts make of x; the residual becomes the sum.

        quantize: of FP8 experts, as 1 x 128 groups.
        """
        w_gate_up, w_down, scales = self._weights()
        inputs, after = (x, topk_weights, topk_ids, w_gate_up), (residual, norm, eps)
        if scales is None:
            return moe_mlp_add_rms_norm(*inputs, w_down, *after, **self._options)
        options = self._options | {"quantized": quantized, "quantize": quantize}
        return fp8_moe_mlp_add_rms_norm(*inputs, scales[0], w_down, scales[1], *after, **options)

    def _weights(self) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor] | None]:
        if self.w_gate_up is None or self.w_down is None:
            raise RuntimeError(f"{self.names[0]} used before it was loaded")
        if self.gate_up_scales is None or self.down_scales is None:
            return self.w_gate_up, self.w_down, None
        return self.w_gate_up, self.w_down, (self.gate_up_scales, self.down_scales)


@functools.cache
def _say_requantised() -> None:
    _LOGGER.warning(
        "The checkpoint's experts have a scale per channel. Grouped FP8 products take blocks of 128 x 128: the experts "
        "are quantised once more, which costs some precision. --quantization none keeps it."
    )

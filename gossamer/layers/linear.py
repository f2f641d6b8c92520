"""Linear layers whose weights are held dense, as FP8, int8, or int4: one module, the format is its parameter.

Merged projections (q, k, v; gate, up) are loaded part by part from the unfused canonical checkpoint names.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from gossamer.ops import gemm_weight_only as wo
from gossamer.ops.cpu import wide_linear, wide_products
from gossamer.ops.gemm import few_row_linear, use_few_row, use_fused_norm
from gossamer.ops.gemm.packed import pack_weight, packed_linear, packing_supported
from gossamer.ops.gemm_fp8 import FP8_BLOCK, Fp8Kind, fp8_linear, quantize_activation, quantize_weight
from gossamer.ops.weights import Fp8Tensor, QuantizedTensor

Quantization = Literal["none", "int8", "int4", "fp8"]
Part = torch.Tensor | QuantizedTensor | Fp8Tensor

# From this many rows on, torch's packed int4 products on a CPU lose to a dense product: they take four rows at a time.
# Beside packed bf16 they are about equal at 8, 1.1-1.6x slower at 16 and 2.5x at 512 (SmolLM2's shapes); beside fp32
# with bf16 weights widened in every call, on a CPU without bf16 products, 0.6-1.3x at 32 and 1.0-1.5x at 64.
DENSE_FROM_ROWS = 9
WIDE_DENSE_FROM_ROWS = 64
# On such a CPU bf16 products lose to widened ones from 8 (SmolLM2's shapes) to 24 rows (8192 x 2048) on.
WIDE_FROM_ROWS = 12


@dataclass(slots=True)
class Weight:
    """A weight matrix in some storage format: x [M, K] -> x W^T [M, N]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def tensors(self) -> list[torch.Tensor]:
        """All that it holds, for the memory ledger."""
        held = [getattr(self, field.name) for field in dataclasses.fields(self)]
        inner = [tensor for part in held if isinstance(part, Weight) for tensor in part.tensors()]
        return [part for part in held if isinstance(part, torch.Tensor)] + inner


@dataclass(slots=True)
class DenseWeight(Weight):
    weight: torch.Tensor
    bias: torch.Tensor | None = None
    kernels: bool = False
    """Multiply few rows with our kernel, many with the library's."""

    def __call__(self, x: torch.Tensor, out_dtype: torch.dtype | None = None) -> torch.Tensor:
        if self.kernels and use_few_row(x.shape[0], *self.weight.shape):
            return few_row_linear(x, self.weight, self.bias, out_dtype=out_dtype)
        if x.is_cuda and x.element_size() == 2 and out_dtype == torch.float32 and self.bias is None:
            return torch.mm(x, self.weight.t(), out_dtype=out_dtype)
        linear = wide_linear if x.shape[0] >= WIDE_FROM_ROWS and wide_products(x) else F.linear
        y = linear(x, self.weight, self.bias)
        return y if out_dtype is None else y.to(out_dtype)


@dataclass(slots=True)
class PackedWeight(Weight):
    """Dense bf16 in the layout of the CPU's matrix library."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return packed_linear(x, self.weight, self.bias)


def dense_weight(
    weight: torch.Tensor, bias: torch.Tensor | None = None, *, kernels: bool = False
) -> DenseWeight | PackedWeight:
    """The weight in the layout that serves dense products best where it lies."""
    if packing_supported(weight.dtype, weight.device):
        return PackedWeight(pack_weight(weight), bias)
    return DenseWeight(weight, bias, kernels)


@dataclass(slots=True)
class IntegerWeight(Weight):
    """Weights alone as integers, for few rows; `dense`, if kept, serves the products of `dense_from(x)` rows."""

    weight: torch.Tensor
    scale: torch.Tensor
    bias: torch.Tensor | None = None
    dense: Weight | None = None

    def dense_from(self, x: torch.Tensor) -> int:
        return WIDE_DENSE_FROM_ROWS if wide_products(x) else DENSE_FROM_ROWS

    def product(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.dense is not None and x.shape[0] >= self.dense_from(x):
            return self.dense(x)
        y = self.product(x)
        return y if self.bias is None else y.add_(self.bias)


class Int8Weight(IntegerWeight):
    """Per-channel int8."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return wo.int8_linear(x, self.weight, self.scale)


class Int8HeadWeight(IntegerWeight):
    """Per-channel int8 for few rows and many outputs, multiplied as integers; products are fp32."""

    def dense_from(self, x: torch.Tensor) -> int:
        return 4  # a dense product beats the two integer rows for each row of `int8_linear_exact`

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return wo.int8_linear_exact(x, self.weight, self.scale)


class Int4Weight(IntegerWeight):
    """Group-wise int4; `scale` holds the zeros too."""

    def product(self, x: torch.Tensor) -> torch.Tensor:
        return wo.int4_linear(x, self.weight, self.scale, x.shape[1] // self.scale.shape[0])


@dataclass(slots=True)
class Fp8Weight(Weight):
    """E4M3 weight and activations: 1x128 groups against 128x128 blocks, or whole rows against channels or the tensor.

    `quantized` takes what a fused producer made already.
    """

    weight: torch.Tensor
    scale: torch.Tensor
    kind: Fp8Kind
    bias: torch.Tensor | None = None
    ue8m0: bool = False
    backend: str = "auto"

    @property
    def per_token(self) -> bool:
        """Whether a token's activations share one scale."""
        return self.kind != "block"

    def folds(self, num_rows: int) -> bool:
        """Whether the product of few rows quantises them within."""
        return self.kind == "block" and self.backend != "reference" and use_fused_norm(num_rows, self.weight)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.folds(x.shape[0]):
            return few_row_linear(x, self.weight, self.bias, fp8=(self.scale, self.ue8m0), backend=self.backend)
        q, scales = quantize_activation(x, per_token=self.per_token, ue8m0=self.ue8m0, backend=self.backend)
        return self.quantized(q, scales, x.dtype)

    def quantized(self, q: torch.Tensor, scales: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        """q e4m3 [M, K] with scales fp32 [M, ceil(K / 128)], or [M, 1] unless `kind` is block."""
        return fp8_linear(
            q, scales, self.weight, self.scale, self.bias, out_dtype=out_dtype, kind=self.kind, backend=self.backend
        )


@dataclass(slots=True)
class SplitWeight(Weight):
    """Merged projections whose parts cannot be one matrix: their outputs side by side."""

    weights: list[Weight]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([weight(x) for weight in self.weights], dim=1)

    def tensors(self) -> list[torch.Tensor]:
        return [t for weight in self.weights for t in weight.tensors()]


@dataclass(frozen=True, slots=True)
class WeightFormat:
    """How a loader turns checkpoint tensors into weights."""

    dtype: torch.dtype
    device: torch.device
    quantization: Quantization = "none"
    keep_dense: bool = False
    """Keep a dense copy beside int8/int4 for prefill: speed for memory (a quantised CPU model only)."""
    kernels: bool = False
    """Multiply few rows with our kernels (a GPU, unless the reference was asked for)."""
    as_stored: bool = False
    """Under fp8: what the checkpoint left dense stays dense (an FP8 checkpoint)."""

    @property
    def backend(self) -> str:
        return "auto" if self.kernels else "reference"


def dense(part: Part, fmt: WeightFormat) -> torch.Tensor:
    """The part as a dense tensor of the format's dtype and device."""
    tensor = part if isinstance(part, torch.Tensor) else part.dequantize()
    return tensor.to(device=fmt.device, dtype=fmt.dtype)


def make_weight(parts: Sequence[Part], biases: Sequence[torch.Tensor], fmt: WeightFormat) -> Weight:
    """Concatenates parts [N_i, K] along N and stores them in the format's quantisation.

    Q4_0 and Q4_1 blocks become int4 without loss; shapes that the int4 operator cannot take fall to int8, then dense.
    FP8 tensors stay as they are under fp8; parts that cannot be merged with their scales become several products.
    """
    bias = torch.cat([b.to(device=fmt.device, dtype=fmt.dtype) for b in biases]) if biases else None
    num_out, num_in = sum(p.shape[0] for p in parts), parts[0].shape[1]
    if fmt.quantization == "int4" and wo.int4_supported(num_out, num_in):
        return _int4_weight(parts, bias, fmt)
    if fmt.quantization == "fp8":
        return _fp8_weight(parts, bias, fmt)
    if fmt.quantization != "none" and wo.int8_supported(num_out, num_in):
        q, scale, copy = _int8_parts(parts, bias, fmt, fmt.dtype)
        return Int8Weight(q, scale, bias, copy)
    return dense_weight(_cat([dense(p, fmt) for p in parts]), bias, kernels=fmt.kernels)


def make_head(part: Part, fmt: WeightFormat) -> Weight:
    """The projection to the vocabulary. It keeps 8 bits under int4, as quantised checkpoints do: its errors reach
    every logit. Its products may come back in fp32. Under fp8 it stays as the checkpoint has it.
    """
    if fmt.quantization == "none" or (fmt.quantization == "fp8" and isinstance(part, Fp8Tensor)):
        return make_weight([part], [], fmt)
    if fmt.quantization == "fp8":
        return dense_weight(dense(part, fmt), kernels=fmt.kernels)
    if not wo.int8_exact_supported(*part.shape):
        return make_weight([part], [], dataclasses.replace(fmt, quantization="int8"))
    q, scale, copy = _int8_parts([part], None, fmt, torch.float32)
    return Int8HeadWeight(wo.pack_int8_exact(q), scale, None, copy)


def _int8_parts(
    parts: Sequence[Part], bias: torch.Tensor | None, fmt: WeightFormat, scale_dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, Weight | None]:
    """int8 [N, K], scales [N], and the dense copy if the format wants one."""
    q, scale = wo.quantize_int8(_cat([dense(p, fmt) for p in parts]))
    scale = scale.to(scale_dtype)
    if not fmt.keep_dense:
        return q, scale, None
    # Dequantised, not the original: prefill and decode must see the same weights.
    return q, scale, dense_weight(wo.dequantize_int8(q, scale, fmt.dtype), bias)


def _int4_weight(parts: Sequence[Part], bias: torch.Tensor | None, fmt: WeightFormat) -> Int4Weight:
    triples = []
    for part in parts:
        stored = part.to_int4() if isinstance(part, QuantizedTensor) else None
        triples.append(stored if stored is not None else wo.quantize_int4(dense(part, fmt)))
    q, scale, zero = (_cat([torch.as_tensor(t[i]) for t in triples]) for i in range(3))
    packed, scale_and_zero = wo.pack_int4(q, scale, zero, fmt.dtype)
    copy = dense_weight(wo.dequantize_int4(q, scale, zero, fmt.dtype), bias) if fmt.keep_dense else None
    return Int4Weight(packed, scale_and_zero, bias, copy)


def to_fp8(part: Part, fmt: WeightFormat) -> Part:
    """The part on the format's device as E4M3 with scales of 128 x 128 blocks, or as it was stored."""
    if isinstance(part, Fp8Tensor):
        return part.to(fmt.device)
    if fmt.as_stored:
        return dense(part, fmt)
    return Fp8Tensor(*quantize_weight(dense(part, fmt), backend=fmt.backend), (FP8_BLOCK, FP8_BLOCK))


def _fp8_weight(parts: Sequence[Part], bias: torch.Tensor | None, fmt: WeightFormat) -> Weight:
    if not any(isinstance(part, Fp8Tensor) for part in parts):
        parts = [_cat([dense(part, fmt) for part in parts])]  # one matrix, whose blocks may straddle its parts
    runs: list[list[Part]] = []
    for part in (to_fp8(part, fmt) for part in parts):
        if runs and _mergeable(runs[-1][-1], part):
            runs[-1].append(part)
        else:
            runs.append([part])
    biases = bias.split([sum(p.shape[0] for p in run) for run in runs]) if bias is not None else [None] * len(runs)
    weights = [_merge(run, part_bias, fmt) for run, part_bias in zip(runs, biases, strict=True)]
    return weights[0] if len(weights) == 1 else SplitWeight(weights)


def _mergeable(last: Part, part: Part) -> bool:
    """Whether `part` can follow `last` in one matrix: its blocks of rows must begin where a block ends."""
    if not isinstance(last, Fp8Tensor) or not isinstance(part, Fp8Tensor):
        return not isinstance(last, Fp8Tensor) and not isinstance(part, Fp8Tensor)
    if "block" in (last.kind, part.kind):
        return last.kind == part.kind and last.shape[0] % FP8_BLOCK == 0
    return True


def _merge(run: Sequence[Part], bias: torch.Tensor | None, fmt: WeightFormat) -> Weight:
    parts = [part for part in run if isinstance(part, Fp8Tensor)]
    if not parts:
        return dense_weight(_cat([dense(part, fmt) for part in run]), bias, kernels=fmt.kernels)
    kind, scales = parts[0].kind, [part.scale for part in parts]
    if kind != "block" and len(parts) > 1:  # a tensor's one scale is that of each of its rows
        kind, scales = "channel", [part.scale.expand(part.shape[0], 1) for part in parts]
    return Fp8Weight(_cat([p.data for p in parts]), _cat(scales), kind, bias, parts[0].ue8m0, fmt.backend)


def _cat(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0].contiguous() if len(tensors) == 1 else torch.cat(list(tensors))


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes held, each storage counted once; of oneDNN's opaque tensors the elements, for they show no storage."""
    sizes: dict[int, int] = {}
    for t in tensors:
        held = None if t.is_mkldnn else t.untyped_storage()
        sizes[id(t) if held is None else held.data_ptr()] = t.nbytes if held is None else held.nbytes()
    return sum(sizes.values())


class Linear:
    """One projection, or several that share their input, merged into one product.

    `part_names` are canonical checkpoint names without `.weight` / `.bias`, in output order. The weight appears once
    every part was loaded.
    """

    def __init__(self, part_names: Sequence[str], *, bias: bool = False) -> None:
        self.part_names = tuple(part_names)
        self._expects = [f"{p}.weight" for p in part_names] + ([f"{p}.bias" for p in part_names] if bias else [])
        self._pending: dict[str, Part] = {}
        self.weight: Weight = _Unloaded(self.part_names)

    def expected_names(self) -> list[str]:
        return list(self._expects)

    def load(self, name: str, tensor: Part, fmt: WeightFormat) -> None:
        """Takes one of `expected_names`; builds the weight with the last of them."""
        self._pending[name] = tensor
        if len(self._pending) == len(self._expects):
            weights = [self._pending[f"{p}.weight"] for p in self.part_names]
            biases = [b for p in self.part_names if isinstance(b := self._pending.get(f"{p}.bias"), torch.Tensor)]
            self.weight = make_weight(weights, biases, fmt)
            self._pending = {}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight(x)


@dataclass(slots=True)
class _Unloaded(Weight):
    names: tuple[str, ...]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        raise RuntimeError(f"{', '.join(self.names)} used before its weights were loaded")

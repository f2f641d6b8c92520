"""A weight as a checkpoint stores it: dense, FP8 with scales, or blocks that stay packed until a layer wants them.

The loader yields these and the layers choose the form to keep (int4, int8, FP8 or floating point), so the types lie
below both. Block layouts are ggml's; the int4 convention is that of torch's packed CPU kernel.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from gossamer.core import StartupError

Bytes = np.ndarray[Any, np.dtype[np.uint8]]
Floats = np.ndarray[Any, np.dtype[np.float32]]

INT4_GROUP = 32
"""Elements of a row that share a scale and a zero, in every type that `to_int4` takes."""
INT4_TYPES = ("Q4_0", "Q4_1", "Q4_K")


@dataclass(frozen=True, slots=True, eq=False)
class QuantizedTensor:
    """Quantised blocks: `data` uint8 `[*shape[:-1], bytes per row]`, usually a view of a memory-mapped file."""

    data: Bytes
    ggml_type: str
    shape: tuple[int, ...]

    def dequantize(self) -> torch.Tensor:
        """The values as fp32 `shape`."""
        if self.ggml_type in INT4_TYPES:
            values = _dequantize_int4(self)
        elif self.ggml_type == "Q8_0":
            values = _dequantize_q8_0(self)
        else:  # the package takes 0.3 s to import; the types above are the common ones and do without it
            from gguf import GGMLQuantizationType, dequantize

            values = np.ascontiguousarray(dequantize(self.data, GGMLQuantizationType[self.ggml_type]), np.float32)
        return torch.from_numpy(values).reshape(self.shape)

    def to_int4(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
        """`(q, scale, zero)` with w = (q - 8) * scale + zero, the stored values without loss (zero is rounded to
        fp32); None for other types.

        q: uint8 `[N, K]` of 0..15; scale, zero: fp32 `[N, K / 32]`. Only for matrices.
        """
        if self.ggml_type not in INT4_TYPES or len(self.shape) != 2:
            return None
        q, scale, minimum = _INT4_DECODERS[self.ggml_type](self.data.reshape(self.shape[0], -1))
        rows = [torch.from_numpy(values.reshape(self.shape[0], -1)) for values in (q, scale, minimum + 8.0 * scale)]
        return rows[0], rows[1], rows[2]


@dataclass(frozen=True, slots=True, eq=False)
class Fp8Tensor:
    """E4M3 `data` [N, K] with scales: w = data * scale.

    block: (rows, columns) that share a scale: (128, 128) for blocks, (1, K) per channel, None per tensor. scale: fp32
    [ceil(N / rows), ceil(K / columns)], [1, 1] per tensor.
    """

    data: torch.Tensor
    scale: torch.Tensor
    block: tuple[int, int] | None = None
    ue8m0: bool = False
    """Activations that meet it are to be scaled by powers of two."""

    def __post_init__(self) -> None:
        rows, columns = self.block or self.shape
        expected = (-(-self.shape[0] // rows), -(-self.shape[1] // columns))
        if self.data.dtype != torch.float8_e4m3fn or self.scale.shape != expected:
            raise ValueError(
                f"{self.data.dtype} {self.shape} with scales {tuple(self.scale.shape)}, not E4M3 with {expected}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.data.shape[1]

    @property
    def kind(self) -> Literal["block", "channel", "tensor"]:
        return "tensor" if self.block is None else "channel" if self.block[0] == 1 else "block"

    def dequantize(self) -> torch.Tensor:
        """The values as fp32 [N, K]."""
        scale = self.scale
        for dim, size in enumerate(self.block or ()):
            if size > 1:
                scale = scale.repeat_interleave(size, dim)
        return self.data.float() * (scale if self.block is None else scale[: self.shape[0], : self.shape[1]])

    def narrow(self, dim: int, start: int, length: int) -> Fp8Tensor:
        """Rows (dim 0) or columns (1) of whole blocks. Raises StartupError where others share a block with them."""
        data, scale, block = self.data.narrow(dim, start, length), self.scale, self.block
        if block is not None and block[dim] == self.shape[dim]:  # a row's one scale
            block = (block[0], length)
        elif block is not None:
            size = block[dim]
            if start % size or (length % size and start + length != self.shape[dim]):
                raise StartupError(
                    f"FP8 blocks of {block[0]} x {block[1]} straddle parts of {length}: --quantization none takes them."
                )
            scale = scale.narrow(dim, start // size, -(-length // size))
        return Fp8Tensor(data, scale, block, self.ue8m0)

    def to(self, device: torch.device) -> Fp8Tensor:
        return Fp8Tensor(self.data.to(device), self.scale.to(device), self.block, self.ue8m0)


Weight = torch.Tensor | QuantizedTensor | Fp8Tensor


def _half(raw: Bytes) -> Floats:
    """fp16 values from their two bytes in the last dimension: `[..., 2]` -> `[...]`."""
    return np.ascontiguousarray(raw).view(np.float16)[..., 0].astype(np.float32)


def _nibbles(packed: Bytes) -> Bytes:
    """`[..., n]` bytes -> `[..., 2n]` values of 0..15: all the low halves, then all the high ones."""
    size = packed.shape[-1]
    out = np.empty((*packed.shape[:-1], 2 * size), dtype=np.uint8)
    np.bitwise_and(packed, 15, out=out[..., :size])
    np.right_shift(packed, 4, out=out[..., size:])
    return out


def _q4_0(data: Bytes) -> tuple[Bytes, Floats, Floats]:
    """Blocks of 32: fp16 d, 16 bytes of nibbles; w = d * (q - 8).

    Returns q, scale and minimum with w = q * scale + minimum, as the other decoders do.
    """
    blocks = data.reshape(*data.shape[:-1], -1, 18)
    scale = _half(blocks[..., :2])
    return _nibbles(blocks[..., 2:]), scale, -8.0 * scale


def _q4_1(data: Bytes) -> tuple[Bytes, Floats, Floats]:
    """Blocks of 32: fp16 d, fp16 m, 16 bytes of nibbles; w = d * q + m."""
    blocks = data.reshape(*data.shape[:-1], -1, 20)
    return _nibbles(blocks[..., 4:]), _half(blocks[..., :2]), _half(blocks[..., 2:4])


def _q4_k(data: Bytes) -> tuple[Bytes, Floats, Floats]:
    """Blocks of 256 in 8 groups of 32: fp16 d and dmin, 6-bit scales s and minima m packed in 12 bytes, nibbles.

    w = d * s * q - dmin * m. Groups 2j and 2j + 1 are the low and the high halves of the same 32 bytes.
    """
    blocks = data.reshape(*data.shape[:-1], -1, 144)
    d, dmin, packed = _half(blocks[..., 0:2]), _half(blocks[..., 2:4]), blocks[..., 4:16]
    first, second, third = packed[..., 0:4], packed[..., 4:8], packed[..., 8:12]
    scales = np.concatenate([first & 63, (third & 15) | ((first >> 6) << 4)], axis=-1)
    minima = np.concatenate([second & 63, (third >> 4) | ((second >> 6) << 4)], axis=-1)
    q = _nibbles(blocks[..., 16:].reshape(*blocks.shape[:-1], 4, 32))
    return q, d[..., None] * scales.astype(np.float32), -dmin[..., None] * minima.astype(np.float32)


_INT4_DECODERS = {"Q4_0": _q4_0, "Q4_1": _q4_1, "Q4_K": _q4_k}


def _dequantize_int4(tensor: QuantizedTensor) -> Floats:
    q, scale, minimum = _INT4_DECODERS[tensor.ggml_type](tensor.data)
    values = q.reshape(-1, INT4_GROUP).astype(np.float32)
    if tensor.ggml_type == "Q4_0":
        minimum = np.zeros_like(minimum)
        values -= 8.0
    values *= scale.reshape(-1, 1)
    values += minimum.reshape(-1, 1)
    return values


def _dequantize_q8_0(tensor: QuantizedTensor) -> Floats:
    """Blocks of 32: fp16 d, 32 signed bytes; w = d * q."""
    blocks = tensor.data.reshape(-1, 34)
    values = blocks[:, 2:].view(np.int8).astype(np.float32)
    values *= _half(blocks[:, :2])[:, None]
    return values

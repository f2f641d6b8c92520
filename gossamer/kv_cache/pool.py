"""The tensors of the paged KV cache."""

from __future__ import annotations

import math
import mmap

import torch

from gossamer.core import KVLayout


class KVPool:
    """`layers[i]` is the tuple of layer i's planes (GQA: keys, values), each [num_pages, heads, page_size, dim].

    On a CPU it is zeroed lazily by the operating system: a page costs memory, and time, once it is written.
    """

    def __init__(
        self,
        num_layers: int,
        layout: KVLayout,
        num_pages: int,
        page_size: int,
        device: torch.device,
    ) -> None:
        planes, heads, dim = layout.entry_shape
        shape = (num_layers, planes, num_pages, heads, page_size, dim)
        self.tensor = _zeros(shape, getattr(torch, layout.dtype), device)
        self.layers = [tuple(layer.unbind(0)) for layer in self.tensor.unbind(0)]
        self.page_size = page_size

    @property
    def num_bytes(self) -> int:
        return self.tensor.nbytes


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    # torch.zeros writes every byte: seconds and gigabytes before the first request. Fresh anonymous memory is zero.
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)

"""The tensors of the paged KV cache."""

from __future__ import annotations

import torch

from gossamer.core import KVLayout


class KVPool:
    """`layers[i]` is the tuple of layer i's planes (GQA: keys, values), each [num_pages, heads, page_size, dim].

    Zeroed lazily by the operating system: a page costs memory once it is written.
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
        self.tensor = torch.zeros(shape, dtype=getattr(torch, layout.dtype), device=device)
        self.layers = [tuple(layer.unbind(0)) for layer in self.tensor.unbind(0)]
        self.page_size = page_size

    @property
    def num_bytes(self) -> int:
        return self.tensor.nbytes

"""The tensors of the paged KV cache."""

import math
import mmap

import torch

from gossamer.core import KVLayout, StartupError


class KVPool:
    """`layers[i]` is the tuple of layer i's planes (GQA: keys, values), each [num_pages, heads, page_size, dim].

    After them come, for a layout that is `scaled`, as many planes of fp32 scales [num_pages, heads], and then what lies
    beside pages, each [num_pages, heads, entries, dim].
    On a CPU it is zeroed lazily by the operating system: a page costs memory, and time, once it is written.
    `heads_first` puts the heads outermost in memory, so that a head's consecutive pages are one [tokens, dim] matrix.
    """

    def __init__(
        self, num_layers: int, layout: KVLayout, num_pages: int, page_size: int, device: torch.device, *,
        heads_first: bool = False,
    ) -> None:  # fmt: skip
        planes, heads, dim = layout.entry_shape
        outer = (heads, num_pages) if heads_first else (num_pages, heads)
        memory = _zeros((num_layers, planes, *outer, page_size, dim), getattr(torch, layout.dtype), device)
        self.tensor = memory.transpose(2, 3) if heads_first else memory
        self.scales: torch.Tensor | None = None
        self.layers = [tuple(layer.unbind(0)) for layer in self.tensor.unbind(0)]
        if layout.scaled:
            self.scales = _zeros((num_layers, planes, num_pages, heads), torch.float32, device)
            self.layers = [p + tuple(s.unbind(0)) for p, s in zip(self.layers, self.scales.unbind(0), strict=True)]
        self.beside: list[torch.Tensor] = []
        for heads, entries, dim in layout.beside:
            outer = (heads, num_pages) if heads_first else (num_pages, heads)
            size = (num_layers, *outer, entries or page_size, dim)
            memory = _zeros(size, getattr(torch, layout.beside_dtype), device)
            self.beside.append(memory.transpose(1, 2) if heads_first else memory)
            self.layers = [(*p, x) for p, x in zip(self.layers, self.beside[-1].unbind(0), strict=True)]
        self.page_size = page_size

    @property
    def num_bytes(self) -> int:
        held = [self.tensor, *self.beside, *([] if self.scales is None else [self.scales])]
        return sum(t.nbytes for t in held)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    if device.type != "cpu":
        try:
            return torch.zeros(shape, dtype=dtype, device=device)
        except torch.OutOfMemoryError as error:
            raise StartupError(
                f"{math.prod(shape) * dtype.itemsize} bytes for the KV cache were free at start and are not now: "
                f"another process takes memory of this GPU.\nUse a smaller --gpu-memory-utilization.\n{error}"
            ) from error
    # torch.zeros writes every byte: seconds and gigabytes before the first request. Fresh anonymous memory is zero.
    memory = mmap.mmap(-1, math.prod(shape) * dtype.itemsize)
    return torch.frombuffer(memory, dtype=dtype).view(shape)

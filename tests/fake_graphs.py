"""CUDA graphs without CUDA: what a GPU's executor asks of them, on a CPU.

A capture runs nothing; a replay runs the step and puts its results where the first one put them; results that the
caller has no right to read any more are overwritten.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch


class CaptureFailed(RuntimeError):
    """A capture ended early."""


class FakeGraphs:
    """Takes the place of `GraphPool`. Captures of the sizes in `refused` fail."""

    def __init__(self, refused: Iterable[int] = ()) -> None:
        self.captured: dict[tuple[str, int], Callable[[list[Any]], Iterator[Any]]] = {}
        self.num_replays = 0
        self._refused = set(refused)
        self._static: dict[tuple[str, int], tuple[torch.Tensor | None, ...]] = {}

    def __len__(self) -> int:
        return len(self.captured)

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self.captured

    def sizes(self, kind: str) -> set[int]:
        return {bucket for name, bucket in self.captured if name == kind}

    def capture(self, key: tuple[str, int], pieces: Callable[[list[Any]], Iterator[Any]]) -> None:
        if key[1] in self._refused:
            raise CaptureFailed(f"no graph of {key[1]}")
        self.captured[key] = pieces

    def replay(self, key: tuple[str, int], plan: Any = None) -> Any:
        result: list[Any] = []
        for attend in self.captured[key](result):
            attend(plan)
        found = result[0]
        return self._keep(key, found) if isinstance(found, tuple) else self._keep(key, (found,))[0]

    def clear(self) -> None:
        self.captured.clear()
        self._static.clear()

    def _keep(self, key: tuple[str, int], found: tuple[torch.Tensor | None, ...]) -> Any:
        self.num_replays += 1
        for tensors in self._static.values():
            for tensor in tensors:
                if tensor is not None:
                    tensor.fill_(float("nan") if tensor.is_floating_point() else -(10**9))
        static = self._static.setdefault(key, tuple(None if t is None else torch.empty_like(t) for t in found))
        for tensor, value in zip(static, found, strict=True):
            if tensor is not None:
                tensor.copy_(value)
        return static

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
        self.steps: dict[int, Callable[[], Any]] = {}
        self.pieces: dict[int, Callable[[list[torch.Tensor]], Iterator[Any]]] = {}
        self.num_replays = 0
        self._refused = set(refused)
        self._static: dict[tuple[str, int], tuple[torch.Tensor | None, ...]] = {}

    def __len__(self) -> int:
        return len(self.steps) + len(self.pieces)

    def has_step(self, bucket: int) -> bool:
        return bucket in self.steps

    def has_pieces(self, bucket: int) -> bool:
        return bucket in self.pieces

    def capture_step(self, bucket: int, step: Callable[[], Any]) -> None:
        self._refuse(bucket)
        self.steps[bucket] = step

    def capture_pieces(self, bucket: int, pieces: Callable[[list[torch.Tensor]], Iterator[Any]]) -> None:
        self._refuse(bucket)
        self.pieces[bucket] = pieces

    def replay_step(self, bucket: int) -> Any:
        return self._keep(("step", bucket), self.steps[bucket]())

    def replay_pieces(self, bucket: int, plan: Any) -> torch.Tensor:
        result: list[torch.Tensor] = []
        for attend in self.pieces[bucket](result):
            attend(plan)
        return self._keep(("pieces", bucket), (result[0],))[0]

    def clear(self) -> None:
        self.steps.clear()
        self.pieces.clear()
        self._static.clear()

    def _refuse(self, bucket: int) -> None:
        if bucket in self._refused:
            raise CaptureFailed(f"no graph of {bucket}")

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

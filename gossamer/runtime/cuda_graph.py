"""CUDA graphs: captured when a bucket is first needed, replayed ever after, all in one memory pool.

Whole decode steps are one graph each; of a mixed step the pieces between its attention calls are.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch

from gossamer.layers.attention.base import Attend

Key = tuple[str, int]
"""The kind of step, decode or mixed, and its bucket."""


def decode_buckets(max_num_seqs: int) -> list[int]:
    """Batch sizes that get a graph: dense where padding is dear, every 8 from 8 on, every 16 from 64 on."""
    sizes = [1, 2, 4, *range(8, 64, 8), *range(64, max_num_seqs, 16)]
    return [size for size in sizes if size < max_num_seqs] + [max_num_seqs]


def token_buckets(limit: int) -> list[int]:
    """Token counts of mixed steps that get graphs; a step of more keeps the GPU busy longer than its launches take."""
    sizes = [*range(16, 64, 16), *range(64, 256, 32), *range(256, limit + 1, 64)]
    return [size for size in sizes if size <= limit]


def round_up(size: int, buckets: list[int]) -> int | None:
    """The smallest bucket that holds `size`, or None."""
    i = bisect_left(buckets, size)
    return buckets[i] if i < len(buckets) else None


class GraphPool:
    """Captures and replays on the current stream. Graphs share memory: results of one last until the next replay."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._device = device
        self._graphs: dict[Key, tuple[list[torch.cuda.CUDAGraph], list[Attend], Any]] = {}

    def __len__(self) -> int:
        return len(self._graphs)

    def __contains__(self, key: Key) -> bool:
        return key in self._graphs

    def capture(self, key: Key, pieces: Callable[[list[Any]], Iterator[Attend]]) -> None:
        """`pieces(result)` yields its attention calls and appends what it computes to `result`.

        Each stretch up to a yield becomes a graph; the attention calls, whose grids follow the batch, stay outside.
        It must have run once (kernels compiled) and reads its inputs from static memory.
        """
        graphs: list[torch.cuda.CUDAGraph] = []
        attends: list[Attend] = []
        result: list[Any] = []
        iterator = pieces(result)
        torch.cuda.empty_cache()  # what is cached is then free for the captures
        try:
            while True:
                graph = torch.cuda.CUDAGraph()
                with self._capturing(graph):
                    attend = next(iterator, None)
                graphs.append(graph)
                if attend is None:
                    break
                attends.append(attend)
            self._graphs[key] = (graphs, attends, result[0])
        finally:
            if not self._graphs:  # a capture that failed ended the pool with it
                self._pool = torch.cuda.graph_pool_handle()

    def replay(self, key: Key, plan: Any = None) -> Any:
        """Runs the pieces with the attention of this step's plan between them; what they computed, filled anew."""
        graphs, attends, result = self._graphs[key]
        for graph, attend in zip(graphs, attends, strict=False):
            graph.replay()
            attend(plan)
        graphs[-1].replay()
        return result

    def clear(self) -> None:
        """Frees all graphs: what they point to is about to move."""
        torch.cuda.synchronize(self._device)
        self._graphs.clear()
        # A pool ends with its last graph.
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def _capturing(self, graph: torch.cuda.CUDAGraph) -> Iterator[None]:
        # thread_local: the engine's thread waits for events of other steps meanwhile.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        try:
            yield
        except BaseException:
            with suppress(RuntimeError):  # what a forbidden call made invalid ends with an error of its own
                graph.capture_end()
            raise
        graph.capture_end()

"""CUDA graphs: captured when a bucket is first needed, replayed ever after, all in one memory pool.

Whole decode steps are one graph each; of a mixed step the pieces between its attention calls are.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch

from gossamer.layers.attention.base import Attend, PagedPlan


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
        self._whole: dict[int, tuple[torch.cuda.CUDAGraph, object]] = {}
        self._pieces: dict[int, tuple[list[torch.cuda.CUDAGraph], list[Attend], torch.Tensor]] = {}

    def __len__(self) -> int:
        return len(self._whole) + len(self._pieces)

    def has_step(self, bucket: int) -> bool:
        return bucket in self._whole

    def has_pieces(self, bucket: int) -> bool:
        return bucket in self._pieces

    def capture_step(self, bucket: int, step: Callable[[], object]) -> None:
        """`step` must have run once (kernels compiled) and reads its inputs from static memory."""
        graph = torch.cuda.CUDAGraph()
        with self._pool_kept():
            with self._capturing(graph):
                result = step()
            self._whole[bucket] = (graph, result)

    def replay_step(self, bucket: int) -> object:
        """Runs the step; what it returned at capture, now filled anew."""
        graph, result = self._whole[bucket]
        graph.replay()
        return result

    def capture_pieces(self, bucket: int, pieces: Callable[[list[torch.Tensor]], Iterator[Attend]]) -> None:
        """`pieces(result)` yields its attention calls and appends what it computes to `result`.

        Each stretch up to a yield becomes a graph; the attention calls, whose grids follow the batch, stay outside.
        """
        graphs: list[torch.cuda.CUDAGraph] = []
        attends: list[Attend] = []
        result: list[torch.Tensor] = []
        iterator = pieces(result)
        with self._pool_kept():
            while True:
                graph = torch.cuda.CUDAGraph()
                with self._capturing(graph):
                    attend = next(iterator, None)
                graphs.append(graph)
                if attend is None:
                    break
                attends.append(attend)
            self._pieces[bucket] = (graphs, attends, result[0])

    def replay_pieces(self, bucket: int, plan: PagedPlan) -> torch.Tensor:
        """Runs the pieces with the attention of this step's plan between them; what the last piece computed."""
        graphs, attends, result = self._pieces[bucket]
        for graph, attend in zip(graphs, attends, strict=False):
            graph.replay()
            attend(plan)
        graphs[-1].replay()
        return result

    def clear(self) -> None:
        """Frees all graphs: what they point to is about to move."""
        torch.cuda.synchronize(self._device)
        self._whole.clear()
        self._pieces.clear()
        # A pool ends with its last graph.
        self._pool = torch.cuda.graph_pool_handle()

    @contextmanager
    def _pool_kept(self) -> Iterator[None]:
        """Around the captures of a bucket: gives them the memory that is cached, and survives their failure."""
        torch.cuda.empty_cache()
        try:
            yield
        finally:
            if not len(self):
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

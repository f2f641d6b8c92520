"""What a GPU's steps take beside weights and KV cache, measured before the cache is sized: nothing is left to luck.

The widest steps run once on padding, which also compiles every kernel.
"""

from collections.abc import Callable

import torch

from gossamer.config import EngineConfig
from gossamer.core import KVLayout, StartupError
from gossamer.kv_cache.pool import KVPool
from gossamer.runtime.cuda_runner import CudaRunner

GRAPH_SLACK = 1.3
"""Graphs of other sizes share the largest one's memory, but its blocks do not fit theirs exactly."""

SPARSE_LENGTHS = 11
"""Context lengths to warm sparse prefill up for, each half of the one before: of a million tokens, down to 1024."""


def measure(runner: CudaRunner, layout: KVLayout, config: EngineConfig) -> dict[str, int]:
    """Bytes by ledger name, for the resolved `config`. The runner is left without a KV cache and without graphs.

    Raises StartupError for shapes that no kernel serves.
    """
    device, scheduler = runner.device, config.scheduler
    max_num_seqs, max_tokens = scheduler.max_num_seqs or 1, scheduler.max_num_batched_tokens or 1
    pool = KVPool(runner.decoder.config.num_kv_layers, layout, 1, config.cache.page_size, device)
    runner.attach(pool, capture=False)
    with torch.inference_mode(), torch.cuda.stream(runner.stream):
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        try:
            runner.warm_up_prefill(max_tokens)
            # Chunks too short to widen FP8 pages for have a kernel of their own.
            group = runner.decoder.config.num_q_heads // runner.decoder.config.num_kv_heads
            few = min(max_tokens, max(1, 1023 // group))
            # Selection has kernels for each power of two of a context.
            for halvings in range(1 if runner.decoder.config.attention in ("gqa", "mla") else SPARSE_LENGTHS):
                runner.warm_up_prefill(few, halvings)
            runner.warm_up_decode_eagerly(max_num_seqs)
        except (ValueError, NotImplementedError) as error:  # how operators refuse shapes
            raise StartupError(f"No kernel serves this model: {error}.\nUse --ops-backend reference, slow.") from error
        torch.cuda.synchronize(device)
        temporaries = torch.cuda.max_memory_allocated(device) - held
        graphs = _graph_bytes(runner, max_num_seqs) if runner.num_graph_sizes else 0
    runner.detach()
    torch.cuda.empty_cache()
    return {"temporaries": temporaries} | ({"CUDA graphs": graphs} if graphs else {})


def _graph_bytes(runner: CudaRunner, max_num_seqs: int) -> int:
    """Of the graphs of all sizes: memory for the widest, which the others share, and the driver's for each."""
    widest = _taken(runner.device, lambda: runner.warm_up_decode(max_num_seqs))
    runner.warm_up_decode_eagerly(1)  # what its kernels take at first is no graph's
    another = _taken(runner.device, lambda: runner.warm_up_decode(1))
    return int(widest * GRAPH_SLACK) + another * (runner.num_graph_sizes - 1)


def _taken(device: torch.device, action: Callable[[], None]) -> int:
    """By how much an action lowers the device's free memory, caches aside."""
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    action()
    torch.cuda.synchronize(device)
    torch.cuda.empty_cache()
    return max(0, free - torch.cuda.mem_get_info(device)[0])

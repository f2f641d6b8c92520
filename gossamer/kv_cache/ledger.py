"""Who holds how many bytes: the plan made before anything is allocated, refused with arithmetic where it cannot fit."""

from collections.abc import Mapping
from dataclasses import dataclass

from gossamer.config import EngineConfig, Hardware, ModelConfig
from gossamer.core import KVLayout, StartupError

# On a CPU the memory is shared with everything else on the machine.
CPU_KV_BYTES = 4 << 30
CPU_KV_FRACTION = 0.5


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What the engine will hold. `entries` are (name, bytes) and sum to what it may use at most."""

    num_pages: int
    max_model_len: int
    entries: tuple[tuple[str, int], ...]


def human(num_bytes: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(num_bytes) < 1024:
            return f"{num_bytes:.0f} B" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.1f} TiB"


def temporaries(config: EngineConfig, model: ModelConfig) -> int:
    """Upper bound of a step's activations: the widest layer's inputs and outputs, and fp32 logits with their copies."""
    sched = config.scheduler
    tokens, seqs = sched.max_num_batched_tokens or 0, (sched.max_num_seqs or 0) * (1 + model.num_draft_layers)
    itemsize = 4 if config.load.dtype == "float32" else 2
    attention = (2 * model.num_q_heads + 4 * model.num_kv_heads) * model.head_dim
    mlp = 3 * model.intermediate_size
    if model.moe is not None:
        mlp = max(mlp, model.moe.top_k * (3 * model.moe.intermediate_size + 3 * model.hidden_size))
    return tokens * (6 * model.hidden_size + attention + mlp) * itemsize + seqs * model.vocab_size * 4 * 3


def plan_memory(
    config: EngineConfig, hardware: Hardware, model: ModelConfig, layout: KVLayout, weight_bytes: int,
    measured: Mapping[str, int] | None = None,
) -> MemoryPlan:  # fmt: skip
    """Divides the device's free memory. Raises StartupError, with the sum and the flags that mend it, if it cannot fit.

    `config` is resolved. An explicit --max-model-len must fit; the model's own is shortened to what does. `measured`
    holds what else was seen to take memory on the device (temporaries, graphs); without it temporaries are estimated.
    """
    cache = config.cache
    page_bytes = layout.page_bytes(cache.page_size) * model.num_kv_layers
    others = dict(measured) if measured is not None else {"temporaries": temporaries(config, model)}
    usable = int(hardware.memory_bytes * cache.gpu_memory_utilization)
    room = usable - weight_bytes - sum(others.values())
    sums = (
        f"{human(usable)} usable ({human(hardware.memory_bytes)} free x --gpu-memory-utilization "
        f"{cache.gpu_memory_utilization}) - {human(weight_bytes)} weights"
        + "".join(f" - {human(size)} {name}" for name, size in others.items())
    )
    if room < page_bytes:
        fewer = "a smaller --max-num-batched-tokens or --max-num-seqs"
        if hardware.device == "cpu":
            fewer = "--quantization int4, a smaller --max-num-batched-tokens"
        raise StartupError(
            f"The model does not fit on {hardware.name}: no memory is left for the KV cache.\n{sums} = {human(room)}.\n"
            f"Use {fewer}, a larger --gpu-memory-utilization, or a smaller model."
        )
    longest = config.load.max_model_len or model.max_position_embeddings
    wanted = cache.kv_cache_memory_bytes
    if wanted is None:
        wanted = room
        if hardware.device == "cpu":
            wanted = min(CPU_KV_BYTES, int(room * CPU_KV_FRACTION))
        most = -(-longest // cache.page_size) * (config.scheduler.max_num_seqs or 1)
        wanted = min(wanted, most * page_bytes)
    elif wanted > room:
        raise StartupError(
            f"--kv-cache-memory-bytes {wanted} ({human(wanted)}) does not fit: {sums} = {human(room)}.\n"
            f"Set --kv-cache-memory-bytes {room} or less."
        )
    num_pages = wanted // page_bytes
    if num_pages < 1:
        raise StartupError(
            f"--kv-cache-memory-bytes {wanted} holds no page: one of {cache.page_size} tokens takes {page_bytes} bytes."
        )
    entries = (("weights", weight_bytes), ("KV cache", num_pages * page_bytes), *others.items())
    return MemoryPlan(num_pages, min(longest, num_pages * cache.page_size), entries)


def require_context(plan: MemoryPlan, requested: int | None, page_size: int, page_bytes: int) -> None:
    """Raises StartupError if the user asked for a context that the KV cache cannot hold even alone."""
    if requested is not None and plan.max_model_len < requested:
        need = -(-requested // page_size) * page_bytes
        raise StartupError(
            f"--max-model-len {requested} needs {human(need)} of KV cache for one request; there is room for "
            f"{plan.num_pages} pages of {page_size} tokens ({human(plan.num_pages * page_bytes)}).\n"
            f"Set --max-model-len {plan.max_model_len}, or --kv-cache-memory-bytes {need} if memory allows."
        )

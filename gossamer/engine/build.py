"""Builds an engine from a config: inspect the model, resolve what is automatic, load, divide memory, start the loop."""

import dataclasses
import logging
from collections.abc import Iterator
from math import prod

import torch

from gossamer.config import EngineConfig, Hardware, ModelConfig, resolve, with_attention
from gossamer.core import RequestLimits, StartupError
from gossamer.engine.account import StepAccount
from gossamer.engine.engine import Engine
from gossamer.engine.info import EngineInfo, ProgressCallback
from gossamer.engine.trace import Trace
from gossamer.kv_cache.ledger import plan_memory, require_context
from gossamer.kv_cache.pool import KVPool
from gossamer.layers.linear import Part, WeightFormat
from gossamer.layers.moe import ExpertUse, MoELayer
from gossamer.models.cost import StepCost, bytes_per_weight
from gossamer.models.decoder import ATTENTION_KINDS, Decoder
from gossamer.models.loader import ModelSource, inspect_model, iter_weights
from gossamer.models.shapes import expected_shapes
from gossamer.ops.gemm.packed import packing_supported
from gossamer.runtime import ceilings, cuda_memory, native_step
from gossamer.runtime.cuda_runner import CudaRunner
from gossamer.runtime.executor import Executor
from gossamer.runtime.hardware import detect, has_fp8, require_fp8
from gossamer.runtime.model_runner import ModelRunner

logger = logging.getLogger(__name__)

# A dense copy beside int4/int8 weights doubles prefill speed on a CPU; it is kept while it takes at most this share
# of free memory.
_DENSE_COPY_FRACTION = 0.2


def build_engine(
    config: EngineConfig, on_progress: ProgressCallback | None = None, *, paged: bool | None = None
) -> tuple[Engine, EngineInfo]:
    """Loads the model and returns a running engine. Raises StartupError for anything that the user can mend.

    paged: run the GPU's executor (None: on a GPU).
    """
    report = on_progress or (lambda stage, fraction: None)
    report("Inspecting model", 0.0)
    requested = config.load.max_model_len
    config, source, hardware = inspect(config)
    model = source.config
    trace = Trace(config.profile_trace) if config.profile_trace else None
    # One thread until the worker runs: OpenMP keeps a team of threads for each thread that ever used several, and
    # with more team members than cores its barriers stop spinning, which makes a decode step three times slower.
    torch.set_num_threads(1)
    fmt = weight_format(config, hardware, source)
    if config.cache.kv_cache_dtype == "fp8":
        require_fp8(hardware, "--kv-cache-dtype auto")
    layout = ATTENTION_KINDS[model.attention].kv_layout(model, config.cache.kv_cache_dtype)
    plan_memory(config, hardware, model, layout, estimate_weight_bytes(model, fmt))
    decoder = Decoder(model, fmt, config.load.max_model_len or 1, config.ops_backend, paged)
    _load(decoder, source, config, report)
    cost = StepCost(model, ATTENTION_KINDS[model.attention], fmt, layout.itemsize)
    account = StepAccount(cost, _count_experts(decoder) if config.count_experts else [])
    page_bytes = layout.page_bytes(config.cache.page_size) * model.num_kv_layers
    paged_runner = CudaRunner(decoder, config) if decoder.paged else None
    measured: dict[str, int] | None = None
    if paged_runner is not None and fmt.device.type == "cuda":
        report("Compiling kernels", 0.0)
        measured = cuda_memory.measure(paged_runner, layout, config)
    plan = plan_memory(config, hardware, model, layout, decoder.num_bytes, measured)
    require_context(plan, requested, config.cache.page_size, page_bytes)
    config = dataclasses.replace(
        config,
        load=dataclasses.replace(config.load, max_model_len=plan.max_model_len, quantization=fmt.quantization),
        cache=dataclasses.replace(config.cache, kv_cache_memory_bytes=plan.num_pages * page_bytes),
    )
    size = (model.num_kv_layers, layout, plan.num_pages, config.cache.page_size)
    pool = KVPool(*size, fmt.device, heads_first=not decoder.paged)
    runner: Executor
    if paged_runner is not None:
        paged_runner.attach(pool)
        runner = paged_runner
    else:
        native = None if config.ops_backend == "reference" else _native_step(decoder, pool, report)
        runner = ModelRunner(decoder, pool, config.scheduler.max_num_seqs or 1, config.num_threads, native)
    limits = RequestLimits(vocab_size=model.vocab_size, max_model_len=plan.max_model_len)
    ends = model.eos_token_ids
    engine = Engine(
        config, runner, num_pages=plan.num_pages, limits=limits, eos_token_ids=ends, account=account, trace=trace
    )
    report("Ready", 1.0)
    best = ceilings.load(config.cache_dir, hardware, config.load.dtype)
    info = EngineInfo(config, model, limits, plan.num_pages, list(plan.entries), hardware.name, best)
    return engine, info


def inspect(config: EngineConfig) -> tuple[EngineConfig, ModelSource, Hardware]:
    """Finds the model and the device that the config names; resolves it for them, and puts the model under --attention.

    Raises StartupError for what does not fit together.
    """
    source, hardware = inspect_model(config.load), detect(config.device)
    model = with_attention(config, hardware, source.config)
    return resolve(config, hardware, model), dataclasses.replace(source, config=model), hardware


def _native_step(decoder: Decoder, pool: KVPool, report: ProgressCallback) -> native_step.NativeStep | None:
    """Decode rows as native code, where it can be had (a CPU)."""
    try:
        if (obstacle := native_step.obstacle(decoder, pool)) is None:
            return native_step.NativeStep(decoder, pool, report)
        logger.info("Decode steps are not native code: %s.", obstacle)
    except Exception as error:  # of an llvmlite or a CPU unlike those known: torch's operators serve
        logger.warning("Decode steps are not native code: %s: %s", type(error).__name__, error)
    return None


def _count_experts(decoder: Decoder) -> list[ExpertUse]:
    """Makes every MoE layer count from now on. Before any CUDA graph is captured."""
    layers = [block.mlp for block in decoder.all_blocks if isinstance(block.mlp, MoELayer)]
    for layer in layers:
        layer.use = ExpertUse(layer.num_experts, decoder.fmt.device)
    return [layer.use for layer in layers if layer.use is not None]


def weight_format(config: EngineConfig, hardware: Hardware, source: ModelSource) -> WeightFormat:
    """How weights are held: `auto` is that of an FP8 checkpoint or, on a CPU, of a quantised GGUF file, else none."""
    quantization = config.load.quantization
    kernels = hardware.device == "cuda" and config.ops_backend != "reference"
    if quantization == "auto":
        quantization = source.quantization
        if hardware.device != "cpu" and not (quantization == "fp8" and has_fp8(hardware)):
            quantization = "none"
    dtype = getattr(torch, config.load.dtype)
    as_stored = source.fp8 is not None
    fmt = WeightFormat(dtype, torch.device(hardware.device), quantization, kernels=kernels, as_stored=as_stored)
    if quantization == "fp8":
        require_fp8(hardware)
    elif quantization != "none":
        if hardware.device != "cpu":
            raise StartupError(f"--quantization {quantization} runs on a CPU only; use --quantization none.")
        dense_bytes = sum(map(prod, expected_shapes(source.config).values())) * dtype.itemsize
        fmt = dataclasses.replace(fmt, keep_dense=dense_bytes <= _DENSE_COPY_FRACTION * hardware.memory_bytes)
    return fmt


def estimate_weight_bytes(model: ModelConfig, fmt: WeightFormat) -> int:
    """Bytes that the weights will take, before anything is loaded: what does not fit is refused early."""
    # A tied head holds the embedding once more where it has a layout or a format of its own.
    own_head = fmt.quantization in ("int8", "int4") or packing_supported(fmt.dtype, fmt.device)
    copy = fmt.dtype.itemsize if fmt.keep_dense else 0
    total = 0.0
    for name, shape in expected_shapes(model).items():
        size = prod(shape)
        per_weight = bytes_per_weight(fmt, name) if len(shape) == 2 else fmt.dtype.itemsize
        total += size * (per_weight + (copy if len(shape) == 2 and name != "embed.weight" else 0))
        if name == "embed.weight" and model.tie_word_embeddings and own_head:
            total += size * (bytes_per_weight(fmt, "lm_head.weight") + copy)
    return int(total)


def _load(decoder: Decoder, source: ModelSource, config: EngineConfig, report: ProgressCallback) -> None:
    total = len(expected_shapes(source.config))

    def reported() -> Iterator[tuple[str, Part]]:
        for number, weight in enumerate(iter_weights(source, config.load, decoder.fmt.device), 1):
            yield weight
            report("Loading weights", number / total)

    with torch.inference_mode():
        decoder.load(reported())

"""Builds an engine from a config: inspect the model, resolve what is automatic, load, divide memory, start the loop."""

from __future__ import annotations

import dataclasses

import torch

from gossamer.config import EngineConfig, Hardware, ModelConfig, resolve
from gossamer.core import RequestLimits, StartupError
from gossamer.engine.engine import Engine
from gossamer.engine.info import EngineInfo, ProgressCallback
from gossamer.kv_cache.ledger import MemoryPlan, plan_memory, require_context
from gossamer.kv_cache.pool import KVPool
from gossamer.layers.linear import WeightFormat
from gossamer.models.decoder import ATTENTION_KINDS, Decoder
from gossamer.models.loader import ModelSource, inspect_model, iter_weights
from gossamer.models.shapes import expected_shapes
from gossamer.runtime.hardware import detect
from gossamer.runtime.model_runner import ModelRunner

# A dense copy beside int4/int8 weights doubles prefill speed on a CPU; it is kept while it takes at most this share
# of free memory.
_DENSE_COPY_FRACTION = 0.2


def build_engine(config: EngineConfig, on_progress: ProgressCallback | None = None) -> tuple[Engine, EngineInfo]:
    """Loads the model and returns a running engine. Raises StartupError for anything that the user can mend."""
    report = on_progress or (lambda stage, fraction: None)
    report("Inspecting model", 0.0)
    source = inspect_model(config.load)
    hardware = detect(config.device)
    if hardware.device == "cuda" and config.ops_backend != "reference":
        raise StartupError(
            "--device cuda: there are no CUDA kernels in this version yet.\n"
            "Use --device cpu, or --ops-backend reference to run the (slow) torch reference on the GPU."
        )
    requested = config.load.max_model_len
    config = resolve(config, hardware, source.config)
    # One thread until the worker runs: OpenMP keeps a team of threads for each thread that ever used several, and
    # with more team members than cores its barriers stop spinning, which makes a decode step three times slower.
    torch.set_num_threads(1)
    fmt = weight_format(config, hardware, source)
    layout = ATTENTION_KINDS[source.config.attention].kv_layout(source.config, config.cache.kv_cache_dtype)
    plan_memory(config, hardware, source.config, layout, estimate_weight_bytes(source.config, fmt))
    decoder = Decoder(source.config, fmt, config.load.max_model_len or 1, config.ops_backend)
    _load(decoder, source, config, report)
    plan = plan_memory(config, hardware, source.config, layout, decoder.num_bytes)
    page_bytes = config.cache.page_size * layout.bytes_per_token * source.config.num_layers
    require_context(plan, requested, config.cache.page_size, page_bytes)
    config = _with_plan(config, plan, page_bytes, fmt)
    pool = KVPool(source.config.num_layers, layout, plan.num_pages, config.cache.page_size, fmt.device)
    runner = ModelRunner(decoder, pool, config.scheduler.max_num_seqs or 1, config.num_threads)
    limits = RequestLimits(vocab_size=source.config.vocab_size, max_model_len=plan.max_model_len)
    engine = Engine(config, runner, num_pages=plan.num_pages, limits=limits, eos_token_ids=source.config.eos_token_ids)
    report("Ready", 1.0)
    info = EngineInfo(config, source.config, limits, plan.num_pages, list(plan.entries), hardware.name)
    return engine, info


def weight_format(config: EngineConfig, hardware: Hardware, source: ModelSource) -> WeightFormat:
    """How weights are held: `auto` quantisation is that of a quantised GGUF file, else none."""
    quantization = config.load.quantization
    if quantization == "auto":
        quantization = source.quantization
    dtype = getattr(torch, config.load.dtype)
    fmt = WeightFormat(dtype, torch.device(hardware.device), quantization)
    if quantization != "none":
        if hardware.device != "cpu":
            raise StartupError(f"--quantization {quantization} runs on a CPU only; use --quantization none.")
        dense_bytes = _num_parameters(source.config) * dtype.itemsize
        fmt = dataclasses.replace(fmt, keep_dense=dense_bytes <= _DENSE_COPY_FRACTION * hardware.memory_bytes)
    return fmt


def _num_parameters(model: ModelConfig) -> int:
    return sum(torch.Size(shape).numel() for shape in expected_shapes(model).values())


def estimate_weight_bytes(model: ModelConfig, fmt: WeightFormat) -> int:
    """Bytes that the weights will take, before anything is loaded: what does not fit is refused early."""
    per_weight = {"none": fmt.dtype.itemsize, "int8": 1.0, "int4": 0.5 + 2 * fmt.dtype.itemsize / 32}[fmt.quantization]
    if fmt.quantization != "none" and fmt.keep_dense:
        per_weight += fmt.dtype.itemsize
    total = 0.0
    for name, shape in expected_shapes(model).items():
        size = torch.Size(shape).numel()
        total += size * (per_weight if len(shape) == 2 and name != "embed.weight" else fmt.dtype.itemsize)
    return int(total)


def _load(decoder: Decoder, source: ModelSource, config: EngineConfig, report: ProgressCallback) -> None:
    total = len(expected_shapes(source.config))
    loaded = 0

    def on_tensor(_: str) -> None:
        nonlocal loaded
        loaded += 1
        report("Loading weights", loaded / total)

    with torch.inference_mode():
        decoder.load(iter_weights(source, config.load, decoder.fmt.device), on_tensor)


def _with_plan(config: EngineConfig, plan: MemoryPlan, page_bytes: int, fmt: WeightFormat) -> EngineConfig:
    """The config with the planned KV memory, the context length and the quantisation filled in."""
    return dataclasses.replace(
        config,
        load=dataclasses.replace(config.load, max_model_len=plan.max_model_len, quantization=fmt.quantization),
        cache=dataclasses.replace(config.cache, kv_cache_memory_bytes=plan.num_pages * page_bytes),
    )

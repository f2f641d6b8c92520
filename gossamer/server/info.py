"""What `gossamer info` reports: versions, hardware, and what a model would take here, without loading its weights."""

import importlib.metadata
import platform
from typing import Any

import torch

from gossamer import __version__
from gossamer.config import EngineConfig, ModelConfig
from gossamer.core import StartupError
from gossamer.engine.build import estimate_weight_bytes, inspect, weight_format
from gossamer.kv_cache.ledger import human, plan_memory
from gossamer.models.decoder import ATTENTION_KINDS
from gossamer.models.shapes import expected_shapes
from gossamer.runtime import ceilings
from gossamer.runtime.hardware import available_memory, detect, physical_cores

PACKAGES = ("torch", "triton", "numpy", "safetensors", "tokenizers", "gguf", "msgspec", "pyzmq", "fastapi", "uvicorn")


def machine_report() -> dict[str, Any]:
    """Versions and hardware. A package that is not installed has version None."""
    installed = {dist.name.lower(): dist.version for dist in importlib.metadata.distributions()}
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": { "gossamer": __version__, "python": platform.python_version(),
        **{name: installed.get(name) for name in PACKAGES}, }, "hardware": {
        "system": f"{platform.system()} {platform.machine()}", "cpu": detect("cpu").name, "cores": physical_cores(),
        "free_memory_bytes": available_memory(),
        "gpus": [{"name": gpu.name, "memory_bytes": gpu.total_memory} for gpu in gpus], },
    }  # fmt: skip


def model_report(config: EngineConfig) -> dict[str, Any]:
    """Architecture and memory plan of the model under these flags. Raises StartupError if it cannot be read.

    A plan that does not fit is reported with its arithmetic (`refused`), not raised. Weight bytes are estimated from
    the shapes.
    """
    config, source, hardware = inspect(config)
    model = source.config
    fmt = weight_format(config, hardware, source)
    layout = ATTENTION_KINDS[model.attention].kv_layout(model, config.cache.kv_cache_dtype)
    weights = estimate_weight_bytes(model, fmt)
    total, active = count_parameters(model)
    report: dict[str, Any] = {
        "model": config.load.model, "family": model.family, "parameters": total, "active_parameters": active,
        "layers": model.num_layers, "hidden_size": model.hidden_size,
        "heads": {"query": model.num_q_heads, "kv": model.num_kv_heads, "dim": model.head_dim},
        "experts": {"num": model.moe.num_experts, "per_token": model.moe.top_k} if model.moe else None,
        "vocab_size": model.vocab_size, "context": model.max_position_embeddings, "dtype": config.load.dtype,
        "quantization": fmt.quantization,
        "kv_bytes_per_token": layout.page_bytes(config.cache.page_size) * model.num_kv_layers // config.cache.page_size,
    }  # fmt: skip
    try:
        plan = plan_memory(config, hardware, model, layout, weights)
    except StartupError as error:
        return report | {"refused": str(error)}
    return report | {
        "ledger": dict(plan.entries),
        "num_pages": plan.num_pages,
        "page_size": config.cache.page_size,
        "max_model_len": plan.max_model_len,
    }


def measure_ceilings(config: EngineConfig) -> dict[str, Any]:
    """Measures the device that these flags choose, a few seconds long, and keeps the figures for later engines."""
    hardware = detect(config.device)
    measured = ceilings.measure(hardware, config.num_threads)
    return measured | {"device": hardware.name, "file": str(ceilings.save(config.cache_dir, hardware, measured))}


def count_parameters(model: ModelConfig) -> tuple[int, int]:
    """All parameters, and those that one token passes through: of the routed experts, top_k of num_experts."""
    total = sum(torch.Size(shape).numel() for shape in expected_shapes(model).values())
    if model.moe is None:
        return total, total
    moe_layers = model.num_kv_layers - len(model.moe.dense_layers)
    per_expert = 3 * model.hidden_size * model.moe.intermediate_size
    return total, total - moe_layers * (model.moe.num_experts - model.moe.top_k) * per_expert


def render(machine: dict[str, Any], model: dict[str, Any] | None) -> str:
    """The reports as aligned lines of text."""
    versions, hardware = machine["versions"], machine["hardware"]
    rows = [(name, version or "not installed") for name, version in versions.items()]
    rows += [
        ("", ""),
        ("system", hardware["system"]),
        ("CPU", f"{hardware['cpu']}, {hardware['cores']} cores"),
        ("free memory", human(hardware["free_memory_bytes"])),
    ]
    rows += [("GPU", f"{gpu['name']}, {human(gpu['memory_bytes'])}") for gpu in hardware["gpus"]] or [("GPU", "none")]
    if "ceilings" in machine:
        best = machine["ceilings"]
        rates = [f"{rate / 1e12:.2f} TFLOP/s {dtype}" for dtype, rate in best["flops_per_second"].items()]
        rates += [f"{best[f'{how}_bytes_per_second'] / 1e9:.1f} GB/s {how}" for how in ("read", "copy")]
        rows += [("", ""), ("measured", best["device"]), ("at best", ", ".join(rates)), ("kept in", best["file"])]
    if model is not None:
        rows += [("", ""), *_model_rows(model)]
    return "\n".join(f"{name:<14}{value}".rstrip() for name, value in rows)


def _model_rows(model: dict[str, Any]) -> list[tuple[str, str]]:
    heads, experts = model["heads"], model["experts"]
    parameters = f"{model['parameters']:,}"
    if experts:
        parameters += f", {model['active_parameters']:,} active per token"
    rows = [
        ("model", model["model"]),
        ("architecture", f"{model['family']}: {model['layers']} layers, hidden size {model['hidden_size']}"),
        ("heads", f"{heads['query']} query, {heads['kv']} KV, of {heads['dim']}"),
        ("vocabulary", f"{model['vocab_size']:,}"),
        ("parameters", parameters),
        ("held as", f"{model['dtype']}, quantisation {model['quantization']}"),
        ("context", f"{model['context']:,} tokens, {human(model['kv_bytes_per_token'])} of KV cache each"),
    ]
    if experts:
        rows.append(("experts", f"{experts['num']} per layer, {experts['per_token']} per token"))
    if "refused" in model:
        return [*rows, ("memory", model["refused"].replace("\n", "\n" + " " * 14))]
    entries = [f"{human(size)} {name}" for name, size in model["ledger"].items()]
    tokens = model["num_pages"] * model["page_size"]
    return [
        *rows,
        ("memory", " + ".join(entries) + " (weights estimated)"),
        ("KV cache", f"{model['num_pages']:,} pages of {model['page_size']} = {tokens:,} tokens"),
        ("longest", f"{model['max_model_len']:,} tokens of prompt + output"),
    ]

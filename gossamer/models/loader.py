"""Streams a model's weights under canonical names, one tensor at a time, in the order of the decoder."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gossamer.config import LoadConfig
from gossamer.core import StartupError
from gossamer.models.dummy import dummy_weights
from gossamer.models.gguf_tensors import stored_rows
from gossamer.models.source import ModelSource, inspect_model
from gossamer.models.upcycle import upcycle
from gossamer.ops.weights import QuantizedTensor, Weight

__all__ = ["ModelSource", "inspect_model", "iter_weights"]

_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def iter_weights(
    source: ModelSource, load: LoadConfig, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Weight]]:
    """Yields (canonical name, weight) for every weight of `source.config`, each of the shape that `shapes.py` expects.

    A floating-point weight is a CPU tensor of the checkpoint's dtype, usually a view of the memory-mapped file: copy
    before writing. A quantised one is a QuantizedTensor. Dummy weights have load.dtype, or the config's under auto,
    and are drawn on `device`.
    """
    dtype = _dummy_dtype(source, load)
    if source.kind == "dummy":
        stream: Iterator[tuple[str, Weight]] = dummy_weights(
            source.stored_config, load.seed, dtype, device, load.dummy_routing
        )
    elif source.kind == "gguf":
        stream = _gguf_weights(source)
    else:
        stream = _safetensors_weights(source)
    if load.upcycle_experts is not None:
        stream = upcycle(stream, source.config, load.seed, dtype)
    return stream


def _dummy_dtype(source: ModelSource, load: LoadConfig) -> torch.dtype:
    name = load.dtype if load.dtype != "auto" else source.config.dtype
    return {"float32": torch.float32, "float16": torch.float16}.get(name, torch.bfloat16)


def _safetensors_weights(source: ModelSource) -> Iterator[tuple[str, torch.Tensor]]:
    if source.headers is None:
        raise ValueError("a safetensors source has headers")
    files = source.headers.files
    with ExitStack() as stack:
        shards: dict[Path, Any] = {}
        for planned in source.plan:
            path = files[planned.stored_name]
            try:
                if path not in shards:
                    shards[path] = stack.enter_context(safe_open(path, framework="pt"))
                shard = shards[path]
                if planned.expert is None and planned.rows is None:
                    tensor = shard.get_tensor(planned.stored_name)
                else:
                    start, stop = planned.rows or (0, planned.shape[0])
                    view = shard.get_slice(planned.stored_name)
                    tensor = view[start:stop] if planned.expert is None else view[planned.expert, start:stop]
            except (SafetensorError, OSError) as e:
                raise StartupError(f"Cannot read {planned.stored_name} from {path}: {e}.") from e
            yield planned.name, tensor


def _gguf_weights(source: ModelSource) -> Iterator[tuple[str, Weight]]:
    owner = {name: file for file in source.gguf for name in file.tensors}
    for planned in source.plan:
        file = owner[planned.stored_name]
        ggml_type = file.tensors[planned.stored_name].ggml_type
        rows = stored_rows(file, planned, source.interleaved_heads)
        if ggml_type in _TORCH_DTYPES:
            yield planned.name, torch.from_numpy(rows).view(_TORCH_DTYPES[ggml_type]).reshape(planned.shape)
        else:
            yield planned.name, QuantizedTensor(rows, ggml_type, planned.shape)

"""Streams a model's weights under canonical names, one tensor at a time, in the order of the decoder."""

import logging
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from gossamer.config import LoadConfig
from gossamer.core import StartupError
from gossamer.models.checkpoint_fp8 import FP8_DTYPE, Fp8Scheme, scale_rows
from gossamer.models.dummy import dummy_weights, upcycle
from gossamer.models.gguf_tensors import stored_rows
from gossamer.models.source import ModelSource, inspect_model
from gossamer.models.weight_names import PlannedWeight
from gossamer.ops.weights import Fp8Tensor, QuantizedTensor, Weight

__all__ = ["ModelSource", "inspect_model", "iter_weights"]

_LOGGER = logging.getLogger(__name__)
_TORCH_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def iter_weights(
    source: ModelSource, load: LoadConfig, device: torch.device | str = "cpu"
) -> Iterator[tuple[str, Weight]]:
    """Yields (canonical name, weight) for every weight of `source.config`, each of the shape that `shapes.py` expects.

    A floating-point weight is a CPU tensor of the checkpoint's dtype, usually a view of the memory-mapped file: copy
    before writing. A quantised one is a QuantizedTensor or an Fp8Tensor. Dummy weights have load.dtype, or the
    config's under auto, and are drawn on `device`.
    """
    name = load.dtype if load.dtype != "auto" else source.config.dtype
    dtype = {"float32": torch.float32, "float16": torch.float16}.get(name, torch.bfloat16)
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


def _safetensors_weights(source: ModelSource) -> Iterator[tuple[str, Weight]]:
    if source.headers is None:
        raise ValueError("a safetensors source has headers")
    files, dtypes, scheme = source.headers.files, source.headers.dtypes, source.fp8
    if scheme is not None and scheme.static_activations:
        _LOGGER.warning("The checkpoint's static activation scales are not used: activations are scaled as they come.")
    with ExitStack() as stack:
        shards: dict[Path, Any] = {}

        def shard_of(name: str) -> Any:
            path = files[name]
            if path not in shards:
                shards[path] = stack.enter_context(safe_open(path, framework="pt"))
            return shards[path]

        for planned in source.plan:
            name = planned.stored_name
            try:
                tensor = _read(shard_of(name), name, planned)
                scale = None
                if scheme is not None and dtypes[name] == FP8_DTYPE:
                    name += scheme.suffix
                    scale = _read_scale(shard_of(name), name, planned, scheme)
            except (SafetensorError, OSError) as e:
                raise StartupError(f"Cannot read {name} from {files[name]}: {e}.") from e
            if scheme is None or scale is None:
                offset = source.config.norm_offset and planned.name.endswith("norm.weight")
                yield planned.name, tensor.float() + 1.0 if offset else tensor
            else:
                block = {"tensor": None, "channel": (1, tensor.shape[1]), "block": (128, 128)}[scheme.granularity]
                yield planned.name, Fp8Tensor(tensor, scale, block, scheme.ue8m0)


def _read(shard: Any, name: str, planned: PlannedWeight) -> torch.Tensor:
    if planned.expert is None and planned.rows is None:
        tensor: torch.Tensor = shard.get_tensor(name)
        return tensor
    start, stop = planned.rows or (0, planned.shape[0])
    view = shard.get_slice(name)
    piece: torch.Tensor = view[start:stop] if planned.expert is None else view[planned.expert, start:stop]
    return piece


def _read_scale(shard: Any, name: str, planned: PlannedWeight, scheme: Fp8Scheme) -> torch.Tensor:
    """fp32, two-dimensional: the scales of one planned weight."""
    expert = planned.expert
    scale = shard.get_tensor(name) if expert is None else shard.get_slice(name)[expert : expert + 1][0]
    if scheme.granularity != "block":
        scale = scale.reshape(-1, 1)
    rows: torch.Tensor = scale[scale_rows(scheme, planned.rows)]
    return rows.float().contiguous()


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

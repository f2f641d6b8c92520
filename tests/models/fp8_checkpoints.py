"""Tiny FP8 checkpoints in the formats that people publish, written from random weights without our quantiser."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_checkpoints import make_model

E4M3_MAX = 448.0
ALIGNED = {
    "hidden_size": 256,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 2,
}
"""Every part of a merged projection ends where a block of 128 rows does."""
RAGGED = {**ALIGNED, "hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 320}
"""No part does, and the last group of a row is short."""
MOE = {"moe_intermediate_size": 160, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
_CONVERTED = re.compile(r"\.((q|k|v|o|gate|up|down|q_a|q_b|kv_b)_proj|kv_a_proj_with_mqa|wq_b|wk)\.weight$")
_STACKED = re.compile(r"\.experts\.(gate_up|down)_proj$")

WEIGHTS = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": False, "group_size": None}
INPUTS = {"num_bits": 8, "type": "float", "strategy": "token", "symmetric": True, "dynamic": True}


def compressed(strategy: str, inputs: dict[str, Any] | None = INPUTS) -> dict[str, Any]:
    weights = WEIGHTS | {"strategy": strategy, "block_structure": [128, 128] if strategy == "block" else None}
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
        "quantization_status": "compressed",
    }


FINE_GRAINED = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
    "modules_to_not_convert": ["lm_head"],
}
# format -> (quantization_config, granularity, what is added to a tensor's name)
FORMATS: dict[str, tuple[dict[str, Any], str, str]] = {
    "block": (FINE_GRAINED, "block", "_scale_inv"),
    "channel": (compressed("channel"), "channel", "_scale"),
    "tensor": (compressed("tensor"), "tensor", "_scale"),
    "compressed_block": (compressed("block"), "block", "_scale"),
    "static": ({"quant_method": "fp8", "activation_scheme": "static"}, "tensor", "_scale"),
}


def quantise(weight: torch.Tensor, granularity: str) -> tuple[torch.Tensor, torch.Tensor]:
    """E4M3 and scales of a matrix, block by block as the definition says."""
    rows, columns = weight.shape
    height, width = {"block": (128, 128), "channel": (1, columns), "tensor": (rows, columns)}[granularity]
    data = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scale = torch.empty(-(-rows // height), -(-columns // width))
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            place = slice(i * height, (i + 1) * height), slice(j * width, (j + 1) * width)
            block = weight[place].float()
            scale[i, j] = block.abs().max() / E4M3_MAX
            data[place] = (block / scale[i, j]).to(torch.float8_e4m3fn)
    return data, scale.reshape(1) if granularity == "tensor" else scale


def save_fp8_checkpoint(
    folder: Path, family: str, format: str, shapes: dict[str, Any], stacked: bool = False
) -> dict[str, torch.Tensor]:
    """Writes the folder; returns the values that its tensors stand for, by stored name, in fp32."""
    config, granularity, suffix = FORMATS[format]
    # bf16 weights, or what no quantisation is about would be compared with float32's.
    model = make_model(family, **shapes).bfloat16()
    model.save_pretrained(folder, save_original_format=not stacked)
    from safetensors.torch import load_file

    tensors, values = {}, {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        values[name], tensors[name] = tensor.float(), tensor
        if not _CONVERTED.search(name) and not _STACKED.search(name):
            continue
        matrices = [quantise(matrix, granularity) for matrix in (tensor if tensor.ndim == 3 else [tensor])]
        data, scale = (torch.stack(parts) for parts in zip(*matrices, strict=True))
        values[name] = torch.stack([_dequantise(*pair, granularity) for pair in matrices]).view(tensor.shape)
        tensors[name], tensors[name + suffix] = data.view(tensor.shape), scale if tensor.ndim == 3 else scale[0]
        if format == "static":
            tensors[name.removesuffix("weight") + "input_scale"] = torch.tensor([0.5])
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = json.loads((folder / "config.json").read_text()) | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(written))
    return values


def _dequantise(data: torch.Tensor, scale: torch.Tensor, granularity: str) -> torch.Tensor:
    if granularity == "block":
        scale = torch.kron(scale, torch.ones(128, 128))[: data.shape[0], : data.shape[1]]
    return data.float() * scale

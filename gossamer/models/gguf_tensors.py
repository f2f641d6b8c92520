"""The tensors of a GGUF file as the loader sees them: names, order of rows, and the weight format that suits them.

Torch-free: a model is inspected, and refused, before torch is imported.
"""

import math
import re
from collections.abc import Iterable
from typing import Any, Literal

import numpy as np

from gossamer.config import ModelConfig
from gossamer.core import StartupError
from gossamer.models.gguf_file import GGML_TYPES, GGUFFile
from gossamer.models.shapes import Shape
from gossamer.models.weight_names import Place, PlannedWeight, places, plan_weights

Stored = Literal["none", "int8", "int4"]
FLOAT_TYPES = ("F32", "F16", "BF16")
QUANTISED_TYPES = frozenset(name for name, block, _ in GGML_TYPES.values() if block > 1)
# Frequencies are computed from the config, which these tensors were folded into; some converters still store them.
GGUF_IGNORABLE = re.compile(r"^rope_freqs\.weight$|\.attn_rot_embd\.weight$")
_ROTATED = re.compile(r"\.attn\.([qk])\.(?:weight|bias)$")

GGUF_WEIGHTS = places(
    {
        "embed": "token_embd",
        "final_norm": "output_norm",
        "lm_head": "output",
        "layers.{i}.attn_norm": "blk.{i}.attn_norm",
        "layers.{i}.mlp_norm": "blk.{i}.ffn_norm",
        "layers.{i}.attn.o": "blk.{i}.attn_output",
        "layers.{i}.moe.router": "blk.{i}.ffn_gate_inp",
    }
    | {f"layers.{{i}}.attn.{name}": f"blk.{{i}}.attn_{name}" for name in ("q", "k", "v", "q_norm", "k_norm")}
    | {f"layers.{{i}}.mlp.{name}": f"blk.{{i}}.ffn_{name}" for name in ("gate", "up", "down")}
) | {
    # One stacked tensor per projection; files from before 2024-04 have one tensor per expert.
    f"layers.{{i}}.moe.experts.{{e}}.{name}.weight": (
        Place(f"blk.{{i}}.ffn_{name}_exps.weight", stacked=True),
        Place(f"blk.{{i}}.ffn_{name}.{{e}}.weight"),
    )
    for name in ("gate", "up", "down")
}


def plan_gguf(config: ModelConfig, files: Iterable[GGUFFile]) -> list[PlannedWeight]:
    """Finds every weight in the parts; StartupError for a type that cannot be one or a name that occurs twice."""
    shapes: dict[str, Shape] = {}
    for file in files:
        for name, tensor in file.tensors.items():
            if tensor.ggml_type not in FLOAT_TYPES and tensor.ggml_type not in QUANTISED_TYPES:
                raise StartupError(f"The tensor {name} has the type {tensor.ggml_type}, which is not supported.")
            if name in shapes:
                raise StartupError(f"The tensor {name} is in two parts of the model.")
            shapes[name] = tensor.shape
    return plan_weights(config, GGUF_WEIGHTS, shapes, GGUF_IGNORABLE)


def suggested_quantization(files: Iterable[GGUFFile]) -> Stored:
    """What holds most of the matrices' elements best: int4 up to 5 bits an element, int8 above, none for floats.

    Embedding and head are left out: converters often keep them in more bits than the rest.
    """
    elements: dict[Stored, int] = {"int4": 0, "int8": 0, "none": 0}
    sizes = {name: 8 * block_bytes / block for name, block, block_bytes in GGML_TYPES.values()}
    for file in files:
        for name, tensor in file.tensors.items():
            if len(tensor.shape) < 2 or name in ("token_embd.weight", "output.weight"):
                continue
            bits = sizes[tensor.ggml_type]
            kind: Stored = "none" if tensor.ggml_type in FLOAT_TYPES else "int4" if bits <= 5 else "int8"
            elements[kind] += math.prod(tensor.shape)
    return max(elements, key=lambda kind: elements[kind]) if any(elements.values()) else "none"


def stored_rows(
    file: GGUFFile, planned: PlannedWeight, heads: dict[str, int] | None
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The bytes of a planned weight, uint8 `[rows, bytes per row]`, in the row order of Hugging Face's rotary halves.

    `heads` (`{"q": heads, "k": heads}`) is set for files whose q and k rows llama.cpp interleaved: row (h, j, t) of
    [heads, head_dim / 2, 2] goes back to (h, t, j). Rows move whole, so quantised blocks stay as they are.
    """
    blocks = file.blocks(planned.stored_name)
    if planned.expert is not None:
        blocks = blocks[planned.expert]
    rows = blocks.reshape(planned.shape[0], -1)
    match = _ROTATED.search(planned.name)
    if heads is None or match is None:
        return rows
    num_heads = heads[match[1]]
    pairs = rows.reshape(num_heads, planned.shape[0] // num_heads // 2, 2, -1)
    return np.ascontiguousarray(pairs.swapaxes(1, 2)).reshape(rows.shape)


def interleaved_heads(architecture: str, config: ModelConfig) -> dict[str, int] | None:
    """Heads of q and k where the converter interleaves their rows: the `llama` architecture only."""
    return {"q": config.num_q_heads, "k": config.num_kv_heads} if architecture == "llama" else None

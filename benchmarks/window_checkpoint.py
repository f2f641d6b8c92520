"""Writes the default model, dequantised, as a folder whose every layer has a sliding window: what the engine's flags
cannot say of a checkpoint, its `config.json` can. `python benchmarks/window_checkpoint.py FOLDER --window 1024`
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import gguf
import numpy as np
import torch
from safetensors.torch import save_file

from gossamer.models.gguf_config import hf_config_of_gguf, open_gguf
from gossamer.server.cli import default_model

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attn_output": "self_attn.o_proj",
} | {f"attn_{name}": f"self_attn.{name}_proj" for name in "qkv"} | {
    f"ffn_{name}": f"mlp.{name}_proj" for name in ("gate", "up", "down")
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--window", type=int, required=True, help="tokens that a token sees, itself included")
    args = parser.parse_args()
    model = default_model()
    _, config = hf_config_of_gguf(open_gguf(Path(model)))
    rotated = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    tensors = {}
    for stored in gguf.GGUFReader(model).tensors:
        *layer, name = stored.name.removesuffix(".weight").split(".")
        weight = gguf.dequantize(stored.data, stored.tensor_type).astype(np.float32)
        if name in rotated:  # GGUF interleaves the halves that rotate together
            pairs = weight.reshape(rotated[name], -1, 2, weight.shape[1])
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        place = f"model.layers.{layer[1]}.{NAMES[name]}" if layer else NAMES[name]
        tensors[f"{place}.weight"] = torch.from_numpy(np.ascontiguousarray(weight)).bfloat16()
    args.folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, args.folder / "model.safetensors", metadata={"format": "pt"})
    config = {key: value for key, value in config.items() if key not in ("attention_bias", "mlp_bias", "clip_qkv")}
    config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": args.window}
    (args.folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


if __name__ == "__main__":
    main()

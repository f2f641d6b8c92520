"""The default model's greedy continuations equal those of transformers on the same dequantised weights, in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
import transformers

from gossamer import LLM, SamplingParams

NUM_TOKENS = 64
PROMPTS = [
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "1, 2, 3, 4,",
    "Water boils at 100 degrees, which is why, in the mountains, " * 8,  # more than a page, more than a chunk
    "<|im_start|>user\nWrite a poem about the sea.<|im_end|>\n<|im_start|>assistant\n",
    "Dès l'aube, à l'heure où blanchit la campagne",
]
NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}


def transformers_model(path: Path) -> Any:
    """Built with the gguf package alone, so that nothing of the loader under test is shared."""
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
    )
    state = {}
    for tensor in gguf.GGUFReader(path).tensors:
        weight = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy()).float()
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            # llama.cpp rotates neighbouring rows of a head, transformers its halves.
            weight = weight.view(-1, 32, 2, 576).transpose(1, 2).reshape(-1, 576)
        match tensor.name.split("."):
            case ["blk", layer, part, "weight"]:
                state[f"model.layers.{layer}.{NAMES[part]}.weight"] = weight
            case ["token_embd", "weight"]:
                state["model.embed_tokens.weight"] = state["lm_head.weight"] = weight
            case ["output_norm", "weight"]:
                state["model.norm.weight"] = weight
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    model.load_state_dict(state, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


def test_greedy_continuations_equal_transformers(default_gguf: Path) -> None:
    greedy = SamplingParams(temperature=0.0, max_tokens=NUM_TOKENS, ignore_eos=True)
    options = {"dtype": "float32", "quantization": "none", "max_model_len": 512, "num_threads": 1}
    with LLM(str(default_gguf), max_num_batched_tokens=96, **options) as llm:
        outputs = llm.generate(PROMPTS, greedy, use_tqdm=False)
    model = transformers_model(default_gguf)
    for output in outputs:
        prompt, tokens = output.prompt_token_ids, output.outputs[0].token_ids
        # One pass over prompt and answer: where each token is the likeliest after those before it, the greedy
        # continuation is this very sequence.
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
        assert len(tokens) == NUM_TOKENS
        assert tokens == logits.argmax(-1).tolist(), output.prompt

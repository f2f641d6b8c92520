"""Tiny random checkpoints of every family and rope kind against transformers: the proof of config, names and math."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import transformers
from oracle import greedy
from tiny_checkpoints import CHECKPOINTS, make_model

from gossamer.config import LoadConfig
from gossamer.kv_cache.pool import KVPool
from gossamer.layers.attention.base import AttentionBatch
from gossamer.layers.linear import WeightFormat
from gossamer.models.decoder import ATTENTION_KINDS, Decoder
from gossamer.models.loader import ModelSource, inspect_model, iter_weights
from gossamer.models.weight_names import HF_WEIGHTS
from gossamer.ops.weights import QuantizedTensor, Weight

Checkpoint = Callable[[str], Path]
PAGE_SIZE = 16
TEMPLATE = re.compile(r"^layers\.(\d+)\.")
CPU = torch.device("cpu")


class Sequence:
    """One sequence run by hand through a decoder and its pages."""

    def __init__(self, load: LoadConfig, max_len: int = 256) -> None:
        source = inspect_model(load)
        self.decoder = Decoder(source.config, WeightFormat(torch.float32, CPU), max_len)
        self.decoder.load(iter_weights(source, load))
        pages = max_len // PAGE_SIZE
        layout = ATTENTION_KINDS[source.config.attention].kv_layout(source.config, "float32")
        self.pool = KVPool(source.config.num_layers, layout, pages, PAGE_SIZE, CPU)
        self.table = list(reversed(range(pages)))
        self.length = 0

    @torch.inference_mode()
    def feed(self, ids: list[int]) -> torch.Tensor:
        """Logits [len(ids), vocab_size] of the next tokens; one id takes the decode path."""
        decode = int(len(ids) == 1 and self.length > 0)
        batch = AttentionBatch(decode, [self.length], [len(ids)], [self.table], PAGE_SIZE)
        positions = torch.arange(self.length, self.length + len(ids))
        hidden = self.decoder.forward(torch.tensor(ids), positions, batch, self.pool)
        self.length += len(ids)
        return self.decoder.logits(hidden)


def prompt(length: int) -> list[int]:
    return torch.randint(3, 128, (length,), generator=torch.Generator().manual_seed(length)).tolist()


def reference(name: str, ids: list[int], num_new: int) -> tuple[torch.Tensor, list[int]]:
    """transformers' logits of the prompt, and its greedy continuation."""
    return greedy(make_model(name), ids, num_new)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_logits_and_greedy_tokens(name: str, checkpoint: Checkpoint) -> None:
    ids = prompt(45)
    expected, continuation = reference(name, ids, 64)
    sequence = Sequence(LoadConfig(model=str(checkpoint(name))))
    logits = sequence.feed(ids)
    assert expected.std() > 0.5  # flat logits would agree whatever the mathematics
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < 64:
        tokens.append(int(sequence.feed(tokens[-1:])[-1].argmax()))
    assert tokens == continuation


@pytest.mark.parametrize(
    "name", ["llama", "mistral", "qwen2", "olmoe", "deepseek_v32", "glm_moe_dsa_shared", "minimax_m3"]
)
def test_prompt_in_chunks(name: str, checkpoint: Checkpoint) -> None:
    ids = prompt(70)
    expected, _ = reference(name, ids, 0)
    sequence = Sequence(LoadConfig(model=str(checkpoint(name))))
    logits = torch.cat([sequence.feed(ids[start:stop]) for start, stop in ((0, 7), (7, 24), (24, 25), (25, 70))])
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("experts", "top_k"), [(4, 2), (3, 1)])
def test_upcycled_model_equals_the_dense_one(experts: int, top_k: int, checkpoint: Checkpoint) -> None:
    model = str(checkpoint("llama"))
    ids = prompt(45)
    dense = Sequence(LoadConfig(model=model)).feed(ids)
    upcycled = Sequence(LoadConfig(model=model, upcycle_experts=experts, upcycle_topk=top_k)).feed(ids)
    torch.testing.assert_close(upcycled, dense, rtol=0, atol=1e-5)


@pytest.mark.slow  # tests/models/test_smollm2_vs_transformers.py goes further, through the engine
def test_default_model_continues_as_transformers_does(default_gguf: Path) -> None:
    """The same dequantised weights in both; only right names, row order and metadata know France's capital."""
    load = LoadConfig(model=str(default_gguf))
    source = inspect_model(load)
    metadata = source.gguf[0].metadata
    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    ids = [vocabulary[token] for token in ("The", "Ġcapital", "Ġof", "ĠFrance", "Ġis")]
    sequence = Sequence(load, max_len=64)
    tokens: list[int] = []
    while len(tokens) < 12:
        tokens.append(int(sequence.feed(tokens[-1:] or ids)[-1].argmax()))
    assert vocabulary["ĠParis"] in tokens[:3]
    assert tokens == smollm2_reference(source, dict(iter_weights(source, load)), ids, len(tokens))


def smollm2_reference(source: ModelSource, stream: dict[str, Weight], ids: list[int], num_new: int) -> list[int]:
    config = source.config
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_layers,
            num_attention_heads=config.num_q_heads,
            num_key_value_heads=config.num_kv_heads,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
            tie_word_embeddings=True,
        )
    ).eval()
    parameters = dict(model.named_parameters())
    with torch.inference_mode():
        for planned in source.plan:
            weight = stream[planned.name]
            name = HF_WEIGHTS[TEMPLATE.sub(r"layers.{i}.", planned.name)][0].name
            layer = TEMPLATE.match(planned.name)
            target = parameters[name.format(i=layer[1] if layer else 0)]
            target.copy_(weight.dequantize() if isinstance(weight, QuantizedTensor) else weight)
    return greedy(model, ids, num_new)[1]

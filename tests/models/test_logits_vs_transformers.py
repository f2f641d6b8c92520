"""Tiny random checkpoints of every family and rope kind against transformers: the proof of config, names and math."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny_checkpoints import CHECKPOINTS, make_model

from gossamer.config import LoadConfig
from gossamer.kv_cache.pool import KVPool
from gossamer.layers.attention.base import AttentionBatch
from gossamer.layers.attention.gqa import kv_layout
from gossamer.layers.linear import WeightFormat
from gossamer.models.decoder import Decoder
from gossamer.models.loader import inspect_model, iter_weights

Checkpoint = Callable[[str], Path]
PAGE_SIZE = 16
CPU = torch.device("cpu")


class Sequence:
    """One sequence run by hand through a decoder and its pages."""

    def __init__(self, load: LoadConfig, max_len: int = 256) -> None:
        source = inspect_model(load)
        self.decoder = Decoder(source.config, WeightFormat(torch.float32, CPU), max_len)
        self.decoder.load(iter_weights(source, load))
        pages = max_len // PAGE_SIZE
        layout = kv_layout(source.config, "float32")
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
    model, tokens = make_model(name), list(ids)
    with torch.inference_mode():
        out = model(torch.tensor([tokens]), use_cache=True)
        logits, cache = out.logits[0], out.past_key_values
        for _ in range(num_new):
            tokens.append(int(out.logits[0, -1].argmax()))
            out = model(torch.tensor([tokens[-1:]]), past_key_values=cache, use_cache=True)
    return logits, tokens[len(ids) :]


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


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "olmoe"])
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

"""Greedy decoding by transformers, whose models' cache changed its name in 5.24."""

from __future__ import annotations

from typing import Any

import torch


def greedy(model: Any, ids: list[int], num_new: int) -> tuple[torch.Tensor, list[int]]:
    """Logits [len(ids), vocab_size] of a prompt, and its greedy continuation."""
    tokens: list[int] = []
    with torch.inference_mode():
        out = model(torch.tensor([ids]), use_cache=True)
        logits, name = out.logits[0], "cache" if "cache" in out else "past_key_values"
        for i in range(num_new):
            tokens.append(int(out.logits[0, -1].argmax()))
            if i + 1 < num_new:
                out = model(torch.tensor([tokens[-1:]]), use_cache=True, **{name: out[name]})
    return logits, tokens

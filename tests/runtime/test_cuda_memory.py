"""What a GPU's warm-up says of shapes that no kernel serves; the rest needs a GPU and stands in tests/engine."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from gossamer.config import Hardware, ModelConfig, make_engine_config, resolve
from gossamer.core import KVLayout, StartupError
from gossamer.runtime import cuda_memory

MODEL = ModelConfig("llama", 100, 64, 96, 2, 4, 2, 16, max_position_embeddings=256)


def measure(monkeypatch: pytest.MonkeyPatch, model: ModelConfig = MODEL, **methods: Callable[..., None]) -> None:
    monkeypatch.setattr(torch.cuda, "stream", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: None)
    runner = SimpleNamespace(
        device=torch.device("cpu"), decoder=SimpleNamespace(config=model), stream=None,
        attach=lambda pool, capture: None, **methods,
    )  # fmt: skip
    config = resolve(make_engine_config(model="m"), Hardware("cuda", "a GPU", 1 << 34, 2), MODEL)
    cuda_memory.measure(runner, KVLayout.of((2, 2, 16), "bfloat16"), config)  # type: ignore[arg-type]


@pytest.mark.parametrize("error", [ValueError, NotImplementedError])
def test_a_refused_shape_is_a_start_up_error_with_its_remedy(
    monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def refuse(_: int) -> None:
        raise error("head_dim 48")

    with pytest.raises(StartupError, match=r"head_dim 48\.\nUse --ops-backend reference"):
        measure(monkeypatch, warm_up_prefill=refuse)


@pytest.mark.parametrize(
    ("attention", "lengths"), [("gqa", [0]), ("mla", [0]), ("nsa", [*range(11)]), ("dsa", [*range(11)])]
)
def test_sparse_prefill_warms_up_for_shorter_contexts(
    monkeypatch: pytest.MonkeyPatch, attention: str, lengths: list[int]
) -> None:
    """Each half of the one before, by the chunk that has kernels of its own."""
    steps: list[tuple[int, ...]] = []

    def end(_: int) -> None:
        raise ValueError("enough")

    with pytest.raises(StartupError, match="enough"):
        measure(
            monkeypatch, dataclasses.replace(MODEL, attention=attention), warm_up_decode_eagerly=end,
            warm_up_prefill=lambda *step: steps.append(step),
        )  # fmt: skip
    assert steps[1:] == [(511, halvings) for halvings in lengths]

"""Gossamer: an inference engine for Mixture-of-Experts models and long contexts."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from gossamer.core import SamplingParams
    from gossamer.server.async_llm import AsyncLLM
    from gossamer.server.llm import LLM
    from gossamer.server.outputs import CompletionOutput, RequestOutput

_EXPORTS = {
    "AsyncLLM": "gossamer.server.async_llm",
    "CompletionOutput": "gossamer.server.outputs",
    "LLM": "gossamer.server.llm",
    "RequestOutput": "gossamer.server.outputs",
    "SamplingParams": "gossamer.core",
}

__all__ = ["LLM", "AsyncLLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]


def __getattr__(name: str) -> Any:
    # Lazy, so that `gossamer --help` and the API process never pay for torch.
    if name in _EXPORTS:
        return getattr(importlib.import_module(_EXPORTS[name]), name)
    raise AttributeError(f"module 'gossamer' has no attribute {name!r}")

"""What a request leaves open is filled in from the model's generation_config.json; what it sets is not touched."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
from server_process import ServerProcess, write_byte_tokenizer

from gossamer.config import EngineConfig, LoadConfig, ModelConfig, ServerConfig
from gossamer.core import RequestLimits, SamplingParams, StartupError
from gossamer.engine.info import EngineInfo
from gossamer.models.hf_folder import default_sampling
from gossamer.server.openai_protocol import ChatRequest, CompletionRequest
from gossamer.server.serving import Serving

PUBLISHED = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05, "repetition_penalty": 1.1}


def folder_with(folder: Path, config: dict[str, Any]) -> str:
    (folder / "generation_config.json").write_text(json.dumps(config))
    return str(folder)


def test_the_published_values_are_read(tmp_path: Path) -> None:
    model = folder_with(tmp_path, PUBLISHED | {"do_sample": True, "eos_token_id": [1, 2], "max_new_tokens": 9})
    assert default_sampling(LoadConfig(model=model)) == SamplingParams(**PUBLISHED)
    assert default_sampling(LoadConfig(model=model, generation_config="none")) == SamplingParams()
    model = folder_with(tmp_path, {"temperature": None, "top_k": 5})
    assert default_sampling(LoadConfig(model=model)) == SamplingParams(top_k=5)
    assert default_sampling(LoadConfig(model=str(tmp_path / "model.gguf"))) == SamplingParams()


@pytest.mark.parametrize(
    "config", [{"temperature": -1}, {"top_p": "high"}, {"top_k": 1.5}, {"top_k": True}, {"repetition_penalty": 0}]
)
def test_a_value_out_of_range_is_named(tmp_path: Path, config: dict[str, Any]) -> None:
    with pytest.raises(
        StartupError, match=rf"generation_config\.json: {next(iter(config))} must[\s\S]*--generation-co"
    ):
        default_sampling(LoadConfig(model=folder_with(tmp_path, config)))


def accepted(request_type: type[ChatRequest] | type[CompletionRequest], body: dict[str, Any]) -> SamplingParams:
    limits = RequestLimits(vocab_size=100, max_model_len=64)
    info = EngineInfo(EngineConfig(), ModelConfig("m", 100, 8, 8, 1, 1, 1, 8, 64), limits, 1)
    defaults = SamplingParams(**PUBLISHED)
    llm: Any = SimpleNamespace(requested_model="m", default_sampling=defaults, info=info, observe=lambda _: None)
    decoder: Any = msgspec.json.Decoder(request_type)
    return Serving(llm, ServerConfig()).accept(json.dumps(body).encode(), decoder)[1]


@pytest.mark.parametrize(
    ("request_type", "body"),
    [(CompletionRequest, {"prompt": "a"}), (ChatRequest, {"messages": [{"role": "user", "content": "a"}]})],
)
def test_a_request_overrides_them_one_by_one(request_type: Any, body: dict[str, Any]) -> None:
    max_tokens = 16 if request_type is CompletionRequest else None
    recommended = SamplingParams(**PUBLISHED, max_tokens=max_tokens)
    assert accepted(request_type, body) == recommended
    own = {"temperature": 0.0, "top_k": 0, "top_p": 1.0}
    assert accepted(request_type, body | own) == dataclasses.replace(recommended, **own)
    assert accepted(request_type, body | own).greedy
    assert accepted(request_type, body | {"temperature": None}) == recommended


def test_the_server_says_what_it_applies(tmp_path: Path) -> None:
    model = folder_with(write_byte_tokenizer(tmp_path / "tiny"), {"temperature": 0.6})
    with ServerProcess({"load": {"model": model}}) as server:
        assert "Sampling defaults of the model: temperature 0.6 (--generation-config none" in server.stderr
        assert server.stderr.count("Config: ") == 1
        server.canary()

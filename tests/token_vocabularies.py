"""Vocabularies for tests, made from the default model's."""

from __future__ import annotations

from typing import Any


def byte_of_character() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def sentencepiece_metadata(byte_level: dict[str, Any]) -> dict[str, Any]:
    """A vocabulary of SentencePiece's kind with the pieces of a byte-level BPE, scored in the order of its merges."""
    byte_of = byte_of_character()
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256))]
    types = [2, 3, 3, *[6] * 256]
    pieces: dict[str, None] = {}
    for merge in byte_level["tokenizer.ggml.merges"][:12000]:
        raw = bytes(byte_of[c] for c in merge.replace(" ", ""))
        text = raw.decode(errors="ignore").replace(" ", "▁")
        if len(text) > 1 and "\ufffd" not in text and text.replace("▁", " ").encode() == raw:
            pieces[text] = None
    characters = sorted({c for text in pieces for c in text} | {"▁"})
    ranked = [*pieces, *characters]
    own = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*tokens, *ranked, "<|user|>", "<tool>"],
        "tokenizer.ggml.token_type": [*types, *[1] * len(ranked), 3, 4],
        "tokenizer.ggml.scores": [*[0.0] * len(tokens), *(-float(i + 1) for i in range(len(ranked))), 0.0, 0.0],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }
    rest = {key: value for key, value in byte_level.items() if not key.startswith("tokenizer.")}
    return rest | {"llama.vocab_size": len(own["tokenizer.ggml.tokens"])} | own

from __future__ import annotations

import random
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from gossamer.config import LoadConfig
from gossamer.core import StartupError
from gossamer.models.gguf_file import GGML_TYPES, read_gguf
from gossamer.models.loader import inspect_model, iter_weights
from gossamer.ops.weights import QuantizedTensor

MAGIC = b"GGUF"


def string(text: str | bytes) -> bytes:
    raw = text.encode() if isinstance(text, str) else text
    return struct.pack("<Q", len(raw)) + raw


def header(
    metadata: list[bytes] | None = None,
    tensors: list[bytes] | None = None,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> bytes:
    metadata, tensors = metadata or [], tensors or []
    num_tensors, num_metadata = counts or (len(tensors), len(metadata))
    return MAGIC + struct.pack("<IQQ", version, num_tensors, num_metadata) + b"".join(metadata) + b"".join(tensors)


def entry(key: str, type_id: int, payload: bytes) -> bytes:
    return string(key) + struct.pack("<I", type_id) + payload


def info(name: str, dims: list[int], type_id: int = 0, offset: int = 0, num_dims: int | None = None) -> bytes:
    count = len(dims) if num_dims is None else num_dims
    return string(name) + struct.pack(f"<I{len(dims)}QIQ", count, *dims, type_id, offset)


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    path = tmp_path / "sample.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.u8", 200)
    writer.add_int8("a.i8", -7)
    writer.add_uint16("a.u16", 65535)
    writer.add_int16("a.i16", -300)
    writer.add_uint32("a.u32", 2**32 - 1)
    writer.add_int32("a.i32", -5)
    writer.add_uint64("a.u64", 2**63)
    writer.add_int64("a.i64", -(2**40))
    writer.add_float32("a.f32", 0.5)
    writer.add_float64("a.f64", 1e-300)
    writer.add_bool("a.yes", True)
    writer.add_string("a.text", "Ġété\n")
    writer.add_array("a.words", ["", "x", "日本"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("a.floats", [0.5, 2.0])
    writer.add_array("a.flags", [True, False])
    writer.add_tensor("one", np.arange(6, dtype=np.float32).reshape(2, 3))
    writer.add_tensor("two", np.arange(5, dtype=np.float16))
    packed = gguf.quantize(np.ones((4, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("three", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_every_metadata_type(sample: Path) -> None:
    metadata = read_gguf(sample).metadata
    expected: dict[str, Any] = {
        "a.u8": 200,
        "a.i8": -7,
        "a.u16": 65535,
        "a.i16": -300,
        "a.u32": 2**32 - 1,
        "a.i32": -5,
        "a.u64": 2**63,
        "a.i64": -(2**40),
        "a.f32": 0.5,
        "a.f64": 1e-300,
        "a.yes": True,
        "a.text": "Ġété\n",
        "a.words": ["", "x", "日本"],
        "a.numbers": [1, -2, 3],
        "a.floats": [0.5, 2.0],
        "a.flags": [True, False],
        "general.architecture": "llama",
    }
    assert {key: metadata[key] for key in expected} == expected
    assert type(metadata["a.yes"]) is type(metadata["a.flags"][0]) is bool


def test_tensors_are_views_in_torch_order(sample: Path) -> None:
    file = read_gguf(sample)
    assert {n: (t.shape, t.ggml_type) for n, t in file.tensors.items()} == {
        "one": ((2, 3), "F32"),
        "two": ((5,), "F16"),
        "three": ((4, 64), "Q8_0"),
    }
    np.testing.assert_array_equal(file.blocks("one").view(np.float32), [[0, 1, 2], [3, 4, 5]])
    np.testing.assert_array_equal(file.blocks("two").view(np.float16), np.arange(5))
    assert file.blocks("three").shape == (4, 68)
    before = sample.read_bytes()
    file.blocks("one")[:] = 0
    assert sample.read_bytes() == before


def test_agrees_with_the_package_on_the_default_model(default_gguf: Path) -> None:
    file = read_gguf(default_gguf)
    types = {t.ggml_type for t in file.tensors.values()}
    assert types == {"F32", "Q4_1", "Q8_0"}
    assert len(file.tensors) == 272
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    # The last tensor ends the file, so every offset before it was added up rightly.
    assert max(t.offset + t.num_bytes for t in file.tensors.values()) == default_gguf.stat().st_size


def test_type_table_equals_the_package() -> None:
    for type_id, (name, block, size) in GGML_TYPES.items():
        kind = gguf.GGMLQuantizationType(type_id)
        assert (kind.name, *gguf.GGML_QUANT_SIZES[kind]) == (name, block, size)


def test_fifty_thousand_strings_parse_quickly(tmp_path: Path) -> None:
    words = b"".join(string(f"token{i}") for i in range(50_000))
    path = tmp_path / "words.gguf"
    path.write_bytes(header([entry("w", 9, struct.pack("<IQ", 8, 50_000) + words)]))
    best = min(_timed(path) for _ in range(5))
    assert best < 0.2  # 0.025 s on an idle core


def _timed(path: Path) -> float:
    start = time.perf_counter()
    assert read_gguf(path).metadata["w"][-1] == "token49999"
    return time.perf_counter() - start


def test_reading_needs_no_torch() -> None:
    code = "import sys, gossamer.models.source, gossamer.models.gguf_file; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


NESTED = struct.pack("<IQ", 9, 1) * 3 + struct.pack("<IQ", 4, 0)
CORRUPT: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "not a GGUF"),
    "magic": (b"GGML" + bytes(64), "not a GGUF"),
    "pytorch": (b"PK\x03\x04" + bytes(64), "not a GGUF"),
    "only magic": (MAGIC, "more than the file has"),
    "version 1": (header(version=1), "version is 1"),
    "version 4": (header(version=4), "version is 4"),
    "version 0": (header(version=0), "version is 0"),
    "big endian": (MAGIC + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensor count": (header(counts=(2**63, 0)), "tensor count"),
    "metadata count": (header(counts=(0, 2**40)), "metadata count"),
    "missing metadata": (header(counts=(0, 3)), "more than the file has"),
    "key length": (header([struct.pack("<Q", 2**62) + b"k"]), "length of a metadata key"),
    "key not UTF-8": (header([string(b"\xff\xfe") + struct.pack("<II", 4, 1)]), "UTF-8"),
    "value type": (header([entry("k", 99, bytes(8))]), "unknown type 99"),
    "string length": (header([entry("k", 8, struct.pack("<Q", 2**63) + b"x")]), "longer than the file"),
    "string not UTF-8": (header([entry("k", 8, string(b"\xc3\x28"))]), "UTF-8"),
    "array length": (header([entry("k", 9, struct.pack("<IQ", 4, 2**62))]), "length of the array"),
    "array too long": (header([entry("k", 9, struct.pack("<IQ", 4, 2**23))]), "more than the file has"),
    "array type": (header([entry("k", 9, struct.pack("<IQ", 77, 1) + bytes(8))]), "unknown type 77"),
    "string array": (header([entry("k", 9, struct.pack("<IQ", 8, 9) + string("a"))]), "inside the strings"),
    "nested arrays": (header([entry("k", 9, NESTED)]), "nested"),
    "duplicate key": (header([entry("k", 4, bytes(4))] * 2), "twice"),
    "alignment": (header([entry("general.alignment", 4, struct.pack("<I", 48))]), "power of two"),
    "alignment type": (header([entry("general.alignment", 8, string("32"))]), "power of two"),
    "dimensions": (header(tensors=[info("t", [1] * 5)]) + bytes(64), "5 dimensions"),
    "no dimensions": (header(tensors=[info("t", [])]) + bytes(64), "0 dimensions"),
    "many dimensions": (header(tensors=[info("t", [1], num_dims=2**31)]) + bytes(64), "dimensions"),
    "empty dimension": (header(tensors=[info("t", [4, 0])]) + bytes(64), "empty dimension"),
    "huge dimension": (header(tensors=[info("t", [2**63, 2**63])]) + bytes(64), "after the end"),
    "offset": (header(tensors=[info("t", [4], offset=2**63)]) + bytes(64), "after the end"),
    "ggml type": (header(tensors=[info("t", [4], 31)]) + bytes(64), "ggml type 31"),
    "partial block": (header(tensors=[info("t", [33], 8)]) + bytes(64), "multiple of Q8_0"),
    "truncated data": (header(tensors=[info("t", [1000])]) + bytes(640), "after the end"),
    "duplicate tensor": (header(tensors=[info("t", [1])] * 2) + bytes(64), "twice"),
}


@pytest.mark.parametrize("case", CORRUPT)
def test_damaged_files_are_refused(case: str, tmp_path: Path) -> None:
    data, reason = CORRUPT[case]
    path = tmp_path / "bad.gguf"
    path.write_bytes(data)
    with pytest.raises(StartupError) as error:
        read_gguf(path)
    assert reason in str(error.value)
    assert str(path) in str(error.value)
    assert len(str(error.value).splitlines()) <= 5


def test_missing_file_and_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "none.gguf", tmp_path):
        with pytest.raises(StartupError, match="Cannot read"):
            read_gguf(path)


def load_all(path: Path) -> None:
    load = LoadConfig(model=str(path))
    for _, weight in iter_weights(inspect_model(load), load):
        if isinstance(weight, QuantizedTensor):
            weight.dequantize()


@pytest.fixture(scope="module")
def model_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    from gguf_builder import convert, metadata_of, write_gguf
    from tiny_checkpoints import make_model

    model = make_model("llama", num_hidden_layers=1)
    metadata = metadata_of(model, "llama") | {"tokenizer.ggml.tokens": [f"t{i}" for i in range(128)]}
    path = tmp_path_factory.mktemp("fuzz") / "m.gguf"
    quantise = {"ffn_down": "Q4_0", "ffn_up": "Q8_0", "attn_q": "Q4_1"}
    return write_gguf(path, "llama", metadata, convert(model, "llama"), quantise).read_bytes()


def header_size(data: bytes, tmp_path: Path) -> int:
    path = tmp_path / "whole.gguf"
    path.write_bytes(data)
    load_all(path)
    return min(t.offset for t in read_gguf(path).tensors.values())


def test_truncation_anywhere_is_a_startup_error(model_bytes: bytes, tmp_path: Path) -> None:
    size = header_size(model_bytes, tmp_path)
    path = tmp_path / "cut.gguf"
    lengths = [*range(0, size, 41), *range(size, len(model_bytes), 9973), len(model_bytes) - 32]
    for length in lengths:
        path.write_bytes(model_bytes[:length])
        with pytest.raises(StartupError):
            load_all(path)


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning", "ignore:invalid value:RuntimeWarning")
def test_random_damage_never_ends_in_another_exception(model_bytes: bytes, tmp_path: Path) -> None:
    size = header_size(model_bytes, tmp_path)
    rng = random.Random(0)
    path = tmp_path / "fuzz.gguf"
    messages = []
    for _ in range(400):
        data = bytearray(model_bytes)
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(4, size)
            if rng.random() < 0.5:
                data[at] = rng.randrange(256)
            else:
                width = rng.choice((4, 8))
                data[at : at + width] = rng.choice((0, 1, 2**31, 2**32 - 1)).to_bytes(width, "little")
        path.write_bytes(data)
        try:
            load_all(path)
        except StartupError as e:
            messages.append(str(e))
    assert len(messages) > 100
    assert max(len(message.splitlines()) for message in messages) <= 5

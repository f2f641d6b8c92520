"""Reads GGUF headers quickly and safely: metadata and a table of tensors over a memory map.

The tokenizer and the config need the header of a file within milliseconds and without torch; every count, length
and offset is checked against the file before it is used, so a damaged file ends in a StartupError, never a crash.
"""

import math
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from gossamer.core import StartupError

# ggml type id -> (name, elements per block, bytes per block); the layout of ggml's type table.
GGML_TYPES: dict[int, tuple[str, int, int]] = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110),
    22: ("IQ2_S", 256, 82), 23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4),
    27: ("I64", 1, 8), 28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66),
}  # fmt: skip

MAX_METADATA = 1 << 16
MAX_TENSORS = 1 << 20
MAX_ARRAY = 1 << 24
MAX_NAME_BYTES = 1 << 10
MAX_DIMS = 4
MAX_ARRAY_DEPTH = 2
DEFAULT_ALIGNMENT = 32

_STRING, _ARRAY, _BOOL = 8, 9, 7
_SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
_U64 = struct.Struct("<Q").unpack_from


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of a file. `shape` is in torch's order, rows first; `offset` counts bytes from the file's start."""

    name: str
    shape: tuple[int, ...]
    ggml_type: str
    offset: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class GGUFFile:
    """A parsed header. Metadata values are int, float, bool, str, or lists of these."""

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor]
    _map: mmap.mmap = field(repr=False)

    def blocks(self, name: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
        """The raw bytes of a tensor, uint8 `[*shape[:-1], bytes per row]`: a view of the memory map, nothing is read.

        The map is private (copy-on-write), so writing to the view never reaches the file.
        """
        tensor = self.tensors[name]
        flat = np.frombuffer(self._map, dtype=np.uint8, count=tensor.num_bytes, offset=tensor.offset)
        return flat.reshape(*tensor.shape[:-1], -1)


class _Corrupt(Exception):
    """What is wrong with the header; `read_gguf` adds the file's name and the remedy."""


def read_gguf(path: str | Path) -> GGUFFile:
    """Parses a GGUF v2 or v3 file; raises StartupError if it is missing, truncated, corrupt or of another kind."""
    path = Path(path)
    try:
        with path.open("rb") as f:
            head = f.read(8)
            if head[:4] != b"GGUF":
                raise StartupError(f"{path} is not a GGUF file: it starts with {head[:4]!r}, not b'GGUF'.")
            mapped = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
    except (OSError, ValueError) as e:
        raise StartupError(f"Cannot read the GGUF file {path}: {e}.") from e
    try:
        return _Reader(mapped).read(path)
    except _Corrupt as e:
        raise StartupError(
            f"{path} is a damaged or unsupported GGUF file: {e}.\n"
            f"It has {len(mapped)} bytes; compare with the published size and download it again."
        ) from None


class _Reader:
    """A cursor over the header; every read is checked against the end of the file."""

    def __init__(self, buffer: mmap.mmap) -> None:
        self._buffer = buffer
        self._end = len(buffer)
        self._pos = 4

    def read(self, path: Path) -> GGUFFile:
        version = int(self._scalar("<I"))
        if version and version & 0xFFFF == 0:
            raise _Corrupt("it is big-endian; only little-endian files are supported")
        if version not in (2, 3):
            raise _Corrupt(f"its version is {version}; versions 2 and 3 are supported")
        num_tensors = self._count("tensor count", MAX_TENSORS)
        num_metadata = self._count("metadata count", MAX_METADATA)
        metadata: dict[str, Any] = {}
        for _ in range(num_metadata):
            key = self._name("metadata key")
            if key in metadata:
                raise _Corrupt(f"the metadata key {key!r} occurs twice")
            metadata[key] = self._values(key, self._scalar("<I"), 1)[0]
        infos = [self._tensor_info() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise _Corrupt(f"general.alignment is {alignment!r}, not a power of two")
        start = -(-self._pos // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, type_id, relative in infos:
            if name in tensors:
                raise _Corrupt(f"the tensor {name!r} occurs twice")
            tensors[name] = self._place(name, shape, type_id, start + relative)
        return GGUFFile(path, metadata, tensors, self._buffer)

    def _tensor_info(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._name("tensor name")
        num_dims = self._scalar("<I")
        if not 1 <= num_dims <= MAX_DIMS:
            raise _Corrupt(f"the tensor {name!r} has {num_dims} dimensions")
        dims = [int(self._scalar("<Q")) for _ in range(num_dims)]
        if min(dims) < 1:
            raise _Corrupt(f"the tensor {name!r} has an empty dimension in {dims}")
        return name, tuple(reversed(dims)), int(self._scalar("<I")), int(self._scalar("<Q"))

    def _place(self, name: str, shape: tuple[int, ...], type_id: int, offset: int) -> GGUFTensor:
        if type_id not in GGML_TYPES:
            raise _Corrupt(f"the tensor {name!r} has the unknown ggml type {type_id}")
        type_name, block, block_bytes = GGML_TYPES[type_id]
        if shape[-1] % block:
            raise _Corrupt(f"the rows of {name!r} have {shape[-1]} elements, not a multiple of {type_name}'s {block}")
        num_bytes = math.prod(shape) // block * block_bytes
        if offset + num_bytes > self._end:
            raise _Corrupt(f"the tensor {name!r} would end at byte {offset + num_bytes}, after the end of the file")
        return GGUFTensor(name, shape, type_name, offset, num_bytes)

    def _advance(self, num_bytes: int) -> int:
        start = self._pos
        if num_bytes > self._end - start:
            raise _Corrupt(f"{num_bytes} bytes are announced at byte {start}, more than the file has")
        self._pos = start + num_bytes
        return start

    def _scalar(self, fmt: str) -> Any:
        return struct.unpack_from(fmt, self._buffer, self._advance(struct.calcsize(fmt)))[0]

    def _count(self, what: str, limit: int) -> int:
        count = int(self._scalar("<Q"))
        if count > limit:
            raise _Corrupt(f"its {what} is {count}; the limit is {limit}")
        return count

    def _name(self, what: str) -> str:
        length = self._count(f"length of a {what}", MAX_NAME_BYTES)
        start = self._advance(length)
        try:
            return self._buffer[start : start + length].decode()
        except UnicodeDecodeError:
            raise _Corrupt(f"a {what} is not UTF-8") from None

    def _values(self, key: str, type_id: int, count: int, depth: int = 0) -> list[Any]:
        if type_id == _STRING:
            return self._strings(key, count)
        if type_id == _ARRAY:
            if depth == MAX_ARRAY_DEPTH:
                raise _Corrupt(f"the arrays of {key!r} are nested more than {MAX_ARRAY_DEPTH} deep")
            return [self._array(key, depth + 1) for _ in range(count)]
        if type_id not in _SCALARS:
            raise _Corrupt(f"the metadata {key!r} has the unknown type {type_id}")
        dtype = np.dtype(_SCALARS[type_id])
        start = self._advance(count * dtype.itemsize)
        values = np.frombuffer(self._buffer, dtype=dtype, count=count, offset=start)
        return list((values != 0).tolist() if type_id == _BOOL else values.tolist())

    def _array(self, key: str, depth: int) -> list[Any]:
        type_id = self._scalar("<I")
        return self._values(key, type_id, self._count(f"length of the array {key!r}", MAX_ARRAY), depth)

    def _strings(self, key: str, count: int) -> list[str]:
        # Vocabularies have 10^5 strings: locals and one fused bounds check keep this loop under 0.5 us a string.
        buffer, end, pos = self._buffer, self._end, self._pos
        unpack: Callable[[Any, int], tuple[int]] = _U64
        out: list[str] = []
        try:
            for _ in range(count):
                start = pos + 8
                pos = start + unpack(buffer, pos)[0]
                if pos > end:
                    raise _Corrupt(f"a string of {key!r} is longer than the file")
                out.append(buffer[start:pos].decode())
        except struct.error:
            raise _Corrupt(f"the file ends inside the strings of {key!r}") from None
        except UnicodeDecodeError:
            raise _Corrupt(f"a string of {key!r} is not UTF-8") from None
        self._pos = pos
        return out

"""Decode steps of a few rows as one native call, where the model and the CPU allow it; other steps are torch's."""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from gossamer.core import ScheduledRow
from gossamer.kv_cache.pool import KVPool
from gossamer.layers.attention.gqa import GQALayer
from gossamer.layers.linear import Int4Weight, Int8HeadWeight, PackedWeight, Weight
from gossamer.layers.mlp import GatedMLP
from gossamer.models.decoder import Block, Decoder
from gossamer.ops import gemm_weight_only as wo
from gossamer.ops import native
from gossamer.ops.gemm.packed import pack_weight
from gossamer.ops.native import jit

Report = Callable[[str, float], None]


def obstacle(decoder: Decoder, pool: KVPool) -> str | None:
    """Why this model's decode steps are not native; None if they are."""
    c, tile = decoder.config, native.TILE
    if c.attention != "gqa" or c.moe or c.swiglu or c.clip_qkv is not None or c.num_draft_layers or decoder.paged:
        return "the model is not a dense decoder with grouped queries"
    if c.qk_norm == "full" or c.rope.rotary_dim not in (None, c.head_dim):
        return "its heads are normed together or rotate in part"
    qkv_width = (c.num_q_heads + 2 * c.num_kv_heads) * c.head_dim
    if any(n % tile for n in (c.hidden_size, c.intermediate_size, c.vocab_size, qkv_width)) or c.head_dim % 32:
        return f"a width is no multiple of {tile}, or a head's is none of 32"
    if pool.page_size % 16 or {decoder.fmt.dtype, pool.tensor.dtype} != {torch.bfloat16}:
        return "pages are no multiple of 16 tokens, or not bf16"
    weights = [linear.weight for b in decoder.blocks for linear in (*b.attention.linears, *b.mlp.linears)]
    if not all(isinstance(weight, PackedWeight | Int4Weight) for weight in weights):
        return "its layers are neither bf16 nor int4"
    if not isinstance(decoder.head, PackedWeight | Int8HeadWeight):
        return "its head is neither bf16 nor int8"
    return jit.obstacle() or (None if _layouts_known() else "weights are packed in another way")


def _layouts_known() -> bool:
    """Whether torch and oneDNN pack a few random weights as `ops.native.products` says."""
    n, k, tile = 2 * native.TILE, 64, native.TILE
    with torch.inference_mode(False):
        bytes_ = torch.randint(-128, 128, (n, k), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
        tiles, q = bytes_.view(n // tile, tile, k), (bytes_ & 15).to(torch.uint8)
        digits = q.view(n // tile, 2, tile // 2, k).transpose(2, 3)
        packed_q, _ = wo.pack_int4(q, torch.ones(n, k // 32), torch.ones(n, k // 32), torch.bfloat16)
        pairs = (
            (pack_weight(bytes_.bfloat16()), _interleaved(tiles.bfloat16(), 2)),
            (wo.pack_int8_exact(bytes_), _interleaved(tiles, 4)),
            (packed_q, digits[:, 0] | digits[:, 1] << 4),
        )
        wanted = ((packed, expected.contiguous().view(torch.uint8).numpy().tobytes()) for packed, expected in pairs)
        return all(_raw(packed)[: len(expected)] == expected for packed, expected in wanted)


class NativeStep:
    """The tables of the model's weights and pages that the compiled step reads, and its buffers."""

    def __init__(self, decoder: Decoder, pool: KVPool, folder: Path, report: Report) -> None:
        """Compiles what is not in `folder` yet. For what `obstacle` has nothing against."""
        c = decoder.config
        self._decoder, self._held, int8_head = decoder, list[torch.Tensor](), isinstance(decoder.head, Int8HeadWeight)
        self._shape = shape = native.Shape(
            c.hidden_size, c.intermediate_size, c.num_q_heads, c.num_kv_heads, c.head_dim, c.vocab_size,
            pool.page_size, c.rms_norm_eps, c.qk_norm == "head", int8_head,
        )  # fmt: skip
        self._zeros = torch.zeros(max(shape.qkv, 2 * shape.intermediate, shape.vocab_size))
        self._kinds: set[str] = set()
        entries = [self._layer(i, *pool.layers[i][:2]) for i in range(c.num_layers)]
        entries.append({"attn_norm": self._floats(decoder.final_norm)} | self._weight("qkv", decoder.head))
        self._layers = np.array([[entry.get(name, 0) for name in native.LAYER] for entry in entries], np.int64)
        self._team, code = jit.Team(), jit.Code(folder)
        total = 1 + len(self._kinds) * len(native.ROW_COUNTS)
        for i, module in enumerate(native.modules(shape, sorted(self._kinds))):
            report("Compiling kernels", i / total)
            code.add(module)
        self._code, self._step = code, code.address("step")
        self._kernels = {n: {k: code.address(f"{k}_{n}") for k in self._kinds} for n in native.ROW_COUNTS}
        self._rows = np.zeros((3, native.MAX_ROWS), np.int64)
        self._logits, self._num_threads = self._buffer(shape.vocab_size), 0
        self._arguments = np.zeros(len(native.ARGUMENTS), np.int64)
        keys, row_bytes = pool.layers[0][0], self._rows.strides[0]
        widths = {"x": shape.hidden, "qkv": shape.qkv, "attended": shape.q_width, "activated": shape.intermediate}
        threads = {"barrier": "GOMP_barrier", "thread_num": "omp_get_thread_num", "num_threads": "omp_get_num_threads"}
        rows = {name: self._rows.ctypes.data + i * row_bytes for i, name in enumerate(("ids", "positions", "page_tables"))}
        self._set(
            layers=self._layers.ctypes.data, num_layers=c.num_layers, embed=self._keep(decoder.embed),
            logits=self._logits.data_ptr(), page_bytes=2 * keys.stride(0), kv_head_bytes=2 * keys.stride(1), **rows,
            **{name: self._keep(self._buffer(width)) for name, width in widths.items()},
            **{name: self._team.address(symbol) for name, symbol in threads.items()},
        )  # fmt: skip

    def serves(self, rows: Sequence[ScheduledRow]) -> bool:
        return len(rows) <= native.MAX_ROWS and all(row.is_decode and row.samples for row in rows)

    def logits(
        self, rows: Sequence[ScheduledRow], last_token: torch.Tensor, page_tables: Sequence["array[int]"]
    ) -> torch.Tensor:
        """fp32 [num_rows, vocab_size], valid until the next call; writes the KV of each slot's last token.

        last_token: int64 by slot; page_tables: int32 by slot.
        """
        n, num_threads = len(rows), torch.get_num_threads()
        if num_threads > self._num_threads:
            self._num_threads = num_threads
            self._set(scratch=self._keep(torch.empty(num_threads * self._shape.scratch["end"], dtype=torch.uint8)))
        self._rows[0, :n] = last_token.numpy()[[row.slot for row in rows]]
        self._rows[1, :n] = [row.start_pos for row in rows]
        self._rows[2, :n] = [page_tables[row.slot].buffer_info()[0] for row in rows]
        longest = int(self._rows[1, :n].max()) + 1
        cos, sin = self._decoder.rotary.table(1 << (longest - 1).bit_length())
        count = next(count for count in native.ROW_COUNTS if count >= n)
        self._set(rows=n, cos=cos.data_ptr(), sin=sin.data_ptr(), **self._kernels[count])
        self._team.run(self._step, self._arguments.ctypes.data, num_threads)
        return self._logits[:n]

    def _set(self, **values: int) -> None:
        for name, value in values.items():
            self._arguments[native.ARGUMENTS.index(name)] = value

    def _keep(self, tensor: torch.Tensor | None) -> int:
        """The address of a tensor, which lives on with this object."""
        if tensor is None:
            raise RuntimeError("a weight was used before it was loaded")
        self._held.append(tensor)
        return tensor.data_ptr()

    def _floats(self, tensor: torch.Tensor | None) -> int:
        return self._keep(None if tensor is None else tensor.float())

    def _buffer(self, width: int) -> torch.Tensor:
        return torch.zeros(native.MAX_ROWS, width)

    def _layer(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> dict[str, int]:
        block = self._decoder.blocks[index]
        attention, mlp = block.attention, block.mlp
        if not isinstance(attention, GQALayer) or not isinstance(mlp, GatedMLP):
            raise TypeError(f"layer {index} is not one of grouped queries and a gated MLP")
        norms = {"attn_norm": block.attn_norm, "mlp_norm": block.mlp_norm}
        norms |= dict(zip(("q_norm", "k_norm"), attention.norms.values(), strict=False))
        window = self._decoder.config.sliding_window(index)
        entry = {"k_pages": keys.data_ptr(), "v_pages": values.data_ptr(), "window": window or 1 << 62}
        linears = {"qkv": attention.qkv, "o": attention.o, "gate_up": mlp.gate_up, "down": mlp.down}
        for name, linear in linears.items():
            entry |= self._weight(name, linear.weight)
        return entry | {name: self._floats(norm) for name, norm in norms.items()}

    def _weight(self, name: str, weight: Weight | None) -> dict[str, int]:
        """The entries of a weight, under this name."""
        values: tuple[str, int, int, int, int, int]
        if isinstance(weight, PackedWeight):
            address = torch.ops.mkldnn.data_ptr(weight.weight)
            k = weight.weight.shape[1]
            values = "bf16", address, 128 * k, 64, 0, self._bias(weight.bias)
        elif isinstance(weight, Int4Weight):
            data, k = weight.weight, 32 * weight.scale.shape[0]
            values = "int4", data.data_ptr(), 32 * k, 16, weight.scale.data_ptr(), self._bias(weight.bias)
        elif isinstance(weight, Int8HeadWeight):
            n, k = self._shape.vocab_size, self._shape.hidden
            tiles = torch.frombuffer(bytearray(_raw(weight.weight)[: n * k]), dtype=torch.int8).view(-1, k // 4, 64, 4)
            offsets = tiles.sum((1, 3), dtype=torch.int32).mul_(-128)
            values = "int8", torch.ops.mkldnn.data_ptr(weight.weight), 64 * k, 64, weight.scale.data_ptr(), self._keep(offsets)
        else:
            raise TypeError(f"{name} is held as {type(weight).__name__}")
        self._kinds.add(values[0])
        numbers = native.KINDS.index(values[0]), *values[1:]
        return {f"{name}.{field}": value for field, value in zip(native.WEIGHT, numbers, strict=True)}

    def _bias(self, bias: torch.Tensor | None) -> int:
        return self._floats(self._zeros if bias is None else bias)


def _interleaved(tiles: torch.Tensor, count: int) -> torch.Tensor:
    """[tiles, 64, K] -> [tiles, K / count, 64, count]"""
    return tiles.unflatten(2, (-1, count)).transpose(1, 2)


def _raw(packed: torch.Tensor) -> bytes:
    """What a packed weight holds."""
    if not packed.is_mkldnn:
        return packed.numpy().tobytes()
    address, size = torch.ops.mkldnn.data_ptr(packed), torch.ops.mkldnn._nbytes(packed)
    return ctypes.string_at(address, size)

"""Decode rows in native calls, where the model and the CPU allow it; prompts are torch's."""

import ctypes
from array import array
from collections.abc import Callable, Sequence
from typing import cast

import numpy as np
import torch
import torch.nn.functional as F

from gossamer.core import ScheduledRow
from gossamer.kv_cache.pool import KVPool
from gossamer.layers.attention.gqa import GQALayer
from gossamer.layers.linear import Int4Weight, Int8HeadWeight, PackedWeight
from gossamer.layers.mlp import GatedMLP
from gossamer.models.decoder import Decoder
from gossamer.ops import native
from gossamer.ops.native import jit

_Weight = PackedWeight | Int4Weight | Int8HeadWeight
_BITS = {"bf16": 16, "int4": 4, "int8": 8}


def obstacle(decoder: Decoder, pool: KVPool) -> str | None:
    """Why this model's decode steps are not native; None if they are."""
    c = decoder.config
    if c.attention != "gqa" or c.moe or c.swiglu or c.clip_qkv is not None or c.num_draft_layers or decoder.paged:
        return "the model is not a plain dense decoder with grouped queries"
    if c.qk_norm == "full" or c.rope.rotary_dim not in (None, c.head_dim):
        return "its heads are normed together or rotate in part"
    q_width, kv_width = c.num_q_heads * c.head_dim, 2 * c.num_kv_heads * c.head_dim
    widths = c.hidden_size, c.intermediate_size, c.vocab_size, q_width, kv_width
    if any(n % native.TILE for n in widths) or c.head_dim % 32:
        return f"a width is no multiple of {native.TILE}, or a head's is none of 32"
    if c.head_dim > 512 or c.num_q_heads // c.num_kv_heads * c.head_dim > 16384:
        return "its heads are too many or too wide to be unrolled"
    if pool.page_size % 16 or {decoder.fmt.dtype, pool.tensor.dtype} != {torch.bfloat16}:
        return "pages are no multiple of 16 tokens, or not bf16"
    linears = [linear for b in decoder.blocks for linear in (*b.attention.linears, *b.mlp.linears)]
    weights = [decoder.head, *(linear.weight for linear in linears)]
    if not all(isinstance(weight, _Weight) for weight in weights):
        return "its weights are neither bf16 nor int4"
    if (missing := jit.obstacle()) is not None:
        return missing
    known = all(map(_lies_as_known, cast(list[_Weight], weights)))
    return None if known else "torch packs its weights in an unknown way"


def _layout(weight: _Weight) -> tuple[str, int, int]:
    """Kind, outputs and inputs."""
    if isinstance(weight, PackedWeight):
        return "bf16", *weight.weight.shape
    if isinstance(weight, Int4Weight):
        return "int4", weight.scale.shape[1], 32 * weight.scale.shape[0]
    k, n = weight.weight.shape
    return "int8", n, k


def _tiles(weight: _Weight) -> torch.Tensor:
    """A view of the packed numbers, as `ops.native.products` says that they lie."""
    kind, n, k = _layout(weight)
    size = n * k * _BITS[kind] // 8
    raw = torch.frombuffer((ctypes.c_uint8 * size).from_address(_address(weight)), dtype=torch.uint8)
    if kind == "int4":
        return raw.view(-1, k, native.TILE // 2)
    numbers = raw.view(torch.bfloat16 if kind == "bf16" else torch.int8)
    return numbers.view(n // native.TILE, -1, native.TILE, 32 // _BITS[kind])


def _address(weight: _Weight) -> int:
    return int((torch.ops.mkldnn if weight.weight.is_mkldnn else torch.Tensor).data_ptr(weight.weight))


@torch.inference_mode()
def _lies_as_known(weight: _Weight) -> bool:
    """Whether some columns read from the tiles are the weight's products with unit vectors.

    torch and oneDNN choose layouts by their version, the CPU and the shape.
    """
    kind, n, k = _layout(weight)
    if weight.weight.is_mkldnn and torch.ops.mkldnn._nbytes(weight.weight) < n * k * _BITS[kind] // 8:
        return False
    columns, tiles = torch.tensor([0, k // 2 + 5, k - 2]), _tiles(weight)
    if isinstance(weight, Int4Weight):
        pairs = tiles[:, columns].transpose(0, 1)
        scale, zero = weight.scale[columns // 32].float().unbind(-1)
        found = (torch.cat((pairs & 15, pairs >> 4), -1).flatten(1) - 8.0) * scale + zero
    else:
        lanes = tiles.shape[-1]
        found = tiles[:, columns // lanes, :, columns % lanes].flatten(1).float()
        found *= 1.0 if isinstance(weight, PackedWeight) else weight.scale
    product = weight(F.one_hot(columns, k).bfloat16()).float() - (0.0 if weight.bias is None else weight.bias.float())
    return torch.allclose(found, product, rtol=0.02, atol=0.02 * float(found.abs().max()), equal_nan=True)


class NativeStep:
    """The tables of the model's weights and pages that the compiled step reads, and its buffers.

    For a model that `obstacle` has nothing against. `report` is called with a stage and the fraction of it done.
    """

    def __init__(self, decoder: Decoder, pool: KVPool, report: Callable[[str, float], None]) -> None:
        from gossamer.ops.native import step  # needs llvmlite, which not everyone has

        c, self._decoder, self._page_size, self._held = decoder.config, decoder, pool.page_size, list[torch.Tensor]()
        shape = native.Shape(
            c.hidden_size, c.intermediate_size, c.num_q_heads, c.num_kv_heads, c.head_dim, c.vocab_size,
            pool.page_size, c.rms_norm_eps, c.qk_norm == "head", isinstance(decoder.head, Int8HeadWeight),
        )  # fmt: skip
        self._kinds: set[str] = set()
        layers = [self._layer(i, *pool.layers[i][:2]) for i in range(c.num_layers)]
        layers.append(
            {"attn_norm": self._floats(decoder.final_norm)} | self._weight("head", cast(_Weight, decoder.head))
        )
        self._layers = np.array([[layer.get(name, 0) for name in native.LAYER] for layer in layers], np.int64)
        self._code, modules = jit.Code(), step.modules(shape, sorted(self._kinds))
        for i, module in enumerate(modules):
            report("Compiling kernels", i / (1 + len(self._kinds) * len(native.ROW_COUNTS)))
            self._code.add(module)
        address = self._code.address
        self._step, self._num_threads, self._scratch = address("step"), 0, step.scratch(shape)["end"]
        self._kernels = {n: {kind: address(f"{kind}_{n}") for kind in self._kinds} for n in native.ROW_COUNTS}
        self._rows, self._arguments = (np.zeros(n, np.int64) for n in ((3, native.MAX_ROWS), len(native.ARGUMENTS)))
        self._logits = torch.zeros(0, shape.vocab_size)
        keys, widths = pool.layers[0][0], (shape.hidden, shape.qkv, shape.q_width, shape.intermediate)
        buffers = [self._keep(torch.zeros(native.MAX_ROWS, width)) for width in widths]
        openmp = map(address, ("GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads"))
        self._set(
            **dict(zip(("ids", "positions", "page_tables"), (row.ctypes.data for row in self._rows), strict=True)),
            **dict(zip(("x", "qkv", "attended", "activated"), buffers, strict=True)),
            **dict(zip(("barrier", "thread_num", "num_threads"), openmp, strict=True)),
            layers=self._layers.ctypes.data, num_layers=c.num_layers, embed=self._keep(decoder.embed),
            page_bytes=2 * keys.stride(0), kv_head_bytes=2 * keys.stride(1),
        )  # fmt: skip

    def logits(
        self, rows: Sequence[ScheduledRow], last_token: torch.Tensor, page_tables: "Sequence[array[int]]"
    ) -> torch.Tensor:
        """fp32 [num_rows, vocab_size], valid until the next call; writes the KV of each slot's last token.

        last_token: int64 by slot; page_tables: int32 by slot.
        """
        num_threads = torch.get_num_threads()
        if num_threads > self._num_threads:
            self._num_threads = num_threads
            self._set(scratch=self._keep(torch.zeros(num_threads * self._scratch, dtype=torch.uint8)))
        if len(rows) > len(self._logits):
            self._logits = torch.zeros(len(rows), self._logits.shape[1])
        for first in range(0, len(rows), native.MAX_ROWS):
            part = rows[first : first + native.MAX_ROWS]
            n, slots, positions = len(part), [row.slot for row in part], [row.start_pos for row in part]
            buffers = [page_tables[slot].buffer_info() for slot in slots]
            self._rows[:, :n] = last_token.numpy()[slots], positions, [address for address, _ in buffers]
            ids = self._rows[0, :n]
            inside = ids.min() >= 0 and ids.max() < self._logits.shape[1]
            if not inside or any(
                at >= self._page_size * size for at, (_, size) in zip(positions, buffers, strict=True)
            ):
                raise IndexError("a decode row lies outside its pages or the vocabulary")
            cos, sin = self._decoder.rotary.table(1 << max(positions).bit_length())
            kernels = self._kernels[next(count for count in native.ROW_COUNTS if count >= n)]
            tables = {"cos": cos.data_ptr(), "sin": sin.data_ptr(), "logits": self._logits[first:].data_ptr()}
            self._set(rows=n, **tables, **kernels)
            self._code.run(self._step, self._arguments.ctypes.data, num_threads)
        return self._logits[: len(rows)]

    def _set(self, **values: int) -> None:
        for name, value in values.items():
            self._arguments[native.ARGUMENTS.index(name)] = value

    def _keep(self, tensor: torch.Tensor | None) -> int:
        """The address of a tensor that was loaded; from now on it lives as long as this object."""
        self._held.append(cast(torch.Tensor, tensor))
        return self._held[-1].data_ptr()

    def _floats(self, tensor: torch.Tensor | None) -> int:
        return self._keep(cast(torch.Tensor, tensor).float())

    def _layer(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> dict[str, int]:
        block = self._decoder.blocks[index]
        attention, mlp = cast(GQALayer, block.attention), cast(GatedMLP, block.mlp)
        norms = {"attn_norm": block.attn_norm, "mlp_norm": block.mlp_norm}
        norms |= dict(zip(("q_norm", "k_norm"), attention.norms.values(), strict=False))
        entry = {name: self._floats(norm) for name, norm in norms.items()}
        for name, linear in ("qkv", attention.qkv), ("o", attention.o), ("gate_up", mlp.gate_up), ("down", mlp.down):
            entry |= self._weight(name, cast(_Weight, linear.weight))
        window = self._decoder.config.sliding_window(index)
        return entry | {"k_pages": keys.data_ptr(), "v_pages": values.data_ptr(), "window": window or 1 << 62}

    def _weight(self, name: str, weight: _Weight) -> dict[str, int]:
        """A weight's entries, under this name. A tile holds 64 outputs, its halves begin side by side."""
        kind, n, k = _layout(weight)
        bias = torch.zeros(n) if weight.bias is None else weight.bias
        if kind == "int8":  # digits of x are 128 too large, so that they have no sign
            bias = _tiles(weight).sum((1, 3), dtype=torch.int32).mul_(-128).view(torch.float32)
        scales = 0 if isinstance(weight, PackedWeight) else weight.scale.data_ptr()
        half_bytes = 16 if kind == "int4" else 64
        self._kinds.add(kind)
        values = native.KINDS.index(kind), _address(weight), 8 * _BITS[kind] * k, half_bytes, scales, self._floats(bias)
        return {f"{name}.{field}": value for field, value in zip(native.WEIGHT, values, strict=True)}

"""Grouped-query attention (MHA and MQA are its ends) over the paged cache, with optional window and QK norm."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from gossamer.config import ModelConfig
from gossamer.core import KVLayout, OpCost
from gossamer.layers.attention.base import Attended, AttentionBatch, AttentionLayer, PagedPlan
from gossamer.layers.linear import Fp8Weight, Linear
from gossamer.layers.residual import ResidualStream
from gossamer.ops.attention import (
    DecodeGroup,
    DecodeWorkspace,
    PrefillSequence,
    decode_attention,
    paged_decode,
    paged_prefill,
    plan_decode,
    plan_prefill,
    prefill_attention,
)
from gossamer.ops.gemm_fp8 import FP8_BLOCK
from gossamer.ops.kv_cache import write_kv
from gossamer.ops.norm import rms_norm
from gossamer.ops.rope import apply_rope, rope_write_kv


@dataclass(slots=True)
class GQAPlan:
    """One step's metadata. `decode` and `prefill` are keyed by the sliding window, for layers may differ in it."""

    num_decode: int
    slots: torch.Tensor
    fresh_pages: torch.Tensor | None
    decode: dict[int | None, list[DecodeGroup]]
    prefill: dict[int | None, list[PrefillSequence]]


def kv_layout(config: ModelConfig, dtype: str) -> KVLayout:
    return KVLayout.of((2, config.num_kv_heads, config.head_dim), dtype)


def workspace(config: ModelConfig, max_rows: int, device: torch.device) -> DecodeWorkspace:
    return DecodeWorkspace.allocate(max_rows, config.num_q_heads, config.num_kv_heads, config.head_dim, device)


def plan(config: ModelConfig, batch: AttentionBatch, dtype: torch.dtype, below: int | None = None) -> GQAPlan:
    """below: without a window, of the tokens at positions below alone (decode rows among themselves)."""
    page_size, n = batch.page_size, batch.num_decode
    tables, starts, lengths = batch.page_tables, batch.starts, batch.lengths
    windows = {config.sliding_window(layer) for layer in range(config.num_layers)}
    slots: list[int] = []
    fresh: list[int] = []
    for table, start, length in zip(tables, starts, lengths, strict=True):
        if length == 1:
            page, offset = divmod(start, page_size)
            slots.append(table[page] * page_size + offset)
            if offset == 0:
                fresh.append(table[page])
            continue
        slots += [table[p // page_size] * page_size + p % page_size for p in range(start, start + length)]
        fresh += table[-(-start // page_size) : (start + length - 1) // page_size + 1]
    decode: dict[int | None, list[DecodeGroup]] = {}
    for window in windows:
        rows = [i for i in range(n) if below is None or window is not None or starts[i] < below]
        if rows:
            taken, seq_lens = [tables[i] for i in rows], [starts[i] + 1 for i in rows]
            decode[window] = plan_decode(taken, seq_lens, page_size, window, dtype)
    prefill: dict[int | None, list[PrefillSequence]] = {}
    for window in windows if n < len(starts) else ():
        row, sequences = n, []
        for table, start, length in zip(tables[n:], starts[n:], lengths[n:], strict=True):
            part = length if below is None or window is not None else min(length, below - start)
            if part > 0:
                sequences.append(plan_prefill(row, part, start, table, page_size, window))
            row += length
        prefill[window] = sequences
    return GQAPlan(n, torch.tensor(slots), torch.tensor(fresh) if fresh else None, decode, prefill)


def cost(
    config: ModelConfig, layer: int, batch: AttentionBatch, itemsize: int, kv_itemsize: int | None = None
) -> OpCost:
    """2 products of head_dim per (query head, visible key); each row's visible KV and q read once, k, v, o written."""
    window, n = config.sliding_window(layer), batch.num_decode
    # Decode rows apart: this runs beside every step, on as many rows.
    decode = batch.starts[:n]
    pairs = sum(decode) + n if window is None else sum([s + 1 if s < window else window for s in decode])
    kv_tokens = pairs
    for start, length in zip(batch.starts[n:], batch.lengths[n:], strict=True):
        end = start + length
        if window is None or end <= window:
            pairs += length * start + length * (length + 1) // 2
            kv_tokens += end
        else:
            full = max(0, min(length, window - start))  # tokens whose whole past is inside the window
            pairs += full * start + full * (full + 1) // 2 + (length - full) * window
            kv_tokens += min(end, window + length - 1)
    tokens = sum(batch.lengths)
    q_width, kv_width = config.num_q_heads * config.head_dim, 2 * config.num_kv_heads * config.head_dim
    kv_bytes = (itemsize if kv_itemsize is None else kv_itemsize) * (kv_tokens + tokens) * kv_width
    return OpCost(4.0 * pairs * q_width, kv_bytes + itemsize * tokens * 2 * q_width)


def split_planes(planes: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
    """Pages of keys and of values, and the keyword arguments that FP8 pages add."""
    scales = planes[2:4] if planes[0].dtype == torch.float8_e4m3fn else ()
    return planes[0], planes[1], dict(zip(("k_scales", "v_scales"), scales, strict=False))


def _cut(
    slots: torch.Tensor, cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor, below: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Every row as two: its tokens at positions `below`, and the others as a row of length 0, which sees nothing."""
    starts = cu_seqlens_q[:-1]
    counts = cu_seqlens_q[1:] - starts
    first = seq_lens - counts
    kept = torch.minimum((below - first).clamp_min(0), counts)
    lens = torch.stack((first + kept, torch.zeros_like(kept)), 1).flatten()
    bounds = torch.cat((torch.stack((starts, starts + kept), 1).flatten(), cu_seqlens_q[-1:]))
    return slots.repeat_interleave(2), bounds, lens


class GQALayer(AttentionLayer):
    """q, k, v in one product; QK norm and rotary embedding; KV write; attention; output projection."""

    def __init__(self, config: ModelConfig, layer: int, backend: str) -> None:
        name = f"layers.{layer}.attn"
        self.qkv = Linear([f"{name}.q", f"{name}.k", f"{name}.v"], bias=config.qkv_bias)
        self.o = Linear([f"{name}.o"], bias=config.o_bias)
        self.linears = [self.qkv, self.o]
        self.norms: dict[str, torch.Tensor | None] = {}
        self._q_norm, self._k_norm = f"{name}.q_norm.weight", f"{name}.k_norm.weight"
        if config.qk_norm != "none":
            self.norms = {self._q_norm: None, self._k_norm: None}
        self.q_shape = self.out_shape = config.num_q_heads, config.head_dim
        self._config = config
        self._backend = backend
        self._window = config.sliding_window(layer)
        self._scale = config.head_dim**-0.5

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: GQAPlan, planes: Sequence[torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        q = self.store_planned(self.qkv(x), self._config.num_q_heads, cos, sin, plan, planes)
        out = q.new_empty(q.shape)
        self.attend_planned(q, plan, planes, out)
        return self.o(out.flatten(1))

    def store_planned(
        self, qkv: torch.Tensor, num_q: int, cos: torch.Tensor, sin: torch.Tensor, plan: GQAPlan,
        planes: Sequence[torch.Tensor],
    ) -> torch.Tensor:  # fmt: skip
        """Queries [num_tokens, num_q, head_dim]; keys and values go into their pages."""
        config, backend, num_kv = self._config, self._backend, self._config.num_kv_heads
        k_pages, v_pages, scales = split_planes(planes)
        if config.qk_norm != "none":
            self._normalise(qkv, num_q)
        if config.clip_qkv is not None:  # OLMoE bounds what the norms return
            qkv.clamp_(-config.clip_qkv, config.clip_qkv)
        qkv = qkv.view(-1, num_q + 2 * num_kv, config.head_dim)
        v = qkv[:, num_q + num_kv :]
        rotated = apply_rope(qkv[:, : num_q + num_kv], cos, sin, backend=backend)
        q, k = rotated[:, :num_q], rotated[:, num_q:]
        write_kv(k, v, k_pages, v_pages, plan.slots, plan.fresh_pages, **scales, backend=backend)
        return q

    def attend_planned(self, q: torch.Tensor, plan: GQAPlan, planes: Sequence[torch.Tensor], out: torch.Tensor) -> None:
        """Attention proper on a CPU."""
        k_pages, v_pages, scales = split_planes(planes)
        n, backend = plan.num_decode, self._backend
        if n:
            groups = plan.decode[self._window]
            decode_attention(q[:n], k_pages, v_pages, groups, self._scale, out[:n], **scales, backend=backend)
        if plan.prefill:
            sequences = plan.prefill[self._window]
            prefill_attention(q, k_pages, v_pages, sequences, self._scale, out, **scales, backend=backend)

    def project(
        self, stream: ResidualStream, norm: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: PagedPlan,
        planes: Sequence[torch.Tensor], q: torch.Tensor,
    ) -> None:  # fmt: skip
        """Fills `q` [num_tokens, num_q_heads, head_dim] from the normed stream and writes keys and values.

        cos, sin: whole tables, by position.
        """
        self.store(stream.product(norm, self.qkv), cos, sin, plan, planes, q)

    def store(
        self, qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: PagedPlan,
        planes: Sequence[torch.Tensor], q: torch.Tensor,
    ) -> None:  # fmt: skip
        config = self._config
        k_pages, v_pages, scales = split_planes(planes)
        rope_write_kv(
            qkv, q.shape[1], config.num_kv_heads, config.head_dim, cos, sin,
            plan.positions, plan.token_slots, plan.page_table, k_pages, v_pages, q, **scales,
            q_norm=self.norms.get(self._q_norm), k_norm=self.norms.get(self._k_norm), eps=config.rms_norm_eps,
            norm_full=config.qk_norm == "full", clip=config.clip_qkv, single=plan.single, backend=self._backend,
        )  # fmt: skip

    def gives_fp8(self, plan: PagedPlan, planes: Sequence[torch.Tensor], num_tokens: int) -> bool:
        """Where the output projection takes groups of a head's size.

        Not over FP8 pages: what hides their latency is programs of few registers, which quantisation would fill.
        """
        o = self.o.weight
        if not isinstance(o, Fp8Weight) or o.ue8m0 or o.per_token or self._config.head_dim != FP8_BLOCK:
            return False
        return planes[0].dtype != torch.float8_e4m3fn and not o.folds(num_tokens)

    def attend(self, q: torch.Tensor, plan: PagedPlan, planes: Sequence[torch.Tensor], out: Attended) -> None:
        n, scale, window = plan.num_decode, self._scale, self._window
        dense, out_scales = (out, None) if isinstance(out, torch.Tensor) else out
        k_pages, v_pages, scales = split_planes(planes)
        table, slots, lens = plan.page_table, plan.slots, plan.seq_lens
        if n:
            paged_decode(
                q[:n], k_pages, v_pages, table, slots[:n], lens[:n], scale, dense[:n], **scales,
                out_scales=None if out_scales is None else out_scales[:n],
                window=window, workspace=plan.workspace, max_seq_len=plan.max_seq_len, backend=self._backend,
            )  # fmt: skip
        if len(slots) > n:
            self.attend_chunks(q[n:], plan, planes, dense[n:], None if out_scales is None else out_scales[n:])

    def attend_chunks(
        self, q: torch.Tensor, plan: PagedPlan, planes: Sequence[torch.Tensor], out: torch.Tensor,
        out_scales: torch.Tensor | None = None, below: int | None = None,
    ) -> None:  # fmt: skip
        """The chunks' tokens of a step, or those at positions `below`: the others' rows are then zeroed or left."""
        k_pages, v_pages, scales = split_planes(planes)
        rows = plan.slots[plan.num_decode :], plan.cu_seqlens_q, plan.seq_lens[plan.num_decode :]
        num_context = min(plan.chunks.num_context, (below or 2**31) * len(rows[0]))
        if below is not None:
            if plan.chunks.span[0] >= below:
                return
            if plan.chunks.span[1] > below:
                rows = _cut(*rows, below)
        paged_prefill(
            q, k_pages, v_pages, plan.page_table, *rows, plan.chunks.longest, self._scale, out,
            out_scales=out_scales, **scales, window=self._window, num_context=num_context, backend=self._backend,
        )  # fmt: skip

    def output(self, attended: Attended, stream: ResidualStream) -> None:
        if isinstance(attended, torch.Tensor):
            stream.add_product(self.o, attended.flatten(1))
        elif isinstance(self.o.weight, Fp8Weight):
            stream.add(self.o.weight.quantized(attended[0].flatten(1), attended[1], stream.dtype))

    def _normalise(self, qkv: torch.Tensor, num_q: int) -> None:
        """QK norm in place on the packed projection: per head, or over all heads at once."""
        config = self._config
        q_width, kv_width = num_q * config.head_dim, config.num_kv_heads * config.head_dim
        for part, name in ((qkv[:, :q_width], self._q_norm), (qkv[:, q_width : q_width + kv_width], self._k_norm)):
            if not part.shape[1]:
                continue
            heads = part.unflatten(-1, (-1, config.head_dim)) if config.qk_norm == "head" else part
            heads.copy_(rms_norm(heads, self.held(name), config.rms_norm_eps, backend=self._backend))


def build(config: ModelConfig, layer: int, backend: str) -> GQALayer:
    return GQALayer(config, layer, backend)

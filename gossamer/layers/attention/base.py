"""The attention contract: what a kind offers, and the host-side description of a step that its `plan` receives."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self

import torch

from gossamer.config import ModelConfig
from gossamer.core import KVLayout, OpCost, ScheduledRow
from gossamer.layers.linear import Linear, Part, WeightFormat, dense
from gossamer.layers.residual import ResidualStream
from gossamer.ops.attention import DecodeWorkspace
from gossamer.ops.quantize_fp8 import Quantized


@dataclass(slots=True)
class AttentionBatch:
    """A step as attention sees it, on the host. Row i has `lengths[i]` new tokens from position `starts[i]` on.

    The first `num_decode` rows have one token each and read their whole context from the pages. `page_tables[i]`
    covers every position up to the row's last new token.
    """

    num_decode: int
    starts: list[int]
    lengths: list[int]
    page_tables: Sequence[Sequence[int]]
    page_size: int


@dataclass(frozen=True, slots=True)
class Chunks:
    """A step's prefill rows, on the host: what launches outside graphs may go by."""

    longest: int = 0
    """Most new tokens of one."""
    num_context: int = 0
    """Their seq_lens in all."""
    span: tuple[int, int] = (0, 0)
    """The lowest position among them, and the end of the highest."""

    @classmethod
    def of(cls, rows: Sequence[ScheduledRow]) -> Self:
        if not rows:
            return cls()
        ends = [row.start_pos + row.num_tokens for row in rows]
        span = min(row.start_pos for row in rows), max(ends)
        return cls(max(row.num_tokens for row in rows), sum(ends), span)


@dataclass(slots=True)
class PagedPlan:
    """A step as a GPU sees it: host numbers, and static int32 device tensors that `runtime.step_inputs` explains.

    The first `num_decode` rows have one token each, padding included; the other rows are prefill chunks, whose tokens
    follow. Padding has slot -1. `max_seq_len` bounds every seq_len that a captured graph will ever see.
    """

    num_decode: int
    positions: torch.Tensor
    token_slots: torch.Tensor
    slots: torch.Tensor
    seq_lens: torch.Tensor
    cu_seqlens_q: torch.Tensor
    chunks: Chunks
    page_table: torch.Tensor
    max_seq_len: int
    workspace: DecodeWorkspace | None
    single: bool = False
    """Each token is its row's only one, and no two rows are one sequence's: no two tokens share a page."""
    chosen: torch.Tensor | None = None
    """What the last layer with an indexer chose, for those without one."""
    kept: torch.Tensor | None = None
    """int32 [num_kept]: tokens that go on behind the last layer's attention, for nothing reads others; None: all."""


Attended = torch.Tensor | Quantized
"""What attention leaves, [num_tokens, heads, head_dim]; in FP8 with a scale for each token and head."""

Attend = Callable[[PagedPlan], None]
"""The attention proper of one layer and step, its tensors bound: what stays outside piecewise graphs."""


def carve(buffer: torch.Tensor, *shapes: tuple[int, int]) -> list[torch.Tensor]:
    """Parts [num_tokens, *shape] of a step's `q`, one after another and each contiguous."""
    sizes = [len(buffer) * rows * columns for rows, columns in shapes]
    parts = buffer.view(-1)[: sum(sizes)].split(sizes)
    return [part.view(len(buffer), *shape) for part, shape in zip(parts, shapes, strict=True)]


class AttentionLayer(Protocol):
    """One layer's attention. `linears` and `norms` (what is held dense) are what the loader fills by canonical name.

    `q_shape`, `out_shape`: [heads, dim] of a token's queries and of what `attend` leaves. On a GPU it is called in
    three parts: `project` (to the KV write), `attend`, `output`.
    """

    linears: list[Linear]
    norms: dict[str, torch.Tensor | None]
    q_shape: tuple[int, int]
    out_shape: tuple[int, int]

    def load(self, name: str, tensor: Part, fmt: WeightFormat) -> None:
        if name in self.norms:
            self.norms[name] = dense(tensor, fmt)
        else:
            next(linear for linear in self.linears if name in linear.expected_names()).load(name, tensor, fmt)

    def held(self, name: str) -> torch.Tensor:
        """One of `norms`."""
        if (tensor := self.norms[name]) is None:
            raise RuntimeError(f"{name} used before it was loaded")
        return tensor

    def __call__(
        self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: Any, planes: Sequence[torch.Tensor]
    ) -> torch.Tensor: ...

    def project(
        self, stream: ResidualStream, norm: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, plan: PagedPlan,
        planes: Sequence[torch.Tensor], q: torch.Tensor,
    ) -> None: ...  # fmt: skip

    def gives_fp8(self, plan: PagedPlan, planes: Sequence[torch.Tensor], num_tokens: int) -> bool:
        """Whether `attend` is to leave its result in FP8."""
        ...

    def attend(self, q: torch.Tensor, plan: PagedPlan, planes: Sequence[torch.Tensor], out: Attended) -> None: ...

    def output(self, attended: Attended, stream: ResidualStream) -> None: ...


class AttentionKind(Protocol):
    """What a file in `layers/attention/` offers; nothing else in the engine branches on the kind."""

    def build(self, config: ModelConfig, layer: int, backend: str) -> AttentionLayer:
        """The module of one layer."""
        ...

    def kv_layout(self, config: ModelConfig, dtype: str) -> KVLayout:
        """What one layer stores per token."""
        ...

    def workspace(self, config: ModelConfig, max_rows: int, device: torch.device) -> DecodeWorkspace:
        """What decode steps of up to `max_rows` rows need on a GPU, whatever the layer."""
        ...

    def plan(self, config: ModelConfig, batch: AttentionBatch, dtype: torch.dtype) -> Any:
        """Metadata of one step, shared by all layers."""
        ...

    def cost(
        self, config: ModelConfig, layer: int, batch: AttentionBatch, itemsize: int, kv_itemsize: int | None = None
    ) -> OpCost:
        """FLOPs and bytes of one layer's attention proper (projections are counted by their linears).

        itemsize: of queries and outputs; kv_itemsize: of what is cached (None: the same), whose scales do not count.
        """
        ...

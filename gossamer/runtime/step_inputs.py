"""What a step needs on a GPU: packed on the host into pinned memory, brought over by one asynchronous copy.

The device side is static, so a captured graph reads the same addresses at every step. The host side is a ring: the
worker packs a step while earlier ones still run.
"""

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from gossamer.core import ScheduledRow
from gossamer.runtime.drafts import is_draft, pairs

RING = 4
"""Host buffers; the engine keeps two batches in flight, so none is packed again before its copy was made."""
_PAGE_CHUNK = 8192

_ROW_FIELDS = ("slots", "seq_lens", "row_positions", "cu_seqlens_q", "sample_rows", "sample_slots", "output_index")
_TOKEN_FIELDS = ("input_ids", "positions", "token_slots")
_DRAFT_ROW_FIELDS, _DRAFT_TOKEN_FIELDS = ("firsts", "seconds"), ("next_ids",)


@dataclass(slots=True)
class _Staging:
    ints: torch.Tensor
    page_index: torch.Tensor
    page_value: torch.Tensor
    copied: torch.cuda.Event | None
    """Recorded after the copies were enqueued; None where nothing is asynchronous."""

    def wait(self) -> None:
        if self.copied is not None:
            self.copied.synchronize()

    def mark(self) -> None:
        if self.copied is not None:
            self.copied.record()


class StepInputs:
    """Static int32 device tensors, by attribute `device[name]`, of at most `max_rows` rows and `max_tokens` tokens.

    Per row: slots, seq_lens (this step's tokens included), row_positions (of a decode row's token), cu_seqlens_q (of
    the prefill rows, from the first prefill token on), and for the rows that sample, in order: sample_rows (index of
    their last token), sample_slots, output_index. Per token: input_ids (-1: what the slot sampled last), positions,
    token_slots. Padding has slot -1 and length 0. `page_table` is [num_slots, max_pages].

    With `drafts`, rows are those of `drafts.single_rows`; also, `drafts.pairs` of the rows that sample: firsts,
    seconds; and per token: next_ids, as far as they are known. A draft's input id is -2, its slot's draft.
    """

    def __init__(
        self, max_rows: int, max_tokens: int, num_slots: int, max_pages: int, device: torch.device, *,
        drafts: bool = False,
    ) -> None:  # fmt: skip
        self._max_rows, self._max_tokens, self._drafts = max_rows, max_tokens, drafts
        self._row_fields = _ROW_FIELDS + (_DRAFT_ROW_FIELDS if drafts else ())
        self._token_fields = _TOKEN_FIELDS + (_DRAFT_TOKEN_FIELDS if drafts else ())
        self._row_stride = max_rows + 1
        self._num_row_ints = self._row_stride * len(self._row_fields)
        total = self._num_row_ints + max_tokens * len(self._token_fields)
        self._ints = torch.zeros(total, dtype=torch.int32, device=device)
        self.device = self._views(self._ints)
        self.page_table = torch.zeros(num_slots, max_pages, dtype=torch.int32, device=device)
        self._num_pages = [0] * num_slots
        pin = device.type == "cuda"
        self._ring = [
            _Staging(
                torch.zeros(total, dtype=torch.int32, pin_memory=pin),
                torch.zeros(_PAGE_CHUNK, dtype=torch.int64, pin_memory=pin),
                torch.zeros(_PAGE_CHUNK, dtype=torch.int32, pin_memory=pin),
                torch.cuda.Event() if pin else None,
            )
            for _ in range(RING)
        ]
        self._host = [{k: v.numpy() for k, v in self._views(s.ints).items()} for s in self._ring]
        self._next = 0

    def _views(self, ints: torch.Tensor) -> dict[str, torch.Tensor]:
        views = {name: ints[i * self._row_stride :][: self._row_stride] for i, name in enumerate(self._row_fields)}
        for i, name in enumerate(self._token_fields):
            views[name] = ints[self._num_row_ints + i * self._max_tokens :][: self._max_tokens]
        return views

    def pad(self, num_rows: int, num_tokens: int) -> None:
        """Makes the device side a step of padding alone, for warming up and capturing."""
        host = self._begin()
        _pad_rows(host, 0, num_rows)
        if self._drafts:
            host["firsts"][:], host["seconds"][:] = 0, -1
        host["cu_seqlens_q"][:] = 0
        _pad_tokens(host, 0, num_tokens)
        self._send(num_tokens > 0)

    def load_decode(self, rows: list[ScheduledRow], bucket: int) -> None:
        """Decode rows alone, padded to `bucket`: only row fields are written.

        With drafts a slot has two of `bucket` rows, the second of which is padding if it does not draft.
        """
        host = self._begin()
        at: slice | NDArray[np.int64] = slice(len(rows))
        if self._drafts:
            at = self._spread(host, rows, bucket)
        else:
            _pad_rows(host, len(rows), bucket)
        slots = [row.slot for row in rows]
        positions = np.array([row.start_pos for row in rows], np.int32)
        host["slots"][at] = host["sample_slots"][at] = slots
        host["row_positions"][at] = positions
        host["seq_lens"][at] = positions + 1
        host["output_index"][at] = [row.output_index for row in rows]
        self._extend_pages(rows)
        self._send(False)

    def _spread(self, host: dict[str, NDArray[np.int32]], rows: list[ScheduledRow], bucket: int) -> NDArray[np.int64]:
        """Pads all of `bucket` rows, two a slot; returns where the given ones belong."""
        drafts = np.array(is_draft(rows))
        at: NDArray[np.int64] = 2 * np.cumsum(~drafts) - 2 + drafts
        _pad_rows(host, 0, bucket)
        host["firsts"][: bucket // 2] = np.arange(0, bucket, 2)
        host["seconds"][: bucket // 2] = -1
        host["seconds"][at[drafts] // 2] = at[drafts]
        return at

    def load_mixed(self, rows: list[ScheduledRow], num_tokens: int, following: list[int] | None = None) -> None:
        """Any batch; its tokens are padded to `num_tokens`. `following`, with drafts: known tokens behind the rows."""
        host, n = self._begin(), len(rows)
        starts = np.array([row.start_pos for row in rows], np.int32)
        lengths = np.array([row.num_tokens for row in rows], np.int32)
        slots = np.array([row.slot for row in rows], np.int32)
        ends = np.cumsum(lengths, dtype=np.int32)
        num_decode = sum(row.is_decode for row in rows)
        host["slots"][:n] = slots
        host["seq_lens"][:n] = starts + lengths
        host["cu_seqlens_q"][0] = 0
        host["cu_seqlens_q"][1 : n - num_decode + 1] = ends[num_decode:] - num_decode
        sampling = np.flatnonzero([row.samples for row in rows])
        host["sample_rows"][: len(sampling)] = ends[sampling] - 1
        host["sample_rows"][len(sampling) :] = 0
        host["sample_slots"][: len(sampling)] = slots[sampling]
        host["output_index"][: len(sampling)] = [rows[i].output_index for i in sampling]
        total = int(ends[-1])
        host["positions"][:total] = np.arange(total, dtype=np.int32) + np.repeat(starts - (ends - lengths), lengths)
        host["token_slots"][:total] = np.repeat(slots, lengths)
        host["input_ids"][:num_decode] = -1
        host["input_ids"][num_decode:total] = [token for row in rows[num_decode:] for token in row.token_ids]
        if following is not None:
            host["input_ids"][:num_decode][is_draft(rows[:num_decode])] = -2
            host["next_ids"][: total - 1] = host["input_ids"][1:total]
            host["next_ids"][ends - 1] = following
            host["next_ids"][total:num_tokens] = 0
            firsts, seconds = pairs([rows[i] for i in sampling])
            host["firsts"][: len(firsts)], host["seconds"][: len(firsts)] = firsts, seconds
        _pad_tokens(host, total, num_tokens)
        self._extend_pages(rows)
        self._send(True)

    def release(self, slot: int) -> None:
        """Forgets a slot's pages: another sequence enters it."""
        self._num_pages[slot] = 0

    def _begin(self) -> dict[str, NDArray[np.int32]]:
        self._next = (self._next + 1) % RING
        self._ring[self._next].wait()
        return self._host[self._next]

    def _extend_pages(self, rows: list[ScheduledRow]) -> None:
        index: list[int] = []
        pages: list[int] = []
        max_pages = self.page_table.shape[1]
        for row in rows:
            if row.new_page_ids:
                held = self._num_pages[row.slot]
                if held + len(row.new_page_ids) > max_pages:
                    raise ValueError(f"slot {row.slot}: {held} and {len(row.new_page_ids)} pages are over {max_pages}")
                first = row.slot * max_pages + held
                index += range(first, first + len(row.new_page_ids))
                pages += row.new_page_ids
                self._num_pages[row.slot] = held + len(row.new_page_ids)
        staging = self._ring[self._next]
        for low in range(0, len(pages), _PAGE_CHUNK):
            if low:  # a prompt of half a million tokens: its pages go in several copies through one buffer
                staging.mark()
                staging.wait()
            n = min(_PAGE_CHUNK, len(pages) - low)
            staging.page_index[:n] = torch.tensor(index[low : low + n])
            staging.page_value[:n] = torch.tensor(pages[low : low + n], dtype=torch.int32)
            device = self.page_table.device
            self.page_table.view(-1).index_copy_(
                0,
                staging.page_index[:n].to(device, non_blocking=True),
                staging.page_value[:n].to(device, non_blocking=True),
            )

    def _send(self, with_tokens: bool) -> None:
        staging = self._ring[self._next]
        end = len(self._ints) if with_tokens else self._num_row_ints
        self._ints[:end].copy_(staging.ints[:end], non_blocking=True)
        staging.mark()


def _pad_rows(host: dict[str, NDArray[np.int32]], start: int, stop: int) -> None:
    for name in ("slots", "sample_slots"):
        host[name][start:stop] = -1
    for name in ("seq_lens", "row_positions", "output_index", "sample_rows"):
        host[name][start:stop] = 0


def _pad_tokens(host: dict[str, NDArray[np.int32]], start: int, stop: int) -> None:
    host["token_slots"][start:stop] = -1
    host["input_ids"][start:stop] = host["positions"][start:stop] = 0

"""Sampling inside a step's CUDA graph: each slot's parameters live on the device, where the kernel reads them.

What needs a row of its own vocabulary on the host's say (masks, biases, penalties, log-probabilities) is the Sampler's.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.core import AdmittedSequence, ScheduledRow
from gossamer.ops.sampling import sample_slots, workspace_size

_ALWAYS = 1 << 62
# Uploads in flight at once, at most; more would be as many steps ahead of the device.
_NUM_STAGING = 4


class DeviceSampler:
    """Parameters per slot on the device and the draw that reads them there. The methods run on one thread.

    `admit` in step order, then `flush` once before the step's launch, on the stream that the step runs on.
    """

    def __init__(self, max_num_seqs: int, vocab_size: int, max_rows: int, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        # Rows: temperature, top_p, min_p (float64), top_k, seed (int64).
        self._host = np.zeros((5, max_num_seqs), np.int64)
        self._host_floats = self._host[:3].view(np.float64)
        self._host_floats[:2] = 1.0
        self._staging = [torch.zeros(5, max_num_seqs, dtype=torch.int64) for _ in range(_NUM_STAGING)]
        if self._is_cuda:
            self._staging = [buffer.pin_memory() for buffer in self._staging]
            self._uploaded = [torch.cuda.Event() for _ in self._staging]
        self._next = 0
        self._changed = False
        self._table = torch.from_numpy(self._host.copy()).to(device)
        self._temperature, self._top_p, self._min_p = self._table[:3].view(torch.float64).unbind(0)
        self._top_k, self._seed = self._table[3:].unbind(0)
        # Output indices below this need the host, for as long as its request holds the slot.
        self._host_until = np.zeros(max_num_seqs, np.int64)
        size = workspace_size(max_rows, vocab_size) if self._is_cuda else 0
        self._workspace = torch.empty(size, dtype=torch.int32, device=device)

    def admit(self, seq: AdmittedSequence) -> None:
        """Sets up a slot, whatever it held before."""
        p, slot = seq.params, seq.slot
        self._host_floats[:, slot] = p.temperature, p.top_p, p.min_p
        self._host[3, slot] = max(p.top_k, 0)
        self._host[4, slot] = seq.seed
        edited = p.has_penalties or p.logit_bias or p.allowed_token_ids is not None or p.logprobs is not None
        self._host_until[slot] = _ALWAYS if edited else p.min_tokens if seq.stop_token_ids else 0
        self._changed = True

    def flush(self) -> None:
        """Sends what `admit` has changed: one copy, queued on the current stream; nothing if nothing changed."""
        if not self._changed:
            return
        self._changed = False
        staging = self._staging[self._next]
        if self._is_cuda:
            self._uploaded[self._next].synchronize()
        staging.numpy()[:] = self._host
        self._table.copy_(staging, non_blocking=True)
        if self._is_cuda:
            self._uploaded[self._next].record()
        self._next = (self._next + 1) % len(self._staging)

    def needs_host_path(self, rows: list[ScheduledRow]) -> bool:
        """Whether a row needs what only `Sampler.sample` does; the whole step is then sampled there."""
        until = self._host_until
        return bool(until.any()) and any(row.output_index < until[row.slot] for row in rows)

    def sample(self, logits: Tensor, slots: Tensor, output_index: Tensor, last_token: Tensor) -> Tensor:
        """One token per row of `logits`, also stored in last_token; see `ops.sampling.sample_slots`. Capturable."""
        return sample_slots(
            logits, slots, self._temperature, self._top_k, self._top_p, self._min_p, self._seed, output_index,
            last_token, workspace=self._workspace if self._is_cuda else None,
        )  # fmt: skip

    def draw(self, logits: Tensor, slots: list[int], output_index: NDArray[np.int64]) -> Tensor:
        """`sample` for host-side rows: the Sampler's draw on a GPU, so a row's token does not depend on the path."""
        rows = torch.from_numpy(np.array([slots, output_index], np.int32))
        on_device = (rows.pin_memory() if self._is_cuda else rows).to(logits.device, non_blocking=True)
        unused = torch.empty(len(self._host_until), dtype=torch.int64, device=logits.device)
        return self.sample(logits, on_device[0], on_device[1], unused)

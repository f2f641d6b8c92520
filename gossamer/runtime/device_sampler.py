"""Per-slot sampling parameters on the device."""

from __future__ import annotations

import torch

from gossamer.core import AdmittedSequence, ScheduledRow


class DeviceSampler:
    def __init__(self, max_num_seqs: int, vocab_size: int, max_rows: int, device: torch.device) -> None: ...

    def admit(self, seq: AdmittedSequence) -> None: ...

    def flush(self) -> None: ...

    def needs_host_path(self, rows: list[ScheduledRow]) -> bool:
        return True

    def sample(
        self, logits: torch.Tensor, slots: torch.Tensor, index: torch.Tensor, last_token: torch.Tensor
    ) -> torch.Tensor:
        return logits.argmax(-1)

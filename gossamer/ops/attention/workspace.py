"""Scratch memory of split-KV decode, allocated once so that a captured graph may keep its addresses."""

from __future__ import annotations

from dataclasses import dataclass

import torch

# Programs that share a multiprocessor: with FP8 pages, what registers allow. Others take half as many.
_PROGRAMS_PER_SM = 4


@dataclass(slots=True, frozen=True)
class DecodeWorkspace:
    """Partial results of programs that own a part of a sequence. One per stream; every layer may use the same one.

    Its size depends on the device and the heads, hardly on the batch: every program leaves at most two partials.
    """

    partials: torch.Tensor
    """fp32 [num_programs, num_kv_heads, 2, group_size, head_dim]: attention to a part of a row's keys."""
    lse: torch.Tensor
    """fp32 [num_programs, num_kv_heads, 2, group_size]: log2 of that part's sum of exponentials."""
    arrivals: torch.Tensor
    """int32 [max_rows * num_kv_heads]: zero between calls."""

    @property
    def num_programs(self) -> int:
        """Programs per KV head."""
        return self.partials.shape[0]

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.partials, self.lse, self.arrivals))

    @classmethod
    def allocate(
        cls, max_rows: int, num_q_heads: int, num_kv_heads: int, head_dim: int, device: torch.device | str,
        num_programs: int | None = None,
    ) -> DecodeWorkspace:  # fmt: skip
        """For batches of up to `max_rows`; `num_programs` per KV head, None: as many as fill the device."""
        device = torch.device(device)
        if num_programs is None:
            num_sms = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
            num_programs = max(1, _PROGRAMS_PER_SM * num_sms // num_kv_heads)
        group = num_q_heads // num_kv_heads
        shape = (num_programs, num_kv_heads, 2)
        return cls(
            torch.empty(*shape, group, head_dim, dtype=torch.float32, device=device),
            torch.empty(*shape, group, dtype=torch.float32, device=device),
            torch.zeros(max_rows * num_kv_heads, dtype=torch.int32, device=device),
        )

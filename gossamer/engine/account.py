"""Adds up, step by step, what the device was asked to do and how long it waited: the figures behind MFU, MBU and idle.

Torch-free and a few microseconds a step, for it runs in the engine's loop.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from gossamer.core import EngineStats, OpCost, ScheduledBatch, StepResult

CostOfStep = Callable[[int, Sequence[int], Sequence[int], int], OpCost]
"""(num_decode, starts, lengths, num_sampled) -> cost: `gossamer.models.cost.StepCost`."""


class ExpertUse(Protocol):
    """Counters of one MoE layer on the device: `gossamer.layers.moe.ExpertUse`."""

    touched: Any


class StepAccount:
    """Adds up the steps that were committed. `uses` has a counter for each MoE layer if experts are counted."""

    def __init__(self, cost: CostOfStep, uses: Sequence[ExpertUse] = ()) -> None:
        self._cost, self._uses = cost, uses
        self._free_since: float | None = None
        """When the device was done with the step before, if that step only decoded."""

    def add(self, batch: ScheduledBatch, result: StepResult, stats: EngineStats) -> None:
        """Adds a step to the totals in `stats`."""
        rows = batch.rows
        starts = [row.start_pos + 1 for row in rows if row.num_tokens > 1 and row.drafts]  # a draft is a row of its own
        num_drafts = len(starts)
        starts += [row.start_pos for row in rows]
        decodes = rows[-1].is_decode
        if decodes:
            cost = self._cost(len(starts), starts, [1] * len(starts), len(starts))
        else:
            num_decode = num_drafts + batch.num_decode_rows
            lengths = [1] * num_decode + [row.num_tokens for row in rows[batch.num_decode_rows :]]
            cost = self._cost(num_decode, starts, lengths, num_drafts + sum([row.samples for row in rows]))
        stats.model_flops += cost.flops
        stats.model_bytes += cost.bytes
        if decodes and self._free_since is not None:
            # A pure decode step's requests ran in the step before, so the device could have gone on at once.
            stats.decode_seconds += result.device_seconds
            stats.decode_idle_seconds += max(0.0, result.start_time - self._free_since)
        self._free_since = result.start_time + result.device_seconds if decodes else None

    def experts_touched(self) -> tuple[int, int] | None:
        """Distinct experts, summed over MoE layers and steps, and the number of terms. Waits for the device."""
        if not self._uses:
            return None
        totals = [use.touched.tolist() for use in self._uses]
        return sum(distinct for distinct, _ in totals), sum(steps for _, steps in totals)

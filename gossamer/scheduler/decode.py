"""Decode rows: every running sequence past its prompt advances by one token, the latest arrived makes room."""

from gossamer.core import Request, RequestStatus, ScheduledBatch, ScheduledRow
from gossamer.scheduler.sequences import Sequences


def schedule_decodes(sequences: Sequences, batch: ScheduledBatch, budget: int) -> None:
    """Adds at most `budget` rows of one token to the batch, oldest request first.

    A request whose samples in flight may already be its last is left out until they are committed. When pages run
    out, the latest-arrived running request is preempted: never one that is in the batch already, and never the
    oldest, which therefore always progresses.
    """
    page_size = sequences.page_size
    for request in sequences.running.copy():
        if len(batch.rows) >= budget:
            return
        position = request.num_computed_tokens
        output_index = len(request.output_token_ids) + request.num_in_flight
        if (
            request.status is not RequestStatus.RUNNING
            or position < request.num_prefill_tokens
            or output_index >= request.max_tokens
        ):
            continue
        new_page_ids: list[int] = []
        if position // page_size == len(request.page_ids):
            if not _make_room(sequences, request):
                continue
            new_page_ids = sequences.pool.allocate(1, request.page_ids[-1])
            request.page_ids += new_page_ids
        request.num_computed_tokens = position + 1
        request.num_in_flight += 1
        batch.rows.append(ScheduledRow(request.slot, position, 1, [], new_page_ids, True, output_index))
        batch.requests.append(request)


def _make_room(sequences: Sequences, request: Request) -> bool:
    """Preempts from the latest arrival on until a page is available; False if that took `request` itself."""
    while not sequences.pool.num_available:
        victim = sequences.running[-1]
        sequences.preempt(victim)
        if victim is request:
            return False
    return True

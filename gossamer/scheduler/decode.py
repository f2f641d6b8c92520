"""Decode rows: every running sequence past its prompt advances by one token, the latest arrived makes room."""

from gossamer.core import Request, RequestStatus, ScheduledBatch, ScheduledRow
from gossamer.scheduler.sequences import Sequences


def schedule_decodes(sequences: Sequences, batch: ScheduledBatch, budget: int, num_drafts: int = 0) -> int:
    """Adds rows of at most `budget` tokens to the batch, oldest request first: of one, and of up to one drafted.

    A request whose samples in flight may already be its last is left out until they are committed. When pages run
    out, the latest-arrived running request is preempted: never one that is in the batch already, and never the
    oldest, which therefore always progresses. A draft takes a page that is available, or is left out. Returns what is
    left of the budget.
    """
    for request in sequences.running.copy():
        if budget < 1:
            break
        position = request.num_computed_tokens
        output_index = len(request.output_token_ids) + request.num_in_flight
        if (
            request.status is not RequestStatus.RUNNING
            or position < request.num_prefill_tokens
            or output_index >= request.max_tokens
        ):
            continue
        num_held = len(request.page_ids)
        if sequences.num_pages_for(position + 1) > num_held:
            if not _make_room(sequences, request):
                continue
            request.page_ids += sequences.pool.allocate(1, request.page_ids[-1])
        num_tokens = 1
        if num_drafts and budget > 1 and _takes_draft(request, output_index):
            num_pages = sequences.num_pages_for(position + 2)
            if num_pages > len(request.page_ids) and sequences.pool.num_available:
                request.page_ids += sequences.pool.allocate(1, request.page_ids[-1])
            num_tokens += num_pages <= len(request.page_ids)
        new_page_ids = request.page_ids[num_held:]
        budget -= num_tokens
        # An accepted draft is counted when it is known.
        request.num_computed_tokens = position + 1
        request.num_in_flight += 1
        batch.rows.append(ScheduledRow(request.slot, position, num_tokens, [], new_page_ids, True, output_index))
        batch.requests.append(request)
    return budget


def _takes_draft(request: Request, output_index: int) -> bool:
    """Whether the token after the next may be sampled with it: there may be one, and no state of it decides that."""
    p = request.params
    plain = p.logprobs is None and not p.has_penalties and not p.logit_bias and p.allowed_token_ids is None
    return plain and p.min_tokens <= output_index < request.max_tokens - 1


def _make_room(sequences: Sequences, request: Request) -> bool:
    """Preempts from the latest arrival on until a page is available; False if that took `request` itself."""
    while not sequences.pool.num_available:
        victim = sequences.running[-1]
        sequences.preempt(victim)
        if victim is request:
            return False
    return True

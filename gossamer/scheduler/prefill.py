"""Prefill rows: who is admitted, and how the prompts being computed share what is left of the token budget."""

from gossamer.core import Request, ScheduledBatch, ScheduledRow
from gossamer.scheduler.sequences import Sequences

# Requests that wait for another's prefix may be overtaken; a step looks past this many of them at most.
MAX_OVERTAKEN = 16


def schedule_prefills(sequences: Sequences, batch: ScheduledBatch, budget: int, *, chunked: bool) -> None:
    """Adds chunks of at most `budget` tokens in all: of prompts begun earlier first, then of newly admitted ones."""
    prefills = [request for request in sequences.running if request.is_prefilling]
    left = budget
    for request in prefills:
        left -= _share(request.num_prefill_tokens - request.num_computed_tokens, left, sequences.page_size)
    num_begun = len(prefills)
    prefills += _admit(sequences, batch, left, chunked=chunked)
    wanted = [request.num_prefill_tokens - request.num_computed_tokens for request in prefills]
    grants = split_budget(wanted, budget, sequences.page_size) if chunked else wanted
    for i, (request, grant) in enumerate(zip(prefills, grants, strict=True)):
        if grant:
            _add_row(batch, request, grant, request.page_ids.copy() if i >= num_begun else [])


def split_budget(wanted: list[int], budget: int, page_size: int) -> list[int]:
    """How many tokens each prompt, oldest first, gets of `budget`.

    While others wait behind it, a prompt gets at most half of what is left (but a page), so that a long one does not
    starve short ones; what they leave over goes back to the oldest.
    """
    grants: list[int] = []
    left = budget
    for i, num in enumerate(wanted):
        grants.append(min(num, left) if i == len(wanted) - 1 else _share(num, left, page_size))
        left -= grants[-1]
    for i, num in enumerate(wanted):
        extra = min(num - grants[i], left)
        grants[i] += extra
        left -= extra
    return grants


def _share(wanted: int, left: int, page_size: int) -> int:
    return min(wanted, max(left // 2, min(left, page_size)))


def _admit(sequences: Sequences, batch: ScheduledBatch, budget: int, *, chunked: bool) -> list[Request]:
    """Admits waiting requests, in order of arrival, while each of them gets tokens, a slot and all its pages.

    The first that lacks pages ends it: a later, smaller one may not take them. A request whose next page a running
    prefill is about to compute waits for that page instead of computing it twice; it may be overtaken meanwhile.
    """
    admitted: list[Request] = []
    overtaken = 0
    while budget > 0 and sequences.free_slots and overtaken < min(len(sequences.waiting), MAX_OVERTAKEN):
        request = sequences.waiting[overtaken]
        if request.num_in_flight:
            # Preempted; the id of its last token is not known before the next commit.
            break
        cached = sequences.cached_pages(request)
        if sequences.is_being_computed(request, len(cached)):
            overtaken += 1
            continue
        num_tokens = request.num_known_tokens - len(cached) * sequences.page_size
        if (not chunked and num_tokens > budget) or not sequences.fits(request, cached):
            break
        batch.admitted.append(sequences.admit(request, cached))
        admitted.append(request)
        budget -= _share(num_tokens, budget, sequences.page_size) if chunked else num_tokens
    return admitted


def _add_row(batch: ScheduledBatch, request: Request, num: int, new_page_ids: list[int]) -> None:
    start = request.num_computed_tokens
    stop = start + num
    samples, output_index = stop == request.num_prefill_tokens, len(request.output_token_ids)
    token_ids = request.known_token_ids(start, stop)
    batch.rows.append(ScheduledRow(request.slot, start, num, token_ids, new_page_ids, samples, output_index))
    batch.requests.append(request)
    request.num_computed_tokens = stop
    request.num_in_flight += samples

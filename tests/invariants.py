"""What must hold of a scheduler after every call, whatever happened before."""

from __future__ import annotations

from collections import Counter

from gossamer.core import RequestStatus
from gossamer.kv_cache.pages import PagePool
from gossamer.scheduler.scheduler import Scheduler


def check_pool(pool: PagePool, holders: Counter[int]) -> None:
    """Every page is either free, cached or referenced exactly as often as it is held."""
    free: list[int] = []
    for start, length in pool._length_at_start.items():
        assert length > 0
        assert pool._start_at_end[start + length - 1] == start
        assert start + length not in pool._length_at_start, "neighbouring runs must be one"
        assert (-length, start) in pool._longest
        free += range(start, start + length)
    assert len(pool._start_at_end) == len(pool._length_at_start)
    cached = list(pool._lru)
    held = [page for page in range(pool.num_pages) if holders[page]]
    assert sorted(free + cached + held) == list(range(pool.num_pages))
    assert pool._num_free == len(free)
    assert pool.num_in_use == len(held)
    assert pool.num_available == len(free) + len(cached)
    for page in range(pool.num_pages):
        assert pool.num_references(page) == holders[page]
        assert pool._kept[page] or page not in pool._lru
    assert not any(pool._kept[page] for page in free)


def check_scheduler(scheduler: Scheduler) -> None:
    sequences = scheduler._sequences
    pool, size = sequences.pool, sequences.page_size
    check_pool(pool, Counter(page for request in sequences.running for page in request.page_ids))
    cache = sequences.prefix_cache
    registered: set[int] = set()
    if cache is not None:
        assert {page: digest for digest, page in cache._page_of.items()} == cache._digest_of
        registered = set(cache._digest_of)
    assert registered == {page for page in range(pool.num_pages) if pool._kept[page]}
    for request in sequences.running:
        assert request.status is RequestStatus.RUNNING
        assert sequences.num_pages_for(request.num_computed_tokens) <= len(request.page_ids)
        assert len(set(request.page_ids)) == len(request.page_ids)
        for page in request.page_ids[request.num_computed_tokens // size :]:
            assert pool.num_references(page) == 1, "a page still to be written is shared"
            assert page not in registered, "a page still to be written is offered to others"
        assert len(request.output_token_ids) + request.num_in_flight <= request.max_tokens
    for request in sequences.waiting:
        assert request.status is RequestStatus.WAITING
        assert request.page_ids == []
        assert request.slot == -1
    slots = [request.slot for request in sequences.running]
    assert sorted(slots + sequences.free_slots) == list(range(len(slots) + len(sequences.free_slots)))
    for queue in (sequences.waiting, sequences.running):
        order = [(request.arrival_time, request.arrival_index) for request in queue]
        assert order == sorted(order)
    assert set(sequences.by_id.values()) == {*sequences.waiting, *sequences.running}


def check_drained(scheduler: Scheduler) -> None:
    """Nothing is left of any request: all pages free or cached, all slots free."""
    check_scheduler(scheduler)
    sequences = scheduler._sequences
    assert not scheduler.has_work
    assert not sequences.waiting
    assert not sequences.running
    assert sequences.pool.num_in_use == 0
    assert sequences.pool.num_available == sequences.pool.num_pages

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from invariants import check_pool

from gossamer.kv_cache.pages import OutOfPages, PagePool


def test_a_sequence_grows_in_place_when_the_next_page_is_free():
    pool = PagePool(100)
    first = pool.allocate(10)
    second = pool.allocate(10)
    assert first == list(range(first[0], first[0] + 10))
    assert second == list(range(second[0], second[0] + 10))
    for _ in range(4):
        for pages in (first, second):
            pages += pool.allocate(1, after=pages[-1])
    assert first == list(range(first[0], first[0] + 14))
    assert second == list(range(second[0], second[0] + 14))


def test_growth_goes_elsewhere_when_the_next_page_is_taken():
    pool = PagePool(4)
    pages = pool.allocate(2)
    assert pages == [0, 1]
    pool.allocate(1, after=1)
    assert pool.allocate(1, after=1) == [3]


def test_large_allocation_uses_several_runs_when_no_run_is_long_enough():
    pool = PagePool(6)
    pages = pool.allocate(6)
    pool.release([pages[1], pages[2]])
    pool.release([pages[4]])
    assert pool.allocate(3) == [1, 2, 4]


def test_freed_neighbours_merge_into_one_run():
    pool = PagePool(9)
    pool.allocate(9)
    for page in (3, 5, 4, 0, 2, 1):
        pool.release([page])
    check_pool(pool, Counter({6: 1, 7: 1, 8: 1}))
    assert pool.allocate(6) == [0, 1, 2, 3, 4, 5]


def test_running_out_changes_nothing():
    pool = PagePool(4)
    held = pool.allocate(3)
    with pytest.raises(OutOfPages, match="2 pages wanted, 1 of 4 available"):
        pool.allocate(2)
    check_pool(pool, Counter(held))


def test_least_recently_released_sequence_is_evicted_first_and_its_tail_before_its_head():
    pool = PagePool(7)
    evicted: list[int] = []
    pool.on_evict = evicted.append
    a, b = pool.allocate(3), pool.allocate(3)
    for page in a + b:
        pool.keep(page)
    pool.release(b)
    pool.release(a)
    assert pool.num_available == 7
    assert pool.num_in_use == 0
    pool.allocate(1)
    assert evicted == [], "a free page is used before a cached one is evicted"
    pool.allocate(4)
    assert evicted == [b[2], b[1], b[0], a[2]]
    assert pool.num_cached == 2


def test_a_page_taken_from_the_cache_becomes_the_most_recently_used():
    pool = PagePool(3)
    evicted: list[int] = []
    pool.on_evict = evicted.append
    pages = pool.allocate(3)
    for page in pages:
        pool.keep(page)
        pool.release([page])
    assert pool.num_unreferenced([0, 1]) == 2
    pool.acquire([0])
    pool.acquire([0])
    assert pool.num_references(0) == 2
    assert pool.num_unreferenced([0, 1]) == 1
    pool.release([0])
    pool.release([0])
    pool.allocate(2)
    assert evicted == [1, 2]


def test_large_pools_evict_in_batches_so_that_runs_form():
    pool = PagePool(1024)
    pages = pool.allocate(1024)
    for page in pages:
        pool.keep(page)
    pool.release(pages)
    first = pool.allocate(1)
    assert pool.num_cached == 1020
    assert pool.allocate(1, after=first[0]) == [first[0] + 1]


def test_a_kept_page_in_use_is_free_after_forget_and_release():
    pool = PagePool(2)
    pages = pool.allocate(2)
    pool.keep(0)
    pool.keep(1)
    pool.release([1])
    pool.forget(0)
    pool.forget(1)
    assert pool.num_cached == 0
    pool.release([0])
    check_pool(pool, Counter())
    assert pool.allocate(2) == pages


@pytest.mark.parametrize("misuse", ["release", "acquire", "keep"])
def test_misuse_is_an_error(misuse):
    pool = PagePool(2)
    with pytest.raises(ValueError, match="page 1"):
        getattr(pool, misuse)([1] if misuse != "keep" else 1)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.integers(1, 40), st.lists(st.tuples(st.integers(0, 5), st.integers(0, 10**6)), max_size=60))
def test_random_use_loses_and_shares_nothing(num_pages, actions):
    pool = PagePool(num_pages)
    cached: set[int] = set()
    pool.on_evict = cached.remove
    held: list[list[int]] = []
    for action, number in actions:
        if action <= 1 and pool.num_available:
            after = held[number % len(held)][-1] if held else None
            held.append(pool.allocate(min(1 + number % 9, pool.num_available), after))
        elif action == 2 and held:
            pool.release(held.pop(number % len(held)))
        elif action == 3 and held:
            for page in held[number % len(held)]:
                pool.keep(page)
                cached.add(page)
        elif action == 4 and cached:
            shared = sorted(cached)[number % len(cached) :][:3]
            pool.acquire(shared)
            held.append(shared)
        elif action == 5 and cached:
            page = sorted(cached)[number % len(cached)]
            cached.remove(page)
            pool.forget(page)
        check_pool(pool, Counter(page for pages in held for page in pages))

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.scheduler.prefill import split_budget


@pytest.mark.parametrize(
    ("wanted", "budget", "grants"),
    [
        ([], 512, []),
        ([1000], 512, [512]),
        ([1000, 1000], 512, [256, 256]),
        ([1000, 1000, 1000], 512, [256, 128, 128]),
        ([1000, 20], 512, [492, 20]),
        ([20, 1000], 512, [20, 492]),
        ([1000, 30, 40], 512, [442, 30, 40]),
        ([300, 1000, 10], 512, [300, 202, 10]),
        ([1000, 1000], 100, [64, 36]),
        ([1000, 1000], 50, [50, 0]),
        ([10, 20, 30], 512, [10, 20, 30]),
    ],
)
def test_half_for_the_oldest_leftovers_too(wanted, budget, grants):
    assert split_budget(wanted, budget, 64) == grants


@settings(deadline=None, derandomize=True, database=None)
@given(st.lists(st.integers(1, 500), max_size=8), st.integers(0, 600), st.integers(1, 64))
def test_the_budget_is_used_up_and_never_exceeded(wanted, budget, page_size):
    grants = split_budget(wanted, budget, page_size)
    assert sum(grants) == min(budget, sum(wanted))
    assert all(0 <= grant <= want for grant, want in zip(grants, wanted, strict=True))

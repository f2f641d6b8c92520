"""Aborts in every state, and steps that raise."""

from __future__ import annotations

import pytest
from driver import Driver, prompt

from gossamer.core import Request, RequestStatus, StepResult


def abort_when(driver: Driver, request: Request, ready) -> None:
    for _ in range(50):
        if ready():
            driver.abort(request)
            return
        driver.step()
    raise AssertionError("the state to abort in was never reached")


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("state", ["waiting", "prefill", "decode", "in flight", "preempted"])
def test_abort_frees_pages_and_slot_at_once_in_every_state(state, depth):
    driver = Driver(depth=depth, num_pages=9, budget=6, max_num_seqs=2, cached=False)
    keeper = driver.add(prompt(10), max_tokens=14)
    victim = driver.add(prompt(10, first=5), max_tokens=14)
    ready = {
        "waiting": lambda: True,
        "prefill": lambda: victim.is_prefilling and victim.num_computed_tokens > 0,
        "decode": lambda: len(victim.output_token_ids) > 1 and victim.slot >= 0,
        "in flight": lambda: victim.output_token_ids and driver.schedule() and victim.num_in_flight > 0,
        "preempted": lambda: victim.num_preemptions > 0 and victim.slot < 0,
    }[state]
    abort_when(driver, victim, ready)
    assert victim.page_ids == []
    assert driver.scheduler._sequences.pool.num_in_use == len(keeper.page_ids)
    successor = driver.add(prompt(3, first=11), max_tokens=2)
    while successor.status is RequestStatus.WAITING:
        driver.schedule() if len(driver.in_flight) < depth else driver.commit()
    assert {keeper.slot, successor.slot} == {0, 1}
    driver.drain()
    assert driver.tracked["r1"].end == "abort"


def test_abort_of_an_unknown_or_finished_request_is_false():
    driver = Driver()
    driver.add(prompt(2), max_tokens=1)
    driver.step()
    assert not driver.scheduler.abort("r0")
    assert not driver.scheduler.abort("nobody")


def test_a_failed_step_ends_its_requests_and_the_others_start_over():
    driver = Driver(depth=2, budget=8, num_pages=30)
    early = driver.add(prompt(5), max_tokens=9)
    driver.step()
    late = driver.add(prompt(20, first=3), max_tokens=5)
    driver.commit()
    driver.schedule(fail=True)
    assert late.num_computed_tokens > 0
    waiting = driver.add(prompt(9, first=8), max_tokens=5)
    driver.schedule()
    outputs = driver.commit()
    assert {(output.request_id, output.finish_reason, output.error) for output in outputs} == {
        (early.request_id, "error", "boom"),
        (late.request_id, "error", "boom"),
    }
    assert waiting.status is RequestStatus.WAITING
    assert waiting.num_in_flight == 0
    assert driver.scheduler.stats().num_pages_in_use == 0
    driver.drain()
    assert driver.tracked[waiting.request_id].end == "length"


def test_results_must_belong_to_the_oldest_batch():
    driver = Driver(depth=2)
    driver.add(prompt(3), max_tokens=5)
    first, second = driver.schedule(), driver.schedule()
    with pytest.raises(ValueError, match="oldest"):
        driver.scheduler.commit(second, StepResult(second.step_id, [1]))
    with pytest.raises(ValueError, match="match"):
        driver.scheduler.commit(first, StepResult(second.step_id, [1]))
    with pytest.raises(ValueError, match="match"):
        driver.scheduler.commit(first, StepResult(first.step_id, [1, 2]))
    driver.drain()

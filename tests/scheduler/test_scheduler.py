"""What rows and batches hold, what overlap and stopping do, what a step costs."""

from __future__ import annotations

import time

import pytest
from driver import Driver, prompt
from fakes import expected

from gossamer.config import EngineConfig, LoadConfig, SchedulerConfig
from gossamer.core import Request, RequestStatus, SamplingParams, StepResult
from gossamer.scheduler.scheduler import Scheduler


def test_rows_bring_the_whole_page_list_once_and_then_only_new_pages():
    driver = Driver(budget=6)
    request = driver.add(prompt(10), max_tokens=5)
    rows = []
    while request.status is not RequestStatus.FINISHED:
        rows.append(driver.schedule().rows[0])
        driver.commit()
    assert [(row.start_pos, row.num_tokens, row.samples) for row in rows] == [
        (0, 6, False),
        (6, 4, True),
        (10, 1, True),
        (11, 1, True),
        (12, 1, True),
        (13, 1, True),
    ]
    assert [len(row.new_page_ids) for row in rows] == [3, 0, 0, 0, 1, 0]
    assert [row.output_index for row in rows[1:]] == [0, 1, 2, 3, 4]
    assert [row.is_decode for row in rows] == [False, False, True, True, True, True]
    assert [len(batch.admitted) for batch in driver.executor.batches] == [1, 0, 0, 0, 0, 0]
    driver.drain()


def test_decode_rows_come_first_and_the_budget_is_never_exceeded():
    driver = Driver(budget=8, max_num_seqs=6, num_pages=60)
    for _ in range(3):
        driver.add(prompt(2), max_tokens=20)
    driver.step()
    for _ in range(3):
        driver.add(prompt(20), max_tokens=20)
    batch = driver.schedule()
    assert [row.is_decode for row in batch.rows][:4] == [True, True, True, False]
    assert batch.num_tokens == 8
    assert batch.num_decode_rows == 3
    driver.drain()


def test_a_decode_batch_has_a_row_for_every_running_sequence():
    driver = Driver(budget=64, max_num_seqs=16, num_pages=64)
    for i in range(16):
        driver.add(prompt(3, first=i), max_tokens=6)
    driver.step()
    assert driver.schedule().num_decode_rows == 16
    driver.drain()


def test_samples_in_flight_count_towards_max_tokens():
    driver = Driver(depth=2)
    driver.add(prompt(3), max_tokens=2)
    assert driver.schedule().rows[0].output_index == 0
    assert driver.schedule().rows[0].output_index == 1
    assert driver.scheduler.schedule() is None, "a third token must not be scheduled"
    driver.drain()


def test_a_stop_found_at_commit_wastes_one_row_and_its_result_is_discarded():
    params = SamplingParams(max_tokens=10, ignore_eos=True)
    first = expected(prompt(3), params, 0, frozenset(), 1).token_ids[0]
    params.stop_token_ids = [first]
    driver = Driver(depth=2)
    request = driver.add(prompt(3), params)
    driver.schedule()
    driver.schedule()
    (output,) = driver.commit()
    assert (output.token_ids, output.finish_reason, output.stop_reason) == ([first], "stop", first)
    assert request.page_ids == []
    assert driver.schedule() is None
    assert driver.commit() == []
    assert driver.scheduler.stats().num_generation_tokens == 1
    driver.drain()


def test_a_preempted_sequence_returns_only_when_its_sample_is_known():
    driver = Driver(depth=2, num_pages=4, max_num_seqs=2, cached=False)
    old = driver.add(prompt(7), max_tokens=8)
    young = driver.add(prompt(4), max_tokens=8)
    while not young.num_preemptions:
        driver.schedule()
        if len(driver.in_flight) == 2 and not young.num_preemptions:
            driver.commit()
    assert young.num_in_flight == 1
    assert young.status is RequestStatus.WAITING
    driver.abort(old)
    assert driver.schedule() is None, "there is room, but the id of its last token is not known"
    known = len(young.output_token_ids)
    driver.commit()
    driver.commit()
    assert len(young.output_token_ids) == known + 1
    batch = driver.schedule()
    assert batch.admitted[0].output_token_ids == young.output_token_ids
    assert batch.rows[0].token_ids == young.prompt_token_ids + young.output_token_ids
    assert batch.rows[0].output_index == known + 1
    driver.drain()


def test_eos_and_stop_ids_differ_in_their_stop_reason():
    params = SamplingParams(max_tokens=3, ignore_eos=True)
    first = expected(prompt(3), params, 0, frozenset(), 1).token_ids[0]
    for own, reason in (([], None), ([first], first)):
        scheduler = Driver().scheduler
        params = SamplingParams(max_tokens=3, stop_token_ids=own)
        request = Request("r", prompt(3), params, 3, 0, stop_token_ids=frozenset({first}))
        scheduler.add(request)
        batch = scheduler.schedule()
        (output,) = scheduler.commit(batch, StepResult(batch.step_id, [first]))
        assert (output.finish_reason, output.stop_reason) == ("stop", reason)


def test_min_tokens_holds_back_a_stop_id_that_was_sampled_all_the_same():
    scheduler = Driver().scheduler
    params = SamplingParams(max_tokens=4, min_tokens=2)
    scheduler.add(Request("r", prompt(3), params, 4, 0, stop_token_ids=frozenset({5})))
    reasons = []
    while scheduler.has_work:
        batch = scheduler.schedule()
        reasons += [output.finish_reason for output in scheduler.commit(batch, StepResult(batch.step_id, [5]))]
    assert reasons == [None, None, "stop"]


def test_a_row_without_a_valid_token_fails_its_request_alone_and_leaves_nothing_in_the_cache():
    driver = Driver()
    bad, good = driver.add(prompt(9), max_tokens=4), driver.add(prompt(3, first=20), max_tokens=4)
    batch = driver.schedule()
    _, future = driver.in_flight.pop()
    result = future.result()
    result.token_ids[batch.requests.index(bad)] = -1
    outputs = {output.request_id: output for output in driver.scheduler.commit(batch, result)}
    assert outputs[bad.request_id].finish_reason == "error"
    assert "NaN or infinite" in outputs[bad.request_id].error
    assert outputs[good.request_id].finish_reason is None
    assert driver.scheduler._sequences.pool.num_cached == 0
    assert driver.scheduler.num_running == 1


def test_stats_count_everything():
    driver = Driver(budget=16, num_pages=30, max_num_seqs=2)
    for i in range(3):
        driver.add(prompt(10, first=i), max_tokens=3)
    driver.step()
    stats = driver.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_pages) == (2, 1, 30)
    assert stats.num_pages_in_use == 6
    driver.drain()
    stats = driver.scheduler.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_pages_in_use) == (0, 0, 0)
    assert stats.num_prompt_tokens == 30
    assert stats.num_generation_tokens == 9
    assert stats.num_steps == len(driver.executor.batches)
    assert stats.device_seconds == pytest.approx(0.001 * stats.num_steps)


@pytest.mark.parametrize("length", [64, 8000])
def test_a_decode_step_of_32_takes_well_under_half_a_millisecond_however_long_the_contexts(length):
    config = SchedulerConfig(max_num_seqs=32, max_num_batched_tokens=300_000)
    scheduler = Scheduler(EngineConfig(load=LoadConfig(max_model_len=10_000), scheduler=config), num_pages=5000)
    for i in range(32):
        tokens = [i, *range(length - 1)]
        scheduler.add(Request(f"r{i}", tokens, SamplingParams(max_tokens=1000), 1000, 0))
    seconds = []
    for _ in range(200):
        start = time.perf_counter()
        batch = scheduler.schedule()
        scheduled = time.perf_counter()
        result = StepResult(batch.step_id, [5] * len(batch.rows))
        resumed = time.perf_counter()
        scheduler.commit(batch, result)
        if batch.num_decode_rows == 32:
            seconds.append(scheduled - start + time.perf_counter() - resumed)
    assert len(seconds) > 150
    assert sorted(seconds)[len(seconds) // 4] < 0.5e-3

"""Who is admitted when, how prompts share the budget, who is preempted."""

from __future__ import annotations

import pytest
from driver import Driver, grants, prompt

from gossamer.config import Hardware, ModelConfig, make_engine_config, resolve
from gossamer.core import InvalidRequest, Request, RequestStatus, SamplingParams, StartupError


def test_a_long_prompt_leaves_half_of_the_budget_to_those_behind_it():
    driver = Driver(budget=32, num_pages=200)
    driver.add(prompt(400))
    assert grants(driver) == {"r0": 32}
    driver.commit()
    driver.add(prompt(6, first=9))
    driver.add(prompt(100, first=3))
    assert grants(driver) == {"r0": 16, "r1": 6, "r2": 10}
    driver.drain()


def test_short_requests_behind_a_long_prompt_get_their_first_token_at_once():
    driver = Driver(budget=32, num_pages=300, max_num_seqs=4)
    driver.add(prompt(1000), max_tokens=1)
    driver.step()
    for i in range(3):
        driver.add(prompt(3, first=7 + i), max_tokens=1)
    outputs = driver.step()
    assert [output.request_id for output in outputs] == ["r1", "r2", "r3"]
    driver.drain()


def test_the_long_prompt_progresses_under_a_stream_of_short_ones():
    driver = Driver(budget=16, num_pages=300, max_num_seqs=4)
    long = driver.add(prompt(400), max_tokens=1)
    steps = 0
    while long.status is not RequestStatus.FINISHED:
        driver.add(prompt(12, first=steps), max_tokens=1)
        driver.step()
        steps += 1
    assert steps <= 400 / 8 + 1
    driver.drain()


def test_without_chunking_prompts_are_whole_and_a_large_one_is_not_overtaken():
    driver = Driver(chunked=False, budget=80, num_pages=60, max_num_seqs=4, max_len=80)
    driver.add(prompt(20), max_tokens=3)
    driver.step()
    driver.add(prompt(50, first=5), max_tokens=3)
    driver.add(prompt(50, first=9), max_tokens=3)
    driver.add(prompt(2, first=3), max_tokens=3)
    batch = driver.schedule()
    assert [r.request_id for r in batch.requests] == ["r0", "r1"]
    assert [row.num_tokens for row in batch.rows] == [1, 50]
    driver.drain()


def test_chunking_off_needs_a_budget_for_the_longest_prompt():
    options = {"max_model_len": 32, "max_num_seqs": 2, "max_num_batched_tokens": 16}
    config = make_engine_config(model="m", enable_chunked_prefill=False, **options)
    model = ModelConfig("llama", 100, 64, 96, 2, 4, 2, 16, max_position_embeddings=64)
    with pytest.raises(StartupError, match="--max-num-batched-tokens"):
        resolve(config, Hardware("cpu", "a CPU", 1 << 34, 2), model)


def test_first_come_first_served_by_arrival_time_even_when_added_late():
    driver = Driver(max_num_seqs=1)
    driver.add(prompt(3), arrival_time=5.0)
    driver.add(prompt(3, first=4), arrival_time=2.0)
    driver.add(prompt(3, first=6), arrival_time=5.0)
    ends = []
    while driver.scheduler.has_work:
        ends += [output.request_id for output in driver.step() if output.finish_reason]
    assert ends == ["r1", "r0", "r2"]


def test_a_request_that_lacks_pages_is_not_overtaken_by_a_smaller_one():
    driver = Driver(num_pages=10, cached=False, budget=40)
    driver.add(prompt(24), max_tokens=4)
    driver.step()
    driver.add(prompt(20, first=3), max_tokens=2)
    driver.add(prompt(3, first=5), max_tokens=2)
    ends = []
    while driver.scheduler.has_work:
        assert driver.scheduler.num_running == 1 or ends
        ends += [output.request_id for output in driver.step() if output.finish_reason]
    assert ends[0] == "r0"


def test_the_watermark_leaves_room_for_those_who_run_to_grow():
    driver = Driver(num_pages=8, budget=40, cached=False)
    old = driver.add(prompt(14), max_tokens=6)
    driver.step()
    young = driver.add(prompt(16, first=3), max_tokens=2)
    driver.step()
    assert driver.scheduler._sequences.pool.num_available == 4
    assert young.status is RequestStatus.WAITING, "it would fit, and then the old one's growth would preempt it"
    while old.status is RequestStatus.RUNNING:
        driver.step()
    driver.drain()
    assert young.num_preemptions == 0


def test_an_idle_pool_needs_no_watermark():
    driver = Driver(num_pages=8, budget=40)
    driver.add(prompt(31), max_tokens=1)
    assert grants(driver) == {"r0": 31}
    driver.drain()


def test_what_can_never_fit_and_duplicate_ids_are_refused():
    driver = Driver(num_pages=8)
    request = driver.add(prompt(20), max_tokens=12)
    with pytest.raises(InvalidRequest, match="32 tokens") as caught:
        driver.scheduler.add(Request("x", prompt(20), SamplingParams(max_tokens=13), 13, 0))
    assert caught.value.param == "max_tokens"
    with pytest.raises(InvalidRequest, match="r0"):
        driver.scheduler.add(Request("r0", prompt(2), SamplingParams(), 4, 0))
    for tokens, max_tokens in (([], 4), ([1], 0)):
        with pytest.raises(InvalidRequest):
            driver.scheduler.add(Request("y", tokens, SamplingParams(), max_tokens, 0))
    driver.abort(request)
    driver.scheduler.add(Request("r0", prompt(2), SamplingParams(), 4, 0))


def test_the_latest_arrival_makes_room_and_comes_back_in_its_turn():
    driver = Driver(num_pages=7, budget=40, max_num_seqs=3, cached=False)
    driver.add(prompt(8), max_tokens=12)
    driver.add(prompt(7, first=2), max_tokens=12)
    driver.add(prompt(3, first=4), max_tokens=12)
    preempted: list[str] = []
    ends: list[str] = []
    while driver.scheduler.has_work:
        before = {t.request.request_id: t.request.num_preemptions for t in driver.tracked.values()}
        ends += [output.request_id for output in driver.step() if output.finish_reason]
        preempted += [
            t.request.request_id
            for t in driver.tracked.values()
            if t.request.num_preemptions > before[t.request.request_id]
        ]
    assert preempted[:2] == ["r2", "r1"]
    assert ends == ["r0", "r1", "r2"]
    assert driver.scheduler.stats().num_preemptions == len(preempted)
    driver.drain()


def test_a_preempted_request_finds_its_own_pages_in_the_cache():
    driver = Driver(num_pages=8, budget=40, max_num_seqs=2)
    driver.add(prompt(12), max_tokens=16)
    young = driver.add(prompt(12, first=5), max_tokens=16)
    driver.drain()
    assert young.num_preemptions == 1
    assert young.num_cached_tokens == 0, "what the request itself had computed is no cache hit"
    batch = next(b for b in driver.executor.batches if any(a.output_token_ids for a in b.admitted))
    assert batch.requests == [young]
    # Of its 4 pages, 3 were evicted, from the tail, as the older one grew from 4 pages to 7.
    assert batch.rows[0].start_pos == 4

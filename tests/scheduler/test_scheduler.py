"""The scheduler's promises one by one."""

from __future__ import annotations

import time

import pytest
from driver import Driver
from fakes import expected

from gossamer.config import SchedulerConfig
from gossamer.core import InvalidRequest, Request, RequestStatus, SamplingParams, StartupError, StepResult
from gossamer.scheduler.scheduler import Scheduler


def prompt(length: int, first: int = 1) -> list[int]:
    return [(first + i) % 29 for i in range(length)]


def grants(driver: Driver) -> dict[str, int]:
    """Tokens per request of the next batch, which stays in flight."""
    batch = driver.schedule()
    return {r.request_id: row.num_tokens for r, row in zip(batch.requests, batch.rows, strict=True)}


# Rows


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


# Overlap


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


# Stopping


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
    assert "no valid token" in outputs[bad.request_id].error
    assert outputs[good.request_id].finish_reason is None
    assert driver.scheduler._sequences.pool.num_cached == 0
    assert driver.scheduler.num_running == 1


# Admission and fairness


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
    config = SchedulerConfig(max_num_seqs=2, max_num_batched_tokens=16, enable_chunked_prefill=False)
    with pytest.raises(StartupError, match="--max-num-batched-tokens"):
        Scheduler(config, num_pages=8, page_size=4, max_model_len=32, enable_prefix_caching=True)


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


# Preemption


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


# Prefix cache


def test_a_second_request_computes_only_what_differs():
    driver = Driver(budget=64, num_pages=40)
    driver.add(prompt(18), max_tokens=1)
    driver.step()
    second = driver.add([*prompt(17), 0, 0], max_tokens=1)
    row = driver.schedule().rows[0]
    assert (row.start_pos, row.num_tokens) == (16, 3)
    (output,) = driver.commit()
    assert output.num_cached_tokens == second.num_cached_tokens == 16
    stats = driver.scheduler.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (18 + 19, 16)
    assert stats.num_prompt_tokens == 18 + 3
    driver.drain()


def test_the_last_token_is_always_computed():
    driver = Driver(budget=64, num_pages=40)
    driver.add(prompt(16), max_tokens=1)
    driver.step()
    driver.add(prompt(16), max_tokens=1)
    row = driver.schedule().rows[0]
    assert (row.start_pos, row.num_tokens) == (12, 4)
    driver.drain()


def test_the_next_turn_of_a_conversation_reuses_what_was_generated():
    driver = Driver(budget=64, num_pages=40)
    first = driver.add(prompt(6), max_tokens=11)
    for _ in range(11):
        driver.step()
    assert first.status is RequestStatus.FINISHED
    driver.add([*prompt(6), *first.output_token_ids, 1, 2], max_tokens=1)
    # The last token was sampled but never computed: 16 of the 17 tokens have KV.
    assert driver.schedule().rows[0].start_pos == 16
    driver.drain()


def test_salts_keep_tenants_apart():
    driver = Driver(budget=64, num_pages=40)
    for salt in ("a", "b", None, "a"):
        driver.add(prompt(18), max_tokens=1, cache_salt=salt)
        driver.step()
    assert [t.request.num_cached_tokens for t in driver.tracked.values()] == [0, 0, 0, 16]
    driver.drain()


def test_requests_of_one_batch_do_not_read_each_others_pages():
    driver = Driver(budget=64, num_pages=40)
    driver.add(prompt(9), max_tokens=1)
    driver.add(prompt(9), max_tokens=1)
    assert grants(driver) == {"r0": 9}, "the second waits for the page that the first computes now"
    assert grants(driver) == {"r1": 1}
    driver.drain()


def test_the_same_holds_behind_a_cached_prefix():
    driver = Driver(budget=64, num_pages=40)
    driver.add(prompt(9), max_tokens=1)
    driver.step()
    driver.add(prompt(25), max_tokens=1)
    driver.add(prompt(25), max_tokens=1)
    assert grants(driver) == {"r1": 17}
    assert grants(driver) == {"r2": 1}
    driver.drain()


def test_a_page_that_the_prompt_does_not_fill_is_not_waited_for():
    driver = Driver(budget=5, num_pages=40)
    first = driver.add(prompt(7), max_tokens=4)
    driver.step()
    driver.add(prompt(12), max_tokens=1)
    assert grants(driver) == {"r0": 2, "r1": 3}
    driver.drain()
    # The page is complete now, and known by all of its tokens.
    driver.add([*prompt(7), *first.output_token_ids], max_tokens=1)
    assert driver.schedule().rows[0].start_pos == 8
    driver.drain()


def test_a_shared_prompt_is_computed_once_however_many_arrive_together():
    driver = Driver(budget=16, num_pages=64, max_num_seqs=8)
    for i in range(8):
        driver.add([*prompt(60), 28, i], max_tokens=3)
    driver.drain()
    assert driver.scheduler.stats().num_prompt_tokens == 62 + 7 * 2


def test_who_waits_for_anothers_prefix_is_overtaken():
    driver = Driver(budget=16, num_pages=64)
    driver.add(prompt(60), max_tokens=1)
    driver.add([*prompt(59), 28], max_tokens=1)
    driver.add(prompt(3, first=9), max_tokens=1)
    assert set(grants(driver)) == {"r0", "r2"}
    driver.drain()
    assert driver.tracked["r1"].request.num_cached_tokens == 56


def test_hits_survive_the_eviction_that_their_own_admission_causes():
    driver = Driver(budget=64, num_pages=8)
    driver.add(prompt(13), max_tokens=1)
    driver.step()
    driver.add(prompt(8, first=20), max_tokens=1)
    driver.step()
    # 3 + 2 pages are cached. The next request hits the oldest ones and needs all the others.
    driver.add([*prompt(12), *prompt(15, first=10)], max_tokens=4)
    row = driver.schedule().rows[0]
    assert row.start_pos == 12
    assert len(set(row.new_page_ids)) == 7
    driver.drain()


def test_prompt_logprobs_bypass_the_cache_and_come_with_the_first_token():
    driver = Driver(budget=6, num_pages=40)
    driver.add(prompt(18), max_tokens=1)
    for _ in range(3):
        driver.step()
    params = SamplingParams(max_tokens=2, prompt_logprobs=0, ignore_eos=True)
    request = driver.add(prompt(18), params)
    assert grants(driver) == {"r1": 6}
    driver.drain()
    assert len(driver.tracked["r1"].prompt_logprobs) == 17
    assert request.num_cached_tokens == 0


# Aborts


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


# Failures


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


# Statistics and cost


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
    scheduler = Scheduler(config, num_pages=5000, page_size=64, max_model_len=10_000, enable_prefix_caching=True)
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

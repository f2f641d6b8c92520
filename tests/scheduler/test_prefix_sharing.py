"""Which pages the scheduler takes from the prefix cache, and which never."""

from __future__ import annotations

from driver import Driver, grants, prompt

from gossamer.core import RequestStatus, SamplingParams


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

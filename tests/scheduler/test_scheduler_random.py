"""Random adds, aborts, failures and commits against the oracle, for overlap x chunking x prefix cache x drafts."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest
from driver import Driver
from fakes import VOCAB_SIZE
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test

from gossamer.core import SamplingParams

modes = pytest.mark.parametrize(
    ("depth", "chunked", "cached", "drafts"), list(product((2, 1), (True, False), (True, False), (False, True)))
)


def add_random(driver: Driver, rng: Random, prefixes: list[list[int]]) -> None:
    prefix = rng.choice([*prefixes, []])
    tail = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(0, 12))]
    prompt = [*prefix[: rng.randint(0, len(prefix))], *tail] or [1]
    prompt = prompt[: driver.max_len - 1]
    max_tokens = min(rng.randint(1, 24), driver.max_len - len(prompt))
    extras = rng.choice(["", "", "", "logprobs", "prompt_logprobs", "salt"])
    params = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(rng.randint(0, 6), max_tokens),
        temperature=rng.choice([0.0, 1.0]),
        stop_token_ids=[rng.randrange(VOCAB_SIZE) for _ in range(rng.choice([0, 0, 1, 2]))],
        ignore_eos=rng.random() < 0.7,
        logprobs=0 if extras == "logprobs" else None,
        prompt_logprobs=0 if extras == "prompt_logprobs" else None,
    )
    driver.add(
        prompt,
        params,
        seed=rng.randint(0, 1),
        arrival_time=float(len(driver.tracked) - rng.choice([0, 0, 0, 3])),
        cache_salt="salt" if extras == "salt" else None,
    )


class SchedulerMachine(RuleBasedStateMachine):
    """Shrinks to a short story what the long random runs below would only find."""

    depth = 1
    chunked = True
    cached = True
    drafts = False

    @initialize(num_pages=st.integers(6, 20), max_num_seqs=st.integers(1, 6), budget=st.integers(6, 30))
    def start(self, num_pages: int, max_num_seqs: int, budget: int) -> None:
        self.driver = Driver(
            depth=self.depth,
            num_pages=num_pages,
            max_num_seqs=max_num_seqs,
            budget=budget,
            chunked=self.chunked,
            cached=self.cached,
            drafts=self.drafts,
        )

    @rule(seed=st.integers(0, 2**16), num=st.integers(1, 4))
    def add(self, seed: int, num: int) -> None:
        rng = Random(seed)
        for _ in range(num):
            add_random(self.driver, rng, [[3] * 14, list(range(14))])

    @rule(data=st.data())
    @precondition(lambda self: self.driver.unfinished)
    def abort(self, data: st.DataObject) -> None:
        unfinished = self.driver.unfinished
        self.driver.abort(unfinished[data.draw(st.integers(0, len(unfinished) - 1))].request)

    @rule(fail=st.booleans())
    @precondition(lambda self: len(self.driver.in_flight) < self.depth)
    def schedule(self, fail: bool) -> None:
        self.driver.schedule(fail=fail)

    @rule()
    @precondition(lambda self: self.driver.in_flight)
    def commit(self) -> None:
        self.driver.commit()

    @rule(steps=st.integers(1, 12))
    def run(self, steps: int) -> None:
        for _ in range(steps):
            self.driver.step()

    def teardown(self) -> None:
        if hasattr(self, "driver"):
            self.driver.drain()


@modes
def test_random_stories(depth: int, chunked: bool, cached: bool, drafts: bool) -> None:
    mode = {"depth": depth, "chunked": chunked, "cached": cached, "drafts": drafts}
    machine = type("Machine", (SchedulerMachine,), mode)
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25,
            stateful_step_count=25,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            derandomize=True,
            database=None,
        ),
    )


@modes
def test_long_random_runs(depth: int, chunked: bool, cached: bool, drafts: bool) -> None:
    """Crowded pools: many preemptions, shared prefixes and evictions in every run."""
    num_preemptions = num_hits = num_drafts = num_accepted = 0
    for seed in range(12):
        rng = Random(seed)
        driver = Driver(
            depth=depth,
            num_pages=rng.randint(8, 20),
            max_num_seqs=rng.randint(2, 8),
            budget=rng.randint(8, 40),
            chunked=chunked,
            cached=cached,
            max_len=rng.choice([None, 30]),
            drafts=drafts,
        )
        prefixes = [[rng.randrange(VOCAB_SIZE) for _ in range(14)] for _ in range(2)]
        for _ in range(120):
            action = rng.random()
            if action < 0.25:
                add_random(driver, rng, prefixes)
            elif action < 0.28 and driver.unfinished:
                driver.abort(rng.choice(driver.unfinished).request)
            elif action < 0.29 and len(driver.in_flight) < depth:
                driver.schedule(fail=True)
            elif action < 0.6 and len(driver.in_flight) < depth:
                driver.schedule()
            elif driver.in_flight:
                driver.commit()
        driver.drain()
        stats = driver.scheduler.stats()
        num_preemptions += stats.num_preemptions
        num_hits += stats.prefix_cache_hits
        num_drafts += stats.spec_decode_num_drafts
        num_accepted += stats.spec_decode_num_accepted_tokens
    assert num_preemptions > 50
    assert (num_hits > 100) == cached
    assert (num_drafts > 500) == (num_accepted > 0.5 * num_drafts > 0) == drafts

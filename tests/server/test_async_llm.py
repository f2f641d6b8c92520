from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time

import pytest
from server_process import FAKE_ENGINE, TESTS, write_byte_tokenizer

from gossamer.config import make_engine_config
from gossamer.core import (
    EngineDead,
    EngineOverloaded,
    InvalidRequest,
    RequestFailed,
    SamplingParams,
    StartupError,
)
from gossamer.server.async_llm import AsyncLLM


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(write_byte_tokenizer(tmp_path_factory.mktemp("models") / "tiny-model"))


@pytest.fixture(autouse=True)
def fake_engine_importable(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(TESTS))


def with_llm(model, scenario, **options):
    async def main():
        config = make_engine_config(model=model, **({"seed": 2} | options))
        async with AsyncLLM(config=config, factory=FAKE_ENGINE, log_level="critical") as llm:
            await scenario(llm)
            if llm.death is None:
                await idle(llm)
                assert not llm._streams
                assert llm._processor.num_unfinished == 0

    asyncio.run(main())


async def until(condition, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        await asyncio.sleep(0.01)


async def idle(llm):
    await until(lambda: not (llm.stats.num_running or llm.stats.num_waiting or llm.stats.num_pages_in_use), 1.0)


async def collect(llm, prompt, params=None, **options):
    return [output async for output in llm.generate(prompt, params, **options)]


def test_a_tokenizer_from_the_hub(model, tmp_path):
    repository = tmp_path / "models--org--tokenizer"
    write_byte_tokenizer(repository / "snapshots" / "1a2b")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("1a2b")
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_text("{}")

    async def scenario(llm):
        assert (await collect(llm, "HAL", SamplingParams(max_tokens=3)))[-1].outputs[0].text == "IBM"

    with_llm(str(bare), scenario, tokenizer="org/tokenizer", download_dir=str(tmp_path))


def test_modes_agree(model):
    async def scenario(llm):
        params = SamplingParams(max_tokens=7)
        cumulative = await collect(llm, "HAL", params)
        assert cumulative[-1].outputs[0].text == "IBMIBMI"
        assert cumulative[-1].finished
        assert not any(output.finished for output in cumulative[:-1])
        texts = [output.outputs[0].text for output in cumulative]
        assert all(b.startswith(a) for a, b in itertools.pairwise(texts))
        deltas = await collect(llm, "HAL", params, mode="delta")
        assert "".join(output.outputs[0].text for output in deltas) == "IBMIBMI"
        (final,) = await collect(llm, "HAL", params, mode="final")
        assert final.outputs[0].text == "IBMIBMI"
        assert final.outputs[0].finish_reason == "length"
        assert final.prompt == "HAL"
        assert final.prompt_token_ids == [72, 65, 76]

    with_llm(model, scenario)


@pytest.mark.parametrize("prompt", ["HAL", [72, 65, 76], {"prompt": "HAL"}, {"prompt_token_ids": [72, 65, 76]}])
def test_prompt_forms(model, prompt):
    async def scenario(llm):
        (final,) = await collect(llm, prompt, SamplingParams(max_tokens=3), mode="final")
        assert final.outputs[0].text == "IBM"

    with_llm(model, scenario)


def test_samples_and_requests_at_once(model):
    async def scenario(llm):
        params = SamplingParams(n=3, max_tokens=5)
        results = await asyncio.gather(*[collect(llm, text, params, mode="final") for text in ("HAL", "ab", "xyz")])
        for (final,), text in zip(results, ("IBMIB", "bcbcb", "yz{yz"), strict=True):
            assert [output.text for output in final.outputs] == [text] * 3
            assert [output.index for output in final.outputs] == [0, 1, 2]

    with_llm(model, scenario)


def test_leaving_the_loop_aborts(model):
    async def scenario(llm):
        async for output in llm.generate("HAL", SamplingParams(max_tokens=4000, n=2)):
            assert not output.finished
            break
        await idle(llm)

    with_llm(model, scenario)


def test_cancelling_the_reader_aborts(model):
    async def scenario(llm):
        task = asyncio.create_task(collect(llm, "HAL", SamplingParams(max_tokens=4000)))
        await until(lambda: llm.stats.num_running)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with_llm(model, scenario)


def test_abort_by_id_ends_the_reader(model):
    async def scenario(llm):
        reader = asyncio.create_task(collect(llm, "HAL", SamplingParams(max_tokens=4000), request_id="mine"))
        await until(lambda: llm.stats.num_running)
        llm.abort("mine")
        with pytest.raises(RequestFailed, match="was aborted"):
            await reader
        llm.abort("mine")
        llm.abort("unknown")

    with_llm(model, scenario)


def test_slow_reader_loses_nothing(model):
    async def scenario(llm):
        text, num_outputs = "", 0
        async for output in llm.generate("HAL", SamplingParams(max_tokens=300), mode="delta"):
            text += output.outputs[0].text
            num_outputs += 1
            await asyncio.sleep(0.1)
        assert text == "IBM" * 100
        assert num_outputs < 100

    with_llm(model, scenario)


def test_refusals_before_the_engine_is_asked(model):
    async def scenario(llm):
        for prompt, params in (
            ("", SamplingParams()),
            ([260], SamplingParams()),
            ([1.5], SamplingParams()),
            ({}, SamplingParams()),
            ({"prompt": "a", "prompt_token_ids": [1]}, SamplingParams()),
            ("a", SamplingParams(n=10**9)),
            ("a", SamplingParams(temperature=float("nan"))),
            ("a", SamplingParams(max_tokens=4096)),
        ):
            with pytest.raises(InvalidRequest):
                await collect(llm, prompt, params)
        first = llm.generate("a", SamplingParams(max_tokens=4000), "same")
        await anext(first)
        with pytest.raises(InvalidRequest, match="in use"):
            await collect(llm, "a", SamplingParams(), request_id="same")
        assert not (await anext(first)).finished
        await first.aclose()

    with_llm(model, scenario)


def test_refusals_of_the_engine(model):
    async def scenario(llm):
        with pytest.raises(EngineOverloaded) as busy:
            await collect(llm, [253])
        assert busy.value.retry_after == 7
        with pytest.raises(RequestFailed, match="internal error"):
            await collect(llm, [254])
        with pytest.raises(RequestFailed, match="failed on purpose"):
            await collect(llm, [251], SamplingParams(max_tokens=5, n=2))

    with_llm(model, scenario)


def test_open_requests_are_bounded(model):
    """Two run and four wait; one more is refused here, without asking the engine."""

    async def scenario(llm):
        def ask():
            return asyncio.create_task(collect(llm, "HAL", SamplingParams(max_tokens=4000)))

        running = [ask() for _ in range(2)]
        await until(lambda: llm.stats.num_running == 2)
        waiting = [ask() for _ in range(4)]
        await until(lambda: llm._processor.num_unfinished == 6)
        with pytest.raises(EngineOverloaded, match="6 sequences are open"):
            await collect(llm, "HAL", SamplingParams())
        for task in running + waiting:
            task.cancel()
        results = await asyncio.gather(*running, *waiting, return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)

    with_llm(model, scenario, max_num_seqs=2, max_num_queued=4)


def test_death_reaches_every_reader(model):
    async def scenario(llm):
        readers = [asyncio.create_task(collect(llm, "HAL", SamplingParams(max_tokens=4000))) for _ in range(3)]
        await until(lambda: llm.stats.num_running == 3)
        await llm.check_health()
        os.kill(llm._client.pid, signal.SIGKILL)
        started = time.monotonic()
        results = await asyncio.gather(*readers, return_exceptions=True)
        assert time.monotonic() - started < 1.0
        assert all(isinstance(result, EngineDead) for result in results)
        assert "SIGKILL" in str(results[0])
        assert not llm.is_ready
        with pytest.raises(EngineDead):
            await llm.check_health()
        with pytest.raises(EngineDead, match="SIGKILL"):
            await collect(llm, "HAL")
        await llm.dead.wait()

    with_llm(model, scenario)


def test_shutdown_ends_open_requests(model):
    async def scenario(llm):
        reader = asyncio.create_task(collect(llm, "HAL", SamplingParams(max_tokens=4000)))
        await until(lambda: llm.stats.num_running)
        await llm.shutdown()
        with pytest.raises(EngineDead, match="shut down"):
            await reader
        with pytest.raises(EngineDead):
            await collect(llm, "HAL")
        llm.stats.num_running = llm.stats.num_pages_in_use = 0

    with_llm(model, scenario)


def test_startup_failure(model):
    async def main():
        llm = AsyncLLM(
            config=make_engine_config(model=model), factory="fake_engine:build_failing", log_level="critical"
        )
        with pytest.raises(StartupError, match="model folder is empty"):
            await llm.start()
        with pytest.raises(StartupError, match="model folder is empty"):
            await collect(llm, "a")
        await llm.shutdown()

    asyncio.run(main())


def test_missing_model_starts_no_process():
    with pytest.raises(StartupError, match="no such file"):
        AsyncLLM("/no/such/model")
    with pytest.raises(StartupError, match="max_model_len"):
        AsyncLLM("/no/such/model", max_model_lem=5)

"""Drafted tokens change how many steps a request takes, and nothing else: under any schedule, with any sampling."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from fake_graphs import FakeGraphs
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models.tiny_checkpoints import SUCCESSOR, add_mtp_layer, save_checkpoint
from safetensors.torch import load_file, save_file
from test_paged_schedules import LENGTH, PAGE, PROMPTS, build, drain, fail_sometimes

from gossamer.config import LoadConfig, make_engine_config
from gossamer.core import AdmittedSequence, SamplingParams, ScheduledBatch, ScheduledRow, StartupError, TokenOutput
from gossamer.engine.build import build_engine
from gossamer.engine.engine import Engine
from gossamer.kv_cache.pool import KVPool
from gossamer.layers.linear import WeightFormat
from gossamer.models.decoder import ATTENTION_KINDS, Decoder
from gossamer.models.loader import inspect_model, iter_weights
from gossamer.runtime.cuda_runner import CudaRunner
from gossamer.runtime.model_runner import ModelRunner

VOCAB = 128
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
Drafts = dict[tuple[str, int], int]


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def save(folder: Path, name: str, noise: float | None) -> Path:
    add_mtp_layer(save_checkpoint(name, folder), noise)
    return folder


def watch(engine: Engine) -> Drafts:
    """Fills, as steps run, with the draft made after so many tokens of a request."""
    runner, drafts = engine._executor, Drafts()
    assert isinstance(runner, ModelRunner | CudaRunner)
    submit = runner._launch if isinstance(runner, CudaRunner) else runner.submit

    def watched(batch: ScheduledBatch):
        future = submit(batch)
        bonus = future.result().bonus_ids
        for i, (row, request) in enumerate(zip(batch.rows, batch.requests, strict=True)):
            if row.samples:
                count = row.output_index + 1 + (bonus[i] >= 0)
                drafts[request.request_id, count] = int(runner.draft_token[row.slot])
        return future

    if isinstance(runner, CudaRunner):
        runner._launch = watched
    else:
        runner.submit = engine._worker._submit = watched
    return drafts


@pytest.fixture(scope="module", params=[("deepseek_v3", 0.5), ("glm4_moe", 0.6)], ids=["deepseek_v3", "glm4_moe"])
def oracle(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[list[int] | None], Drafts, int]:
    """A model whose drafts are right at times, each request's tokens alone without them, its drafts, a page's bytes."""
    folder = save(tmp_path_factory.mktemp("mtp") / "model", *request.param)
    options = {"enable_prefix_caching": False, "overlap": False, "max_num_batched_tokens": 512}
    engine = build(folder, paged=False, **options)
    alone = [drain(engine, [i])[i] for i in range(len(PROMPTS))]
    engine.shutdown()
    engine = build(folder, paged=False, num_speculative_tokens=1, **options)
    drafts = watch(engine)
    assert [drain(engine, [i])[i] for i in range(len(PROMPTS))] == alone
    stats, pool = engine.stats(), engine._executor.pool
    engine.shutdown()
    assert 0.2 < stats.spec_decode_num_accepted_tokens / stats.spec_decode_num_drafts < 0.8
    return folder, alone, drafts, pool.num_bytes // pool.tensor.shape[2]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(len(PROMPTS))),
    prefix=st.booleans(),
    budget=st.integers(4, 96),
    seqs=st.integers(1, 5),
    spare_pages=st.integers(0, 20),
    aborts=st.dictionaries(st.integers(0, len(PROMPTS) - 1), st.integers(0, 30), max_size=3),
    graphs=st.sampled_from([None, (), (1, 2, 16), range(1, 200)]),
    paged=st.booleans(),
)
def test_tokens_and_drafts_do_not_depend_on_the_schedule(
    oracle: tuple[Path, list[list[int] | None], Drafts, int],
    order: list[int],
    prefix: bool,
    budget: int,
    seqs: int,
    spare_pages: int,
    aborts: dict[int, int],
    graphs: range | tuple[int, ...] | None,
    paged: bool,
) -> None:
    folder, alone, expected_drafts, page_bytes = oracle
    engine = build(
        folder,
        paged=paged,
        graphs=FakeGraphs(graphs) if paged and graphs is not None else None,
        num_speculative_tokens=1,
        enable_prefix_caching=prefix,
        max_num_batched_tokens=max(budget, 2 * seqs),
        max_num_seqs=seqs,
        kv_cache_memory_bytes=page_bytes * (-(-LENGTH // PAGE) + spare_pages),
    )
    drafts = watch(engine)
    tokens = drain(engine, order, aborts)
    # Once more: prompts and outputs are in the prefix cache now, with the draft layer's KV.
    again = drain(engine, order)
    engine.shutdown()
    for i, expected in enumerate(alone):
        assert tokens[i] == (expected[: len(tokens[i])] if i in aborts else expected)
        assert again[i] == expected
    both = drafts.keys() & expected_drafts.keys()
    assert len(both) > len(PROMPTS)
    assert {key: drafts[key] for key in both} == {key: expected_drafts[key] for key in both}


def run(
    folder: Path, params: SamplingParams, prompts: list[list[int]], *, num: int = 1, paged: bool, **options: object
) -> tuple[list[list[TokenOutput]], Engine]:
    engine = build(folder, paged=paged, num_speculative_tokens=num, **options)
    outputs: list[list[TokenOutput]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
        engine.add_request(str(i), prompt, params)
    while engine.has_work():
        for output in engine.step():
            outputs[int(output.request_id)].append(output)
    engine.shutdown()
    return outputs, engine


@pytest.fixture(scope="module", params=["deepseek_v3", "deepseek_v32", "glm4_moe"])
def certain(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose draft layer is always right."""
    return save(tmp_path_factory.mktemp("certain") / "model", request.param, 0.0)


@pytest.mark.parametrize("paged", [False, True])
def test_a_right_draft_makes_two_tokens_a_step(certain: Path, paged: bool) -> None:
    ((outputs,), engine) = run(certain, GREEDY, [[5, 6, 7]], paged=paged)
    tokens = [token for output in outputs for token in output.token_ids]
    assert tokens == [(7 + SUCCESSOR * (i + 1)) % VOCAB for i in range(24)]
    assert [len(output.token_ids) for output in outputs] == [1, *[2] * 11, 1]  # no draft goes with the last token
    stats = engine.stats()
    assert (stats.spec_decode_num_drafts, stats.spec_decode_num_accepted_tokens) == (11, 11)
    assert stats.num_generation_tokens == 24
    assert stats.num_steps == 13


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_nothing_follows_a_stop(certain: Path, paged: bool, at: int) -> None:
    """Whether the stop is the first or the second token of its step."""
    stop = (7 + SUCCESSOR * (at + 1)) % VOCAB
    for params in (
        SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=[stop], ignore_eos=True),
        SamplingParams(temperature=0.0, max_tokens=24, stop_token_ids=[stop], ignore_eos=True, min_tokens=at),
        SamplingParams(temperature=0.0, max_tokens=at + 1, ignore_eos=True),
    ):
        ((outputs,), _) = run(certain, params, [[5, 6, 7]], paged=paged)
        tokens = [token for output in outputs for token in output.token_ids]
        assert tokens == [(7 + SUCCESSOR * (i + 1)) % VOCAB for i in range(at + 1)]
        assert outputs[-1].finish_reason == ("stop" if params.stop_token_ids else "length")
        assert outputs[-1].stop_reason == (stop if params.stop_token_ids else None)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize(
    "extra",
    [{"logprobs": 1}, {"frequency_penalty": 0.5}, {"logit_bias": {3: 1.0}}, {"allowed_token_ids": list(range(64))}],
    ids=lambda extra: next(iter(extra)),
)
def test_what_depends_on_the_token_before_is_not_drafted_but_beside_drafts(
    certain: Path, paged: bool, extra: dict[str, object]
) -> None:
    """The host's path samples such steps; drafts of the other requests in them stay right."""
    engine = build(certain, paged=paged, num_speculative_tokens=1, graphs=FakeGraphs() if paged else None)
    engine.add_request("odd", [9, 8], SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, **extra))
    engine.add_request("even", [5, 6, 7], GREEDY)
    sizes: dict[str, list[int]] = {"odd": [], "even": []}
    while engine.has_work():
        for output in engine.step():
            sizes[output.request_id].append(len(output.token_ids))
            assert (output.logprobs is not None) == (output.request_id == "odd" and "logprobs" in extra)
    engine.shutdown()
    assert sizes == {"odd": [1] * 12, "even": [1, *[2] * 11, 1]}


@pytest.mark.parametrize("paged", [False, True])
def test_crowded_pages_cost_drafts_and_no_tokens(certain: Path, paged: bool) -> None:
    """Two sequences whose drafts begin pages when few are left: the later one is preempted, both end right."""
    prompts = [[5] * (PAGE - 1), [6] * (PAGE - 1)]
    params = SamplingParams(temperature=0.0, max_tokens=LENGTH - PAGE, ignore_eos=True)
    pool = run(certain, GREEDY, prompts[:1], paged=paged)[1]._executor.pool
    memory = pool.num_bytes // pool.tensor.shape[2] * (-(-LENGTH // PAGE) + 3)
    outputs, engine = run(
        certain, params, prompts, paged=paged, enable_prefix_caching=False, kv_cache_memory_bytes=memory
    )
    for prompt, part in zip(prompts, outputs, strict=True):
        tokens = [token for output in part for token in output.token_ids]
        assert tokens == [(prompt[-1] + SUCCESSOR * (i + 1)) % VOCAB for i in range(LENGTH - PAGE)]
    stats = engine.stats()
    assert stats.num_pages_in_use == 0
    assert stats.num_preemptions > 0


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("kv_cache_dtype", ["fp8", "bfloat16"])
def test_caches_of_other_types_take_drafts_too(certain: Path, paged: bool, kv_cache_dtype: str) -> None:
    dtype = "float32" if kv_cache_dtype == "fp8" else "bfloat16"
    ((outputs,), engine) = run(certain, GREEDY, [[5, 6, 7]], paged=paged, kv_cache_dtype=kv_cache_dtype, dtype=dtype)
    assert sum(len(output.token_ids) for output in outputs) == 24
    assert engine.stats().spec_decode_num_accepted_tokens == 11


def test_drafts_are_as_often_right_as_the_model_samples_them(certain: Path) -> None:
    """At temperature 1 the model's distribution decides, whatever was drafted: compared with the run without."""
    params = SamplingParams(temperature=6.0, seed=11, max_tokens=90, ignore_eos=True)
    prompts = [[5 + i, 6, 7] for i in range(4)]
    drafted, engine = run(certain, params, prompts, paged=False)
    plain, _ = run(certain, params, prompts, num=0, paged=False)
    merged = [[[t for o in part for t in o.token_ids] for part in outputs] for outputs in (drafted, plain)]
    assert merged[0] == merged[1]
    stats = engine.stats()
    expected = sum(b == (a + SUCCESSOR) % VOCAB for tokens in merged[1] for a, b in pairwise(tokens))
    assert 0 < stats.spec_decode_num_accepted_tokens <= expected < stats.num_generation_tokens


@pytest.mark.parametrize("paged", [False, True])
def test_a_damaged_draft_layer_costs_speed_alone(paged: bool, tmp_path: Path) -> None:
    folder = save(tmp_path / "model", "deepseek_v3", 0.0)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.3.eh_proj.weight"].fill_(float("nan"))
    save_file(tensors, path, metadata={"format": "pt"})
    ((outputs,), engine) = run(folder, GREEDY, [[5, 6, 7]], paged=paged)
    tokens = [token for output in outputs for token in output.token_ids]
    assert tokens == [(7 + SUCCESSOR * (i + 1)) % VOCAB for i in range(24)]
    assert engine.stats().spec_decode_num_accepted_tokens <= 1


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("distance", [3, 4])
def test_logits_that_are_no_numbers_end_their_request_alone(paged: bool, distance: int, tmp_path: Path) -> None:
    """Whether the token from which nothing follows is the first or the second of its step: a draft, whose NaN keys the
    masks of the CPU's own route do not keep from the row before."""
    folder = save(tmp_path / "model", "deepseek_v3", 0.0)
    path, poison = folder / "model.safetensors", (7 + SUCCESSOR * distance) % VOCAB
    tensors = load_file(path)
    tensors["model.embed_tokens.weight"][poison] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    prompts = [[5, 6, 7], [5, 6, (poison + 1) % VOCAB]]
    (bad, good), _ = run(folder, GREEDY, prompts, paged=paged, max_num_batched_tokens=8, max_num_seqs=3)
    found = [token for output in bad for token in output.token_ids]
    count = distance - (distance == 4 and not paged)
    assert found == [(7 + SUCCESSOR * (i + 1)) % VOCAB for i in range(count)]
    assert bad[-1].finish_reason == "error"
    assert [t for o in good for t in o.token_ids] == [(prompts[1][2] + SUCCESSOR * (i + 1)) % VOCAB for i in range(24)]


@pytest.mark.parametrize("name", ["_mixed", "_decode", "_draft", "finish"])
@pytest.mark.parametrize("after", [False, True])
def test_a_failed_step_costs_others_nothing(
    oracle: tuple[Path, list[list[int] | None], Drafts, int],
    name: str,
    after: bool,
    caplog: pytest.LogCaptureFixture,
) -> None:
    folder, alone, _, page_bytes = oracle
    options = {"max_num_batched_tokens": 24, "max_num_seqs": 4, "kv_cache_memory_bytes": page_bytes * 22}
    engine = build(folder, paged=True, graphs=FakeGraphs(), num_speculative_tokens=1, **options)
    steps, order = {2, 5}, [0, 1, 3, 4]  # none that is sampled on the host: steps that only decode are whole
    fail_sometimes(engine._executor, name, steps, after)
    with caplog.at_level(logging.CRITICAL):
        tokens = drain(engine, order)
    steps.clear()
    again = drain(engine, order)
    engine.shutdown()
    assert None in tokens.values()
    assert all(tokens[i] in (None, alone[i]) for i in order)
    assert again == {i: alone[i] for i in order}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_speculative_tokens": 2}, "--num-speculative-tokens must be 0 or 1.*got 2"),
        ({"num_speculative_tokens": -1}, "--num-speculative-tokens must be at least 0"),
        ({"num_speculative_tokens": 1, "max_num_seqs": 16, "max_num_batched_tokens": 20}, "Raise.* to 32"),
    ],
)
def test_values_that_cannot_be(certain: Path, options: dict[str, int], said: str) -> None:
    with pytest.raises(StartupError, match=said):
        build_engine(make_engine_config(model=str(certain), **options))


def test_a_model_without_the_layer_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint("deepseek_v2", tmp_path / "model")
    for load_format in ("auto", "dummy"):
        with pytest.raises(StartupError, match="no multi-token-prediction layer"):
            build_engine(make_engine_config(model=str(folder), num_speculative_tokens=1, load_format=load_format))


def test_the_loop_does_not_overlap(certain: Path) -> None:
    engine = build(certain, paged=False, num_speculative_tokens=1, overlap=True)
    assert not engine.config.scheduler.overlap
    engine.shutdown()


@pytest.mark.gpu
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_on_a_device(
    oracle: tuple[Path, list[list[int] | None], Drafts, int], certain: Path, enforce_eager: bool
) -> None:
    """Whole steps with verification and draft layer as one graph."""
    folder, alone, expected_drafts, _ = oracle
    options = {"max_model_len": LENGTH, "page_size": 16, "dtype": "float32", "kv_cache_memory_bytes": 4 << 20}
    options |= {"device": "cuda", "enforce_eager": enforce_eager, "num_speculative_tokens": 1, "max_num_seqs": 5}
    engine, _ = build_engine(make_engine_config(model=str(folder), max_num_batched_tokens=48, **options))
    for _ in range(2):
        tokens = drain(engine, list(range(len(PROMPTS))))
        assert [tokens[i] for i in range(len(PROMPTS))] == alone
    engine.shutdown()
    engine, _ = build_engine(make_engine_config(model=str(folder), max_num_batched_tokens=48, **options))
    drafts = watch(engine)
    drain(engine, list(range(len(PROMPTS))))
    both = drafts.keys() & expected_drafts.keys()
    assert {key: drafts[key] for key in both} == {key: expected_drafts[key] for key in both}
    engine.shutdown()
    engine, _ = build_engine(make_engine_config(model=str(certain), **options))
    engine.add_request("0", [5, 6, 7], GREEDY)
    sizes = []
    while engine.has_work():
        sizes += [len(output.token_ids) for output in engine.step()]
    engine.shutdown()
    assert sizes == [1, *[2] * 11, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v32", "glm_moe_dsa_shared", "glm4_moe"])
def test_the_kernels_take_two_rows_of_a_slot(name: str, tmp_path: Path) -> None:
    """All of a step's kernels, interpreted: drafts beside padding in a decode step, and in a page of FP8 with their
    slot's first token."""
    if torch.cuda.is_available():
        pytest.skip("test_on_a_device does this, compiled")
    load = LoadConfig(model=str(save(tmp_path / "model", name, 0.0)), num_speculative_tokens=1)
    source = inspect_model(load)
    kind, cpu, found = ATTENTION_KINDS[source.config.attention], torch.device("cpu"), []
    for backend in ("reference", "triton"):
        fmt = WeightFormat(torch.float32, cpu, kernels=backend == "triton")
        decoder = Decoder(source.config, fmt, 64, backend, True)
        decoder.load(iter_weights(source, load))
        sizes = {"max_num_seqs": 4, "max_num_batched_tokens": 32, "max_model_len": 64, "page_size": 16}
        runner = CudaRunner(decoder, make_engine_config(**sizes))
        runner.attach(KVPool(source.config.num_kv_layers, kind.kv_layout(source.config, "fp8"), 12, 16, cpu))
        prompts, params = [list(range(3, 16)), [9, 8, 7]], SamplingParams(temperature=0.0)
        admitted = [AdmittedSequence(i + 1, str(i), prompts[i], [], params, 0, frozenset()) for i in range(2)]
        chunks = [ScheduledRow(1, 0, 13, prompts[0], [3, 5], True), ScheduledRow(2, 0, 2, prompts[1][:2], [7], False)]
        last = ScheduledRow(2, 2, 1, prompts[1][2:], [], True)
        steps = [
            ScheduledBatch(0, admitted, chunks),
            ScheduledBatch(1, [], [ScheduledRow(1, 13, 2, [], [], True, 1), last]),
            ScheduledBatch(2, [], [ScheduledRow(2, 3, 1, [], [], True, 1), ScheduledRow(1, 15, 2, [], [], True, 3)]),
        ]
        results = [runner.submit(step).result() for step in steps]
        found.append([(result.token_ids, result.bonus_ids, runner.draft_token.tolist()) for result in results])
    assert found[0] == found[1]
    assert [bonus for _, bonus, _ in found[0]] == [
        [-1, -1],
        [(15 + 3 * SUCCESSOR) % VOCAB, -1],
        [-1, (15 + 5 * SUCCESSOR) % VOCAB],
    ]

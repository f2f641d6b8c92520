"""Sparse attention through the engine, in both executors: schedule, prefix cache and preemption change nothing."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models.tiny_checkpoints import save_checkpoint

from gossamer.config import make_engine_config
from gossamer.core import SamplingParams, StartupError
from gossamer.engine.build import build_engine

PAGE = 16
PROMPTS = [[(7 * i + 13 * j) % 120 + 3 for i in range(n)] for j, n in enumerate((120, 190, 33, 150))]
PROMPTS += [[*PROMPTS[1][:130], 5, 6, 7], [*PROMPTS[1], 9]]  # shared prefixes
SPARSE = {"attention": "block_topk", "sparse_budget": 6 * PAGE, "sparse_window": 2 * PAGE, "sparse_from": 0}
EXECUTORS = [(False, "cpu"), (True, "cpu"), pytest.param((True, "cuda"), marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The second one has windows in some layers, which keep them."""
    return save_checkpoint(request.param, tmp_path_factory.mktemp("model") / request.param)


def run(
    folder: Path, executor: tuple[bool, str] = (False, "cpu"), num_new: int = 20, **options: object
) -> list[list[int]]:
    paged, device = executor
    options = {"max_model_len": 256, "page_size": PAGE, "dtype": "float32", "num_threads": 1} | options
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 4, "device": device} | options
    engine, _ = build_engine(make_engine_config(model=str(folder), **options), paged=paged)
    found: list[list[int]] = [[] for _ in PROMPTS]
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, SamplingParams(temperature=0.0, max_tokens=num_new, ignore_eos=True))
    preempted = 0
    while engine.has_work():
        for output in engine.step():
            found[int(output.request_id)] += output.token_ids
    stats = engine.stats()
    preempted = stats.num_preemptions
    engine.shutdown()
    assert stats.num_pages_in_use == 0
    run.preemptions = preempted  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    "sparse", [{}, {"sparse_score": "bounds"}, {"sparse_from": 100}, {"kv_cache_dtype": "fp8"}], ids=str
)
def test_the_schedule_leaves_tokens_alone(folder: Path, executor: tuple[bool, str], sparse: dict[str, object]) -> None:
    options = SPARSE | sparse
    expected = run(folder, enable_prefix_caching=False, max_num_batched_tokens=512, max_num_seqs=1, **options)
    if "kv_cache_dtype" in sparse and executor[1] == "cuda":
        # A page's scale grows with its tokens, and a last bit decides how a number rounds: not across devices.
        assert run(folder, executor, **options) == run(folder, executor, enforce_eager=True, **options)
        return
    if executor != (False, "cpu"):
        assert run(folder, executor, **options) == expected
    if "kv_cache_dtype" in sparse:  # chunks see it at other sizes
        return
    assert run(folder, executor, max_num_batched_tokens=24, **options) == expected
    tight = {"kv_cache_memory_bytes": 20 * page_bytes(folder, options)}
    assert run(folder, executor, **options, **tight) == expected
    assert run.preemptions > 0  # type: ignore[attr-defined]


def page_bytes(folder: Path, options: dict[str, object]) -> int:
    config = make_engine_config(
        model=str(folder), page_size=PAGE, dtype="float32", num_threads=1, device="cpu", **options
    )
    engine, info = build_engine(config)
    engine.shutdown()
    return info.config.cache.kv_cache_memory_bytes // info.num_pages


def test_a_budget_of_everything_is_dense_and_a_small_one_is_not(folder: Path) -> None:
    dense = run(folder)
    for options in ({"sparse_budget": 256}, {"sparse_from": 256}):
        assert run(folder, **{**SPARSE, **options}) == dense
    assert run(folder, **SPARSE) != dense


def test_what_lies_beside_pages_is_counted(folder: Path) -> None:
    dense, mean, bounds = (page_bytes(folder, o) for o in ({}, SPARSE, SPARSE | {"sparse_score": "bounds"}))
    assert mean - dense == bounds - mean
    assert dense == (mean - dense) * 2 * PAGE  # one key of the page's keys and values


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparse_budget": 100}, "--sparse-budget 100 is no multiple of --page-size 16; 96"),
        ({"sparse_window": 24}, "--sparse-window 24"),
        ({"sparse_budget": 32}, "--sparse-budget 64 or more"),
    ],
)
def test_budgets_that_cannot_be(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        run(folder, **{**SPARSE, **options})


def test_a_model_of_windows_alone_has_nothing_to_make_sparse(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="has a window already"):
        run(save_checkpoint("mistral", tmp_path / "mistral"), **SPARSE)

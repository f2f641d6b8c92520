"""Greedy tokens of a real (tiny) model do not depend on the schedule: chunks, batches, cache, preemption, overlap."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from models.tiny_checkpoints import save_checkpoint

from gossamer.config import make_engine_config
from gossamer.core import SamplingParams
from gossamer.engine.build import build_engine

PROMPTS = [[(7 * i + 13 * j) % 120 + 3 for i in range(n)] for j, n in enumerate((1, 5, 17, 40, 64, 33))]
PROMPTS += [[*PROMPTS[3], 9, 8], [*PROMPTS[3][:32], 50, 51, 52]]  # shared prefixes
OUTPUT = 24


def run(folder: Path, order: list[int], **options: object) -> dict[int, list[int]]:
    """Tokens by prompt, all requests added at once in `order`."""
    options = {"max_model_len": 128, "page_size": 8, "dtype": "float32", "num_threads": 1} | options
    engine, _ = build_engine(make_engine_config(model=str(folder), **options))
    tokens: dict[int, list[int]] = {i: [] for i in order}
    for i in order:
        engine.add_request(str(i), PROMPTS[i], SamplingParams(temperature=0.0, max_tokens=OUTPUT, ignore_eos=True))
    while engine.has_work():
        for output in engine.step():
            tokens[int(output.request_id)] += output.token_ids
    stats = engine.stats()
    engine.shutdown()
    assert stats.num_pages_in_use == 0
    return tokens


@pytest.fixture(
    scope="module", params=["llama", "qwen3_moe", "deepseek_v3", "deepseek_v32", "glm_moe_dsa_shared", "minimax_m3"]
)
def oracle(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, list, int]]:
    before = torch.get_num_threads()
    folder = save_checkpoint(request.param, tmp_path_factory.mktemp("model") / request.param)
    alone = [
        run(folder, [i], enable_prefix_caching=False, overlap=False, max_num_batched_tokens=512)[i]
        for i in range(len(PROMPTS))
    ]
    engine, info = build_engine(make_engine_config(model=str(folder), page_size=8, dtype="float32", num_threads=1))
    engine.shutdown()
    yield folder, alone, info.config.cache.kv_cache_memory_bytes // info.num_pages
    torch.set_num_threads(before)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    order=st.permutations(range(len(PROMPTS))),
    overlap=st.booleans(),
    prefix=st.booleans(),
    budget=st.integers(4, 96),
    seqs=st.integers(1, 4),
    spare_pages=st.integers(0, 24),
)
def test_tokens_do_not_depend_on_the_schedule(
    oracle: tuple[Path, list, int],
    order: list[int],
    overlap: bool,
    prefix: bool,
    budget: int,
    seqs: int,
    spare_pages: int,
) -> None:
    folder, alone, page_bytes = oracle
    tokens = run(
        folder,
        order,
        overlap=overlap,
        enable_prefix_caching=prefix,
        max_num_batched_tokens=max(budget, seqs),
        max_num_seqs=seqs,
        kv_cache_memory_bytes=page_bytes * (16 + spare_pages),
    )
    assert [tokens[i] for i in range(len(PROMPTS))] == alone

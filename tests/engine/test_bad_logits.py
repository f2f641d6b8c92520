"""A request whose logits are NaN ends with an error; the others of its batch, and later ones, get their tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from invariants import check_drained
from models.tiny_checkpoints import make_model

from gossamer.config import make_engine_config
from gossamer.core import SamplingParams, TokenOutput
from gossamer.engine.build import build_engine

POISON = 127
"""The token whose embedding is NaN in the checkpoints of these tests."""
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logit_bias={POISON: -100.0})
SEEDED = SamplingParams(seed=7, max_tokens=12, ignore_eos=True, presence_penalty=0.5, logit_bias={POISON: -100.0})
PLAIN = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SCORED = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=2, frequency_penalty=0.5)
GOOD = [([3, 4, 5], GREEDY), ([9] * 21, SEEDED), (list(range(50, 10, -1)), GREEDY)]
BAD = [([3, 4, POISON], PLAIN), ([*range(50, 18, -1), POISON, 8], SCORED)]


@pytest.fixture(scope="module", params=["llama", "qwen3_moe"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    threads = torch.get_num_threads()
    model = make_model(request.param)
    with torch.no_grad():
        model.get_input_embeddings().weight[POISON] = float("nan")
    path = tmp_path_factory.mktemp("poisoned")
    model.save_pretrained(path)
    yield path
    torch.set_num_threads(threads)


def run(
    folder: Path,
    requests: list[tuple[list[int], SamplingParams]],
    overlap: bool = True,
    device: str = "cpu",
    paged: bool = False,
) -> list[TokenOutput]:
    """One output a request, with all of its tokens; then the good requests once more, over the pages just freed."""
    options = {"device": device, "page_size": 16 if device == "cuda" else 8, "overlap": overlap}
    engine, _ = build_engine(
        make_engine_config(
            model=str(folder), dtype="float32", max_model_len=64, num_threads=1,
            kv_cache_memory_bytes=1 << 20, **options,
        ),
        paged=paged,
    )  # fmt: skip
    results: list[TokenOutput] = []
    for batch in (requests, GOOD):
        found = [TokenOutput(str(i), []) for i in range(len(batch))]
        for i, (prompt, params) in enumerate(batch):
            engine.add_request(str(i), prompt, params)
        while engine.has_work():
            for output in engine.step():
                result = found[int(output.request_id)]
                result.token_ids += output.token_ids
                result.finish_reason, result.error = output.finish_reason, output.error
        check_drained(engine.scheduler)
        results += found
    engine.shutdown()
    return results


@pytest.mark.parametrize(
    ("device", "paged"), [("cpu", False), ("cpu", True), pytest.param("cuda", True, marks=pytest.mark.gpu)]
)
@pytest.mark.parametrize("overlap", [True, False])
def test_only_the_request_with_nan_logits_fails(folder: Path, overlap: bool, device: str, paged: bool) -> None:
    clean = [output.token_ids for output in run(folder, GOOD, overlap)[: len(GOOD)]]
    assert all(len(tokens) == 12 for tokens in clean)
    # The last good request begins like the last bad one: before it in the batch, and after its pages are distrusted.
    mixed = run(folder, [GOOD[0], BAD[0], GOOD[1], GOOD[2], BAD[1]], overlap, device, paged)
    for output in (mixed[1], mixed[4]):
        assert (output.finish_reason, output.token_ids) == ("error", [])
        assert "NaN or infinite" in (output.error or "")
    survivors = [mixed[0], *mixed[2:4], *mixed[5:]]
    assert {output.finish_reason for output in survivors} == {"length"}
    assert [output.token_ids for output in survivors] == clean * 2


def test_a_token_whose_successor_is_nan_ends_the_request_after_it(folder: Path) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, allowed_token_ids=[POISON])
    assert next((o.finish_reason, o.token_ids) for o in run(folder, [([3, 4], params)])) == ("error", [POISON])

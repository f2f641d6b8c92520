"""The GPU's executor gives the CPU engine's tokens: every family, mixed steps, graphs or not. On a CPU it runs too,
on the ops' references and without graphs, so that all but the kernels is proved anywhere."""

from __future__ import annotations

import gc
from itertools import chain
from pathlib import Path

import pytest
import torch
from models.tiny_checkpoints import CHECKPOINTS, page_options, save_checkpoint

from gossamer.config import make_engine_config
from gossamer.core import SamplingParams, TokenOutput
from gossamer.engine.build import build_engine
from gossamer.models import decoder
from gossamer.models.decoder import Decoder
from gossamer.ops.dispatch import device_users

PROMPTS = [[(7 * i + 13 * j) % 120 + 3 for i in range(n)] for j, n in enumerate((1, 5, 17, 40, 64, 33, 90))]
PROMPTS += [[*PROMPTS[4], 9, 8]]  # a full page in common
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(folder: Path, params: SamplingParams, *, paged: bool, **options: object) -> list[list[TokenOutput]]:
    options = {"max_model_len": 192, "dtype": "float32", "num_threads": 1, "max_num_seqs": 5} | options
    config = make_engine_config(model=str(folder), max_num_batched_tokens=48, kv_cache_memory_bytes=4 << 20, **options)
    engine, _ = build_engine(config, paged=paged)
    outputs: list[list[TokenOutput]] = [[] for _ in PROMPTS]
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, params)
    while engine.has_work():
        for output in engine.step():
            outputs[int(output.request_id)].append(output)
    assert engine.stats().num_pages_in_use == 0
    engine.shutdown()
    return outputs


def tokens(outputs: list[list[TokenOutput]]) -> list[list[int]]:
    return [[token for output in part for token in output.token_ids] for part in outputs]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_greedy_tokens_of_every_family(name: str, device: str, tmp_path: Path) -> None:
    folder = save_checkpoint(name, tmp_path / name)
    params = SamplingParams(temperature=0.0, max_tokens=16, ignore_eos=True)
    page = page_options(name)
    expected = tokens(run(folder, params, paged=False, device="cpu", **page))
    assert tokens(run(folder, params, paged=True, device=device, **page)) == expected
    if device == "cuda":
        assert tokens(run(folder, params, paged=True, device=device, enforce_eager=True, **page)) == expected
        assert tokens(run(folder, params, paged=True, device=device, ops_backend="reference", **page)) == expected


@pytest.mark.parametrize("device", DEVICES)
def test_sampling_logprobs_and_penalties(device: str, tmp_path: Path) -> None:
    folder = save_checkpoint("qwen3_moe", tmp_path / "model")
    for params in (
        SamplingParams(temperature=0.9, seed=5, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=20, min_p=0.01, seed=3, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0.0, frequency_penalty=0.7, logit_bias={5: 3.0}, max_tokens=12, ignore_eos=True),
        SamplingParams(temperature=0.0, logprobs=3, prompt_logprobs=2, max_tokens=4, ignore_eos=True),
    ):
        expected = run(folder, params, paged=False, device="cpu")
        found = run(folder, params, paged=True, device=device)
        assert tokens(found) == tokens(expected)
        for one, other in zip(chain(*found), chain(*expected), strict=True):
            for kind in ("logprobs", "prompt_logprobs"):
                for a, b in zip(getattr(one, kind) or [], getattr(other, kind) or [], strict=True):
                    assert a.token_ids == b.token_ids
                    assert a.logprobs == pytest.approx(b.logprobs, abs=1e-3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("prefix", [False, True])
def test_the_schedule_leaves_tokens_alone(device: str, overlap: bool, prefix: bool, tmp_path: Path) -> None:
    folder = save_checkpoint("qwen3_moe", tmp_path / "model")
    params = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    expected = tokens(run(folder, params, paged=False, device="cpu"))
    # 24 KiB a page of 64 tokens: seven pages for five sequences of up to three, so some are preempted
    options = {"overlap": overlap, "enable_prefix_caching": prefix}
    assert tokens(run(folder, params, paged=True, device=device, **options)) == expected


def test_rows_that_do_not_sample_end_at_the_last_attention(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Unless a prompt's log-probabilities are wanted, which their hidden states give."""
    folder, whole, sizes = save_checkpoint("qwen3_moe", tmp_path / "model"), Decoder.forward_paged, []

    def forward_paged(self: Decoder, input_ids: torch.Tensor, *args) -> torch.Tensor:
        hidden = whole(self, input_ids, *args)
        sizes.append((len(input_ids), len(hidden)))
        return hidden

    monkeypatch.setattr(Decoder, "forward_paged", forward_paged)
    for wanted in (None, 0):
        sizes.clear()
        run(folder, SamplingParams(max_tokens=2, ignore_eos=True, prompt_logprobs=wanted), paged=True, device="cpu")
        largest = max(hidden for num, hidden in sizes[1:] if num == 48)  # the first warms up, with all rows
        assert largest == 48 if wanted is not None else largest <= 5


def test_an_engine_uses_its_device_until_it_is_gone(tmp_path: Path) -> None:
    gc.collect()
    before, folder = len(device_users), save_checkpoint("qwen3_moe", tmp_path)
    config = make_engine_config(model=str(folder), max_model_len=64, kv_cache_memory_bytes=4 << 20, num_threads=1)
    engine, info = build_engine(config, paged=True)
    assert len(device_users) == before + 1
    engine.shutdown()
    del engine, info
    gc.collect()
    assert len(device_users) == before


@pytest.mark.parametrize("num", [3, 64, 70])
def test_scales_of_kept_rows_lie_as_those_of_any(num: int) -> None:
    """What many rows' products expect side by side stays so."""
    x = torch.randn(96, 256, dtype=torch.bfloat16)
    q, scales = decoder._empty_fp8(x, (96, 2, 128))
    scales.copy_(torch.randn(96, 2))
    q.copy_(torch.randn(96, 2, 128))
    rows = torch.randperm(96)[:num].int()
    kept_q, kept = decoder._rows((q, scales), rows)
    assert kept_q.float().equal(q.float()[rows])
    assert kept.equal(scales[rows])
    assert kept.stride() == decoder._empty_fp8(x, (num, 2, 128))[1].stride()

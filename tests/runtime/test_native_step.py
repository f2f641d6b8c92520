"""Native decode steps beside torch's: nearer to a float32 model, and the same whatever shares the batch."""

from __future__ import annotations

import dataclasses
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models.tiny_checkpoints import make_model

from gossamer.config import ModelConfig, RopeConfig, make_engine_config
from gossamer.core import SamplingParams, ScheduledRow
from gossamer.engine.build import build_engine
from gossamer.kv_cache.pool import KVPool
from gossamer.layers.attention import gqa
from gossamer.layers.attention.base import AttentionBatch
from gossamer.layers.linear import WeightFormat
from gossamer.models.decoder import Decoder
from gossamer.models.dummy import draw
from gossamer.models.shapes import expected_shapes
from gossamer.ops.gemm.packed import packing_supported
from gossamer.ops.native import ROW_COUNTS, jit
from gossamer.runtime import native_step

CPU = torch.device("cpu")
reason = jit.obstacle() or (None if packing_supported(torch.bfloat16, CPU) else "oneDNN does not multiply bf16")
pytestmark = pytest.mark.skipif(reason is not None, reason=f"no native code here: {reason}")

BASE = ModelConfig("llama", 320, 192, 128, 3, 6, 2, 32, 1024, rms_norm_eps=1e-5)
CONFIGS = {
    "llama": BASE,
    "biased": dataclasses.replace(BASE, qkv_bias=True, o_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "qwen3": dataclasses.replace(BASE, qk_norm="head", head_dim=128, num_q_heads=4, num_kv_heads=1),
    "windows": dataclasses.replace(BASE, sliding_windows=(None, 70, 5), rope=RopeConfig(theta=500.0)),
    "many_queries": dataclasses.replace(BASE, num_q_heads=14, num_kv_heads=1, head_dim=64),
}
FORMATS = ("none", "int4")
PAGE_SIZE, PAGES = 32, 8
LENGTHS = [1, 31, 32, 33, 64, 5, 190, 128, 100, 70, 71, 2, 96, 150, 17, 223]
"""Tokens before a row's new one: some of these begin a page."""


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def weights(config: ModelConfig, quantization: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Under int4 numbers that its groups, and the head's rows of 8 bits, hold without loss, and bf16 too."""
    for name, shape in expected_shapes(config).items():
        weight = draw(torch.empty(shape), name, 0)
        if name.endswith("norm.weight"):
            weight += 0.2 * draw(torch.empty(shape), name + "x", 1) / 0.02
        elif quantization == "int4" and weight.ndim == 2:
            if name in ("embed.weight", "lm_head.weight"):
                weight = (40 * weight / weight.std()).round().clamp(-127, 127)
                weight[:, 0] = 127.0
                weight /= 1024
            else:
                weight = (3 * weight / weight.std()).round().clamp(-8, 7)
                weight[:, ::32], weight[:, 1::32] = -8.0, 7.0
                weight /= 64
        yield name, weight.bfloat16().float()


class Models:
    """One model in float32, and in bf16 by torch and as native steps, whose caches hold the same past."""

    def __init__(self, name: str, quantization: str) -> None:
        config = CONFIGS[name]
        stream = list(weights(config, quantization))
        with torch.inference_mode():
            self.exact = Decoder(config, WeightFormat(torch.float32, CPU), 512)
            self.exact.load(iter(stream))
            self.decoder = Decoder(config, WeightFormat(torch.bfloat16, CPU, quantization, keep_dense=True), 512)
            self.decoder.load(iter(stream))
        layouts = (gqa.kv_layout(config, dtype) for dtype in ("float32", "bfloat16"))
        size = len(LENGTHS) * PAGES, PAGE_SIZE
        self.wide, self.pool = (KVPool(config.num_layers, layout, *size, CPU, heads_first=True) for layout in layouts)
        assert native_step.obstacle(self.decoder, self.pool) is None
        self.native = native_step.NativeStep(self.decoder, self.pool, lambda *_: None)
        order = torch.randperm(size[0], generator=torch.Generator().manual_seed(1)).tolist()
        self.tables = [array("i", order[i * PAGES : (i + 1) * PAGES]) for i in range(len(LENGTHS))]
        self.last = torch.arange(len(LENGTHS)) * 19 % config.vocab_size
        self.pool.tensor.fill_(torch.nan)  # what a former owner left
        ids = torch.randint(0, config.vocab_size, (sum(LENGTHS),), generator=torch.Generator().manual_seed(2))
        positions = torch.tensor([p for n in LENGTHS for p in range(n)])
        with torch.inference_mode():
            batch = AttentionBatch(0, [0] * len(LENGTHS), LENGTHS, self.tables, PAGE_SIZE)
            self.decoder.forward(ids, positions, batch, self.pool)
        self.past = self.pool.tensor.clone()

    @torch.inference_mode()
    def step(self, rows: list[int]) -> torch.Tensor:
        """Native logits; the cache is then as it was."""
        scheduled = [ScheduledRow(i, LENGTHS[i], 1, [], [], True) for i in rows]
        logits = self.native.logits(scheduled, self.last, self.tables).clone()
        self.written = self.pool.tensor.clone()
        self.pool.tensor.copy_(self.past)
        return logits

    @torch.inference_mode()
    def by_torch(self, decoder: Decoder, pool: KVPool) -> torch.Tensor:
        pool.tensor.copy_(self.past)
        n = len(LENGTHS)
        batch = AttentionBatch(n, LENGTHS, [1] * n, self.tables, PAGE_SIZE)
        hidden = decoder.forward(self.last, torch.tensor(LENGTHS), batch, pool)
        logits, self.written_by_torch = decoder.logits(hidden).clone(), pool.tensor.clone()
        self.pool.tensor.copy_(self.past)
        return logits


def rms(x: torch.Tensor) -> float:
    return x.double().square().mean().sqrt().item()


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("name", CONFIGS)
def test_nearer_to_float32_than_torch(name: str, quantization: str) -> None:
    torch.set_num_threads(2)
    models = Models(name, quantization)
    exact = models.by_torch(models.exact, models.wide)
    peer = models.by_torch(models.decoder, models.pool)
    ours = models.step(list(range(len(LENGTHS))))
    assert exact.isfinite().all()
    assert rms(peer - exact) < 3e-2 * rms(exact)
    assert rms(ours - exact) <= 0.85 * rms(peer - exact)
    both = [x[~x.isnan()].float() for x in (models.written, models.written_by_torch)]
    assert both[0].shape == both[1].shape  # the same pages are zeroed, the same tokens written
    assert rms(both[0] - both[1]) < 1e-2 * rms(both[1])


@pytest.mark.parametrize("quantization", FORMATS)
def test_a_row_is_the_same_whatever_shares_the_batch(quantization: str) -> None:
    torch.set_num_threads(2)
    models = Models("llama", quantization)
    rows = list(range(len(LENGTHS)))
    alone = torch.cat([models.step([row]) for row in rows])
    for count in (2, 3, 5, 8, 9, 12, 13, 16):
        assert torch.equal(models.step(rows[-count:]), alone[-count:])
    assert torch.equal(models.step([*rows, *rows, *rows[3:8]]), torch.cat((alone, alone, alone[3:8])))
    for num_threads in (1, 3):
        torch.set_num_threads(num_threads)
        assert torch.equal(models.step(rows), alone)
    assert max(ROW_COUNTS) == len(rows)


def test_a_number_that_is_none_stays_in_its_row() -> None:
    for quantization in FORMATS:
        models = Models("llama", quantization)
        expected = models.step([3, 6, 8])
        assert models.decoder.embed is not None
        with torch.inference_mode():
            models.decoder.embed[models.last[6], 5] = torch.inf
        found = models.step([3, 6, 8])
        assert found[1].isnan().all()
        assert torch.equal(found[::2], expected[::2])


def test_nothing_outside_its_tables_is_touched() -> None:
    models = Models("llama", "none")
    past_its_pages = [ScheduledRow(0, PAGES * PAGE_SIZE, 1, [], [], True)]
    with pytest.raises(IndexError, match="outside"):
        models.native.logits(past_its_pages, models.last, models.tables)
    models.last[4] = CONFIGS["llama"].vocab_size
    with pytest.raises(IndexError, match="outside"):
        models.step([4])


def test_what_is_not_native_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def why(config: ModelConfig, dtype: torch.dtype = torch.bfloat16, quantization: str = "none") -> str | None:
        decoder = Decoder(config, WeightFormat(dtype, CPU, quantization), 512)
        with torch.inference_mode():
            decoder.load(weights(config, quantization))
        pool = KVPool(config.num_layers, gqa.kv_layout(config, "bfloat16"), 4, PAGE_SIZE, CPU, heads_first=True)
        return native_step.obstacle(decoder, pool)

    assert why(BASE) is None
    assert "bf16" in str(why(BASE, torch.float32))
    assert "neither" in str(why(BASE, quantization="int8"))
    assert "multiple of 64" in str(why(dataclasses.replace(BASE, intermediate_size=96)))
    assert "rotate in part" in str(why(dataclasses.replace(BASE, rope=RopeConfig(rotary_dim=16))))
    tiles = native_step._tiles
    for quantization in FORMATS:
        assert why(BASE, quantization=quantization) is None
        monkeypatch.setattr(native_step, "_tiles", lambda weight: tiles(weight).flip(2))
        assert "unknown way" in str(why(BASE, quantization=quantization))
        monkeypatch.undo()
    monkeypatch.setattr("llvmlite.__version__", "0.43.0")
    assert "0.43.0 is older" in str(why(BASE))
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    assert "gossamer[cpu]" in str(why(BASE))


PROMPTS = [torch.randint(3, 128, (n,), generator=torch.Generator().manual_seed(n)).tolist() for n in (5, 40, 64, 90)]
PROMPTS += [[*PROMPTS[2], 9, 8]]  # a full page in common


PAGE_BYTES = 3 * 2 * 2 * 64 * 32  # at one byte a number


def served(folder: Path, params: SamplingParams, **options: object) -> tuple[list[list[float]], list[list[int]], int]:
    """Log-probabilities and tokens of every prompt's output, and how often one was preempted."""
    itemsize = 4 if options.get("dtype") == "float32" else 2
    options = {"max_model_len": 192, "dtype": "bfloat16", "num_threads": 1, "max_num_seqs": 5} | options
    config = make_engine_config(
        model=str(folder), max_num_batched_tokens=48, kv_cache_memory_bytes=7 * PAGE_BYTES * itemsize, **options
    )
    engine, _ = build_engine(config)
    logprobs: list[list[float]] = [[] for _ in PROMPTS]
    tokens: list[list[int]] = [[] for _ in PROMPTS]
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, params)
    while engine.has_work():
        for output in engine.step():
            tokens[int(output.request_id)] += output.token_ids
            logprobs[int(output.request_id)] += [entry.logprobs[0] for entry in output.logprobs or []]
    num_preemptions = engine.stats().num_preemptions
    engine.shutdown()
    return logprobs, tokens, num_preemptions


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("native") / "model"
    make_model("qwen3", intermediate_size=128).save_pretrained(path)
    return path


def test_an_engine_serves_what_torch_would(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens are forced, so that all runs see the same ones; sequences are preempted, share pages, come and go."""
    steps, whole = [], native_step.NativeStep.logits

    def logits(self: native_step.NativeStep, rows: list[ScheduledRow], *args) -> torch.Tensor:
        steps.append(len(rows))
        return whole(self, rows, *args)

    monkeypatch.setattr(native_step.NativeStep, "logits", logits)
    forced = SamplingParams(temperature=0.0, allowed_token_ids=[77], logprobs=0, max_tokens=60, ignore_eos=True)

    def values(**options: object) -> torch.Tensor:
        logprobs, _, num_preemptions = served(folder, forced, **options)
        assert num_preemptions > 0
        return torch.tensor(logprobs)

    peer, exact = values(ops_backend="reference"), values(dtype="float32")
    assert not steps
    error = (peer - exact).abs().median()
    assert error < 4e-2 * exact.std()
    for options in ({}, {"overlap": False}, {"enable_prefix_caching": False}):
        assert (values(**options) - exact).abs().median() <= 1.5 * error
    assert max(steps) > 1


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=0.8, top_p=0.9, top_k=20, seed=3, max_tokens=24, ignore_eos=True),
        SamplingParams(temperature=0.0, frequency_penalty=0.7, logit_bias={5: 3.0}, max_tokens=24, ignore_eos=True),
    ],
)
def test_overlap_leaves_tokens_alone(params: SamplingParams, folder: Path) -> None:
    found = [served(folder, params, overlap=overlap)[1] for overlap in (False, True)]
    assert found[0] == found[1]
    assert all(len(tokens) == params.max_tokens for tokens in found[0])


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_overlap_leaves_tokens_alone_while_prompts_come_and_go(temperature: float, folder: Path) -> None:
    """Decode rows share steps with others' prompts, which steps depends on overlap."""
    outputs: list[dict[str, list[int]]] = []
    for overlap in (False, True):
        config = make_engine_config(
            model=str(folder), max_num_batched_tokens=48, max_model_len=192, dtype="bfloat16", num_threads=1,
            max_num_seqs=3, overlap=overlap,
        )  # fmt: skip
        engine, _ = build_engine(config)
        found: dict[str, list[int]] = {str(i): [] for i in range(12)}
        for name in found:
            i = int(name)
            params = SamplingParams(temperature=temperature, seed=i, max_tokens=6 + 5 * (i % 4), ignore_eos=True)
            engine.add_request(name, PROMPTS[i % len(PROMPTS)][: 90 - i], params)
        while engine.has_work():
            for output in engine.step():
                found[output.request_id] += output.token_ids
        engine.shutdown()
        outputs.append(found)
    assert outputs[0] == outputs[1]


def test_an_engine_starts_without_native_steps_that_do_not_compile(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(jit.Code, "add", lambda *_: 1 / 0)
    params = SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True)
    assert all(len(tokens) == 3 for tokens in served(folder, params)[1])
    assert "ZeroDivisionError" in caplog.text

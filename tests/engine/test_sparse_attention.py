"""Sparse attention through the engine, in both executors: schedule, prefix cache and preemption change nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from models.tiny_checkpoints import add_mtp_layer, save_checkpoint, save_nsa_checkpoint

from gossamer.config import make_engine_config, with_attention
from gossamer.core import SamplingParams, StartupError
from gossamer.engine.build import build_engine
from gossamer.layers.attention import block_topk, gqa
from gossamer.layers.attention.base import AttentionBatch
from gossamer.models.source import inspect_model
from gossamer.runtime.hardware import detect

PAGE = 16


def make_prompts(shift: int) -> list[list[int]]:
    prompts = [[(7 * i + 13 * j + shift) % 120 + 3 for i in range(n)] for j, n in enumerate((120, 190, 33, 150))]
    return [*prompts, [*prompts[1][:130], 5, 6, 7], [*prompts[1], 9]]  # shared prefixes


PROMPTS = make_prompts(0)
# Over FP8 pages a key near the middle of two E4M3 numbers becomes either, as fp32 rounds, and a token that two
# logits nearly share may follow it. These prompts have no such token: a test below shakes them.
FP8_PROMPTS = make_prompts(5)
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
    prompts = FP8_PROMPTS if options.get("kv_cache_dtype") == "fp8" else PROMPTS
    options = {"max_model_len": 256, "page_size": PAGE, "dtype": "float32", "num_threads": 1} | options
    options = {"max_num_batched_tokens": 64, "max_num_seqs": 4, "device": device} | options
    engine, _ = build_engine(make_engine_config(model=str(folder), **options), paged=paged)
    found: list[list[int]] = [[] for _ in prompts]
    for i, prompt in enumerate(prompts):
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
    if executor[1] == "cuda":
        assert run(folder, executor, **options) == run(folder, executor, enforce_eager=True, **options)
    if executor != (False, "cpu"):
        assert run(folder, executor, **options) == expected
    if "kv_cache_dtype" in sparse:  # chunks see it at other sizes
        return
    assert run(folder, executor, max_num_batched_tokens=24, **options) == expected
    tight = {"kv_cache_memory_bytes": 20 * page_bytes(folder, options)}
    assert run(folder, executor, **options, **tight) == expected
    assert run.preemptions > 0  # type: ignore[attr-defined]


def test_fp8_prompts_survive_the_roundings_of_fp32(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tens of times what a device's order of sums changes. Without this, equality over devices would be luck."""
    options = SPARSE | {"kv_cache_dtype": "fp8", "enable_prefix_caching": False, "max_num_batched_tokens": 512}
    expected = run(folder, max_num_seqs=1, **options)
    store = gqa.GQALayer.store_planned

    def noisy(self: gqa.GQALayer, qkv: torch.Tensor, *args: object) -> torch.Tensor:
        return store(self, qkv * (1 + 3e-6 * torch.randn_like(qkv)), *args)  # type: ignore[arg-type]

    monkeypatch.setattr(gqa.GQALayer, "store_planned", noisy)
    for seed in range(3):
        torch.manual_seed(seed)
        assert run(folder, max_num_seqs=1, **options) == expected


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
        ({"sparse_dense_layers": (1, 9)}, "--sparse-dense-layers"),
        ({"attention": "auto"}, "--sparse-budget is of --attention block_topk"),
    ],
)
def test_budgets_that_cannot_be(folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        run(folder, **{**SPARSE, **options})


def test_a_dense_layer_sees_the_whole_context(tmp_path: Path) -> None:
    config = make_engine_config(
        model=str(save_checkpoint("llama", tmp_path / "llama")), page_size=PAGE, **SPARSE, sparse_dense_layers=(0, 2)
    )
    stored = inspect_model(config.load).config
    model = with_attention(config, detect("cpu"), stored)
    whole = model.max_position_embeddings
    assert model.sliding_windows == (whole, None, whole)
    for start, length in ((0, whole), (whole - 1, 1)):
        batch = AttentionBatch(int(length == 1), [start], [length], [[]], PAGE)
        cost = [block_topk.cost(model, layer, batch, 2) for layer in range(3)]
        assert cost[0] == cost[2] == gqa.cost(stored, 0, batch, 2)
        assert cost[1].flops < cost[0].flops


@pytest.mark.parametrize("executor", EXECUTORS)
def test_layers_that_stay_dense(tmp_path: Path, executor: tuple[bool, str]) -> None:
    """Each choice of layers answers otherwise, whatever the schedule."""
    llama = save_checkpoint("llama", tmp_path / "llama")
    sparse = [run(llama, executor, **SPARSE, sparse_dense_layers=layers) for layers in ((), (0,), (0, 1), (2,))]
    assert all(a != b for i, a in enumerate(sparse) for b in [*sparse[:i], run(llama, executor)])
    options = SPARSE | {"sparse_dense_layers": (0, 2)}
    expected = run(llama, executor, enable_prefix_caching=False, max_num_batched_tokens=512, max_num_seqs=1, **options)
    assert run(llama, executor, max_num_batched_tokens=24, **options) == expected
    with pytest.raises(StartupError, match="names every layer"):
        run(llama, **SPARSE, sparse_dense_layers=(0, 1, 2))
    with pytest.raises(StartupError, match=r"-layers 1: this model's layers without a window are 0\."):
        run(save_checkpoint("qwen2", tmp_path / "qwen2"), **SPARSE, sparse_dense_layers=(0, 1))


def test_a_model_of_windows_alone_has_nothing_to_make_sparse(tmp_path: Path) -> None:
    with pytest.raises(StartupError, match="has a window already"):
        run(save_checkpoint("mistral", tmp_path / "mistral"), **SPARSE)


@pytest.fixture(scope="module", params=[("llama", True), ("qwen3", False)], ids=["shared", "independent"])
def nsa_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    name, shared = request.param
    return save_nsa_checkpoint(name, tmp_path_factory.mktemp("nsa") / name, PAGE, shared_kv=shared)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_schedule_leaves_tokens_of_nsa_alone(nsa_folder: Path, executor: tuple[bool, str]) -> None:
    expected = run(nsa_folder, enable_prefix_caching=False, max_num_batched_tokens=512, max_num_seqs=1)
    assert run(nsa_folder, executor) == expected
    assert run(nsa_folder, executor, max_num_batched_tokens=24) == expected
    assert run(nsa_folder, executor, kv_cache_memory_bytes=20 * page_bytes(nsa_folder, {})) == expected
    assert run.preemptions > 0  # type: ignore[attr-defined]


def test_nsa_depends_on_each_of_its_parts(nsa_folder: Path, tmp_path: Path) -> None:
    """Otherwise the test above would pass without them."""
    found = run(nsa_folder)
    config = json.loads((nsa_folder / "config.json").read_text())
    for key, value in (("num_blocks", 12), ("window_size", 8), ("num_local_blocks", 1)):
        changed = config | {"native_sparse_attention": config["native_sparse_attention"] | {key: value}}
        (tmp_path / "config.json").write_text(json.dumps(changed))
        (tmp_path / "model.safetensors").unlink(missing_ok=True)
        (tmp_path / "model.safetensors").symlink_to(nsa_folder / "model.safetensors")
        assert run(tmp_path) != found, key


@pytest.mark.parametrize("paged", [False, True])
def test_drafts_that_are_refused_leave_nothing_of_nsa_behind(tmp_path: Path, paged: bool) -> None:
    folder = save_nsa_checkpoint("glm4_moe", tmp_path / "glm4_moe", PAGE, shared_kv=True)
    add_mtp_layer(folder)
    expected = run(folder, (paged, "cpu"))
    assert run(folder, (paged, "cpu"), num_speculative_tokens=1) == expected


def test_nsa_over_fp8_pages(nsa_folder: Path) -> None:
    found = run(nsa_folder, kv_cache_dtype="fp8")
    assert run(nsa_folder, (True, "cpu"), kv_cache_dtype="fp8") == found


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"page_size": 32}, "--page-size 32: this model selects blocks, hence pages, of 16"),
        ({"attention": "block_topk"}, "--attention block_topk is for grouped-query attention; this is nsa"),
    ],
)
def test_what_nsa_refuses(nsa_folder: Path, options: dict[str, object], message: str) -> None:
    with pytest.raises(StartupError, match=message):
        run(nsa_folder, **options)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("llama", {"compress_stride": 8}, r"native_sparse_attention.compress_stride must be 4; .* got 8"),
        ("llama", {"num_blocks": 3}, "native_sparse_attention.num_blocks must be an integer from 4"),
        ("llama", {"blocks": 3}, "native_sparse_attention has no 'blocks'; its keys are block_size, "),
        ("llama", {"block_size": 48, "compress_stride": None}, "block_size must be a power of two; got 48"),
        ("mistral", {}, "grouped-query attention without other windows"),
        ("deepseek_v3", {}, "grouped-query attention without other windows"),
    ],
)
def test_configs_of_nsa_that_cannot_be(tmp_path: Path, name: str, changes: dict[str, object], message: str) -> None:
    folder = save_checkpoint(name, tmp_path / name)
    config = json.loads((folder / "config.json").read_text())
    nsa = {"block_size": 16, "compress_stride": 4, "compress_width": 24, **changes}
    (folder / "config.json").write_text(json.dumps(config | {"native_sparse_attention": nsa}))
    with pytest.raises(StartupError, match=message):
        run(folder)


@pytest.mark.gpu
def test_no_long_prompt_waits_for_a_kernel(tmp_path: Path) -> None:
    """Those of scores and selection follow a context's length by powers of two, and the warm-up has met them all."""
    from gossamer.ops.sparse import triton as sparse_kernels

    folder = save_checkpoint("llama", tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text()) | {"max_position_embeddings": 1 << 16}
    (folder / "config.json").write_text(json.dumps(config))
    options = {"max_model_len": 40000, "max_num_batched_tokens": 4096, "max_num_seqs": 2, "dtype": "float32"}
    engine, _ = build_engine(make_engine_config(model=str(folder), device="cuda", page_size=PAGE, **options, **SPARSE))
    kernels = sparse_kernels._entries_kernel, sparse_kernels._select_kernel
    compiled = [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]
    assert min(compiled) > 1
    for length in (600, 3000, 11000, 39000):
        engine.add_request(str(length), [i % 120 + 3 for i in range(length)], SamplingParams(max_tokens=2))
        while engine.has_work():
            engine.step()
    engine.shutdown()
    assert compiled == [sum(len(cache[0]) for cache in kernel.device_caches.values()) for kernel in kernels]


@pytest.fixture(scope="module", params=["minimax_m3", "minimax_m3_sparse"])
def msa_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first has a layer that sees all, and shared experts of a width of their own."""
    return save_checkpoint(request.param, tmp_path_factory.mktemp("msa") / request.param)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_the_schedule_leaves_tokens_of_msa_alone(msa_folder: Path, executor: tuple[bool, str]) -> None:
    expected = run(msa_folder, enable_prefix_caching=False, max_num_batched_tokens=512, max_num_seqs=1)
    assert run(msa_folder, executor) == expected
    if executor[1] == "cpu":  # kernels ask for pages of 16 tokens, which are this model's blocks
        assert run(msa_folder, executor, page_size=8) == expected  # blocks of two pages
    assert run(msa_folder, executor, max_num_batched_tokens=24) == expected
    assert run(msa_folder, executor, kv_cache_memory_bytes=20 * page_bytes(msa_folder, {})) == expected
    assert run.preemptions > 0  # type: ignore[attr-defined]

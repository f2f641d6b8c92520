"""MiniMax-M3's published config, names and sizes, what its configs may not say, and its text model beside a tower."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_logits_vs_transformers import Sequence, prompt
from tiny_checkpoints import BASE, M3, make_model, save_checkpoint

from gossamer.config import LoadConfig, SparseConfig, make_engine_config
from gossamer.core import AdmittedSequence, SamplingParams, ScheduledBatch, ScheduledRow, StartupError
from gossamer.engine.build import build_engine
from gossamer.kv_cache.pool import KVPool
from gossamer.layers.attention import msa
from gossamer.layers.linear import WeightFormat
from gossamer.models.decoder import Decoder
from gossamer.models.loader import inspect_model, iter_weights
from gossamer.models.registry import family_of_hf
from gossamer.models.shapes import expected_shapes
from gossamer.runtime.cuda_runner import CudaRunner

FREQ = [0, 0, 0, *[1] * 57]
PUBLISHED: dict[str, Any] = {
    "hidden_size": 6144,
    "intermediate_size": 3072,
    "dense_intermediate_size": 12288,
    "shared_intermediate_size": 3072,
    "num_hidden_layers": 60,
    "num_attention_heads": 64,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "hidden_act": "swigluoai",
    "max_position_embeddings": 1048576,
    "rms_norm_eps": 1e-6,
    "rope_theta": 5000000,
    "rotary_dim": 64,
    "partial_rotary_factor": 0.5,
    "num_local_experts": 128,
    "num_experts_per_tok": 4,
    "n_shared_experts": 1,
    "scoring_func": "sigmoid",
    "use_routing_bias": True,
    "use_qk_norm": True,
    "qk_norm_type": "per_head",
    "use_gemma_norm": True,
    "routed_scaling_factor": 2.0,
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "moe_layer_freq": FREQ,
    "vocab_size": 200064,
    "sparse_attention_config": {
        "use_sparse_attention": True,
        "sparse_attention_freq": FREQ,
        "sparse_num_index_heads": 4,
        "sparse_index_dim": 128,
        "sparse_block_size": 128,
        "sparse_topk_blocks": 16,
        "sparse_local_block": 1,
        "sparse_init_block": 0,
        "sparse_score_type": "max",
    },
}
VL = {"architectures": ["MiniMaxM3SparseForConditionalGeneration"], "text_config": PUBLISHED, "dtype": "bfloat16"}


def config_of(raw: dict[str, Any]) -> Any:
    return family_of_hf(raw).from_hf(raw)


def test_the_published_config() -> None:
    config = config_of(VL)
    assert (config.attention, config.family) == ("msa", "minimax_m3_vl_text")
    assert config.sparse == SparseConfig(128, 16, 0, 1, 2048)
    assert config.index.shared == config.moe.dense_layers == {0, 1, 2}
    assert config.sliding_windows == (1048576,) * 3 + (None,) * 57
    assert (config.moe.num_shared, config.moe.shared_width, config.moe.routed_scale) == (1, None, 2.0)
    assert (config.rope.rotary_dim, config.rope.theta, config.swiglu) == (64, 5e6, (1.702, 7.0))
    size = sum(math.prod(shape) for shape in expected_shapes(config).values())
    assert size / 1e9 == pytest.approx(427, abs=1)  # 428B with its vision tower
    assert config_of(PUBLISHED | {"architectures": ["MiniMaxM3SparseForCausalLM"]}) == config
    defaults = ("swiglu_alpha", "swiglu_limit", "routed_scaling_factor", "rope_theta", "num_experts_per_tok")
    absent = {key: value for key, value in PUBLISHED.items() if key not in defaults}
    absent["sparse_attention_config"] = {"sparse_attention_freq": FREQ}
    assert config_of(absent | {"architectures": ["MiniMaxM3VLForCausalLM"]}) == config


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"scoring_func": "softmax"}, "scoring_func"),
        ({"use_gemma_norm": False}, "use_gemma_norm"),
        ({"use_routing_bias": False}, "use_routing_bias"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"rotary_dim": 128}, "rotary_dim must be 64"),
        ({"partial_rotary_factor": 2}, "partial_rotary_factor"),
        ({"moe_layer_freq": [1]}, "mlp_layer_types must be 60 names, each sparse or dense"),
        ({"layer_types": ["sliding_attention"] * 60}, "layer_types must be 60"),
        ({"sparse": {"sparse_local_block": 0}}, "index_local_blocks"),
        ({"sparse": {"sparse_topk_blocks": 1}}, "index_topk_blocks"),
        ({"sparse": {"sparse_num_index_heads": 8}}, "index_n_heads 8"),
        ({"sparse": {"sparse_block_size": 96}}, "index_block_size 96"),
        ({"sparse": {"sparse_index_dim": 32}}, "index_head_dim 32"),
        ({"sparse": {"sparse_init_block": 1}}, "sparse_attention_config.sparse_init_block"),
        ({"sparse": {"sparse_score_type": "mean"}}, "sparse_attention_config.sparse_score_type"),
        ({"sparse": {"use_sparse_attention": False}}, "sparse_attention_config.use_sparse_attention"),
        ({"sparse": {"sparse_disable_index_value": [1] * 59 + [0]}}, "sparse_disable_index_value"),
    ],
)
def test_what_is_not_implemented_is_refused(changes: dict[str, Any], named: str) -> None:
    sparse = PUBLISHED["sparse_attention_config"] | changes.get("sparse", {})
    text = PUBLISHED | changes | {"sparse_attention_config": sparse}
    with pytest.raises(StartupError, match=named):
        config_of(VL | {"text_config": text})


@pytest.mark.parametrize("published", [True, False])
def test_the_text_model_of_a_checkpoint_with_a_tower(
    published: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The same logits as the text model alone, under the published names and those that transformers holds."""
    text = save_checkpoint("minimax_m3", tmp_path / "text")
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14}
    config = transformers.MiniMaxM3VLConfig(text_config={**BASE, **M3}, vision_config=vision, projector_hidden_size=64)
    whole = transformers.MiniMaxM3SparseForConditionalGeneration(config)
    own = dict(make_model("minimax_m3").state_dict())
    whole.model.language_model.load_state_dict({n[6:]: t for n, t in own.items() if n.startswith("model.")})
    whole.lm_head.weight.data.copy_(own["lm_head.weight"])
    if published:
        whole.save_pretrained(tmp_path / "whole")
        names = load_file(tmp_path / "whole" / "model.safetensors")
        assert "language_model.model.layers.1.block_sparse_moe.experts.0.w1.weight" in names
    else:
        (tmp_path / "whole").mkdir()
        config.architectures = ["MiniMaxM3SparseForConditionalGeneration"]
        config.save_pretrained(tmp_path / "whole")
        tensors = {name: tensor.contiguous() for name, tensor in whole.state_dict().items()}
        assert "model.language_model.layers.1.mlp.experts.gate_up_proj" in tensors
        save_file(tensors, tmp_path / "whole" / "model.safetensors", metadata={"format": "pt"})
    with caplog.at_level(logging.WARNING):
        found = Sequence(LoadConfig(model=str(tmp_path / "whole"))).feed(prompt(70))
    assert "vision tower" in caplog.text
    torch.testing.assert_close(found, Sequence(LoadConfig(model=str(text))).feed(prompt(70)), rtol=0, atol=1e-5)


def test_what_selects_matters(tmp_path: Path) -> None:
    """Otherwise agreement with transformers would not tell selection from dense attention."""
    folder = save_checkpoint("minimax_m3", tmp_path / "model")
    raw = json.loads((folder / "config.json").read_text())
    logits = {}
    for changes in ((), ("index_topk_blocks", 4), ("index_local_blocks", 2), ("swiglu_limit", 7.0)):
        (folder / "config.json").write_text(json.dumps(raw | dict([changes] if changes else [])))
        logits[changes] = Sequence(LoadConfig(model=str(folder))).feed(prompt(100))
    first = logits.pop(())
    assert all(float((first - other).abs().max()) > 0.01 for other in logits.values())


def test_norms_are_held_in_fp32_and_bf16_logits_are_near(tmp_path: Path) -> None:
    """w is small beside 1: in bf16 their sum would lose it."""
    folder = save_checkpoint("minimax_m3_full", tmp_path / "model")
    load = LoadConfig(model=str(folder))
    source = inspect_model(load)
    decoder = Decoder(source.config, WeightFormat(torch.bfloat16, torch.device("cpu")), 128)
    decoder.load(iter_weights(source, load))
    stored = load_file(folder / "model.safetensors")["model.norm.weight"]
    assert decoder.final_norm is not None
    assert decoder.final_norm.dtype == torch.float32
    assert torch.equal(decoder.final_norm, 1.0 + stored)
    attention = decoder.blocks[0].attention
    assert all(norm is not None and norm.dtype == torch.float32 for norm in attention.norms.values())


@pytest.mark.parametrize("quantization", ["none", "fp8", "int8"])
def test_an_engine_runs_from_a_config_alone(quantization: str, tmp_path: Path) -> None:
    make_model("minimax_m3").config.save_pretrained(tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(raw | {"architectures": ["MiniMaxM3VLForCausalLM"]}))
    options = {"load_format": "dummy", "quantization": quantization, "dtype": "bfloat16", "page_size": 8}
    engine, info = build_engine(
        make_engine_config(model=str(tmp_path), max_model_len=64, kv_cache_memory_bytes=1 << 20, **options),
        paged=quantization != "int8",
    )
    engine.shutdown()
    assert info.model.attention == "msa"


def test_pages_must_fit_into_blocks(tmp_path: Path) -> None:
    folder = save_checkpoint("minimax_m3", tmp_path / "model")
    with pytest.raises(StartupError, match="--page-size 64: this model selects blocks, of whole pages, of 16"):
        build_engine(make_engine_config(model=str(folder)))
    with pytest.raises(StartupError, match="is for grouped-query attention; this is msa"):
        build_engine(make_engine_config(model=str(folder), attention="block_topk", page_size=16))


@pytest.mark.slow
@pytest.mark.parametrize("kv", ["float32", "fp8"])
def test_all_of_a_steps_kernels_interpreted(kv: str, tmp_path: Path) -> None:
    """Chunks and decode beside padding, past what is dense: the references' tokens."""
    if torch.cuda.is_available():
        pytest.skip("tests of the paged executor do this, compiled")
    small = {"num_hidden_layers": 2, "layer_types": M3["layer_types"][:2], "mlp_layer_types": ["dense", "sparse"]}
    make_model("minimax_m3", **small, index_topk_blocks=2).save_pretrained(tmp_path)
    config = make_engine_config(
        model=str(tmp_path), max_num_seqs=3, max_num_batched_tokens=40, max_model_len=64, page_size=16
    )
    load = config.load
    source = inspect_model(load)
    cpu, found, pages = torch.device("cpu"), [], [3, 2, 4, 1]
    for backend in ("reference", "triton"):
        fmt = WeightFormat(torch.float32, cpu, kernels=backend == "triton")
        decoder = Decoder(source.config, fmt, 64, backend, True)
        decoder.load(iter_weights(source, load))
        runner = CudaRunner(decoder, config)
        runner.attach(KVPool(2, msa.kv_layout(source.config, kv), 5, 16, cpu))
        ids, params = prompt(40), SamplingParams(temperature=0.0)
        admitted = [AdmittedSequence(1, "0", ids, [], params, 0, frozenset())]
        rows = [
            ScheduledRow(1, 0, 36, ids[:36], pages, False),
            ScheduledRow(1, 36, 4, ids[36:], [], True),
            *(ScheduledRow(1, at, 1, [], [], True) for at in (40, 41)),
        ]
        steps = [ScheduledBatch(i, [] if i else admitted, [row]) for i, row in enumerate(rows)]
        found.append([runner.submit(step).result().token_ids for step in steps])
    assert found[0] == found[1]

"""The draft layer against its published definition, written here over transformers' blocks; its weights, its cost."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import transformers
from fp8_checkpoints import save_fp8_checkpoint
from safetensors.torch import load_file, save_file
from test_deepseek import ALIGNED, V3, config_of
from test_fp8_checkpoints import tokens
from tiny_checkpoints import add_mtp_layer, save_checkpoint

from gossamer.config import LoadConfig, ModelConfig, make_engine_config
from gossamer.core import SamplingParams
from gossamer.engine.build import build_engine
from gossamer.kv_cache.pool import KVPool
from gossamer.layers.attention.base import AttentionBatch, Chunks, PagedPlan
from gossamer.layers.linear import WeightFormat
from gossamer.models.cost import StepCost
from gossamer.models.decoder import ATTENTION_KINDS, Decoder
from gossamer.models.loader import inspect_model, iter_weights
from gossamer.models.shapes import expected_shapes

PAGE, LENGTH = 16, 50
CPU = torch.device("cpu")
IDS = torch.randint(3, 128, (LENGTH + 1,), generator=torch.Generator().manual_seed(4))


def published(folder: Path, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """DeepSeek-V3's equations 21 to 23: h' = M [RMSNorm(Emb(t_{i+1})); RMSNorm(h_i)], a block, the model's head. h_i
    is what the model's own head sees, its final norm included, as the weights were published for. [LENGTH, vocab].

    The block is transformers': the last of a model with one layer more, whose weights are those of the MTP layer.
    """
    with torch.inference_mode():
        config = transformers.AutoConfig.from_pretrained(folder)
        config._attn_implementation = "eager"
        base = transformers.AutoModelForCausalLM.from_pretrained(folder, config=config).eval()
        hidden = base.model(IDS[None, :-1]).last_hidden_state
        last = config.num_hidden_layers
        config.num_hidden_layers += 1
        deeper = folder.parent / "deeper"
        deeper.mkdir()
        config.save_pretrained(deeper)
        own = ("eh_proj", "norm.weight", "embed_tokens.weight", "head.weight")
        keep = {n: t for n, t in tensors.items() if f"layers.{last}." not in n or not n.endswith(own) or "attn" in n}
        keep |= {n: t for n, t in tensors.items() if f"layers.{last}." in n and "layernorm" in n}
        save_file(keep, deeper / "model.safetensors", metadata={"format": "pt"})
        more = transformers.AutoModelForCausalLM.from_pretrained(deeper, config=config).eval()

        def rms(x: torch.Tensor, name: str) -> torch.Tensor:
            variance = x.double().pow(2).mean(-1, keepdim=True)
            return (x.double() * (variance + config.rms_norm_eps).rsqrt()).float() * tensors[name]

        name = f"model.layers.{last}"
        embedded = tensors["model.embed_tokens.weight"][IDS[None, 1:]]
        joined = torch.cat((rms(embedded, f"{name}.enorm.weight"), rms(hidden, f"{name}.hnorm.weight")), -1)
        x = joined @ tensors[f"{name}.eh_proj.weight"].t()
        positions = torch.arange(LENGTH)[None]
        mask = torch.full((LENGTH, LENGTH), torch.finfo(torch.float32).min).triu(1)[None, None]
        rotary = more.model.rotary_emb(x, positions)
        x = more.model.layers[last](x, attention_mask=mask, position_ids=positions, position_embeddings=rotary)
        x = x[0] if isinstance(x, tuple) else x
        return (rms(x, f"{name}.shared_head.norm.weight") @ tensors["lm_head.weight"].t())[0]


def decoder_of(folder: Path, *, paged: bool) -> tuple[Decoder, KVPool]:
    load = LoadConfig(model=str(folder), num_speculative_tokens=1)
    source = inspect_model(load)
    decoder = Decoder(source.config, WeightFormat(torch.float32, CPU), 128, "reference", paged)
    decoder.load(iter_weights(source, load))
    layout = ATTENTION_KINDS[source.config.attention].kv_layout(source.config, "float32")
    pool = KVPool(source.config.num_kv_layers, layout, 6, PAGE, CPU, heads_first=not paged)
    return decoder, pool


def drafted(decoder: Decoder, pool: KVPool, cuts: list[int], num_decode: int) -> torch.Tensor:
    """Draft logits of every position: chunks that end at `cuts`, then single tokens."""
    table, found = [5, 2, 0, 3], []
    for start, stop in zip([0, *cuts], [*cuts, LENGTH], strict=True):
        length, decodes = stop - start, stop - start == 1 and num_decode > 0
        batch = AttentionBatch(int(decodes), [start], [length], [table], PAGE)
        positions = torch.arange(start, stop)
        if not decoder.paged:
            hidden = decoder.forward(IDS[start:stop], positions, batch, pool)
            found.append(decoder.draft(hidden, IDS[start + 1 : stop + 1], positions, batch, pool))
            continue
        plan = PagedPlan(
            num_decode=int(decodes), positions=positions.int(), token_slots=torch.zeros(length, dtype=torch.int32),
            slots=torch.zeros(1, dtype=torch.int32), seq_lens=torch.tensor([stop], dtype=torch.int32),
            cu_seqlens_q=torch.tensor([0] if decodes else [0, length], dtype=torch.int32),
            page_table=torch.tensor([table], dtype=torch.int32), max_seq_len=128, workspace=None,
            chunks=Chunks() if decodes else Chunks(length, stop, (start, stop)),
        )  # fmt: skip
        last = torch.zeros(1, dtype=torch.int64)
        hidden = decoder.forward_paged(IDS[start:stop].int(), last, plan, pool)
        found.append(decoder.draft_paged(hidden, IDS[start + 1 : stop + 1].int(), last, plan, pool))
    return decoder.logits(torch.cat(found))


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("name", ["deepseek_v3", "deepseek_v3_yarn", "glm4_moe"])
def test_draft_logits(name: str, paged: bool, tmp_path: Path) -> None:
    folder = save_checkpoint(name, tmp_path / "model")
    expected = published(folder, add_mtp_layer(folder))
    for cuts in ([], [7, 32, 48, 49]):
        decoder, pool = decoder_of(folder, paged=paged)
        with torch.inference_mode():
            found = drafted(decoder, pool, cuts, len(cuts))
        assert float((found - expected).abs().max()) < 1e-4 * float(expected.abs().max())


def test_draft_weights_are_loaded_on_demand_alone(tmp_path: Path) -> None:
    folder = save_checkpoint("deepseek_v3", tmp_path)
    tensors = add_mtp_layer(folder)
    plain, with_drafts = (
        dict(iter_weights(inspect_model(load), load))
        for load in (LoadConfig(model=str(folder), num_speculative_tokens=n) for n in (0, 1))
    )
    more = with_drafts.keys() - plain.keys()
    assert plain.keys() < with_drafts.keys()
    assert all(name.startswith("layers.3.") for name in more)
    assert torch.equal(with_drafts["layers.3.mtp.norm.weight"], tensors["model.layers.3.shared_head.norm.weight"])
    assert not any(tensor.isnan().any() for tensor in with_drafts.values())


def fp8_with_mtp(folder: Path) -> None:
    """As published: the block in FP8, what is the layer's own in bf16."""
    save_fp8_checkpoint(folder, "deepseek_v3", "block", ALIGNED | {"num_hidden_layers": 3})
    path, hidden = folder / "model.safetensors", ALIGNED["hidden_size"]
    raw = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    raw.pop("num_mtp_layers", None)
    (folder / "config.json").write_text(json.dumps(raw))
    own = {f"{norm}.weight": torch.ones(hidden) for norm in ("enorm", "hnorm", "shared_head.norm")}
    own["eh_proj.weight"] = torch.randn(hidden, 2 * hidden) / (2 * hidden) ** 0.5
    more = {f"model.layers.2.{name}": tensor.bfloat16() for name, tensor in own.items()}
    save_file(load_file(path) | more, path, metadata={"format": "pt"})


def test_fp8_checkpoints_draft_too(tmp_path: Path) -> None:
    fp8_with_mtp(tmp_path)
    for paged in (False, True):
        expected = tokens(tmp_path, paged=paged)
        assert tokens(tmp_path, paged=paged, num_speculative_tokens=1) == expected


@pytest.mark.parametrize("quantization", ["none", "fp8", "int8"])
def test_dummy_weights_draft_too(quantization: str, tmp_path: Path) -> None:
    add_mtp_layer(save_checkpoint("deepseek_v3", tmp_path))
    options = {"load_format": "dummy", "quantization": quantization, "max_model_len": 64, "num_threads": 1}
    config = make_engine_config(model=str(tmp_path), num_speculative_tokens=1, dtype="bfloat16", **options)
    engine, _ = build_engine(config)
    engine.add_request("0", [5, 6, 7], SamplingParams(max_tokens=9, ignore_eos=True))
    while engine.has_work():
        engine.step()
    assert engine.stats().num_generation_tokens == 9
    assert 0 < engine.stats().spec_decode_num_drafts < 9
    engine.shutdown()


def test_published_size_of_the_layer() -> None:
    """README_WEIGHTS of DeepSeek-V3 says 11.5B for the block; embedding and head are the model's."""
    plain = config_of(V3)
    drafting = dataclasses.replace(plain, num_draft_layers=1)
    sizes = [sum(torch.Size(shape).numel() for shape in expected_shapes(c).values()) for c in (plain, drafting)]
    assert (sizes[1] - sizes[0] - 2 * 7168**2) / 1e9 == pytest.approx(11.507, abs=1e-3)


def test_a_drafting_step_costs_what_its_rows_and_layer_do() -> None:
    plain: ModelConfig = config_of(V3)
    drafting = dataclasses.replace(plain, num_draft_layers=1)
    fmt = WeightFormat(torch.bfloat16, CPU)
    cost = [StepCost(config, ATTENTION_KINDS["mla"], fmt, 2) for config in (plain, drafting)]
    one, two = (c(4, [100] * 4, [1] * 4, 4) for c in cost)
    head, hidden = 2.0 * plain.vocab_size * plain.hidden_size, plain.hidden_size
    layer = (one.flops - 4 * head) / 61
    # An MoE layer is smaller than the mean of dense and MoE layers here by little; eh_proj is 2 x hidden^2 more.
    assert two.flops - one.flops == pytest.approx(4 * (head + 4.0 * hidden * hidden) + layer, rel=0.1)
    assert two.bytes > one.bytes + 2 * plain.vocab_size * hidden

"""Inspects a model without torch: finds it, reads its config, and checks its weights against it by headers alone."""

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from gossamer.config import LoadConfig, ModelConfig, MoEConfig
from gossamer.core import StartupError
from gossamer.models.checkpoint_fp8 import FP8_DTYPE, Fp8Scheme, check_scales, fp8_scheme, without_scales
from gossamer.models.gguf_config import hf_config_of_gguf, open_gguf
from gossamer.models.gguf_file import GGUFFile
from gossamer.models.gguf_tensors import interleaved_heads, plan_gguf, suggested_quantization
from gossamer.models.hf_config import ConfigReader, merge_token_ids
from gossamer.models.hf_folder import SafetensorsHeaders, read_headers, read_json, tokenizer_end, weight_files
from gossamer.models.registry import family_of_hf
from gossamer.models.resolve import resolve_model
from gossamer.models.weight_names import PlannedWeight, plan_weights

SAFETENSORS_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Buffers that old checkpoints carry although the config determines them, multi-token-prediction heads, and the towers
# of families whose text model alone is served.
_TOWERS = r"^(model\.)?(vision_tower|multi_modal_projector|patch_merge_mlp)\."
_IGNORABLE = re.compile(r"\.rotary_emb\.inv_freq$|^(language_model\.)?(model\.)?mtp\.|" + _TOWERS)


@dataclass(frozen=True, slots=True)
class ModelSource:
    """A model that was found and checked. `config` is what the decoder runs, upcycling included."""

    kind: Literal["safetensors", "gguf", "dummy"]
    path: Path
    """The model's folder or .gguf file."""
    config: ModelConfig
    stored_config: ModelConfig
    """As the checkpoint has it; differs from `config` only under --upcycle-experts."""
    quantization: Literal["none", "int8", "int4", "fp8"] = "none"
    """What --quantization auto means for this checkpoint."""
    plan: tuple[PlannedWeight, ...] = field(default=(), repr=False)
    headers: SafetensorsHeaders | None = field(default=None, repr=False)
    gguf: tuple[GGUFFile, ...] = field(default=(), repr=False)
    interleaved_heads: dict[str, int] | None = None
    """Heads of q and k whose rows a GGUF file holds interleaved."""
    fp8: Fp8Scheme | None = None
    """How the FP8 tensors of a safetensors checkpoint are scaled."""


def inspect_model(load: LoadConfig) -> ModelSource:
    """Finds and checks the model of a LoadConfig; everything wrong with it is a StartupError that names it.

    Reads headers and JSON only: no weights, no torch.
    """
    path = resolve_model(load.model, load.download_dir, load.load_format)
    if load.load_format == "safetensors" and not path.is_dir():
        raise StartupError(f"--load-format safetensors, but {path} is a GGUF file.\nUse --load-format auto.")
    try:
        source = _inspect_folder(path, load) if path.is_dir() else _inspect_gguf(path, load)
    except StartupError as e:
        if str(path) in str(e):
            raise
        raise StartupError(f"{path}: {e}") from e
    if load.upcycle_experts is not None:
        moe = _upcycled(source.stored_config, load.upcycle_experts, load.upcycle_topk)
        source = dataclasses.replace(source, config=dataclasses.replace(source.config, moe=moe))
    return source


def _with_drafts(config: ModelConfig, num: int) -> ModelConfig:
    if num > config.num_mtp_layers:
        raise StartupError(
            f"--num-speculative-tokens {num}: the model has no multi-token-prediction layer that could draft tokens.\n"
            "Drop the flag."
        )
    return dataclasses.replace(config, num_draft_layers=num)


def _inspect_folder(folder: Path, load: LoadConfig) -> ModelSource:
    raw = read_json(folder / "config.json")
    family = family_of_hf(raw)
    config = _with_drafts(family.from_hf(raw), load.num_speculative_tokens)
    tokenizer = Path(load.tokenizer or folder).expanduser()
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    ends = ConfigReader(generation, "generation_config.json: ").token_ids("eos_token_id")
    ends = merge_token_ids(config.vocab_size, config.eos_token_ids, ends, tokenizer_end(tokenizer))
    config = dataclasses.replace(config, eos_token_ids=ends)
    scheme = fp8_scheme(raw.get("quantization_config"))
    quantization: Literal["none", "fp8"] = "fp8" if scheme is not None and scheme.quantizes_activations else "none"
    if load.load_format == "dummy":
        return ModelSource("dummy", folder, config, config, quantization)
    headers = read_headers(weight_files(folder))
    stored = headers.shapes if scheme is None else without_scales(headers.shapes)
    plan = tuple(plan_weights(config, family.weights, stored, _IGNORABLE))
    if scheme is not None:
        check_scales(plan, scheme, headers.shapes, headers.dtypes)
    for planned in plan:
        dtype = headers.dtypes[planned.stored_name]
        if dtype not in SAFETENSORS_DTYPES and (dtype, len(planned.shape), scheme is None) != (FP8_DTYPE, 2, False):
            raise StartupError(
                f"The tensor {planned.stored_name} has the dtype {dtype}; supported: {', '.join(SAFETENSORS_DTYPES)}; "
                f"{FP8_DTYPE} under a quantization_config.\n"
                "Use an unquantised checkpoint, with --quantization fp8, int8 or int4."
            )
    if raw.get("dtype") is None and raw.get("torch_dtype") is None:
        config = dataclasses.replace(
            config, dtype=SAFETENSORS_DTYPES.get(headers.dtypes[plan[0].stored_name], "bfloat16")
        )
    return ModelSource("safetensors", folder, config, config, quantization, plan, headers, fp8=scheme)


def _inspect_gguf(path: Path, load: LoadConfig) -> ModelSource:
    files = open_gguf(path)
    family, raw = hf_config_of_gguf(files)
    config = _with_drafts(family.from_hf(raw), load.num_speculative_tokens)
    if load.load_format == "dummy":
        return ModelSource("dummy", path, config, config)
    return ModelSource(
        "gguf", path, config, config, quantization=suggested_quantization(files),
        plan=tuple(plan_gguf(config, files)), gguf=tuple(files),
        interleaved_heads=interleaved_heads(files[0].metadata["general.architecture"], config),
    )  # fmt: skip


def _upcycled(config: ModelConfig, num_experts: int, top_k: int) -> MoEConfig:
    if config.moe is not None:
        raise StartupError(
            f"--upcycle-experts {num_experts}: the model has {config.moe.num_experts} experts already.\n"
            "Drop the flag, or give a dense model."
        )
    if config.mlp_bias:
        raise StartupError("--upcycle-experts: the model's MLP has biases, which experts have not.\nDrop the flag.")
    # Copies give the same output whatever their weights, if these sum to 1.
    return MoEConfig(num_experts, top_k, config.intermediate_size, renormalize=True)

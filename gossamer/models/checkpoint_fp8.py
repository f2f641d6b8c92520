"""FP8 checkpoints: which schemes are taken, which tensors hold the scales, and whether these fit. Torch-free.

A tensor is FP8 if its header says so, whatever lists of exceptions a config carries; the config says how it is scaled.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gossamer.core import StartupError
from gossamer.models.shapes import Shape
from gossamer.models.weight_names import PlannedWeight

FP8_DTYPE = "F8_E4M3"
SCALE_DTYPES = ("F32", "BF16", "F16", "F8_E8M0")
BLOCK = 128
# Scales that go with a weight, and those of static activations and caches, which dynamic scales replace.
_SCALES = re.compile(r"_scale(_inv)?$")

Granularity = Literal["block", "channel", "tensor"]


@dataclass(frozen=True, slots=True)
class Fp8Scheme:
    """How the FP8 tensors of a checkpoint are scaled. The scales of tensor NAME are in NAME + `suffix`."""

    granularity: Granularity
    suffix: str
    quantizes_activations: bool = True
    """False: the weights alone are FP8; such a checkpoint is dequantised unless FP8 is asked for."""
    static_activations: bool = False
    """The checkpoint has fixed activation scales; they are left aside for dynamic ones, which are never worse."""
    ue8m0: bool = False
    """Activation scales are to be powers of two, as in training."""


def fp8_scheme(config: object) -> Fp8Scheme | None:
    """The scheme of a config.json's `quantization_config`; None if there is none. Raises StartupError for others."""
    if config is None:
        return None
    if not isinstance(config, dict):
        raise _refused("it is no object")
    method = config.get("quant_method")
    if method == "fp8":
        return _fine_grained(config)
    if method == "compressed-tensors":
        return _compressed_tensors(config)
    raise _refused(f"the quant_method {str(method)[:40]!r}")


def _refused(what: str) -> StartupError:
    return StartupError(
        f"quantization_config: {what} is not supported; FP8 (E4M3) is, in blocks of 128 x 128, per channel or per "
        "tensor.\nUse such a checkpoint, or the unquantised one (on a CPU also with --quantization fp8, int8 or int4)."
    )


def _fine_grained(config: Mapping[str, Any]) -> Fp8Scheme:
    """`quant_method: fp8`: blocks as DeepSeek and Qwen publish them; without a block size, one scale per tensor."""
    if config.get("fmt", "e4m3") not in ("e4m3", "float8_e4m3fn"):
        raise _refused(f"the fmt {str(config['fmt'])[:40]!r}")
    scheme = config.get("activation_scheme", "dynamic")
    if scheme not in ("dynamic", "static"):
        raise _refused(f"the activation_scheme {str(scheme)[:40]!r}")
    block = config.get("weight_block_size")
    if block is None:
        return Fp8Scheme("tensor", "_scale", static_activations=scheme == "static")
    if block != [BLOCK, BLOCK]:
        raise _refused(f"the weight_block_size {str(block)[:40]}")
    ue8m0 = config.get("scale_fmt") == "ue8m0"
    return Fp8Scheme("block", "_scale_inv", static_activations=scheme == "static", ue8m0=ue8m0)


def _compressed_tensors(config: Mapping[str, Any]) -> Fp8Scheme:
    """compressed-tensors: every group of modules must be scaled alike; `ignore` shows in the tensors themselves."""
    groups = config.get("config_groups")
    if not isinstance(groups, dict) or not groups or not all(isinstance(group, dict) for group in groups.values()):
        raise _refused("compressed-tensors without config_groups")
    schemes = {_compressed_group(group) for group in groups.values()}
    if len(schemes) > 1:
        raise _refused("compressed-tensors with groups of different schemes")
    return schemes.pop()


def _compressed_group(group: Mapping[str, Any]) -> Fp8Scheme:
    weights: Any = group.get("weights") or {}
    inputs = group.get("input_activations")
    for part in [weights] if inputs is None else [weights, inputs]:
        kind = (part.get("num_bits"), part.get("type")) if isinstance(part, dict) else (None, None)
        if kind != (8, "float"):
            raise _refused(f"compressed-tensors with numbers of {str(kind[0])[:20]} bits, type {str(kind[1])[:20]},")
    strategy = weights.get("strategy", "tensor")
    if strategy not in ("block", "channel", "tensor"):
        raise _refused(f"compressed-tensors with the strategy {str(strategy)[:40]!r}")
    if weights.get("symmetric", True) is not True:
        raise _refused("compressed-tensors with zero points")
    if strategy == "block" and weights.get("block_structure") != [BLOCK, BLOCK]:
        raise _refused(f"compressed-tensors with the block_structure {str(weights.get('block_structure'))[:40]}")
    static = inputs is not None and inputs.get("dynamic") is not True
    return Fp8Scheme(strategy, "_scale", inputs is not None, static)


def without_scales(stored: Mapping[str, Shape]) -> dict[str, Shape]:
    """The tensors that are weights."""
    return {name: shape for name, shape in stored.items() if not _SCALES.search(name)}


def check_scales(
    plan: Iterable[PlannedWeight], scheme: Fp8Scheme, shapes: Mapping[str, Shape], dtypes: Mapping[str, str]
) -> None:
    """Raises StartupError unless every FP8 tensor of the plan has scales of the scheme's shape."""
    for planned in plan:
        if dtypes[planned.stored_name] != FP8_DTYPE:
            continue
        name = planned.stored_name + scheme.suffix
        if name not in shapes:
            raise StartupError(f"{planned.stored_name} is FP8, but the checkpoint has no {name}.\nDownload it again.")
        expected = _scale_shapes(scheme.granularity, shapes[planned.stored_name], planned.expert is not None)
        if shapes[name] not in expected or dtypes[name] not in SCALE_DTYPES:
            raise StartupError(
                f"The scales {name} are {dtypes[name]} {list(shapes[name])}; the config implies {list(expected[0])} "
                f"of {', '.join(SCALE_DTYPES)}.\nThe config and the weights do not belong together."
            )
        start, stop = planned.rows or (0, planned.shape[0])
        total = shapes[planned.stored_name][-2]
        if scheme.granularity == "block" and (start % BLOCK or (stop % BLOCK and stop != total)):
            raise StartupError(
                f"The rows {start} to {stop} of {planned.stored_name} are one weight, but share blocks of {BLOCK} rows "
                "with the next.\nUse a checkpoint with a tensor for each expert."
            )


def _scale_shapes(granularity: Granularity, shape: Shape, stacked: bool) -> list[Shape]:
    """The shapes that the scales of a tensor may have; of stacked experts there are as many as experts."""
    experts, (rows, columns) = shape[:-2] if stacked else (), shape[-2:]
    if granularity == "block":
        return [(*experts, -(-rows // BLOCK), -(-columns // BLOCK))]
    if granularity == "channel":
        return [(*experts, rows, 1), (*experts, rows)]
    return [experts, (*experts, 1), (*experts, 1, 1)]


def scale_rows(scheme: Fp8Scheme, rows: tuple[int, int] | None) -> slice:
    """Which rows of a tensor's scales belong to the given rows of the tensor."""
    if rows is None or scheme.granularity == "tensor":
        return slice(None)
    size = BLOCK if scheme.granularity == "block" else 1
    return slice(rows[0] // size, -(-rows[1] // size))

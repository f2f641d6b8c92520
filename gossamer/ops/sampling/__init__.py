"""Sampling: from logits to token ids and their log-probabilities, for all rows of a step at once.

`sample_slots` decides everything on the device and has a kernel. The other functions, documented in `reference.py`,
are torch on CPU and CUDA tensors alike, and do not wait for a GPU.
"""

import torch
from torch import Tensor

from gossamer.ops.dispatch import use_kernel
from gossamer.ops.sampling import reference
from gossamer.ops.sampling.reference import apply_penalties, argmax, sample, token_logprobs, top_tokens, uniform

__all__ = [
    "apply_penalties", "argmax", "sample", "sample_slots", "token_logprobs", "top_tokens", "uniform", "workspace_size",
]  # fmt: skip


def workspace_size(num_rows: int, vocab: int) -> int:
    """Number of int32 elements of the workspace with which `sample_slots`' kernel serves up to `num_rows` rows."""
    from gossamer.ops.sampling import triton

    return triton.workspace_size(num_rows, vocab)


def sample_slots(
    logits: Tensor, slots: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, seed: Tensor,
    output_index: Tensor, last_token: Tensor, *, workspace: Tensor | None = None, out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:  # fmt: skip
    """`sample` with parameters per slot, read where they lie: two launches, no host decision, for CUDA graphs.

    The token is `sample`'s for the uniform number of (seed, output_index), unless that lies within UNIFORM_TOLERANCE
    of a step of the cumulative distribution, where rounding decides. Bit-identical from run to run and in any batch.

    Args:
        logits: [num_rows, vocab] of any float dtype, rows contiguous; vocab at most 2**20.
        slots: int32 [num_rows]; -1 is a padded row, whose result is -1.
        temperature, top_p, min_p: float64 [num_slots]. top_k: int32 or int64 [num_slots].
        seed: int64 [num_slots].
        output_index: int32 or int64 [num_rows].
        last_token: int64 [num_slots]; the token of each row is stored for its slot, 0 where it is -1.
        workspace: int32, at least `workspace_size(num_rows, vocab)`; allocated if absent.
        out: int64 [num_rows]; allocated if absent.
    Returns: int64 [num_rows]; -1 where nothing can be drawn, as in `sample`.
    """
    num_rows, vocab = logits.shape
    per_slot = {"temperature": temperature, "top_p": top_p, "min_p": min_p, "top_k": top_k, "seed": seed}
    for name, value in (per_slot | {"last_token": last_token}).items():
        kinds = (torch.float64,) if name in ("temperature", "top_p", "min_p") else (torch.int64, torch.int32)
        _check(name, value, len(last_token), kinds[: None if name == "top_k" else 1], logits.device)
    _check("slots", slots, num_rows, (torch.int32,), logits.device)
    _check("output_index", output_index, num_rows, (torch.int64, torch.int32), logits.device)
    if out is None:
        out = torch.empty(num_rows, dtype=torch.int64, device=logits.device)
    _check("out", out, num_rows, (torch.int64,), logits.device)
    arguments = (logits, slots, temperature, top_k, top_p, min_p, seed, output_index, last_token)
    if num_rows == 0:
        return out
    if not use_kernel(logits, backend, "sample_slots"):
        return reference.sample_slots(*arguments, out)
    from gossamer.ops.sampling import triton

    size = triton.workspace_size(num_rows, vocab)
    if workspace is None:
        workspace = torch.empty(size, dtype=torch.int32, device=logits.device)
    if workspace.numel() < size or workspace.dtype != torch.int32 or workspace.device != logits.device:
        raise ValueError(f"workspace must be int32 [{size}] or more on {logits.device}")
    if vocab > 1 << 20 or logits.stride(1) != 1:
        raise ValueError(f"logits must have contiguous rows of at most 2**20, got {logits.shape} {logits.stride()}")
    return triton.sample_slots(*arguments, workspace, out)


def _check(name: str, value: Tensor, size: int, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    if value.shape != (size,) or value.dtype not in dtypes or value.device != device:
        raise ValueError(
            f"{name} must be {dtypes[0]} [{size}] on {device}, got {value.dtype} {list(value.shape)} on {value.device}"
        )

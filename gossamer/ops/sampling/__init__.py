"""Sampling: from logits to token ids and their log-probabilities, for all rows of a step at once.

`sample_slots` decides everything on the device and has a kernel. The other functions are torch on CPU and CUDA
tensors alike, and do not wait for a GPU.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gossamer.ops.dispatch import use_kernel
from gossamer.ops.sampling import reference

__all__ = [
    "apply_penalties",
    "argmax",
    "sample",
    "sample_slots",
    "token_logprobs",
    "top_tokens",
    "uniform",
    "workspace_size",
]


def argmax(logits: Tensor) -> Tensor:
    """Index of each row's largest value, the lowest of equals.

    Args: logits: [num_rows, vocab].
    Returns: int64 [num_rows].
    """
    return reference.argmax(logits)


def apply_penalties(
    logits: Tensor,
    prompt_mask: Tensor,
    output_counts: Tensor,
    presence: Tensor,
    frequency: Tensor,
    repetition: Tensor,
) -> Tensor:
    """Lowers the logits of tokens that have occurred (OpenAI's presence and frequency, CTRL's repetition penalty).

    Tokens of prompt or output: a positive logit is divided by `repetition`, a negative one multiplied. Then those of
    the output alone lose `frequency` per occurrence and `presence` once.

    Args:
        logits: float32 [num_rows, vocab].
        prompt_mask: bool [num_rows, vocab], true where the prompt has the token.
        output_counts: int32 [num_rows, vocab].
        presence, frequency, repetition: float32 [num_rows], CPU tensors: penalties that no row has cost nothing.
    Returns: float32 [num_rows, vocab]; `logits` is not modified.
    """
    return reference.apply_penalties(logits, prompt_mask, output_counts, presence, frequency, repetition)


def sample(logits: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor, uniform: Tensor) -> Tensor:
    """Draws one token per row: temperature, then min_p, top_k and top_p, each renormalised over what the last left.

    The parameters are CPU tensors, for they decide on the host what work is needed at all (greedy rows: an argmax;
    neither top_k nor top_p: no ordering). A row's token depends on its own logits and parameters alone.

    Args:
        logits: float32 [num_rows, vocab], on any device.
        temperature: float64 [num_rows]; below 1e-5 is greedy.
        top_k: int64 [num_rows]; below 1 or at least vocab is off. Ties go to the lowest ids: top_k=1 is greedy.
        top_p: float64 [num_rows] in (0, 1]: keeps tokens while the mass of the more likely ones is below it.
        min_p: float64 [num_rows] in [0, 1]: keeps tokens at least this times as likely as the likeliest.
        uniform: float64 [num_rows] in [0, 1): the only randomness.
    Returns: int64 [num_rows]; -1 where the row's largest logit is not finite, so that nothing can be drawn.
    """
    num_rows = logits.shape[0]
    parameters = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p, "uniform": uniform}
    for name, value in parameters.items():
        if value.shape != (num_rows,) or value.is_cuda:
            raise ValueError(f"{name} must be a CPU tensor of shape [{num_rows}], got {list(value.shape)}")
    if num_rows == 0:
        return torch.empty(0, dtype=torch.int64, device=logits.device)
    return reference.sample(logits, temperature, top_k, top_p, min_p, uniform)


def uniform(seeds: NDArray[np.uint64], output_index: NDArray[np.int64]) -> NDArray[np.float64]:
    """Number `output_index` of each seed's stream, in [0, 1): a hash of the two and of nothing else."""
    return reference.uniform(seeds, output_index)


def workspace_size(num_rows: int, vocab: int) -> int:
    """Number of int32 elements of the workspace with which `sample_slots`' kernel serves up to `num_rows` rows."""
    from gossamer.ops.sampling import triton

    return triton.workspace_size(num_rows, vocab)


def sample_slots(
    logits: Tensor,
    slots: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    seed: Tensor,
    output_index: Tensor,
    last_token: Tensor,
    *,
    workspace: Tensor | None = None,
    out: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
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


def top_tokens(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest logits of each row, falling, and their ids; equal logits by rising id.

    Args: logits: float32 [num_rows, vocab] without NaN. k: at least 1; more than vocab means vocab.
    Returns: values float32 and ids int64, both [num_rows, min(k, vocab)].
    """
    return reference.top_tokens(logits, k)


def token_logprobs(logits: Tensor, token_ids: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Log-softmax of the given tokens and of the k likeliest.

    Args: logits: float32 [num_rows, vocab]. token_ids: int64 [num_rows]. k: 0 to vocab.
    Returns: ids int64, log-probabilities float32 and 1-based ranks int64, each [num_rows, 1 + k], the given token
        first. Ranks order equal values by rising id.
    """
    return reference.token_logprobs(logits, token_ids, k)

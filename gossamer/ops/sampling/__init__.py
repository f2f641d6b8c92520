"""Sampling: from logits to token ids and their log-probabilities, for all rows of a step at once.

There is no kernel: the torch reference runs on CPU and CUDA tensors alike, without waiting for a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.ops.sampling import reference

__all__ = ["apply_penalties", "argmax", "sample", "token_logprobs", "top_tokens"]


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

"""The first op of a step on a device: input ids, some of which only the device knows, to embeddings."""

import torch

from gossamer.ops.embedding import reference


def embed_tokens(
    input_ids: torch.Tensor, token_slots: torch.Tensor, last_token: torch.Tensor, weight: torch.Tensor, *,
    backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """Rows of `weight` [vocab_size, hidden]; returns [num_tokens, hidden].

    input_ids: int32 [num_tokens]; -1 stands for `last_token[token_slots[t]]`, what the slot sampled last (int64
    [num_slots]). token_slots: int32 [num_tokens]; -1 is padding and gives a row of zeros.
    """
    if backend == "reference" or (backend == "auto" and input_ids.is_cpu):
        return reference.embed_tokens(input_ids, token_slots, last_token, weight)
    from gossamer.ops.embedding import triton

    return triton.embed_tokens(input_ids, token_slots, last_token, weight)

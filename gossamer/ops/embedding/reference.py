"""Torch reference of the token embedding."""

import torch


def embed_tokens(
    input_ids: torch.Tensor, token_slots: torch.Tensor, last_token: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    ids = torch.where(input_ids < 0, last_token[token_slots.clamp_min(0).long()], input_ids.long())
    rows = weight[ids.clamp_(0, weight.shape[0] - 1)]
    return rows.masked_fill_((token_slots < 0).unsqueeze(1), 0.0)

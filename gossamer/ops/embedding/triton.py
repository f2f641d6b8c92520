"""Triton kernel of the token embedding: one program per token and block of the hidden dimension."""

import torch
import triton
import triton.language as tl


@triton.jit
def _embed_kernel(ids, slots, last_token, weight, out, hidden, vocab, BLOCK: tl.constexpr):
    token = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + token)
    given = tl.load(ids + token).to(tl.int64)
    sampled = tl.load(last_token + tl.maximum(slot, 0))
    row = tl.where(given < 0, sampled, given)
    # A failed row's last token is -1: its result is discarded, but it must not read outside the table.
    row = tl.minimum(tl.maximum(row, 0), vocab - 1)
    inside = columns < hidden
    values = tl.load(weight + row * hidden + columns, mask=inside, other=0.0)
    tl.store(out + token.to(tl.int64) * hidden + columns, tl.where(slot < 0, 0.0, values), mask=inside)


def embed_tokens(
    input_ids: torch.Tensor, token_slots: torch.Tensor, last_token: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    num_tokens, (vocab, hidden) = input_ids.shape[0], weight.shape
    out = torch.empty(num_tokens, hidden, dtype=weight.dtype, device=weight.device)
    if num_tokens:
        block = min(2048, triton.next_power_of_2(hidden))
        grid = (num_tokens, triton.cdiv(hidden, block))
        _embed_kernel[grid](input_ids, token_slots, last_token, weight, out, hidden, vocab, BLOCK=block, num_warps=4)
    return out

"""Torch reference of token-sparse latent attention, in float64 where its inputs are; temporaries are bounded."""

import torch
import torch.nn.functional as F

from gossamer.ops.attention import DecodeWorkspace
from gossamer.ops.rope.reference import apply_rope

# Elements of scores by head, or of gathered latents, at a time.
_TILE_ELEMENTS = 1 << 23


def _compute(q: torch.Tensor) -> torch.dtype:
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def rope_write_index(
    q: torch.Tensor, key: torch.Tensor, weights: torch.Tensor, norm: tuple[torch.Tensor, torch.Tensor], eps: float,
    cos: torch.Tensor, sin: torch.Tensor, positions: torch.Tensor, token_slots: torch.Tensor,
    page_table: torch.Tensor, key_pages: torch.Tensor, q_out: torch.Tensor, weights_out: torch.Tensor,
    interleaved: bool,
) -> None:  # fmt: skip
    live, rope_dim = token_slots >= 0, cos.shape[-1]
    at, page_size = positions[live].long(), key_pages.shape[2]
    cos, sin = (table[live] if table.ndim == 3 else table[at, None].to(q.dtype) for table in (cos, sin))
    keys = F.layer_norm(key[live], key.shape[1:], *norm, eps)
    turning = torch.cat((q.unflatten(1, q_out.shape[1:])[live], keys[:, None]), 1)
    if interleaved:
        halves = turning[..., :rope_dim].unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
        turning = torch.cat((halves, turning[..., rope_dim:]), -1)
    turned = apply_rope(turning, cos, sin)
    page = page_table[token_slots[live].long(), at // page_size].long()
    key_pages[page, 0, at % page_size] = turned[:, -1].to(key_pages.dtype)
    for out, values in ((q_out, turned[:, :-1]), (weights_out, weights[live])):
        out.zero_()
        out[live] = values


def choose_tokens(
    q: torch.Tensor, weights: torch.Tensor, key_pages: torch.Tensor, page_table: torch.Tensor,
    token_slots: torch.Tensor, positions: torch.Tensor, chosen: torch.Tensor, max_seq_len: int,
) -> None:  # fmt: skip
    compute, page_size = _compute(q), key_pages.shape[2]
    chosen.fill_(-1)
    live = (token_slots >= 0).nonzero()[:, 0]
    # Tokens of one sequence at a time where they follow one another: its keys are read once.
    owners, counts = torch.unique_consecutive(token_slots[live], return_counts=True)
    for slot, run in zip(owners.tolist(), live.split(counts.tolist()), strict=True):
        length = int(positions[run].max()) + 1
        pages = page_table[slot, : -(-length // page_size)].long()
        keys = key_pages[pages, 0].to(compute).flatten(0, 1)[:length].t()
        rows = (pages[:, None] * page_size + torch.arange(page_size, device=q.device)).flatten()[:length]
        for tile in run.split(max(1, _TILE_ELEMENTS // (length * q.shape[1]))):
            logits = (q[tile].to(compute).flatten(0, 1) @ keys).relu_().view(len(tile), -1, length)
            scores = torch.bmm(weights[tile].to(compute)[:, None], logits)[:, 0]
            _list_best(scores, positions[tile], rows.to(chosen.dtype), chosen, tile)


def _list_best(
    scores: torch.Tensor, positions: torch.Tensor, rows: torch.Tensor, chosen: torch.Tensor, tile: torch.Tensor
) -> None:
    top_k = chosen.shape[1]
    taken = torch.arange(scores.shape[1], device=scores.device) <= positions[:, None]
    if scores.shape[1] > top_k:
        scores.masked_fill_(~taken, -torch.inf)
        least = scores.topk(top_k, -1).values[:, -1:]
        above = scores > least
        equal = (scores == least) & taken
        taken = above | (equal & (equal.cumsum(-1) <= top_k - above.sum(-1, keepdim=True)))
    token, position = taken.nonzero(as_tuple=True)
    chosen[tile[token], (taken.cumsum(-1) - 1)[taken]] = rows[position]


def attend_chosen(
    q_latent: torch.Tensor, q_rope: torch.Tensor, pages: torch.Tensor, chosen: torch.Tensor,
    token_slots: torch.Tensor, positions: torch.Tensor, scale: float, out: torch.Tensor,
    scales: torch.Tensor | None, workspace: DecodeWorkspace | None,
) -> None:  # fmt: skip
    compute, page_size, rank = _compute(q_latent), pages.shape[2], q_latent.shape[2]
    longest = int((chosen >= 0).sum(-1).max()) if len(chosen) else 0
    step = max(1, _TILE_ELEMENTS // (max(1, longest) * pages.shape[3]))
    for low in range(0, len(chosen), step):
        tile = slice(low, low + step)
        listed, at = chosen[tile, :longest] >= 0, chosen[tile, :longest].clamp_min(0).long()
        latents = pages[at // page_size, 0, at % page_size].to(compute)
        if scales is not None:
            latents *= scales[at // page_size, 0][..., None]
        latents.masked_fill_(~listed[..., None], 0.0)
        q = torch.cat((q_latent[tile], q_rope[tile]), -1).to(compute)
        scores = torch.bmm(q, latents.transpose(1, 2)).mul_(scale).masked_fill_(~listed[:, None], -torch.inf)
        weights = torch.softmax(scores, -1).nan_to_num_(0.0) if longest else scores  # padding has no list
        out[tile] = torch.bmm(weights, latents[..., :rank]).to(out.dtype)

"""Torch reference of multi-head latent attention, in float64 where its inputs are."""

import torch
import torch.nn.functional as F

from gossamer.ops.attention import DecodeWorkspace, PrefillSequence
from gossamer.ops.kv_cache.reference import write_scaled
from gossamer.ops.norm.reference import rms_norm
from gossamer.ops.rope.reference import apply_rope

# Latents that are expanded at once, and queries whose scores are held: what bounds a prefill's temporaries.
_PIECE, _QUERY_BLOCK = 1024, 128


def rope_latents(
    q: torch.Tensor, kv: torch.Tensor, norm: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    rope_dim = cos.shape[-1]
    turning = torch.cat((q[..., -rope_dim:], kv[:, None, -rope_dim:]), 1)
    if interleaved:
        turning = turning.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)
    turned = apply_rope(turning, cos, sin)
    latents = torch.cat((rms_norm(kv[:, :-rope_dim], norm, eps), turned[:, -1]), 1)
    return torch.cat((q[..., :-rope_dim], turned[:, :-1]), -1), latents


def write_latents(
    latents: torch.Tensor, pages: torch.Tensor, slots: torch.Tensor, fresh_pages: torch.Tensor | None,
    scales: torch.Tensor | None,
) -> None:  # fmt: skip
    page_size = pages.shape[2]
    if scales is not None:
        write_scaled(latents[:, None], pages, scales, slots // page_size, slots % page_size)
        return
    if fresh_pages is not None:
        pages.index_fill_(0, fresh_pages, 0)
    pages[slots // page_size, 0, slots % page_size] = latents


def rope_write_latents(
    q: torch.Tensor, kv: torch.Tensor, norm: torch.Tensor, eps: float, cos: torch.Tensor, sin: torch.Tensor,
    positions: torch.Tensor, token_slots: torch.Tensor, page_table: torch.Tensor, pages: torch.Tensor,
    q_out: torch.Tensor, *, interleaved: bool, scales: torch.Tensor | None,
) -> None:  # fmt: skip
    live = token_slots >= 0
    at, page_size = positions[live].long(), pages.shape[2]
    cos, sin = (table.view(-1, 1, table.shape[-1])[at].to(q.dtype) for table in (cos, sin))
    turned, latents = rope_latents(q.view_as(q_out)[live], kv[live], norm, eps, cos, sin, interleaved)
    page = page_table[token_slots[live].long(), at // page_size].long()
    write_latents(latents, pages, page * page_size + at % page_size, None, scales)
    q_out.zero_()
    q_out[live] = turned


def _gather(
    pages: torch.Tensor, scales: torch.Tensor | None, index: torch.Tensor | slice, dtype: torch.dtype
) -> torch.Tensor:
    """The tokens of some pages, [tokens, width]."""
    taken = pages[index, 0].to(dtype)
    if scales is not None:
        taken = taken * scales[index][..., None].to(dtype)
    return taken.flatten(0, 1)


def attend(q: torch.Tensor, latents: torch.Tensor, first: int, kv_b: torch.Tensor, scale: float) -> torch.Tensor:
    """Causal attention of q [num, heads, dim] at positions first, first + 1, ... to latents [tokens, width] from 0 on.

    A piece of the keys after the other is expanded, and the softmax carried on from piece to piece.
    """
    (num, heads, head_dim), (_, out_dim, rank) = q.shape, kv_b.shape
    nope_dim = head_dim - (latents.shape[1] - rank)
    v_dim = out_dim - nope_dim
    peak = q.new_full((heads, num, 1), -torch.inf)
    weight, total = torch.zeros_like(peak), q.new_zeros(heads, num, v_dim)
    queries = (q * scale).transpose(0, 1)
    position = torch.arange(first, first + num, device=q.device)
    for low in range(0, first + num, _PIECE):
        piece = latents[low : min(low + _PIECE, first + num)]
        expanded = F.linear(piece[:, :rank], kv_b.flatten(0, 1)).unflatten(1, (heads, out_dim)).transpose(0, 1)
        k = torch.cat((expanded[..., :nope_dim], piece[:, rank:].expand(heads, -1, -1)), -1).transpose(1, 2)
        v = expanded[..., nope_dim:]
        token = torch.arange(low, low + len(piece), device=q.device)
        for start in range(max(0, low - first) // _QUERY_BLOCK * _QUERY_BLOCK, num, _QUERY_BLOCK):
            rows = slice(start, start + _QUERY_BLOCK)
            scores = torch.bmm(queries[:, rows], k)
            scores.masked_fill_(token > position[rows, None], -torch.inf)
            # Before its first visible key a row's maximum is minus infinity, whose differences are NaN.
            highest = torch.maximum(peak[:, rows], scores.amax(-1, keepdim=True)).clamp_min(-1e30)
            fade, scores = torch.exp(peak[:, rows] - highest), torch.exp(scores - highest)
            weight[:, rows] = weight[:, rows] * fade + scores.sum(-1, keepdim=True)
            total[:, rows] = total[:, rows] * fade + torch.bmm(scores, v)
            peak[:, rows] = highest
    return (total / weight).transpose(0, 1)


def sequence_prefill(
    q: torch.Tensor, kv_b: torch.Tensor, pages: torch.Tensor, sequences: list[PrefillSequence], scale: float,
    out: torch.Tensor, scales: torch.Tensor | None,
) -> None:  # fmt: skip
    for seq in sequences:
        rows = slice(seq.start, seq.start + seq.length)
        out[rows] = attend(q[rows], _gather(pages, scales, seq.pages, q.dtype), seq.prefix_len, kv_b, scale)


def latent_prefill(
    q: torch.Tensor, kv_b: torch.Tensor, pages: torch.Tensor, page_table: torch.Tensor, slots: torch.Tensor,
    cu_seqlens_q: torch.Tensor, seq_lens: torch.Tensor, num_context: int, max_q_len: int, scale: float,
    out: torch.Tensor, *, scales: torch.Tensor | None,
) -> None:  # fmt: skip
    """The definition, row by row and in float64 where q is, else in fp32; waits for the device."""
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    bounds, page_size = cu_seqlens_q.tolist(), pages.shape[2]
    out.zero_()
    for slot, seq_len, start, stop in zip(slots.tolist(), seq_lens.tolist(), bounds[:-1], bounds[1:], strict=True):
        if slot < 0 or stop == start:
            continue
        index = page_table[slot, : -(-seq_len // page_size)].long()
        latents = _gather(pages, scales, index, compute)[:seq_len]
        out[start:stop] = attend(
            q[start:stop].to(compute), latents, seq_len - (stop - start), kv_b.to(compute), scale
        ).to(out.dtype)


def latent_decode(
    q_latent: torch.Tensor, q_rope: torch.Tensor, pages: torch.Tensor, page_table: torch.Tensor, slots: torch.Tensor,
    seq_lens: torch.Tensor, scale: float, out: torch.Tensor, *, scales: torch.Tensor | None,
    workspace: DecodeWorkspace | None, max_seq_len: int,
) -> None:  # fmt: skip
    compute = torch.float64 if q_latent.dtype == torch.float64 else torch.float32
    q, rank = torch.cat((q_latent, q_rope), -1).to(compute), q_latent.shape[2]
    out.zero_()
    for row, (slot, seq_len) in enumerate(zip(slots.tolist(), seq_lens.tolist(), strict=True)):
        if slot >= 0 and seq_len > 0:
            index = page_table[slot, : -(-seq_len // pages.shape[2])].long()
            latents = _gather(pages, scales, index, compute)[:seq_len]
            out[row] = (torch.softmax(q[row] @ latents.t() * scale, -1) @ latents[:, :rank]).to(out.dtype)

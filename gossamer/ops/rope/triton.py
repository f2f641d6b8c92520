"""QK norm, clamp, rotary embedding and the paged KV write in one pass over the packed projection."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.ops.dispatch import overlap_options


@triton.jit
def _rope_write_kv_kernel(
    qkv, q_norm, k_norm, cos, sin, positions, token_slots, page_table, k_pages, v_pages, q_out,
    max_pages, page_size, eps, clip,
    NUM_Q: tl.constexpr, NUM_KV: tl.constexpr, HEAD_DIM: tl.constexpr, ROTARY_DIM: tl.constexpr,
    NORM: tl.constexpr, CLIP: tl.constexpr, HEADS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROW: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    # NORM: 0 none, 1 per head, 2 over all heads at once. A program takes HEADS heads of one token, all of one kind.
    q_blocks: tl.constexpr = (NUM_Q + HEADS - 1) // HEADS
    kv_blocks: tl.constexpr = (NUM_KV + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    is_q = block < q_blocks
    is_v = block >= q_blocks + kv_blocks
    kind_heads = tl.where(is_q, NUM_Q, NUM_KV)
    first = tl.where(is_q, block, tl.where(is_v, block - q_blocks - kv_blocks, block - q_blocks)) * HEADS
    kind_start = tl.where(is_q, 0, tl.where(is_v, NUM_Q + NUM_KV, NUM_Q)) * HEAD_DIM
    head = first + tl.arange(0, HEADS)
    dim = tl.arange(0, BLOCK_D)
    half: tl.constexpr = ROTARY_DIM // 2
    # The dimension that a rotation pairs with this one; beyond ROTARY_DIM cos is 1 and sin 0.
    partner = tl.where(dim < half, dim + half, tl.where(dim < ROTARY_DIM, dim - half, dim))
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(token_slots + token)
    live = slot >= 0
    # A padded token reads nothing and leaves zeros in q_out.
    position = tl.where(live, tl.load(positions + token), 0).to(tl.int64)
    row = qkv + token * ((NUM_Q + 2 * NUM_KV) * HEAD_DIM) + kind_start
    limit = tl.where(live, kind_heads, 0)
    mask = (head[:, None] < limit) & (dim[None, :] < HEAD_DIM)
    x = tl.load(row + head[:, None] * HEAD_DIM + dim[None, :], mask, 0.0).to(tl.float32)
    if is_v:
        if CLIP:
            x = tl.minimum(tl.maximum(x, -clip), clip)
    else:
        pair = tl.load(row + head[:, None] * HEAD_DIM + partner[None, :], mask, 0.0).to(tl.float32)
        if NORM > 0:
            weight = q_norm if is_q else k_norm
            if NORM == 1:
                inverse = tl.rsqrt(tl.sum(x * x, 1) / HEAD_DIM + eps)[:, None]
                weight_row = weight + tl.zeros_like(head)[:, None]
            else:
                whole = tl.arange(0, BLOCK_ROW)
                every = tl.load(row + whole, whole < limit * HEAD_DIM, 0.0).to(tl.float32)
                square = tl.sum(every * every)
                inverse = tl.rsqrt(square / (kind_heads * HEAD_DIM) + eps)
                weight_row = weight + head[:, None] * HEAD_DIM
            x = x * inverse * tl.load(weight_row + dim[None, :], mask, 0.0).to(tl.float32)
            pair = pair * inverse * tl.load(weight_row + partner[None, :], mask, 0.0).to(tl.float32)
        if CLIP:
            x = tl.minimum(tl.maximum(x, -clip), clip)
            pair = tl.minimum(tl.maximum(pair, -clip), clip)
        turns = dim < ROTARY_DIM
        c = tl.load(cos + position * ROTARY_DIM + dim, turns, 1.0).to(tl.float32)
        s = tl.load(sin + position * ROTARY_DIM + dim, turns, 0.0).to(tl.float32)
        x = x * c[None, :] + pair * s[None, :]
    if is_q:
        at = (token * NUM_Q + head[:, None]) * HEAD_DIM + dim[None, :]
        tl.store(q_out + at, x.to(q_out.dtype.element_ty), (head[:, None] < NUM_Q) & (dim[None, :] < HEAD_DIM))
    elif live:
        page = tl.load(page_table + slot.to(tl.int64) * max_pages + position // page_size).to(tl.int64)
        at = ((page * NUM_KV + head[:, None]) * page_size + position % page_size) * HEAD_DIM + dim[None, :]
        pages = v_pages if is_v else k_pages
        tl.store(pages + at, x.to(k_pages.dtype.element_ty), mask)


def rope_write_kv(
    qkv: torch.Tensor,
    num_q_heads: int,
    num_kv_heads: int,
    head_dim: int,
    cos: torch.Tensor,
    sin: torch.Tensor,
    positions: torch.Tensor,
    token_slots: torch.Tensor,
    page_table: torch.Tensor,
    k_pages: torch.Tensor,
    v_pages: torch.Tensor,
    q_out: torch.Tensor,
    *,
    q_norm: torch.Tensor | None,
    k_norm: torch.Tensor | None,
    eps: float,
    norm_full: bool,
    clip: float | None,
) -> None:
    num_tokens = qkv.shape[0]
    if not num_tokens:
        return
    # Few tokens: spread the heads over the device. Many: whole kinds, for fewer and larger programs.
    heads = min(4 if num_tokens <= 64 else 16, triton.next_power_of_2(max(num_q_heads, num_kv_heads)))
    grid = (num_tokens, triton.cdiv(num_q_heads, heads) + 2 * triton.cdiv(num_kv_heads, heads))
    _rope_write_kv_kernel[grid](
        qkv, qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, cos, sin, positions, token_slots,
        page_table, k_pages, v_pages, q_out, page_table.shape[1], k_pages.shape[2], eps, clip or 0.0,
        NUM_Q=num_q_heads, NUM_KV=num_kv_heads, HEAD_DIM=head_dim, ROTARY_DIM=cos.shape[-1],
        NORM=0 if q_norm is None else 2 if norm_full else 1, CLIP=clip is not None, HEADS=heads,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_ROW=triton.next_power_of_2(max(num_q_heads, num_kv_heads) * head_dim),
        num_warps=4 if heads > 4 else 2, **overlap_options(qkv),
    )  # fmt: skip

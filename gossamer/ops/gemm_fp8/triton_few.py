"""The routed FP8 experts of one or two tokens on the CUDA cores, which read each touched weight once."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gossamer.ops.dispatch import overlap_options
from gossamer.ops.quantize_fp8.triton import BLOCK, quantize_activation


class Cut(NamedTuple):
    """Columns, groups of 128 at a time, warps and stages of a program of the gate-up product, then of the down one."""

    gate_columns: int = 8
    gate_groups: int = 4
    gate_warps: int = 4
    gate_stages: int = 3
    down_columns: int = 4
    down_warps: int = 4
    down_stages: int = 4


@triton.jit
def _gate_up_kernel(
    q_ptr, scales_ptr, w_ptr, w_scales_ptr, ids_ptr, act_ptr, hidden, inter,
    TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of one assignment for BLOCK_N columns, in fp32."""
    assignment = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    group = tl.arange(0, GROUPS)
    k = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    groups, blocks = tl.cdiv(hidden, GROUP), tl.cdiv(inter, GROUP)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(ids_ptr + assignment).to(tl.int64)
    if expert < 0:
        return
    token = assignment // TOP_K
    w_ptrs = w_ptr + (expert * inter + n)[:, None, None] * 2 * hidden + k[None, :, :]
    scale_at = w_scales_ptr + (expert * 2 * blocks + first // GROUP) * groups + group
    gate_sums = tl.zeros([BLOCK_N, GROUPS], tl.float32)
    up_sums = tl.zeros([BLOCK_N, GROUPS], tl.float32)
    for start in tl.range(0, groups, GROUPS, num_stages=STAGES):
        inside = k < hidden - start * GROUP
        mask = (n < inter)[:, None, None] & inside[None, :, :]
        gate = tl.load(w_ptrs + start * GROUP, mask, 0.0)
        up = tl.load(w_ptrs + hidden + start * GROUP, mask, 0.0)
        x = tl.load(q_ptr + token * hidden + start * GROUP + k, inside, 0.0).to(tl.float32)[None, :, :]
        known = group < groups - start
        scale = tl.load(scales_ptr + token * groups + start + group, known, 0.0)
        gate_scale = scale * tl.load(scale_at + start, known, 0.0)
        up_scale = scale * tl.load(scale_at + blocks * groups + start, known, 0.0)
        gate_sums += tl.sum(gate.to(tl.float32) * x, 2) * gate_scale[None, :]
        up_sums += tl.sum(up.to(tl.float32) * x, 2) * up_scale[None, :]
    gate, up = tl.sum(gate_sums, 1), tl.sum(up_sums, 1)
    tl.store(act_ptr + assignment * inter + n, gate / (1.0 + tl.exp(-gate)) * up, mask=n < inter)


@triton.jit
def _down_kernel(
    q_ptr, scales_ptr, w_ptr, w_scales_ptr, weights_ptr, ids_ptr, out_ptr, hidden, inter,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, GROUP: tl.constexpr, STAGES: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[t, n] = the weighted sum over the token's experts, for BLOCK_N columns."""
    token = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    slots = tl.arange(0, SLOTS)
    columns = tl.arange(0, GROUP)
    groups = tl.cdiv(inter, GROUP)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    ids = tl.load(ids_ptr + token * TOP_K + slots, mask=slots < TOP_K, other=-1).to(tl.int64)
    live = ids >= 0
    weights = tl.load(weights_ptr + token * TOP_K + slots, mask=live & (slots < TOP_K), other=0.0)
    w_ptrs = w_ptr + ((ids[None, :] * hidden + n[:, None]) * inter)[:, :, None] + columns[None, None, :]
    scale_at = (ids * tl.cdiv(hidden, GROUP) + first // GROUP) * groups
    row = token * TOP_K + slots
    sums = tl.zeros([BLOCK_N, SLOTS], tl.float32)
    for group in tl.range(0, groups, num_stages=STAGES):
        inside = live[:, None] & (columns < inter - group * GROUP)[None, :]
        mask = (n < hidden)[:, None, None] & inside[None, :, :]
        w = tl.load(w_ptrs + group * GROUP, mask, 0.0)
        x = tl.load(q_ptr + row[:, None] * inter + group * GROUP + columns[None, :], inside, 0.0)
        scale = tl.load(scales_ptr + row * groups + group, live, 0.0)
        scale *= tl.load(w_scales_ptr + scale_at + group, live, 0.0)
        sums += tl.sum(w.to(tl.float32) * x.to(tl.float32)[None, :, :], 2) * scale[None, :]
    out = tl.sum(sums * weights[None, :], 1)
    tl.store(out_ptr + token * hidden + n, out.to(out_ptr.dtype.element_ty), mask=n < hidden)


def moe_mlp(
    x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor,
    w_gate_up: torch.Tensor, gate_up_scales: torch.Tensor, w_down: torch.Tensor, down_scales: torch.Tensor,
    cut: Cut | None = None,
) -> torch.Tensor:  # fmt: skip
    """`fp8_moe_mlp` of few tokens: no two of them are expected to share an expert."""
    cut = cut or Cut()
    (num_tokens, hidden), top_k, inter = x.shape, ids.shape[1], w_down.shape[2]
    act, out = x.new_empty(ids.numel(), inter, dtype=torch.float32), torch.empty_like(x)
    options = overlap_options(x)
    _gate_up_kernel[(triton.cdiv(inter, cut.gate_columns), ids.numel())](
        q, scales, w_gate_up, gate_up_scales, ids, act, hidden, inter, TOP_K=top_k, BLOCK_N=cut.gate_columns,
        GROUPS=cut.gate_groups, GROUP=BLOCK, STAGES=cut.gate_stages, num_warps=cut.gate_warps, **options,
    )  # fmt: skip
    # Apart, though small: each program of the product would have to quantise all of its input.
    inner, inner_scales = quantize_activation(act, dtype=q.dtype)
    _down_kernel[(triton.cdiv(hidden, cut.down_columns), num_tokens)](
        inner, inner_scales, w_down, down_scales, weights, ids, out, hidden, inter, TOP_K=top_k,
        SLOTS=triton.next_power_of_2(top_k), BLOCK_N=cut.down_columns, GROUP=BLOCK, STAGES=cut.down_stages,
        num_warps=cut.down_warps, **options,
    )  # fmt: skip
    return out

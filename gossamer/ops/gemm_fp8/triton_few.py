"""The routed FP8 experts of one or two tokens on the CUDA cores, which read each touched weight once."""

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from gossamer.ops.activation.triton import gated_activation, swiglu_options
from gossamer.ops.dispatch import overlap_options
from gossamer.ops.quantize_fp8.triton import BLOCK, TRITON_DTYPE, quantize_rows

GATE_COLUMNS, DOWN_COLUMNS = 4, 2  # of a program


@triton.jit
def _gate_up_kernel(
    q_ptr, scales_ptr, w_ptr, w_scales_ptr, ids_ptr, act_ptr, inner_ptr, inner_scales_ptr, counters_ptr, hidden, inter,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    TOP_K: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr, DTYPE: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """silu(gate) * up of one assignment for BLOCK_N columns; the last program of a group of columns quantises it."""
    assignment = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_N
    row = tl.arange(0, 2 * BLOCK_N)
    group = tl.arange(0, GROUPS)
    k = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    groups, inner_groups = tl.cdiv(hidden, GROUP), tl.cdiv(inter, GROUP)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()
    expert = tl.load(ids_ptr + assignment).to(tl.int64)
    if expert < 0:
        return
    token = assignment // TOP_K
    inside, known = k < hidden, group < groups
    w_ptrs = w_ptr + (expert * 2 * inter + first * 2 + row)[:, None, None] * hidden + k[None, :, :]
    w = tl.load(w_ptrs, (first * 2 + row < 2 * inter)[:, None, None] & inside[None, :, :], 0.0)
    x = tl.load(q_ptr + token * hidden + k, inside, 0.0)
    scale = tl.load(scales_ptr + token * groups + group, known, 0.0)
    block = (expert * 2 + row % 2) * inner_groups + first // GROUP
    w_scale = tl.load(w_scales_ptr + block[:, None] * groups + group[None, :], known[None, :], 0.0)
    sums = tl.sum(w.to(tl.float32) * x.to(tl.float32)[None, :, :], 2) * (w_scale * scale[None, :])
    gate, up = tl.split(tl.reshape(tl.sum(sums, 1), [BLOCK_N, 2]))
    n = first + tl.arange(0, BLOCK_N)
    tl.store(act_ptr + assignment * inter + n, gated_activation(gate, up, ALPHA, LIMIT), mask=n < inter)
    tl.debug_barrier()
    own = first // GROUP
    counter = counters_ptr + assignment * inner_groups + own
    if tl.atomic_add(counter, 1, sem="acq_rel") == tl.cdiv(tl.minimum(inter - own * GROUP, GROUP), BLOCK_N) - 1:
        tl.store(counter, 0)
        column = own * GROUP + tl.arange(0, GROUP)[None, :]
        act = tl.load(act_ptr + assignment * inter + column, column < inter, 0.0, cache_modifier=".cg")
        code, code_scale = quantize_rows(act, False, DTYPE)
        tl.store(inner_ptr + assignment * inter + column, code, column < inter)
        tl.store(inner_scales_ptr + assignment * inner_groups + own + tl.arange(0, 1), code_scale)


@triton.jit
def _down_kernel(
    q_ptr, scales_ptr, w_ptr, w_scales_ptr, weights_ptr, ids_ptr, out_ptr, hidden, inter,
    TOP_K: tl.constexpr, SLOTS: tl.constexpr, BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, GROUP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """out[t, n] = the weighted sum over the token's experts, for BLOCK_N columns."""
    token = tl.program_id(1)
    first = tl.program_id(0) * BLOCK_N
    n = first + tl.arange(0, BLOCK_N)
    pair = tl.arange(0, SLOTS * GROUPS)
    slot, group = pair // GROUPS, pair % GROUPS
    k = group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    groups = tl.cdiv(inter, GROUP)
    # The gate-up kernel let this one start after it had waited for the router: ids and weights are final already, and
    # what they choose is on its way before the gate-up kernel ends.
    ids = tl.load(ids_ptr + token * TOP_K + slot, mask=slot < TOP_K, other=-1, cache_modifier=".cg").to(tl.int64)
    known = (ids >= 0) & (group < groups)
    mask = known[:, None] & (k < inter)
    w_ptrs = w_ptr + ((ids[None, :] * hidden + n[:, None]) * inter)[:, :, None] + k[None, :, :]
    if PDL:
        gdc_launch_dependents()
    w = tl.load(w_ptrs, (n < hidden)[:, None, None] & mask[None, :, :], 0.0)
    scale = tl.load(w_scales_ptr + (ids * tl.cdiv(hidden, GROUP) + first // GROUP) * groups + group, known, 0.0)
    scale *= tl.load(weights_ptr + token * TOP_K + slot, known, 0.0, cache_modifier=".cg")
    if PDL:
        gdc_wait()
    assignment = token * TOP_K + slot
    q = tl.load(q_ptr + assignment[:, None] * inter + k, mask, 0.0)
    scale *= tl.load(scales_ptr + assignment * groups + group, known, 0.0)
    sums = tl.sum(w.to(tl.float32) * q.to(tl.float32)[None, :, :], 2) * scale[None, :]
    tl.store(out_ptr + token * hidden + n, tl.sum(sums, 1).to(out_ptr.dtype.element_ty), mask=n < hidden)


@functools.cache
def _counters(device: torch.device, size: int) -> torch.Tensor:
    """Programs that have left their columns; zero between calls, which follow each other on one stream."""
    return torch.zeros(size, dtype=torch.int32, device=device)


def moe_mlp(
    x: torch.Tensor, q: torch.Tensor, scales: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor,
    w_gate_up: torch.Tensor, gate_up_scales: torch.Tensor, w_down: torch.Tensor, down_scales: torch.Tensor,
    swiglu: tuple[float, float] | None = None,
) -> torch.Tensor:  # fmt: skip
    """`fp8_moe_mlp` of few tokens: no two of them are expected to share an expert."""
    (num_tokens, hidden), top_k, inter = x.shape, ids.shape[1], w_down.shape[2]
    groups, inner_groups, options = triton.cdiv(hidden, BLOCK), triton.cdiv(inter, BLOCK), overlap_options(x)
    act, inner = x.new_empty(ids.numel(), inter, dtype=torch.float32), x.new_empty(ids.numel(), inter, dtype=q.dtype)
    inner_scales, out = act.new_empty(ids.numel(), inner_groups), torch.empty_like(x)
    counters = _counters(x.device, triton.next_power_of_2(ids.numel() * inner_groups))
    _gate_up_kernel[(triton.cdiv(inter, GATE_COLUMNS), ids.numel())](
        q, scales, w_gate_up, gate_up_scales, ids, act, inner, inner_scales, counters, hidden, inter, TOP_K=top_k,
        BLOCK_N=GATE_COLUMNS, GROUPS=triton.next_power_of_2(groups), GROUP=BLOCK, DTYPE=TRITON_DTYPE[q.dtype],
        num_warps=4, **swiglu_options(swiglu), **options,
    )  # fmt: skip
    _down_kernel[(triton.cdiv(hidden, DOWN_COLUMNS), num_tokens)](
        inner, inner_scales, w_down, down_scales, weights, ids, out, hidden, inter, TOP_K=top_k,
        SLOTS=triton.next_power_of_2(top_k), BLOCK_N=DOWN_COLUMNS, GROUPS=triton.next_power_of_2(inner_groups),
        GROUP=BLOCK, num_warps=2, **options,
    )  # fmt: skip
    return out

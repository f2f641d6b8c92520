"""Gated activations on the device: elementwise, bound by memory."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from gossamer.ops.dispatch import overlap_options


@triton.jit
def _silu_mul_kernel(gate_up, out, numel, width, BLOCK: tl.constexpr, PDL: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = at < numel
    gate_at = at + (at // width) * width
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    gate = tl.load(gate_up + gate_at, valid, 0.0).to(tl.float32)
    up = tl.load(gate_up + gate_at + width, valid, 0.0).to(tl.float32)
    # silu(x) = x sigmoid(x), written so that a large negative gate gives -0 and not 0 * inf.
    tl.store(out + at, (gate / (1.0 + tl.exp(-gate)) * up).to(out.dtype.element_ty), valid)


def silu_mul(gate_up: torch.Tensor) -> torch.Tensor:
    if gate_up.shape[-1] % 2 or not gate_up.is_contiguous():
        raise ValueError("silu_mul needs a contiguous tensor with an even last dimension")
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    if out.numel():
        block = 1024
        _silu_mul_kernel[(triton.cdiv(out.numel(), block),)](
            gate_up, out, out.numel(), width, BLOCK=block, num_warps=4, **overlap_options(gate_up)
        )
    return out

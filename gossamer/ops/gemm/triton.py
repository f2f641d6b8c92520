"""Products of few rows on the device, bound by reading the weight once.

`_rows` holds whole weight rows in registers and multiplies on the CUDA cores: one or two rows of x, the RMSNorm before
them and, for FP8 weights, the quantisation of x folded in. `_tiles` streams weight tiles through shared memory to the
tensor cores.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gossamer.ops.dispatch import overlap_options
from gossamer.ops.quantize_fp8.triton import BLOCK as FP8_BLOCK
from gossamer.ops.quantize_fp8.triton import quantize_rows

MOST_ROWS = 64
MOST_FUSED_ROWS = 2


class Config(NamedTuple):
    """How a product is cut: BLOCK_N weight rows a program; block_k 0 chooses `_rows`."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 1
    split_k: int = 1
    num_registers: int | None = None
    """Of a thread at most."""


@triton.jit
def _sum_rows(x, residual, at, mask, ADD: tl.constexpr):
    h = tl.load(x + at, mask, 0.0)
    if ADD:
        # What is normalised is what is kept: the sum rounded to the residual's dtype.
        h = (h.to(tl.float32) + tl.load(residual + at, mask, 0.0).to(tl.float32)).to(residual.dtype.element_ty)
    return h


@triton.jit
def _rows(
    x, residual, norm_weight, weight, weight_scales, bias, out, new_residual, normed, num_out, width, groups, eps,
    M: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr,
    GROUP: tl.constexpr, UE8M0: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """GROUP: 0, or how many numbers of x, and of a row of FP8 weights, share a scale."""
    pid = tl.program_id(0)
    n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = k < width
    # Weights do not depend on earlier kernels: their reads may overlap the end of the one before.
    w = tl.load(
        weight + n[:, None].to(tl.int64) * width + k[None, :], (n < num_out)[:, None] & inside[None, :], 0.0,
        eviction_policy="evict_first",
    )  # fmt: skip
    if GROUP:
        group = tl.arange(0, BLOCK_K // GROUP)
        w_scale = tl.load(weight_scales + pid * BLOCK_N // GROUP * groups + group, group < groups, 0.0)
    if NORM:
        scale = tl.load(norm_weight + k, inside, 0.0).to(tl.float32)
    if BIAS:
        shift = tl.load(bias + n, n < num_out, 0.0).to(tl.float32)
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for m in tl.static_range(M):
        row = _sum_rows(x, residual, m * width + k, inside, ADD)
        if NORM:
            full = row.to(tl.float32)
            inverse = tl.rsqrt(tl.sum(full * full) / width + eps)
            row = (full * inverse * scale).to(x.dtype.element_ty)
            if ADD or NORMED:
                part = pid * CHUNK + tl.arange(0, CHUNK)
                mine = part < width
                h = _sum_rows(x, residual, m * width + part, mine, ADD)
                if ADD:
                    tl.store(new_residual + m * width + part, h, mine)
                if NORMED:
                    g = tl.load(norm_weight + part, mine, 0.0).to(tl.float32)
                    tl.store(normed + m * width + part, (h.to(tl.float32) * inverse * g).to(x.dtype.element_ty), mine)
        factor = row.to(tl.float32)
        if GROUP:
            grouped = tl.reshape(factor, [BLOCK_K // GROUP, GROUP])
            code, code_scale = quantize_rows(grouped, UE8M0, weight.dtype.element_ty)
            factor = tl.reshape(code.to(tl.float32) * (code_scale * w_scale)[:, None], [BLOCK_K])
        y = tl.sum(w.to(tl.float32) * factor[None, :], 1)
        if BIAS:
            y += shift
        tl.store(out + m * num_out + n, y.to(out.dtype.element_ty), n < num_out)


@triton.jit(do_not_specialize=["num_rows"])
def _tiles(
    x, weight, bias, out, partial, counters, num_rows, num_out, width,
    BIAS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
    EVEN_K: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pid, split = tl.program_id(0), tl.program_id(1)
    span = tl.cdiv(tl.cdiv(width, SPLIT_K), BLOCK_K) * BLOCK_K
    start = split * span
    n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    # Rows past the end repeat the last one; nothing of them is stored.
    w_row = weight + tl.minimum(n, num_out - 1)[:, None].to(tl.int64) * width
    x_row = x + tl.minimum(m, num_rows - 1)[None, :] * width
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    for k0 in range(start, tl.minimum(start + span, width), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if EVEN_K:
            w = tl.load(w_row + k[None, :], eviction_policy="evict_first")
            a = tl.load(x_row + k[:, None])
        else:
            w = tl.load(w_row + k[None, :], k[None, :] < width, 0.0)
            a = tl.load(x_row + k[:, None], k[:, None] < width, 0.0)
        acc = tl.dot(w, a.to(weight.dtype.element_ty), acc, input_precision="ieee")
    if SPLIT_K > 1:
        # The last of a tile's programs adds the parts in their order, whatever order they came in.
        tile = n[:, None] * BLOCK_M + m[None, :]
        stride = tl.num_programs(0) * BLOCK_N * BLOCK_M
        tl.store(partial + split * stride + tile, acc)
        tl.debug_barrier()
        if tl.atomic_add(counters + pid, 1, sem="acq_rel") < SPLIT_K - 1:
            return
        tl.store(counters + pid, 0)
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        for s in tl.static_range(SPLIT_K):
            acc += tl.load(partial + s * stride + tile, cache_modifier=".cg")
    if BIAS:
        acc += tl.load(bias + n, n < num_out, 0.0).to(tl.float32)[:, None]
    where = m[None, :].to(tl.int64) * num_out + n[:, None]
    tl.store(out + where, acc.to(out.dtype.element_ty), (n < num_out)[:, None] & (m < num_rows)[None, :])


def choose(num_rows: int, num_out: int, width: int, itemsize: int = 2, fused: bool = False) -> Config:
    """The cut that measured fastest (`benchmarks/ops/bench_linear.py --sweep` times them all)."""
    if itemsize == 1:  # every program repeats the quantisation: few and large ones
        return Config(max(1, min(16, 32768 // triton.next_power_of_2(width))), 0, 8)
    if fused and num_out >= 1024:
        # Every program repeats the norm, which wants few of them: as many rows of weight as registers hold. A fifth
        # program on a multiprocessor reads Qwen3-30B-A3B's q, k and v in one wave.
        block_n = max(1, min(8, 16384 // triton.next_power_of_2(width)))
        return Config(block_n, 0, 4, num_registers=96 if num_rows == 1 and width <= 2048 else None)
    if fused or (num_rows <= 2 and itemsize > 2 and width <= 8192):
        return Config(1, 0, 4)
    whole, most = triton.next_power_of_2(width), 1 << max(0, (num_out // 128).bit_length() - 1)
    if num_rows == 1 and width * itemsize <= 32768:
        return Config(min(most, 8 if whole <= 1024 else 2 if whole == 2048 else 1), 0, 4)
    if num_rows == 2 and itemsize <= 2 and (width <= 4096 or (num_out > 4096 and width <= 16384)):
        return Config(min(most, 8, max(2, 4096 // whole)), 0, 4) if whole <= 4096 else Config(1, 0, 8)
    if itemsize > 2:
        return Config(32, 64, 4, 3, 4 if num_out <= 4096 else 1)
    if num_out <= 512:
        return Config(32, 256, 4, 3, 4)
    if num_out <= 4096:
        return Config(64, 256, 4, 3, 4)
    return Config(64, 256, 4, 3) if num_rows <= 16 and num_out <= 16384 else Config(64, 128, 4, 5)


@functools.cache
def _counters(device: torch.device, stream: int) -> torch.Tensor:
    return torch.zeros(4096, dtype=torch.int32, device=device)


def arrival_counters(x: torch.Tensor) -> torch.Tensor:
    """Counters of split products, zero between them: those of one stream run one after the other."""
    return _counters(x.device, torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0)


def _check(x: torch.Tensor, weight: torch.Tensor, most_rows: int, *others: torch.Tensor | None) -> None:
    if not all(t.is_contiguous() for t in (x, weight, *others) if t is not None) or weight.shape[1] != x.shape[1]:
        raise ValueError(f"product of {tuple(x.shape)} and {tuple(weight.shape)} needs contiguous, matching tensors")
    if x.shape[0] > most_rows:
        raise ValueError(f"{x.shape[0]} rows: this product takes at most {most_rows}")


def few_row_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype,
    config: Config | None = None, fp8: tuple[torch.Tensor, bool] | None = None,
) -> torch.Tensor:  # fmt: skip
    _check(x, weight, MOST_ROWS if fp8 is None else MOST_FUSED_ROWS, bias)
    (num_rows, width), num_out = x.shape, weight.shape[0]
    config = config or choose(num_rows, num_out, width, weight.element_size())
    if not config.block_k:
        return _launch_rows(x, None, None, 0.0, weight, bias, out_dtype, False, fp8, config)[0]
    out = x.new_empty(num_rows, num_out, dtype=out_dtype)
    if not out.numel():
        return out
    block_n, block_k, num_warps, num_stages, split_k = config[:5]
    programs, block_m = triton.cdiv(num_out, block_n), max(16, triton.next_power_of_2(num_rows))
    partial = counters = x  # not touched unless split
    if split_k > 1:
        partial = x.new_empty(split_k * programs * block_n * block_m, dtype=torch.float32)
        counters = arrival_counters(x)
    _tiles[(programs, split_k)](
        x, weight, x if bias is None else bias, out, partial, counters, num_rows, num_out, width,
        BIAS=bias is not None, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, SPLIT_K=split_k,
        EVEN_K=width % (split_k * block_k) == 0, num_warps=num_warps, num_stages=num_stages, **overlap_options(x),
    )  # fmt: skip
    return out


def add_rms_norm_linear(
    x: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor, eps: float, weight: torch.Tensor,
    bias: torch.Tensor | None, out_dtype: torch.dtype, keep_normed: bool, config: Config | None = None,
    fp8: tuple[torch.Tensor, bool] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    _check(x, weight, MOST_FUSED_ROWS, bias, residual, norm_weight)
    config = config or choose(x.shape[0], weight.shape[0], x.shape[1], weight.element_size(), fused=True)
    return _launch_rows(x, residual, norm_weight, eps, weight, bias, out_dtype, keep_normed, fp8, config)


def _launch_rows(
    x: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor | None, eps: float, weight: torch.Tensor,
    bias: torch.Tensor | None, out_dtype: torch.dtype, keep_normed: bool, fp8: tuple[torch.Tensor, bool] | None,
    config: Config,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    (num_rows, width), num_out = x.shape, weight.shape[0]
    out = x.new_empty(num_rows, num_out, dtype=out_dtype)
    summed = x if residual is None else torch.empty_like(residual)
    normed = torch.empty_like(x) if keep_normed else None
    if out.numel():
        programs = triton.cdiv(num_out, config.block_n)
        # What is absent is compiled out; x stands in for it.
        weight_scales, ue8m0 = fp8 or (x, False)
        inputs = (x if t is None else t for t in (residual, norm_weight, weight, weight_scales, bias))
        _rows[(programs,)](
            x, *inputs, out, summed, x if normed is None else normed, num_out, width, triton.cdiv(width, FP8_BLOCK),
            eps, M=num_rows, NORM=norm_weight is not None, ADD=residual is not None, NORMED=keep_normed,
            BIAS=bias is not None, GROUP=FP8_BLOCK if fp8 else 0, UE8M0=ue8m0, BLOCK_N=config.block_n,
            BLOCK_K=max(FP8_BLOCK if fp8 else 1, triton.next_power_of_2(width)),
            CHUNK=triton.next_power_of_2(triton.cdiv(width, programs)), num_warps=config.num_warps,
            **overlap_options(x), **({"maxnreg": config.num_registers} if config.num_registers else {}),
        )  # fmt: skip
    return out, summed, normed

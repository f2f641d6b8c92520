"""Products of few rows on the device, bound by reading the weight once; the RMSNorm before them is folded in.

Two kernels: `_rows` holds whole weight rows in registers and multiplies on the CUDA cores (1 to 4 rows of x); `_tiles`
streams weight tiles through shared memory to the tensor cores.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from gossamer.ops.dispatch import overlap_options

MOST_ROWS = 64
# Weights up to this size are fetched into L2 while the kernel ahead still runs; it must leave room for the rest.
PREFETCH_BYTES = 24 << 20


class Config(NamedTuple):
    """How a product is cut: BLOCK_N weight rows a program; block_k 0 chooses `_rows`."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int = 1
    split_k: int = 1


@triton.jit
def _sum_rows(x, residual, at, mask, ADD: tl.constexpr):
    h = tl.load(x + at, mask, 0.0)
    if ADD:
        # What is normalised is what is kept: the sum rounded to the residual's dtype.
        h = (h.to(tl.float32) + tl.load(residual + at, mask, 0.0).to(tl.float32)).to(residual.dtype.element_ty)
    return h


@triton.jit
def _rows(
    x, residual, norm_weight, weight, bias, out, new_residual, normed, num_out, width, eps,
    M: tl.constexpr, NORM: tl.constexpr, ADD: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, CHUNK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    inside = k < width
    # Weights do not depend on earlier kernels: their reads may overlap the end of the one before.
    w = tl.load(
        weight + n[:, None].to(tl.int64) * width + k[None, :], (n < num_out)[:, None] & inside[None, :], 0.0,
        eviction_policy="evict_first",
    )  # fmt: skip
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
        y = tl.sum(w.to(tl.float32) * row.to(tl.float32)[None, :], 1)
        if BIAS:
            y += shift
        tl.store(out + m * num_out + n, y.to(out.dtype.element_ty), n < num_out)


@triton.jit
def _prefetch(weight, n, start, span, width, num_out, BLOCK_N: tl.constexpr, THREADS: tl.constexpr):
    # One bulk copy into L2 a thread covers the program's weights before anything waits.
    per_row: tl.constexpr = max(1, THREADS // BLOCK_N)
    piece = tl.arange(0, max(THREADS, BLOCK_N))
    row = tl.minimum(n * BLOCK_N + piece // per_row, num_out - 1)
    size = span * (weight.dtype.element_ty.primitive_bitwidth // 8) // per_row
    address = (weight + row.to(tl.int64) * width + start).to(tl.int64) + (piece % per_row) * size
    tl.inline_asm_elementwise(
        "cp.async.bulk.prefetch.L2.global [$1], $2; mov.b32 $0, 0;", "=r,l,r", [address, size], tl.int32, False, 1
    )


@triton.jit(do_not_specialize=["num_rows"])
def _tiles(
    x, residual, norm_weight, weight, bias, out, new_residual, normed, partial, counters, num_rows, num_out, width, eps,
    NORM: tl.constexpr, ADD: tl.constexpr, NORMED: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, EVEN_K: tl.constexpr,
    CHUNK: tl.constexpr, PREFETCH: tl.constexpr, THREADS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    pid, split = tl.program_id(0), tl.program_id(1)
    span = tl.cdiv(tl.cdiv(width, SPLIT_K), BLOCK_K) * BLOCK_K
    start = split * span
    if PREFETCH:
        _prefetch(weight, pid, start, span, width, num_out, BLOCK_N, THREADS)
    n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    m = tl.arange(0, BLOCK_M)
    # Rows past the end repeat the last one; nothing of them is stored.
    w_row = weight + tl.minimum(n, num_out - 1)[:, None].to(tl.int64) * width
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    squares = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    for k0 in range(start, tl.minimum(start + span, width), BLOCK_K):
        k = k0 + tl.arange(0, BLOCK_K)
        if EVEN_K:
            w = tl.load(w_row + k[None, :], eviction_policy="evict_first")
        else:
            w = tl.load(w_row + k[None, :], k[None, :] < width, 0.0)
        mask = (m < num_rows)[None, :] & (k < width)[:, None]
        a = _sum_rows(x, residual, m[None, :] * width + k[:, None], mask, ADD)
        if NORM:
            full = a.to(tl.float32)
            squares += full * full
            a = full * tl.load(norm_weight + k, k < width, 0.0).to(tl.float32)[:, None]
        acc = tl.dot(w, a.to(weight.dtype.element_ty), acc, input_precision="ieee")
    if NORM:
        # The root mean square is one factor a row: it may follow the product.
        inverse = tl.rsqrt(tl.sum(squares, 0) / width + eps)
        acc = acc * inverse[None, :]
        if ADD or NORMED:
            part = pid * CHUNK + tl.arange(0, CHUNK)
            mine = (m < num_rows)[:, None] & (part < width)[None, :]
            at = m[:, None] * width + part[None, :]
            h = _sum_rows(x, residual, at, mine, ADD)
            if ADD:
                tl.store(new_residual + at, h, mine)
            if NORMED:
                g = tl.load(norm_weight + part, part < width, 0.0).to(tl.float32)
                value = h.to(tl.float32) * inverse[:, None] * g[None, :]
                tl.store(normed + at, value.to(x.dtype.element_ty), mine)
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


def choose(num_rows: int, num_out: int, width: int) -> Config:
    """The fastest measured cut for a product (benchmarks/ops/bench_linear.py --sweep enumerates them)."""
    if num_rows <= 2 and width <= 8192:
        return Config(4, 0, 4)
    if num_rows <= 16:
        return Config(16 if num_out <= 4096 else 32, 256 if width % 256 == 0 else 128, 4, 4)
    return Config(64, 128, 4, 4)


@functools.cache
def _counters(device: torch.device) -> torch.Tensor:
    """Arrival counters of split products; every kernel leaves them at zero. Products of one device share a stream."""
    return torch.zeros(4096, dtype=torch.int32, device=device)


def few_row_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    config: Config | None = None,
) -> torch.Tensor:
    return _launch(x, weight, bias, out_dtype, config, None, None, 0.0, False)[0]


def add_rms_norm_linear(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    keep_normed: bool,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    out, summed, normed = _launch(x, weight, bias, out_dtype, config, residual, norm_weight, eps, keep_normed)
    return out, x if residual is None else summed, normed if keep_normed else None


def _launch(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    out_dtype: torch.dtype,
    config: Config | None,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor | None,
    eps: float,
    keep_normed: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    (num_rows, width), num_out = x.shape, weight.shape[0]
    given = (x, weight, bias, residual, norm_weight)
    if not all(t.is_contiguous() for t in given if t is not None) or weight.shape[1] != width:
        raise ValueError(f"product of {tuple(x.shape)} and {tuple(weight.shape)} needs contiguous, matching tensors")
    if num_rows > MOST_ROWS:
        raise ValueError(f"{num_rows} rows: this product takes at most {MOST_ROWS}")
    out = x.new_empty(num_rows, num_out, dtype=out_dtype)
    summed = x if residual is None else torch.empty_like(residual)
    normed = torch.empty_like(x) if keep_normed else x
    if not (num_rows and num_out):
        return out, summed, normed
    block_n, block_k, num_warps, num_stages, split_k = config or choose(num_rows, num_out, width)
    split_k = split_k if norm_weight is None else 1
    programs = triton.cdiv(num_out, block_n)
    unused = x  # stands in for tensors that the kernel was compiled not to touch
    tensors = (*(unused if t is None else t for t in (residual, norm_weight, weight, bias)), out, summed, normed)
    flags = {
        "NORM": norm_weight is not None,
        "ADD": residual is not None,
        "NORMED": keep_normed,
        "BIAS": bias is not None,
        "BLOCK_N": block_n,
        "CHUNK": triton.next_power_of_2(triton.cdiv(width, programs)),
        "num_warps": num_warps,
        **overlap_options(x),
    }
    if not block_k:
        block_k = triton.next_power_of_2(width)
        _rows[(programs,)](x, *tensors, num_out, width, eps, M=num_rows, BLOCK_K=block_k, **flags)
        return out, summed, normed
    block_m = max(16, triton.next_power_of_2(num_rows))
    partial, counters = unused, unused
    if split_k > 1:
        partial = x.new_empty(split_k * programs * block_n * block_m, dtype=torch.float32)
        counters = _counters(x.device)
    even = width % (split_k * block_k) == 0
    threads = 32 * num_warps
    row_bytes = width // split_k * weight.element_size()
    prefetch = even and row_bytes % (16 * max(1, threads // block_n)) == 0 and weight.nbytes <= PREFETCH_BYTES
    _tiles[(programs, split_k)](
        x, *tensors, partial, counters, num_rows, num_out, width, eps, BLOCK_M=block_m, BLOCK_K=block_k,
        SPLIT_K=split_k, EVEN_K=even, PREFETCH=prefetch and flags["PDL"], THREADS=threads, num_stages=num_stages,
        **flags,
    )  # fmt: skip
    return out, summed, normed

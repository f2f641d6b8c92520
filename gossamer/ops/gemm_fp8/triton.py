"""FP8 products on the device: dense and by expert, promoted to fp32 with their scales after every 128 of K.

One kernel holds tiles of either operand in front: with few rows the weight's are (a tensor core wants 64), with many
x's. Experts' gate and up rows alternate in memory; a tile reads both as matrices of twice the row length.
"""

import functools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
from triton.tools.tensor_descriptor import TensorDescriptor

from gossamer.ops.activation.triton import gated_activation, swiglu_options
from gossamer.ops.dispatch import device_users, is_hopper, overlap_options
from gossamer.ops.gemm.triton import arrival_counters
from gossamer.ops.gemm_fp8 import hopper, hopper_few, hopper_grouped, triton_few
from gossamer.ops.gemm_fp8.hopper import HopperConfig
from gossamer.ops.gemm_fp8.hopper_few import FewConfig
from gossamer.ops.gemm_fp8.hopper_grouped import GroupedConfig
from gossamer.ops.moe.triton import combine, sort_by_expert
from gossamer.ops.norm.triton import add_rms_norm, add_rms_norm_fp8
from gossamer.ops.quantize_fp8 import Quantized
from gossamer.ops.quantize_fp8.triton import TRITON_DTYPE, fp8_like, quantize_activation, quantize_rows

BLOCK_K = 128
GEMV_ROWS = 1  # up to here dense products run on the CUDA cores, which start sooner
GEMV_TOKENS = 2  # up to here hardly any two tokens share an expert
GEMV_WIDTH = 8192  # a row of the weight is held in registers
DOT_ROWS, DOT_WIDTH = 8, 4096  # or 16 of them, which tensor cores multiply by up to so many rows


@triton.jit
def _multiply(acc, w, a, scale, w_scale, SWAP: tl.constexpr, PROMOTE: tl.constexpr, EXACT: tl.constexpr):
    """acc + (a @ w.T) * scale[row of a] * w_scale, transposed with SWAP. Without PROMOTE tensor cores keep the sum.

    EXACT: products of fp16, which holds every FP8 number, are summed in fp32; FP8 tensor cores keep 14 bits of sums.
    """
    if EXACT:
        w = w.to(tl.float16)
        a = a.to(tl.float16)
    if SWAP:
        if PROMOTE:
            acc += tl.dot(w, a.T) * (scale * w_scale)[None, :]
        else:
            acc = tl.dot(w, a.T, acc)
    else:
        if PROMOTE:
            acc += tl.dot(a, w.T) * (scale * w_scale)[:, None]
        else:
            acc = tl.dot(a, w.T, acc)
    return acc


@triton.jit
def _add_splits(acc, partial, offsets, stride, SPLIT_K: tl.constexpr):
    """The sum of what the programs of a tile left in `partial`, in their order."""
    acc = tl.zeros_like(acc)
    for split in tl.static_range(SPLIT_K):
        acc += tl.load(partial + split * stride + offsets, cache_modifier=".cg")
    return acc


@triton.jit(do_not_specialize=["num_rows", "row_stride", "group_stride", "scale_stride"])
def _product_kernel(
    a_ptr, a_desc, a_scales_ptr, w_desc, w_scales_ptr, bias_ptr, out_ptr, out_scales_ptr, rows_ptr, block_expert_ptr,
    num_blocks_ptr, partial_ptr, counters_ptr, num_rows, N, K, row_stride, group_stride, scale_stride,
    ALPHA: tl.constexpr, LIMIT: tl.constexpr,
    TOP_K: tl.constexpr, GATED: tl.constexpr, BLOCK_SCALES: tl.constexpr, CHANNEL_STEP: tl.constexpr,
    BIAS: tl.constexpr, QUANTIZE: tl.constexpr, PROMOTE: tl.constexpr, EXACT: tl.constexpr, DTYPE: tl.constexpr,
    SWAP: tl.constexpr, PARTS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
    SPLIT_K: tl.constexpr, FLATTEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Tiles of a @ w.T. TOP_K 0: dense, row by row. Else blocks of rows in the order of `rows_ptr`, each of one expert.

    GATED: a's rows are gathered by token, parts are gate and up, silu(gate) * up is stored, fp32 or quantised. Else
    parts are neighbouring columns. Results are in the order of `rows_ptr`.
    """
    EARLY: tl.constexpr = TOP_K > 0 and not GATED and not FLATTEN
    STEP: tl.constexpr = BLOCK_N if GATED else BLOCK_N * PARTS
    HEIGHT: tl.constexpr = BLOCK_N if SWAP else BLOCK_M
    WIDTH: tl.constexpr = BLOCK_M if SWAP else BLOCK_N
    n_tiles, n_blocks, groups = tl.cdiv(N, STEP), tl.cdiv(N, 128), tl.cdiv(K, 128)
    span = tl.cdiv(groups, SPLIT_K) * 128
    start = tl.program_id(1) * span
    columns = tl.arange(0, 128)
    if PDL:
        if GATED:
            gdc_wait()
        gdc_launch_dependents()  # of gate and up, when the order is there: what follows reads it ahead of its wait
        if not EARLY:
            gdc_wait()
    num_blocks = tl.load(num_blocks_ptr, cache_modifier=".cg") if TOP_K else tl.cdiv(num_rows, BLOCK_M)
    for tile in tl.range(tl.program_id(0), num_blocks * n_tiles, tl.num_programs(0), flatten=FLATTEN):
        # Tiles that run at one time share rows and columns, so that both come from L2.
        band = tile // (GROUP_M * n_tiles) * GROUP_M
        height = tl.minimum(num_blocks - band, GROUP_M)
        block = band + tile % (GROUP_M * n_tiles) % height
        n = tile % (GROUP_M * n_tiles) // height * STEP
        position = block * BLOCK_M + tl.arange(0, BLOCK_M)
        expert = tl.load(block_expert_ptr + block, cache_modifier=".cg") if TOP_K else 0
        row = tl.load(rows_ptr + position, cache_modifier=".cg") if TOP_K else position
        if PDL and EARLY:
            gdc_wait()
        inside = row < num_rows
        a_row = row // TOP_K if GATED else position
        w_row = expert * N + n
        # Past the end the last block's scale serves: nothing there is stored.
        scale_row0 = ((expert * 2 if GATED else expert) * n_blocks + n // 128) * groups
        last = tl.minimum((n + BLOCK_N) // 128, n_blocks - 1)
        scale_row1 = (((expert * 2 + 1) * n_blocks + n // 128) if GATED else (expert * n_blocks + last)) * groups
        acc0 = tl.zeros([HEIGHT, WIDTH], tl.float32)
        acc1 = tl.zeros([HEIGHT, WIDTH], tl.float32)
        for k in range(start, tl.minimum(start + span, K), 128):
            group = k // 128
            scale = tl.load(a_scales_ptr + a_row * row_stride + group * group_stride, inside, 0.0)
            # Loaded ahead of the products and used behind them, which hide the time that takes.
            w_scale0 = tl.load(w_scales_ptr + scale_row0 + group) if BLOCK_SCALES else 1.0
            w_scale1 = tl.load(w_scales_ptr + scale_row1 + group) if BLOCK_SCALES and PARTS == 2 else 1.0
            if GATED:
                mask = inside[:, None] & (columns < K - k)[None, :]
                a = tl.load(a_ptr + a_row[:, None].to(tl.int64) * K + k + columns[None, :], mask=mask, other=0.0)
            else:
                a = a_desc.load([block * BLOCK_M, k])
            acc0 = _multiply(acc0, w_desc.load([w_row, k]), a, scale, w_scale0, SWAP, PROMOTE, EXACT)
            if PARTS == 2:
                w1 = w_desc.load([w_row, K + k] if GATED else [w_row + BLOCK_N, k])
                acc1 = _multiply(acc1, w1, a, scale, w_scale1, SWAP, PROMOTE, EXACT)
        if SPLIT_K > 1:
            # The last of a tile's programs adds the parts in their order, whatever order they came in.
            AREA: tl.constexpr = HEIGHT * WIDTH
            offsets = tl.arange(0, HEIGHT)[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :] + tile * (PARTS * AREA)
            stride = tl.num_programs(0) * PARTS * AREA
            tl.store(partial_ptr + tl.program_id(1) * stride + offsets, acc0)
            if PARTS == 2:
                tl.store(partial_ptr + tl.program_id(1) * stride + offsets + AREA, acc1)
            tl.debug_barrier()
            arrived = tl.atomic_add(counters_ptr + tile, 1, sem="acq_rel")
            inside = row < tl.where(arrived == SPLIT_K - 1, num_rows, 0)
            if arrived == SPLIT_K - 1:
                tl.store(counters_ptr + tile, 0)
                acc0 = _add_splits(acc0, partial_ptr, offsets, stride, SPLIT_K)
                if PARTS == 2:
                    acc1 = _add_splits(acc1, partial_ptr, offsets + AREA, stride, SPLIT_K)
        for part in tl.static_range(1 if GATED else PARTS):
            out_column = n + part * BLOCK_N + tl.arange(0, BLOCK_N)
            known = out_column < N
            acc = acc1 if part else acc0
            y = acc.T if SWAP else acc
            if not PROMOTE:
                y *= tl.load(a_scales_ptr + a_row * row_stride, inside, 0.0)[:, None]
                y *= tl.load(w_scales_ptr + scale_row0) if BLOCK_SCALES else 1.0
            if not BLOCK_SCALES:
                y *= tl.load(w_scales_ptr + out_column * CHANNEL_STEP, known, 0.0)[None, :]
            if GATED:
                up = acc1.T if SWAP else acc1
                y = tl.where(known[None, :], gated_activation(y, up, ALPHA, LIMIT), 0.0)
            if BIAS:
                y += tl.load(bias_ptr + out_column, known, 0.0).to(tl.float32)[None, :]
            out_ptrs = out_ptr + position[:, None].to(tl.int64) * N + out_column[None, :]
            if QUANTIZE:
                q, out_scale = quantize_rows(y, False, DTYPE)
                tl.store(out_ptrs, q, mask=inside[:, None] & known[None, :])
                tl.store(out_scales_ptr + n // 128 * scale_stride + position, out_scale, mask=inside)
            else:
                tl.store(out_ptrs, y.to(out_ptr.dtype.element_ty), mask=inside[:, None] & known[None, :])
    if PDL and EARLY:
        gdc_wait()


@triton.jit(do_not_specialize=["num_rows", "row_stride", "group_stride"])
def _rows_kernel(
    q, scales, weight, w_scales, bias, out, num_rows, num_out, width, groups, row_stride, group_stride,
    M: tl.constexpr, BLOCK_SCALES: tl.constexpr, CHANNEL_STEP: tl.constexpr, BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr, GROUPS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """BLOCK_N whole rows of the weight times a row of x on the CUDA cores, or up to M (8) on the tensor cores."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    group = tl.arange(0, GROUPS)
    k = group[:, None] * 128 + tl.arange(0, 128)[None, :]
    mask = (n < num_out)[:, None, None] & (k < width)[None, :, :]
    if PDL:
        gdc_launch_dependents()
    # Weights do not depend on earlier kernels: their reads may overlap the end of the one before.
    w = tl.load(weight + n[:, None, None].to(tl.int64) * width + k[None, :, :], mask, 0.0)
    block = tl.program_id(0) * BLOCK_N // 128 * groups + group[:, None]
    shared = tl.load(w_scales + block, (group < groups)[:, None], 0.0) if BLOCK_SCALES else 1.0
    channel = 1.0 if BLOCK_SCALES else tl.load(w_scales + n * CHANNEL_STEP, n < num_out, 0.0)[:, None]
    if M > 1:  # the warps share the groups of K; fp16 holds every FP8 number
        w = tl.permute(w, (1, 0, 2)).to(tl.float16)
    if PDL:
        gdc_wait()
    m = tl.arange(0, M)[None, :]
    inside = (m < num_rows) & (group < groups)[:, None]
    x = tl.load(q + m[:, None, :] * width + k[:, :, None], inside[:, None, :] & (k < width)[:, :, None], 0.0)
    scale = tl.load(scales + m * row_stride + group[:, None] * group_stride, inside, 0.0) * shared
    if M > 1:
        y = tl.sum(tl.dot(w, x.to(tl.float16)) * scale[:, None, :], 0)
    else:
        x = tl.reshape(x.to(tl.float32), [GROUPS, 128]) * scale
        y = tl.sum(tl.sum(w.to(tl.float32) * x[None, :, :], 2), 1)[:, None]
    y *= channel
    if BIAS:
        y += tl.load(bias + n, n < num_out, 0.0).to(tl.float32)[:, None]
    tl.store(out + m * num_out + n[:, None], y.to(out.dtype.element_ty), (m < num_rows) & (n < num_out)[:, None])


class Config(NamedTuple):
    """Tile of a product. `parts`: tiles of block_n weight rows that share one of x (gate and up always do); `swap`: the
    weight in front; `split_k`: programs that share a tile's K; `persistent`: one program per multiprocessor.
    """

    block_m: int
    block_n: int
    parts: int
    num_warps: int
    num_stages: int
    swap: bool
    split_k: int = 1
    persistent: bool = False


def choose_few(num_rows: int, num_out: int, width: int) -> FewConfig | None:
    """The cut of few rows on Hopper where `hopper_few` won: `benchmarks/ops/bench_fp8.py --sweep`.

    As many programs as multiprocessors, or somewhat fewer: tiles are as wide and K is shared by as many as that takes.
    Where that is not to be had, more than 64 rows are for the library or the plain kernel.
    """
    if not 32 <= num_rows <= 256 or (num_rows < 64 and width > 4096):  # below 64 rows their scales are gathered
        return None
    tiles, blocks = triton.cdiv(num_out, 64), triton.cdiv(num_rows, 64)
    if tiles * blocks <= 132:
        split_k = max(1, min(4, 132 // (tiles * blocks), width // 1536))
        split_k = 1 << (split_k.bit_length() - 1)
        if split_k == 1 and width > (4096 if blocks == 2 else 8192) and blocks < 3:
            return FewConfig(1, 1, 1, 14, 10) if blocks == 1 else FewConfig(2, 1, 2, 10, 8)
        return FewConfig(1, 1, split_k)
    three = num_out > 16384 and width >= 1024 and triton.cdiv(num_out, 192) <= 132
    if blocks == 1:
        return FewConfig(1, 3) if three else FewConfig(1, 2, 1, 5, 3) if num_out > 16384 else FewConfig()
    if num_out > 16384:
        return FewConfig(2, 3, 1, 5, 6) if three and blocks == 2 and width <= 2048 else None
    if width > 8192 and blocks == 2 and tiles <= 132:
        return FewConfig(2, 2, 2, 6, 7)
    if tiles * triton.cdiv(blocks, 2) <= 132:
        return FewConfig(2, 1, 1, 10, 8) if width > 4096 else FewConfig(2, 1, 1, 5, 4)
    return FewConfig(1, 2, 1, 5, 3) if blocks == 3 and triton.cdiv(tiles, 2) <= 44 and width <= 2048 else None


def choose(
    num_rows: int, num_out: int, width: int, hopper: bool = False, few: bool = False
) -> Config | HopperConfig | FewConfig:
    """The cut of a dense product, from bytes in flight and registers; `benchmarks/ops/bench_fp8.py --sweep` times them.

    Few rows: two programs or more per multiprocessor, which K may have to be split for; or one with a longer pipeline.
    `few`: `hopper_few` may serve.
    """
    if few and (config := choose_few(num_rows, num_out, width)):
        return config
    if num_rows > 128:
        # A divisor of 132: programs stay with a block of rows, whose tiles the ring of four stages keeps.
        many = HopperConfig(group_m=22 if triton.cdiv(width, 128) == 4 else 8)
        return many if hopper else Config(128, 128, 1, 8, 4, False, 1, width <= 1536)
    block_m, tiles = max(16, triton.next_power_of_2(num_rows)), triton.cdiv(num_out, 64)
    if num_out >= 16384 and block_m != 32:
        return Config(block_m, 64, 2, 4, 3, True)
    if width >= 8192 and block_m in (32, 64):
        return Config(block_m, 128, 1, 4, 4, True, 4)
    if block_m == 128 and tiles <= 132:
        split_k = triton.next_power_of_2(min(4, 132 // tiles) + 1) // 2
        if width <= 2048 * split_k:
            return Config(block_m, 64, 1, 4, 6, True, split_k)
    short = block_m > 32 or width >= 4096 or (block_m == 16 and tiles < 100)
    split_k = max(1, min(4, 264 // tiles, width // (1024 if short else 1536)))
    return Config(block_m, 64, 1, 4, 4, True, triton.next_power_of_2(split_k + 1) // 2)


def library_is_faster(num_rows: int, num_out: int, width: int) -> bool:
    """Where torch's product of 1 x 128 by 128 x 128 blocks serves and won on Hopper: `benchmarks/ops/bench_fp8.py`."""
    if (
        num_rows % 4 or num_out % 64 or width % 512 or choose_few(num_rows, num_out, width)
    ):  # it wants a weight's scales padded to four blocks of K
        return False
    if num_rows > 128:
        return width > 512 and num_out >= 512
    return num_rows > 64 and num_out >= 5120 and choose_few(num_rows, num_out, width) is None


def choose_grouped(
    num_assignments: int, num_experts: int, hopper: bool = False, exact: bool = False, both: bool = False
) -> tuple[Config | HopperConfig, Config | HopperConfig] | GroupedConfig:
    """Tiles of the gate-up product (of 128 columns, which it quantises) and of the down product, by rows per expert.

    `exact` operands are twice as wide in shared memory. `both`: `hopper_grouped` may serve, which makes both.
    """
    rows = num_assignments / num_experts
    if both and rows <= 16:
        return GroupedConfig(16 if rows <= 10 else 32)
    if rows <= 10:
        return Config(16, 128, 2, 4, 3, True), Config(16, 64, 2, 4, 3, True)
    if hopper and rows > 24 and not exact:
        return HopperConfig(2, 2, 1), HopperConfig(2, 2, 1)
    if rows <= 80 or exact:
        block_m = 32 if rows <= 24 else 64
        gate_up = Config(32, 128, 2, 4, 3, True) if rows <= 24 else Config(64, 128, 2, 8, 2 if exact else 3, True)
        return gate_up, Config(block_m, 128, 2, 8, gate_up.num_stages, True)
    return (Config(128, 128, 2, 8, 3, False, 1, True),) * 2


def _strides(scales: torch.Tensor) -> tuple[int, int]:
    """Of scales [M, groups], from a row to the next and from a group; whole rows share theirs."""
    return scales.stride(0), scales.stride(1) if scales.shape[1] > 1 else 0


@functools.cache
def _multiprocessors(index: int | None) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def _product(
    a: torch.Tensor, a_scales: torch.Tensor, w: torch.Tensor, w_scales: torch.Tensor, out: torch.Tensor,
    config: Config | HopperConfig | FewConfig, *, num_rows: int, most_blocks: int, n: int,
    order: tuple[torch.Tensor, ...] | None = None, top_k: int = 0, gated: bool = False,
    out_scales: torch.Tensor | None = None, bias: torch.Tensor | None = None, kind: str = "block",
    promote: bool = True, exact: bool = False, swiglu: tuple[float, float] | None = None,
) -> None:  # fmt: skip
    """a FP8 [rows, K] times w [experts * n (, 2), K]; what is absent is compiled out and `a` stands in for it."""
    if isinstance(config, HopperConfig):
        hopper.product(
            a, a_scales, w, w_scales, out, config, num_rows=num_rows, most_blocks=most_blocks, n=n, order=order,
            top_k=top_k, gated=gated, out_scales=out_scales, bias=bias, kind=kind, strides=_strides(a_scales),
            multiprocessors=_multiprocessors(a.device.index), swiglu=swiglu,
        )  # fmt: skip
        return
    if isinstance(config, FewConfig):
        most = _multiprocessors(a.device.index)
        hopper_few.product(a, a_scales, w, w_scales, out, config, arrival_counters(a), _strides(a_scales), most)
        return
    k, split_k = a.shape[1], config.split_k
    num_tiles = most_blocks * triton.cdiv(n, config.block_n * (1 if gated else config.parts))
    programs = min(num_tiles, _multiprocessors(a.device.index)) if config.persistent and a.is_cuda else num_tiles
    partial = counters = a
    if split_k > 1:
        area = config.parts * config.block_m * config.block_n
        partial, counters = a.new_empty(split_k * num_tiles * area, dtype=torch.float32), arrival_counters(a)
    options: dict[str, Any] = {"num_warps": config.num_warps, "num_stages": config.num_stages, **overlap_options(a)}
    options |= swiglu_options(swiglu)
    _product_kernel[(programs, split_k)](
        a, TensorDescriptor.from_tensor(a, [config.block_m, BLOCK_K]), a_scales,
        TensorDescriptor.from_tensor(w.view(-1, 2 * k if gated else k), [config.block_n, BLOCK_K]), w_scales,
        a if bias is None else bias, out, a_scales if out_scales is None else out_scales, *(order or (a, a, a))[:3],
        partial, counters, num_rows, n, k, *_strides(a_scales), 0 if out_scales is None else out_scales.stride(1),
        TOP_K=top_k, GATED=gated, BLOCK_SCALES=kind == "block", CHANNEL_STEP=int(kind == "channel"),
        BIAS=bias is not None, QUANTIZE=out_scales is not None, PROMOTE=promote, EXACT=exact,
        DTYPE=TRITON_DTYPE[a.dtype], SWAP=config.swap, PARTS=config.parts, BLOCK_M=config.block_m,
        BLOCK_N=config.block_n, GROUP_M=1 if top_k else 8, SPLIT_K=split_k, FLATTEN=config.persistent, **options,
    )  # fmt: skip


def fp8_linear(
    q: torch.Tensor, scales: torch.Tensor, weight: torch.Tensor, weight_scales: torch.Tensor,
    bias: torch.Tensor | None = None, *, out_dtype: torch.dtype, kind: str,
    config: Config | HopperConfig | FewConfig | None = None, promote: bool = True,
) -> torch.Tensor:  # fmt: skip
    """`promote=False` leaves sums over all of K to the tensor cores, for the test that shows what that costs."""
    (num_rows, width), num_out = q.shape, weight.shape[0]
    out = q.new_empty(num_rows, num_out, dtype=out_dtype)
    if not out.numel():
        return out
    dot = num_rows > GEMV_ROWS
    rows = num_rows <= DOT_ROWS and width <= (DOT_WIDTH if dot else GEMV_WIDTH)
    if config is None and promote and rows and not (dot and (num_out >= 16384 or num_out * width > 1 << 24)):
        groups = triton.cdiv(width, BLOCK_K)
        block_n = 16 if dot else min(32, 32768 // triton.next_power_of_2(width))
        if not dot and num_out < 400 * block_n:  # three programs for each multiprocessor
            block_n = max(1, block_n // 4)
        _rows_kernel[(triton.cdiv(num_out, block_n),)](
            q, scales, weight, weight_scales, q if bias is None else bias, out, num_rows, num_out, width, groups,
            *_strides(scales), M=DOT_ROWS if dot else num_rows, BLOCK_SCALES=kind == "block",
            CHANNEL_STEP=int(kind == "channel"), BIAS=bias is not None, BLOCK_N=block_n,
            GROUPS=triton.next_power_of_2(groups), num_warps=8 if groups > 16 else 4, **overlap_options(q),
        )  # fmt: skip
        return out
    hopper = promote and out_dtype != torch.float32 and num_out % 8 == 0 and is_hopper(q)
    if (
        hopper and config is None and bias is None and kind == "block" and out_dtype == torch.bfloat16
        and scales.stride() == (1, num_rows) and library_is_faster(num_rows, num_out, width)
    ):  # fmt: skip
        scaling = F.ScalingType
        return F.scaled_mm(q, weight.t(), scales, scaling.BlockWise1x128, weight_scales.t(), scaling.BlockWise128x128)
    config = config or choose(num_rows, num_out, width, hopper, hopper and bias is None and kind == "block")
    _product(
        q, scales, weight, weight_scales, out, config, num_rows=num_rows, n=num_out,
        most_blocks=triton.cdiv(num_rows, config.block_m), bias=bias, kind=kind, promote=promote,
        exact=promote and out_dtype == torch.float32,
    )  # fmt: skip
    return out


def fp8_moe_mlp(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, w_gate_up: torch.Tensor,
    gate_up_scales: torch.Tensor, w_down: torch.Tensor, down_scales: torch.Tensor, quantized: Quantized | None = None,
    residual: torch.Tensor | None = None, norm_weight: torch.Tensor | None = None, eps: float = 0.0,
    quantize: bool = False, swiglu: tuple[float, float] | None = None,
) -> torch.Tensor | Quantized:  # fmt: skip
    """With a residual the norm after it is part of the sum over experts, as for `moe.triton.combine`."""
    if x.shape[0] == 0:
        return fp8_like(x) if quantize else torch.empty_like(x)
    q, scales = quantized or quantize_activation(x)
    if x.shape[0] <= GEMV_TOKENS:
        experts = w_gate_up, gate_up_scales, w_down, down_scales
        y = triton_few.moe_mlp(x, q, scales.contiguous(), topk_weights, topk_ids, *experts, swiglu=swiglu)
        if residual is None or norm_weight is None:
            return y
        return (add_rms_norm_fp8 if quantize else add_rms_norm)(y, residual, norm_weight, eps)
    (num_experts, hidden, inter), num_assignments = w_down.shape, topk_ids.numel()
    hopper = is_hopper(q) and not (hidden % 128 or inter % 128 or x.dtype == torch.float32) and q.numel() < 2**31
    exact = x.dtype == torch.float32
    both = hopper and len(device_users) < 2 and hopper_grouped.serves(hidden, inter)
    config = choose_grouped(num_assignments, num_experts, hopper, exact, both)
    block_m = config.block_m if isinstance(config, GroupedConfig) else config[0].block_m
    order = sort_by_expert(topk_ids, num_experts, block_m)
    act = x.new_empty(order.rows.numel(), inter, dtype=q.dtype)
    act_scales = x.new_empty(triton.cdiv(inter, BLOCK_K), act.shape[0], dtype=torch.float32).t()
    y = x.new_empty(act.shape[0], hidden)
    common: dict[str, Any] = {"num_rows": num_assignments, "top_k": topk_ids.shape[1], "order": order}
    if isinstance(config, GroupedConfig):
        experts = w_gate_up, gate_up_scales, w_down, down_scales
        hopper_grouped.experts(
            q, scales, *experts, act, act_scales, y, config, arrival_counters(q), strides=_strides(scales),
            multiprocessors=_multiprocessors(q.device.index), swiglu=swiglu, **common,
        )  # fmt: skip
    else:
        common |= {"most_blocks": order.block_expert.numel(), "exact": exact}
        first: dict[str, Any] = {"gated": True, "out_scales": act_scales, "swiglu": swiglu}
        _product(q, scales, w_gate_up, gate_up_scales, act, config[0], n=inter, **first, **common)
        _product(act, act_scales, w_down, down_scales, y, config[1], n=hidden, **common)
    fp8 = fp8_like(x) if quantize else None
    out = x if fp8 else torch.empty_like(x)  # x is not written then
    early = isinstance(config, GroupedConfig) or (isinstance(config[1], Config) and not config[1].persistent)
    combine(y, topk_weights, order.places, out, residual, norm_weight, eps, fp8, early)
    return fp8 or out

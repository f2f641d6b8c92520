"""Dense products x [M, K] by weight [N, K], for the few rows of a decode step: bound by reading the weight."""

import torch

from gossamer.ops.dispatch import use_kernel
from gossamer.ops.gemm import reference


def few_row_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, out_dtype: torch.dtype | None = None,
    fp8: tuple[torch.Tensor, bool] | None = None, backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """x [M, K] weight [N, K]^T + bias [N] -> [M, N] in `out_dtype` (x's unless given), accumulated in fp32.

    M is at most 64 on a device. The weight may have another dtype than x (a float32 router). Where `use_few_row` is
    false, the library's product is faster.
    fp8: of an FP8 weight the fp32 scales [ceil(N / 128), ceil(K / 128)] of its blocks, and whether those of x are
    powers of two: x is quantised 1 x 128 within. M is at most 2 then: see `use_fused_norm`.
    """
    out_dtype = out_dtype or x.dtype
    if use_kernel(x, backend, "few_row_linear"):
        from gossamer.ops.gemm import triton

        return triton.few_row_linear(x, weight, bias, out_dtype, fp8=fp8)
    return reference.few_row_linear(x, weight, bias, out_dtype, fp8)


def add_rms_norm_linear(
    x: torch.Tensor, residual: torch.Tensor | None, norm_weight: torch.Tensor, eps: float, weight: torch.Tensor,
    bias: torch.Tensor | None = None, *, out_dtype: torch.dtype | None = None, keep_normed: bool = False,
    fp8: tuple[torch.Tensor, bool] | None = None, backend: str = "auto",
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:  # fmt: skip
    """`add_rms_norm` and `few_row_linear` in one launch.

    x, residual: [M, K]; norm_weight: [K]; weight: [N, K]; bias: [N]. Returns the product [M, N], the new residual
    stream x + residual (a new tensor, for other programs still read the old one; x itself without a residual), and,
    with `keep_normed`, the normed rows [M, K]. On a device M is at most 2: see `use_fused_norm`. fp8: as there.
    """
    out_dtype = out_dtype or x.dtype
    if use_kernel(x, backend, "add_rms_norm_linear"):
        from gossamer.ops.gemm import triton

        return triton.add_rms_norm_linear(x, residual, norm_weight, eps, weight, bias, out_dtype, keep_normed, fp8=fp8)
    return reference.add_rms_norm_linear(x, residual, norm_weight, eps, weight, bias, out_dtype, keep_normed, fp8)


def use_few_row(num_rows: int, num_out: int, width: int) -> bool:
    """Whether `few_row_linear` beats the library's product of this shape on a device.

    Measured on an H100 (benchmarks/ops/bench_linear.py), up to 64 rows it wins at every shape of Qwen3-30B-A3B.
    """
    return num_rows <= 64 and width % 64 == 0 and num_out >= 64


def use_fused_norm(num_rows: int, weight: torch.Tensor) -> bool:
    """Whether `add_rms_norm_linear` takes this shape and beats `add_rms_norm` followed by a product.

    Every program repeats the norm, and the quantisation for weights of one byte: that pays where there are few.
    """
    small = weight.numel() < 1 << (24 if num_rows == 1 else 22)
    return num_rows <= 2 and weight.shape[1] <= 4096 and (small or (num_rows == 1 and weight.element_size() > 1))

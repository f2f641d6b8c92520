"""Writing keys and values into the paged cache.

A cache of torch.float8_e4m3fn has fp32 scales [num_pages, num_kv_heads] beside its pages: what is stored is value /
scale. They are powers of two, so that a page whose scale grows keeps every bit of what it held, underflow aside.
"""

import torch

from gossamer.ops.dispatch import require_reference, use_kernel
from gossamer.ops.kv_cache import reference


def write_kv(
    k: torch.Tensor, v: torch.Tensor, k_pages: torch.Tensor, v_pages: torch.Tensor, slots: torch.Tensor,
    fresh_pages: torch.Tensor | None = None, *, k_scales: torch.Tensor | None = None,
    v_scales: torch.Tensor | None = None, backend: str = "auto",
) -> None:  # fmt: skip
    """Stores new tokens' keys and values in place.

    k, v: [num_tokens, num_kv_heads, head_dim].
    k_pages, v_pages: [num_pages, num_kv_heads, page_size, head_dim], best with the heads outermost in memory.
    slots: int64 [num_tokens], page * page_size + offset of each token.
    fresh_pages: int64, the pages whose first token is among these; they are zeroed first, so that nothing a former
    owner left there (a NaN, say) ever meets a masked product.
    k_scales, v_scales: of FP8 pages, updated as by `write_kv_fp8`; a page's first token zeroes it.
    """
    require_reference(k, backend, "write_kv")
    reference.write_kv(k, v, k_pages, v_pages, slots, fresh_pages, k_scales, v_scales)


def write_kv_fp8(
    kv: torch.Tensor, positions: torch.Tensor, token_slots: torch.Tensor, page_table: torch.Tensor,
    k_pages: torch.Tensor, v_pages: torch.Tensor, k_scales: torch.Tensor, v_scales: torch.Tensor, *,
    backend: str = "auto",
) -> None:  # fmt: skip
    """Quantises new tokens' keys and values into their FP8 pages, whose scales grow where the tokens need it.

    kv: [num_tokens, 2, num_kv_heads, head_dim], keys and values; the rest as for `ops.rope.rope_write_kv`, but that a
    slot's tokens follow one another, at consecutive positions.
    A scale is the smallest power of two, from 2^-40 on, under which the page's largest finite number is at most 448.
    A larger one requantises what the page holds; a page's first token (offset 0) starts anew, whatever page and scale
    held. Numbers that are not finite are stored as NaN and count for no scale. Raises ValueError for other dtypes or
    shapes.
    """
    num_kv_heads, head_dim = k_pages.shape[1], k_pages.shape[3]
    require_scales(k_pages, v_pages, k_scales, v_scales)
    if kv.shape[1:] != (2, num_kv_heads, head_dim):
        raise ValueError(f"kv {[*kv.shape]}: [num_tokens, 2, {num_kv_heads}, {head_dim}]")
    tensors = (kv, positions, token_slots, page_table, k_pages, v_pages, k_scales, v_scales)
    if not all(t.is_contiguous() for t in tensors):
        raise ValueError("write_kv_fp8 needs contiguous tensors")
    run = reference.write_kv_fp8
    if use_kernel(kv, backend, "write_kv_fp8"):
        from gossamer.ops.kv_cache import triton

        run = triton.write_kv_fp8
    run(*tensors)


def require_scales(
    k_pages: torch.Tensor, v_pages: torch.Tensor, k_scales: torch.Tensor | None, v_scales: torch.Tensor | None
) -> None:
    """Raises ValueError unless FP8 pages come with their scales, fp32 [num_pages, num_kv_heads], and others without."""
    for pages, scales in ((k_pages, k_scales), (v_pages, v_scales)):
        if (pages.dtype == torch.float8_e4m3fn) != (scales is not None):
            raise ValueError(f"pages of {pages.dtype} {'without' if scales is None else 'with'} scales: e4m3 has them")
        if scales is None:
            continue
        if scales.dtype != torch.float32 or scales.shape != pages.shape[:2] or not scales.is_contiguous():
            raise ValueError(f"scales {scales.dtype} {[*scales.shape]}: contiguous fp32 {[*pages.shape[:2]]}")

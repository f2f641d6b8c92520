"""Absorbed decode over FP8 pages on Hopper: pages stay FP8 up to the registers from which products take them.

Tokens, and of the second product the latent's numbers, are the rows of Hopper's products; query heads are the columns.
Numbers are loaded, and turned round for the second product, two at a time as 16 bits. fp16 holds E4M3 exactly.
"""

from __future__ import annotations

from typing import Any

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from gossamer.ops.attention.hopper import copy_tile, new_barriers, view
from gossamer.ops.dispatch import is_hopper
from gossamer.ops.gemm_fp8.hopper import thread_barrier
from gossamer.ops.mla.hopper import PAGE, RANK, ROPE, _share

_STAGES = 2
# Weights lie between 0 and 2^14: fp16 then keeps those that a sum of millions of tokens may need.
_LIFT = gl.constexpr(14.0)


# fp16 of the first two and of the last two of four numbers in 32 bits; NaN stays NaN.
_IN_TWOS = gl.constexpr("{.reg .b16 a, b; mov.b32 {a, b}, $2; cvt.rn.f16x2.e4m3x2 $0, a; cvt.rn.f16x2.e4m3x2 $1, b;}")
# fp16 of the even and of the odd ones of four numbers in 32 bits, divided by 256: E4M3's bits, moved. NaN becomes 480 /
# 256, but then the token's scores were NaN.
_EVEN_AND_ODD = gl.constexpr("""{.reg .b32 a, b;
    shl.b32 a, $2, 7; and.b32 a, a, 0x3f803f80; shl.b32 b, $2, 8; lop3.b32 $0, b, 0x80008000, a, 0xea;
    shr.b32 a, $2, 1; and.b32 a, a, 0x3f803f80; lop3.b32 $1, $2, 0x80008000, a, 0xea;}""")


@gluon.jit
def _to_fp16(pairs, asm: gl.constexpr):
    """Two operands of what lies two FP8 numbers in an int16."""
    return gl.inline_asm_elementwise(
        asm, "=&r,=&r,r", [pairs], dtype=(gl.float16, gl.float16), is_pure=True, pack=2
    )  # fmt: skip


@gluon.jit
def _feed(
    desc, key_desc, tiles, keys, full, empty, page_table, slots, seq_lens, num_rows, table_stride, program,
    num_programs, PAGES: gl.constexpr, BLOCK_R: gl.constexpr, MIN_PAGES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The producer: PAGES pages a step; one that is absent repeats the last."""
    unit, stop, row, row_begin = _share(slots, seq_lens, num_rows, program, num_programs, BLOCK_R, MIN_PAGES)
    step = 0
    while unit < stop:
        slot = gl.load(slots + row)
        seq_len = gl.where(slot >= 0, gl.load(seq_lens + row), 0)
        row_end = row_begin + (seq_len + 63) // 64
        table = page_table + slot.to(gl.int64) * table_stride
        part_end = gl.minimum(row_end, stop)
        high = part_end - row_begin
        for p in range(unit - row_begin, high, PAGES):
            stage = step % STAGES
            mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
            mbarrier.expect(full.index(stage), PAGES * 64 * 576)
            for i in gl.static_range(PAGES):
                line = gl.load(table + gl.minimum(p + i, high - 1)) * 64
                for c in gl.static_range(4):
                    copy_tile(desc, [line, c * 64], full.index(stage), tiles.index((stage * 4 + c) * PAGES + i))
                copy_tile(key_desc, [line, 256], full.index(stage), keys.index(stage * PAGES + i))
            step += 1
        unit = gl.maximum(part_end, unit)
        row_begin = row_end
        row += 1


@gluon.jit
def _halves(pairs):
    """fp32 of the two bf16 numbers in an int32."""
    return (pairs << 16).to(gl.float32, bitcast=True), (pairs & -65536).to(gl.float32, bitcast=True)


@gluon.jit
def _store_twos(pairs, factor, tile):
    """Two bf16 numbers in an int32 as fp16, times `factor`: the even int32 to tile 0, the odd ones to tile 1."""
    low, high = _halves(pairs)
    low = (low * factor[:, None]).to(gl.float16).to(gl.int16, bitcast=True).to(gl.int32) & 65535
    high = (high * factor[:, None]).to(gl.float16).to(gl.int16, bitcast=True).to(gl.int32) << 16
    even, odd = gl.split(gl.reshape(low | high, [pairs.shape[0], pairs.shape[1] // 2, 2]))
    tile.index(0).store(even)
    tile.index(1).store(odd)


@gluon.jit
def _load_queries(latent_q, rope_q, q_wide, q_keys, head_stride, GROUP: gl.constexpr):
    """Stores queries as fp16, each head's scaled to below 2^14; returns what undoes that."""
    LINES: gl.constexpr = gl.BlockedLayout([1, 4], [1, 32], [gl.num_warps(), 1], [1, 0])
    KEYS: gl.constexpr = gl.BlockedLayout([1, 2], [2, 16], [gl.num_warps(), 1], [1, 0])
    at = gl.arange(0, GROUP, gl.SliceLayout(1, LINES))[:, None] * 256
    pairs = gl.load(latent_q + at + gl.arange(0, 256, gl.SliceLayout(0, LINES))[None, :])
    at = gl.arange(0, GROUP, gl.SliceLayout(1, KEYS))[:, None] * head_stride
    key_pairs = gl.load(rope_q + at + gl.arange(0, 32, gl.SliceLayout(0, KEYS))[None, :])
    low, high = _halves(pairs)
    key_low, key_high = _halves(key_pairs)
    largest = gl.max(gl.maximum(gl.abs(low), gl.abs(high)), 1)
    key_largest = gl.max(gl.maximum(gl.abs(key_low), gl.abs(key_high)), 1)
    largest = gl.maximum(largest, gl.convert_layout(key_largest, gl.SliceLayout(1, LINES)))
    exponent = gl.minimum(gl.maximum(largest.to(gl.int32, bitcast=True) >> 23, 14), 254)
    factor = ((267 - exponent) << 23).to(gl.float32, bitcast=True)
    _store_twos(pairs, factor, q_wide)
    _store_twos(key_pairs, gl.convert_layout(factor, gl.SliceLayout(1, KEYS)), q_keys)
    fence_async_shared()
    return ((exponent - 13) << 23).to(gl.float32, bitcast=True)


@gluon.jit
def _attend(
    latent_q, rope_q, scales, out, partials, lse, q_words, q_tiles, key_words, q_keys, weights_tile, latents, tiles,
    keys, full, empty, page_table, slots, seq_lens, num_rows, row_stride, head_stride, table_stride, scale_log2, block,
    program, num_programs, NUM_BLOCKS: gl.constexpr, GROUP: gl.constexpr, BLOCK_R: gl.constexpr,
    MIN_PAGES: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    PAGES: gl.constexpr = gl.num_warps() // 4
    TOKENS: gl.constexpr = PAGES * 64
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [gl.num_warps(), 1], [16, GROUP, 16])
    OPERAND: gl.constexpr = gl.DotOperandLayout(0, LAYOUT, 2)
    LINES: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    begin, stop, row, row_begin = _share(slots, seq_lens, num_rows, program, num_programs, BLOCK_R, MIN_PAGES)
    unit = begin
    step = 0
    g = gl.arange(0, GROUP, gl.SliceLayout(0, LAYOUT))
    at = gl.arange(0, 256, gl.SliceLayout(1, LAYOUT))[:, None] + g[None, :] * 256
    token = gl.arange(0, TOKENS, gl.SliceLayout(1, LAYOUT))
    while unit < stop:
        slot = gl.load(slots + row)
        seq_len = gl.where(slot >= 0, gl.load(seq_lens + row), 0)
        row_end = row_begin + (seq_len + 63) // 64
        if row_end > unit:
            part_end = gl.minimum(row_end, stop)
            low, high = unit - row_begin, part_end - row_begin
            table = page_table + slot.to(gl.int64) * table_stride
            line = (row.to(gl.int64) * NUM_BLOCKS + block) * (GROUP * 256)
            rotated = rope_q + row.to(gl.int64) * row_stride + block * GROUP * head_stride
            back = _load_queries(latent_q + line, rotated, q_words, key_words, head_stride, GROUP)
            unit_log2 = gl.convert_layout(back, gl.SliceLayout(0, LAYOUT)) * scale_log2
            peak = gl.full([GROUP], -1e30, gl.float32, gl.SliceLayout(0, LAYOUT))
            weight = gl.zeros([TOKENS, GROUP], gl.float32, LAYOUT)
            even_total = gl.zeros([256, GROUP], gl.float32, LAYOUT)
            odd_total = gl.zeros([256, GROUP], gl.float32, LAYOUT)
            limit = gl.minimum(seq_len, high * 64)
            # A token's page, two steps ahead, and the scale of its page in the next one.
            own = token // 64
            scale = gl.load(scales + gl.load(table + gl.minimum(low + own, high - 1)))
            page = gl.load(table + gl.minimum(low + PAGES + own, high - 1))
            for p in range(low, high, PAGES):
                stage = step % STAGES
                latent = latents.index(stage)
                next_scale = gl.load(scales + page)
                page = gl.load(table + gl.minimum(p + 2 * PAGES + own, high - 1))
                mbarrier.wait(full.index(stage), (step // STAGES) & 1)
                scores = gl.zeros([TOKENS, GROUP], gl.float32, LAYOUT)
                for c in gl.static_range(4):
                    first, last = _to_fp16(tiles.index(stage * 4 + c).load(OPERAND), _IN_TWOS)
                    scores = warpgroup_mma(first, q_tiles.index(c).permute((1, 0)), scores, is_async=True)
                    scores = warpgroup_mma(last, q_tiles.index(4 + c).permute((1, 0)), scores, is_async=True)
                    scores = warpgroup_mma_wait(2, deps=[scores])
                first, last = _to_fp16(keys.index(stage).load(OPERAND), _IN_TWOS)
                scores = warpgroup_mma(first, q_keys.index(0).permute((1, 0)), scores, is_async=True)
                scores = warpgroup_mma(last, q_keys.index(1).permute((1, 0)), scores, is_async=True)
                scores = warpgroup_mma_wait(0, deps=[scores])
                # A page's scale counts among the scores, so that weights are those of the numbers as they are stored.
                logits = scores * unit_log2[None, :] * scale[:, None] + gl.log2(scale)[:, None]
                if (p + PAGES) * 64 > limit:
                    logits = gl.where((p * 64 + token < limit)[:, None], logits, float("-inf"))
                    # What a page holds beyond the sequence may be NaN, and 0 * NaN is NaN.
                    present = p * 64 + gl.arange(0, TOKENS, gl.SliceLayout(1, LINES)) < limit
                    for c in gl.static_range(4):
                        tile = tiles.index(stage * 4 + c)
                        tile.store(gl.where(present[:, None], tile.load(LINES), 0))
                highest = gl.maximum(peak, gl.max(logits, 0))
                fade = gl.exp2(peak - highest)
                weights = gl.exp2(logits - (highest - _LIFT)[None, :])
                weight = weight * fade[None, :] + weights * (1.0 / scale)[:, None]
                peak = highest
                scale = next_scale
                weights_tile.store(weights.to(gl.float16))
                fence_async_shared()
                even_total = even_total * fade[None, :]
                odd_total = odd_total * fade[None, :]
                for k in gl.static_range(TOKENS // 16):
                    even, odd = _to_fp16(latent.slice(16 * k, 16).permute((1, 0)).load(OPERAND), _EVEN_AND_ODD)
                    even_total = warpgroup_mma(even, weights_tile.slice(16 * k, 16), even_total, is_async=True)
                    odd_total = warpgroup_mma(odd, weights_tile.slice(16 * k, 16), odd_total, is_async=True)
                    even_total, odd_total = warpgroup_mma_wait(2, deps=[even_total, odd_total])
                even_total, odd_total = warpgroup_mma_wait(0, deps=[even_total, odd_total])
                thread_barrier()  # all warps have read the page
                mbarrier.arrive(empty.index(stage))
                step += 1
            total = gl.sum(weight, 0)
            even_total, odd_total = even_total * (256.0 / total)[None, :], odd_total * (256.0 / total)[None, :]
            if (low == 0) & (part_end == row_end):
                pairs = even_total.to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32) & 65535
                pairs = pairs | (odd_total.to(gl.bfloat16).to(gl.int16, bitcast=True).to(gl.int32) << 16)
                gl.store(out + line + at, pairs)
            else:
                index = (program * NUM_BLOCKS + block) * 2 + (unit > begin).to(gl.int32)
                gl.store(lse + index * GROUP + g, peak + gl.log2(total) - _LIFT)
                words = even_total.to(gl.int32, bitcast=True).to(gl.int64) & 4294967295
                words = words | (odd_total.to(gl.int32, bitcast=True).to(gl.int64) << 32)
                gl.store(partials + index * (GROUP * 256) + at, words)
            unit = part_end
        row_begin = row_end
        row += 1


@gluon.jit(do_not_specialize=["num_rows"])
def _hopper_fp8_decode_kernel(
    latent_q, rope_q, desc, key_desc, scales, page_table, slots, seq_lens, out, partials, lse,
    num_rows, row_stride, head_stride, table_stride, scale_log2,
    NUM_BLOCKS: gl.constexpr, GROUP: gl.constexpr, BLOCK_R: gl.constexpr, MIN_PAGES: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    PAGES: gl.constexpr = gl.num_warps() // 4
    TOKENS: gl.constexpr = PAGES * 64
    pairs: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, 256], gl.int16)
    latents = gl.allocate_shared_memory(gl.int16, [STAGES, TOKENS, 256], pairs)
    keys = gl.allocate_shared_memory(gl.int16, [STAGES, TOKENS, 32], key_desc.layout)
    wide: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP, 256], gl.float16)
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP, 64], gl.float16)
    narrow: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP, 32], gl.float16)
    words: gl.constexpr = gl.NVMMASharedLayout(128, 32, 2)
    narrow_words: gl.constexpr = gl.NVMMASharedLayout(64, 32, 2)
    q_wide = gl.allocate_shared_memory(gl.float16, [2, GROUP, 256], wide)
    q_keys = gl.allocate_shared_memory(gl.float16, [2, GROUP, 32], narrow)
    weights_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([TOKENS, GROUP], gl.float16)
    weights_tile = gl.allocate_shared_memory(gl.float16, [TOKENS, GROUP], weights_layout)
    full, empty = new_barriers(STAGES, 1), new_barriers(STAGES, 1)
    fence_async_shared()
    block = gl.program_id(0) % NUM_BLOCKS
    program = gl.program_id(0) // NUM_BLOCKS
    num_programs = gl.num_programs(0) // NUM_BLOCKS
    gl.warp_specialize([
        (_attend, (
            latent_q, rope_q, scales, out, partials, lse, view(q_wide, gl.int32, [2, GROUP, 128], words),
            view(q_wide, gl.float16, [8, GROUP, 64], tile), view(q_keys, gl.int32, [2, GROUP, 16], narrow_words),
            q_keys, weights_tile, latents, view(latents, gl.int16, [STAGES * 4, TOKENS, 64], desc.layout), keys, full,
            empty, page_table, slots, seq_lens, num_rows, row_stride, head_stride, table_stride, scale_log2, block,
            program, num_programs, NUM_BLOCKS, GROUP, BLOCK_R, MIN_PAGES, STAGES,
        )),
        (_feed, (
            desc, key_desc, view(latents, gl.int16, [STAGES * 4 * PAGES, 64, 64], desc.layout),
            view(keys, gl.int16, [STAGES * PAGES, 64, 32], key_desc.layout), full, empty, page_table, slots, seq_lens,
            num_rows, table_stride, program, num_programs, PAGES, BLOCK_R, MIN_PAGES, STAGES,
        )),
    ], [1], [40])  # fmt: skip


def group_of(q: torch.Tensor, q_rope: torch.Tensor, pages: torch.Tensor, group: int) -> int:
    """Heads of a program, of the `group` that a plain one takes; 0 if the kernel does not run these shapes here."""
    fits = is_hopper(q) and (q.dtype, pages.dtype) == (torch.bfloat16, torch.float8_e4m3fn)
    fits = fits and (q.shape[2], *pages.shape[2:]) == (RANK, PAGE, RANK + ROPE) and group in (16, 32, 64)
    # Two numbers are loaded as one.
    return min(group, 32) * (fits and not any(n % 2 for n in (*q_rope.stride()[:2], q_rope.storage_offset())))


def decode(
    q_latent: torch.Tensor, q_rope: torch.Tensor, pages: torch.Tensor, scales: torch.Tensor | None,
    page_table: torch.Tensor, slots: torch.Tensor, seq_lens: torch.Tensor, scale_log2: float, out: torch.Tensor,
    partials: torch.Tensor, lse: torch.Tensor, num_programs: int, **cut: Any,
) -> None:  # fmt: skip
    """The plain kernel's launch, for what `group_of` accepts; `cut`: NUM_BLOCKS, GROUP, BLOCK_R, MIN_PAGES."""
    lines, rope = pages.view(torch.int16).view(-1, pages.shape[3] // 2), q_rope.view(torch.int32)
    desc, key_desc = (
        TensorDescriptor.from_tensor(lines, [PAGE, width], gl.NVMMASharedLayout(2 * width, 16, 2)) for width in (64, 32)
    )
    # Of 16 heads two programs of a page a step share a multiprocessor; of 32 one has it, with two pages a step.
    size: dict[str, int] = {"num_warps": 4, "maxnreg": 128} if cut["GROUP"] == 16 else {"num_warps": 8}
    _hopper_fp8_decode_kernel[(num_programs * cut["NUM_BLOCKS"],)](
        q_latent.view(torch.int32), rope, desc, key_desc, scales, page_table, slots, seq_lens, out.view(torch.int32),
        partials.view(torch.int64), lse, seq_lens.shape[0], rope.stride(0), rope.stride(1), page_table.stride(0),
        scale_log2, STAGES=_STAGES, **size, **cut,
    )  # fmt: skip

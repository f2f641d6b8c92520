"""Norms, SiLU gate and rotary embedding with KV write against their bytes: `bench_elementwise.py [--out FILE]`.

Shapes of Qwen3-30B-A3B; input sets rotate through more memory than L2 holds once a set is that large.
"""

from __future__ import annotations

import argparse
import pathlib
import statistics
import sys
from collections.abc import Callable

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common

from gossamer.ops.activation import silu_mul
from gossamer.ops.norm import add_rms_norm, rms_norm
from gossamer.ops.rope import rope_write_kv

HIDDEN, NUM_Q, NUM_KV, HEAD_DIM, WIDTH, PAGE = 2048, 32, 4, 128, 768, 64
Call = Callable[[int], object]


def draw(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)


def rope_case(num_tokens: int, sets: int) -> Call:
    qkv = [draw(num_tokens, (NUM_Q + 2 * NUM_KV) * HEAD_DIM) for _ in range(sets)]
    q_out = [draw(num_tokens, NUM_Q, HEAD_DIM) for _ in range(sets)]
    num_pages = -(-num_tokens // PAGE)
    k_pages, v_pages = (draw(num_pages, NUM_KV, PAGE, HEAD_DIM) for _ in range(2))
    page_table = torch.randperm(num_pages, device="cuda", dtype=torch.int32)[None]
    angles = torch.rand(num_tokens, HEAD_DIM, device="cuda")
    positions = torch.arange(num_tokens, device="cuda", dtype=torch.int32)
    slots, norm = torch.zeros_like(positions), draw(HEAD_DIM)
    return lambda i: rope_write_kv(
        qkv[i % sets], NUM_Q, NUM_KV, HEAD_DIM, angles, angles, positions, slots, page_table, k_pages, v_pages,
        q_out[i % sets], q_norm=norm, k_norm=norm,
    )  # fmt: skip


def cases(num_tokens: int) -> dict[str, tuple[Call, int]]:
    """Each op with the bytes that it must move."""
    sets = common.rotations(num_tokens * HIDDEN * 2, most=16)
    x, residual = ([draw(num_tokens, HIDDEN) for _ in range(sets)] for _ in range(2))
    gate_up, weight = [draw(8 * num_tokens, 2 * WIDTH) for _ in range(sets)], draw(HIDDEN)
    row = 2 * num_tokens * HIDDEN
    return {
        "rms_norm": (lambda i: rms_norm(x[i % sets], weight, 1e-6), 2 * row),
        "add_rms_norm": (lambda i: add_rms_norm(x[i % sets], residual[i % sets], weight, 1e-6), 4 * row),
        "silu_mul x8": (lambda i: silu_mul(gate_up[i % sets]), 2 * 8 * num_tokens * 3 * WIDTH),
        "rope_write_kv": (
            rope_case(num_tokens, sets),
            2 * 2 * num_tokens * (NUM_Q + 2 * NUM_KV) * HEAD_DIM + 8 * num_tokens * HEAD_DIM,
        ),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    args = parser.parse_args()
    every: dict[str, list[float]] = {}
    floor: dict[str, float] = {}
    table: dict[str, dict[str, float | str]] = {}
    for num_tokens in (1, 32, 256, 2048, 16384):
        for name, (fn, num_bytes) in cases(num_tokens).items():
            case = f"{name} T={num_tokens}"
            every[case] = common.measure_us(fn)
            floor[case] = common.floor_us(num_bytes)
            us = statistics.median(every[case])
            table[case] = {"floor us": floor[case], "us": us, "of floor": floor[case] / us}
    common.print_table(table)
    median = {case: statistics.median(times) for case, times in every.items()}
    common.write(
        args.out, unit="us a call", shapes="Qwen3-30B-A3B, T tokens", repeats=15, median={"kernel": median},
        all=every, floor=floor,
    )  # fmt: skip


if __name__ == "__main__":
    main()

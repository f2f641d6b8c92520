"""What top-k attention loses whose weights are not renormalised: softmax over everything, then the largest weights.

python benchmarks/ops/bench_literal.py [--out FILE]

Random queries, keys and values, float64; the spread of the logits says how sharp attention is (1: keys of unit
variance, scaled as usual). Values are independent, or have a common part as large as what differs. Errors are
relative, ||found - expected|| / ||expected||; "selected" is softmax over the keys that were kept, "dense" over all.
"""

from __future__ import annotations

import argparse
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common

ROWS, DIM, KEPT = 64, 128, 1024


def literal(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, num_kept: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k attention as it is often listed: softmax over everything, the largest weights, and no renormalisation.

    It saves nothing, for every product with a key is made, and its weights sum to the mass it retains, not to 1.
    q [..., num_rows, dim], k, v [..., num_keys, dim]: the output and the retained mass [..., num_rows].
    """
    weights = torch.softmax(q @ k.mT * scale, -1)
    kept, index = weights.topk(min(num_kept, k.shape[-2]), -1)
    sparse = torch.zeros_like(weights).scatter_(-1, index, kept)
    return sparse @ v, kept.sum(-1)


def compare(length: int, spread: float, common_part: float) -> dict[str, float | str]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(n, DIM, dtype=torch.float64) for n in (ROWS, length, length))
    v += common_part * torch.randn(DIM, dtype=torch.float64)
    scale = spread * DIM**-0.5
    found, mass = literal(q, k, v, KEPT, scale)
    logits = q @ k.T * scale
    dense = torch.softmax(logits, -1) @ v
    best, index = logits.topk(KEPT, -1)
    selected = (torch.softmax(best, -1)[:, None] @ v[index])[:, 0]

    def error(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a - b).norm() / b.norm())

    return {
        "retained mass": float(mass.mean()),
        "literal from selected": error(found, selected),
        "literal from dense": error(found, dense),
        "selected from dense": error(selected, dense),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    options = parser.parse_args()
    lengths = {"4k": 1 << 12, "64k": 1 << 16}
    rows = {
        f"{name}, spread {spread:.0f}{', common part' * bool(part)}": compare(length, spread, part)
        for part in (0.0, 1.0)
        for name, length in lengths.items()
        for spread in (1.0, 2.0, 4.0)
    }
    common.print_table(rows)
    common.write(
        options.out, unit="ratios", shapes={"rows": ROWS, "head_dim": DIM, "keys kept": KEPT}, repeats=1, table=rows
    )


if __name__ == "__main__":
    main()

"""What an FP8 page's scale costs in precision: amax / 448 as it is, or rounded up to a power of two.

python benchmarks/ops/bench_kv_scales.py [--out FILE]

Random keys arrive a few at a time in pages of 64 tokens; a scale that is too small grows and the page is requantised.
The relative RMS error of a token in a full page, in %, mean over tokens, stands beside that of pages written at once.
"""

from __future__ import annotations

import argparse
import pathlib
import sys
from collections.abc import Callable

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common

from gossamer.ops.kv_cache.reference import page_scale

PAGES, PAGE, DIM = 400, 64, 128


def direct(amax: torch.Tensor) -> torch.Tensor:
    return amax / 448


def streams() -> dict[str, torch.Tensor]:
    """[pages, tokens, dim] each."""
    shape = (PAGES, PAGE, DIM)
    normal = torch.randn(shape)
    channels = torch.exp(1.5 * torch.randn(PAGES, 1, DIM))
    return {
        "normal": normal,
        "channels that differ": normal * channels,
        "tokens that differ": normal * torch.exp(torch.randn(PAGES, PAGE, 1)),
        "heavy tails": torch.distributions.StudentT(2.5).sample(shape),
        "growing by 5% a token": normal * 1.05 ** torch.arange(PAGE)[:, None],
        "a first token 1000 times the rest": normal * torch.where(torch.arange(PAGE) == 0, 1000.0, 1.0)[:, None],
    }


def fill(x: torch.Tensor, chunk: int, scale_of: Callable[[torch.Tensor], torch.Tensor]) -> tuple[torch.Tensor, float]:
    """What pages hold that got `chunk` tokens at a time, and how often a page's scale grew after the first."""
    held, scale, growths = torch.zeros_like(x), torch.zeros(PAGES, 1, 1), 0.0
    for start in range(0, PAGE, chunk):
        new = x[:, start : start + chunk]
        grown = torch.maximum(scale, scale_of(new.abs().amax((1, 2))).view(-1, 1, 1))
        growths += float((grown > scale).float().mean()) if start else 0.0
        held = (held * scale / grown).to(torch.float8_e4m3fn).float()
        held[:, start : start + chunk] = (new / grown).to(torch.float8_e4m3fn).float()
        scale = grown
    return held * scale, growths


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out")
    options = parser.parse_args()
    torch.manual_seed(0)
    rows: dict[str, dict[str, float | str]] = {}
    for name, x in streams().items():
        row: dict[str, float | str] = {}
        for label, scale_of in (("amax / 448", direct), ("power of two", page_scale)):
            for chunk, how in ((PAGE, "at once"), (7, "by 7"), (1, "one by one")):
                found, growths = fill(x, chunk, scale_of)
                row[f"{label}, {how}"] = 100 * float(((found - x).norm(dim=2) / x.norm(dim=2)).mean())
            row[f"{label}, growths"] = growths
        rows[name] = row
    common.print_table(rows)
    shapes = {"pages": PAGES, "tokens a page": PAGE, "head_dim": DIM}
    common.write(
        options.out,
        unit="a token's rel-RMS error in % (mean); growths of a page's scale",
        shapes=shapes,
        repeats=1,
        table=rows,
    )


if __name__ == "__main__":
    main()

"""The MoE block against its floor and the library's: `python benchmarks/ops/bench_moe.py [--sweep] [--out FILE]`.

Shapes of Qwen3-30B-A3B in bf16; every token draws 8 of 128 experts at random, and three layers' experts (3.6 GB) take
turns. The library's block is permute, torch._grouped_mm, SiLU*mul, torch._grouped_mm, weighted sum. `--sweep` times the
tiles that `grouped_configs` chooses from.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import statistics
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common

from gossamer.ops.moe import add_rms_norm_router, moe_mlp, moe_mlp_add_rms_norm, route_topk, router
from gossamer.ops.moe import triton as kernels

HIDDEN, INTER, EXPERTS, TOP_K, LAYERS = 2048, 768, 128, 8, 3
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
Config = kernels.GroupedConfig
CANDIDATES = [
    *(Config(16, 32, 256, 4, 3), Config(16, 64, 128, 4, 4), Config(16, 64, 128, 4, 3), Config(32, 32, 256, 4, 3)),
    *(Config(32, 64, 128, 4, 3), Config(64, 64, 128, 4, 3), Config(64, 128, 64, 4, 3), Config(64, 256, 64, 8, 4)),
    *(Config(128, 128, 64, 8, 4), Config(128, 256, 64, 8, 3), Config(128, 256, 64, 8, 3, True)),
]


class Inputs:
    """One batch: activations, spread routing of several steps, and the experts of a few layers."""

    def __init__(self, num_tokens: int, layers: list[tuple[torch.Tensor, ...]]) -> None:
        self.layers, self.num_tokens = layers, num_tokens
        self.x, self.residual = torch.randn(2, num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        self.norm = torch.ones(HIDDEN, device="cuda", dtype=torch.bfloat16)
        draws = [torch.rand(num_tokens, EXPERTS, device="cuda") for _ in range(16 if num_tokens <= 64 else 4)]
        self.routes = [route_topk(scores, TOP_K, renormalize=True) for scores in draws]
        self.touched = statistics.mean(len(ids.unique()) for _, ids in self.routes)
        self.weight_bytes = self.touched * 3 * INTER * HIDDEN * 2
        self.flops = 6.0 * num_tokens * TOP_K * INTER * HIDDEN
        self.calls = 16 if num_tokens <= 64 else 8 if num_tokens <= 1024 else 3

    def block(self, i: int) -> torch.Tensor:
        weights, ids = self.routes[i % len(self.routes)]
        w_gate_up, w_down, _ = self.layers[i % LAYERS]
        return moe_mlp(self.x, weights, ids, w_gate_up, w_down)

    def block_norm(self, i: int) -> torch.Tensor:
        """The block, with the residual add and the norm that follow."""
        weights, ids = self.routes[i % len(self.routes)]
        w_gate_up, w_down, _ = self.layers[i % LAYERS]
        return moe_mlp_add_rms_norm(self.x, weights, ids, w_gate_up, w_down, self.residual, self.norm, 1e-6)

    def peer(self, i: int) -> torch.Tensor:
        weights, ids = self.routes[i % len(self.routes)]
        w_gate_up, w_down, _ = self.layers[i % LAYERS]
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        ends = (flat[:, None] == torch.arange(EXPERTS, device="cuda")).sum(0).cumsum(0).int()
        gate, up = torch._grouped_mm(self.x[order // TOP_K], w_gate_up.transpose(1, 2), offs=ends).chunk(2, -1)
        y = torch._grouped_mm(F.silu(gate) * up, w_down.transpose(1, 2), offs=ends)
        y = torch.empty_like(y).index_copy_(0, order, y).view(self.num_tokens, TOP_K, HIDDEN)
        return torch.bmm(weights.to(y.dtype).unsqueeze(1), y).squeeze(1)

    def router(self, arrivals: torch.Tensor, i: int) -> object:
        return router(self.x, self.layers[i % LAYERS][2], TOP_K, renormalize=True, arrivals=arrivals)

    def norm_router(self, arrivals: torch.Tensor, i: int) -> object:
        """The router, with the residual add and the norm before it."""
        weight = self.layers[i % LAYERS][2]
        return add_rms_norm_router(
            self.x, self.residual, self.norm, 1e-6, weight, TOP_K, renormalize=True, arrivals=arrivals
        )

    def time(self, fn: Callable[[int], object]) -> list[float]:
        return common.measure_us(fn, calls=self.calls, repeats=9)


def sweep(data: Inputs) -> str:
    """The five best pairs of equal tiles, as medians in us, that of `hopper.py` among them where it serves."""
    chosen, rows, results = kernels.grouped_configs, kernels.HOPPER_ROWS, list[tuple[float, object]]()
    if kernels.hopper_serves(data.x, INTER, kernels.HOPPER_ROWS):
        kernels.HOPPER_ROWS = 0
        results.append((statistics.median(data.time(data.block)), "hopper.py"))
    kernels.HOPPER_ROWS = 2**31
    try:
        for config in CANDIDATES:
            if config.block_m <= 16 * max(1, data.num_tokens * TOP_K // EXPERTS):
                kernels.grouped_configs = lambda *_, c=config: (c, c)  # type: ignore[assignment]
                results.append((statistics.median(data.time(data.block)), tuple(config)))
    finally:
        kernels.grouped_configs, kernels.HOPPER_ROWS = chosen, rows
    return "  ".join(f"{us:.1f} {config}" for us, config in sorted(results)[:5])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    layers = [
        (
            torch.randn(EXPERTS, 2 * INTER, HIDDEN, device="cuda", dtype=torch.bfloat16) / HIDDEN**0.5,
            torch.randn(EXPERTS, HIDDEN, INTER, device="cuda", dtype=torch.bfloat16) / INTER**0.5,
            (torch.randn(EXPERTS, HIDDEN, device="cuda") * 0.02).bfloat16(),
        )
        for _ in range(LAYERS)
    ]
    arrivals = torch.zeros(16, dtype=torch.int32, device="cuda")
    times: dict[str, dict[str, list[float]]] = {}
    floors: dict[str, float] = {}
    rows: dict[str, dict[str, float | str]] = {}
    for num_tokens in args.tokens:
        data, name = Inputs(num_tokens, layers), f"T={num_tokens}"
        times[name] = {
            "block": data.time(data.block),
            "library": data.time(data.peer),
            "router": data.time(functools.partial(data.router, arrivals)),
            "norm, router": data.time(functools.partial(data.norm_router, arrivals)),
            "block, norm": data.time(data.block_norm),
        }
        floors[name] = common.floor_us(data.weight_bytes, data.flops)
        median = {what: statistics.median(values) for what, values in times[name].items()}
        rows[name] = {
            "experts": data.touched,
            "us": median["block"],
            "TB/s": data.weight_bytes / median["block"] / 1e6,
            "TFLOP/s": data.flops / median["block"] / 1e6,
            "floor": floors[name],
            "ratio": floors[name] / median["block"],
            "library us": median["library"],
            "router us": median["router"],
            "norm, router us": median["norm, router"],
            "block, norm us": median["block, norm"],
            "chosen": "gossamer" if median["block"] <= median["library"] else "LIBRARY",
        }
        if args.sweep and num_tokens > kernels.GEMV_TOKENS:
            print(f"{name} {sweep(data)}", flush=True)
    print(torch.cuda.get_device_name(), "hidden", HIDDEN, "inter", INTER, "experts", EXPERTS, "top", TOP_K)
    common.print_table(rows)
    shapes = {"hidden": HIDDEN, "inter": INTER, "experts": EXPERTS, "top_k": TOP_K, "dtype": "bfloat16"}
    medians = {name: {what: statistics.median(us) for what, us in by.items()} for name, by in times.items()}
    common.write(args.out, unit="us", shapes=shapes, repeats=9, median=medians, all=times, floor=floors, table=rows)


if __name__ == "__main__":
    main()

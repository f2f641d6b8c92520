"""FP8 products against their floors and the library's: `python benchmarks/ops/bench_fp8.py [--sweep] [--out FILE]`.

Dense: DeepSeek-V3's shapes, 1x128 by 128x128 scales; "own" is the kernel of this repository, the library's torch's
scaled_mm with the same scales, gossamer's whichever `library_is_faster` names, and "read" a kernel that reads the
weight and does nothing else: what no product of few rows can be faster than. Experts: Qwen3-30B-A3B's block,
routing at random, layers in turns; the library's is torch._scaled_grouped_mm, a scale per row. `--sweep` times the
tiles that `choose` and `choose_grouped` pick from; `--fused` the producers of quantised rows.
"""

from __future__ import annotations

import argparse
import functools
import pathlib
import statistics
import sys
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import common

from gossamer.ops.dispatch import overlap_options
from gossamer.ops.gemm_fp8 import fp8_moe_mlp, quantize_activation
from gossamer.ops.gemm_fp8 import triton as kernels
from gossamer.ops.gemm_fp8.hopper import HopperConfig
from gossamer.ops.gemm_fp8.hopper_few import FewConfig
from gossamer.ops.gemm_fp8.hopper_grouped import GroupedConfig
from gossamer.ops.moe import route_topk
from gossamer.ops.norm import add_rms_norm, add_rms_norm_fp8

E4M3 = torch.float8_e4m3fn
SHAPES = [(2112, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)]
ROWS = (1, 2, 8, 16, 64, 128, 4096)
TOKENS = (1, 2, 8, 32, 128, 256, 1024, 16384)
HIDDEN, INTER, EXPERTS, TOP_K, LAYERS = 2048, 768, 128, 8, 3
Config = kernels.Config
AnyConfig = Config | HopperConfig | FewConfig
ExpertConfig = Config | HopperConfig | GroupedConfig
FEW_ROWS = [
    Config(16, n, parts, warps, stages, True, split)
    for n, parts, warps, stages in ((64, 1, 4, 4), (64, 1, 4, 6), (64, 2, 4, 4), (128, 1, 4, 4), (128, 1, 8, 6))
    for split in (1, 2, 4, 8)
]
FEW_HOPPER = [
    FewConfig(tokens, parts, split, *stages)
    for tokens, parts, *stages in (
        (1, 1, 7, 6), (1, 1, 8, 5), (1, 1, 14, 10), (1, 2, 5, 3), (1, 3, 7, 6), (2, 1, 5, 4), (2, 1, 10, 8),
        (2, 2, 6, 7), (2, 3, 5, 6),
    )
    for split in (1, 2, 4)
    if split == 1 or tokens * parts <= 4
]  # fmt: skip
MANY_ROWS = [
    *(HopperConfig(3, 1, group_m) for group_m in (4, 8, 11, 22)),
    *(HopperConfig(2, 2, group_m) for group_m in (8, 16)),
    *(Config(128, 128, 1, 8, 4, False, 1, persistent) for persistent in (True, False)),
    Config(64, 128, 1, 4, 3, False),
]
GROUPED: list[ExpertConfig] = [
    *(Config(16, 64, 2, 4, stages, True) for stages in (3, 4, 5, 6)),
    *(Config(m, 128, 2, warps, stages, True) for m in (16, 32, 64) for warps in (4, 8) for stages in (3, 4, 5)),
    *(Config(m, 128, 2, 8, stages, False, 1, p) for m in (64, 128) for stages in (3, 4) for p in (True, False)),
    *(HopperConfig(2, 2, group_m) for group_m in (1, 4)),
    GroupedConfig(16),
    GroupedConfig(32),
]
Timed = dict[str, list[float]]
Table = dict[str, dict[str, float | str]]


@triton.jit
def read_kernel(words, out, size, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Like a product, it reads what no kernel writes before the one ahead has ended."""
    if PDL:
        gdc_launch_dependents()
    found = tl.zeros([BLOCK], tl.int32)
    for start in range(tl.program_id(0) * BLOCK, size, tl.num_programs(0) * BLOCK):
        at = start + tl.arange(0, BLOCK)
        found ^= tl.load(words + at, at < size, 0)
    if PDL:
        gdc_wait()
    tl.store(out + tl.program_id(0), tl.xor_sum(found, 0))


def tried(fn: Callable[[], list[float]]) -> list[float]:
    """Times, or none where torch or the device has no such product."""
    try:
        return fn()
    except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
        print("skipped:", str(error).splitlines()[0][:160], flush=True)
        return []


def make_weights(num_out: int, width: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    blocks = -(-num_out // 128), -(-width // 128)
    return [
        (torch.randn(num_out, width, device="cuda").mul_(60).to(E4M3), torch.rand(*blocks, device="cuda") * 0.02)
        for _ in range(common.rotations(num_out * width, 16))
    ]


class Dense:
    def __init__(self, num_rows: int, weights: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        (self.num_out, width), self.weights = weights[0][0].shape, weights
        self.bytes = self.num_out * width
        self.x = torch.randn(num_rows, width, device="cuda", dtype=torch.bfloat16)
        self.a = quantize_activation(self.x)
        self.calls = max(4, len(self.weights)) if num_rows <= 128 else 4
        self.column_scales = self.a[1].t().contiguous().t()

    def product(self, config: AnyConfig | None, i: int) -> torch.Tensor:
        w = self.weights[i % len(self.weights)]
        return kernels.fp8_linear(*self.a, *w, out_dtype=torch.bfloat16, kind="block", config=config)

    def own(self) -> AnyConfig | None:
        few = self.x.shape[0] <= kernels.DOT_ROWS and self.x.shape[1] <= kernels.DOT_WIDTH
        if few or self.x.shape[0] <= kernels.GEMV_ROWS:
            return None
        hopper = torch.cuda.get_device_capability() == (9, 0)
        return kernels.choose(self.x.shape[0], self.num_out, self.x.shape[1], hopper, hopper)

    def peer(self, i: int) -> torch.Tensor:
        q, scales = self.weights[i % len(self.weights)]
        recipe = F.ScalingType
        return F.scaled_mm(
            self.a[0], q.t(), self.column_scales, recipe.BlockWise1x128, scales.t(), recipe.BlockWise128x128
        )

    def read(self, i: int) -> None:
        words = self.weights[i % len(self.weights)][0].view(torch.int32)
        programs = 8 * torch.cuda.get_device_properties(words.device).multi_processor_count
        out = words.new_empty(programs)
        read_kernel[(programs,)](words, out, words.numel(), BLOCK=4096, num_warps=4, **overlap_options(words))

    def time(self, fn: Callable[[int], object]) -> list[float]:
        return common.measure_us(fn, calls=self.calls, repeats=9)


class Experts:
    def __init__(self, num_tokens: int, layers: list[tuple[torch.Tensor, ...]]) -> None:
        self.layers = layers
        self.x = torch.randn(num_tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
        self.quantized = quantize_activation(self.x)
        draws = [torch.rand(num_tokens, EXPERTS, device="cuda") for _ in range(16 if num_tokens <= 64 else 4)]
        self.routes = [route_topk(scores, TOP_K, renormalize=True) for scores in draws]
        self.touched = statistics.mean(len(ids.unique()) for _, ids in self.routes)
        self.bytes = self.touched * 3 * INTER * HIDDEN
        self.flops = 6.0 * num_tokens * TOP_K * INTER * HIDDEN
        self.calls = 16 if num_tokens <= 64 else 8 if num_tokens <= 1024 else 3

    def block(self, i: int) -> torch.Tensor:
        return fp8_moe_mlp(self.x, *self.routes[i % len(self.routes)], *self.layers[i % LAYERS])

    def products(self, i: int) -> torch.Tensor:
        routes = self.routes[i % len(self.routes)]
        return fp8_moe_mlp(self.x, *routes, *self.layers[i % LAYERS], quantized=self.quantized)

    def peer(self, i: int) -> torch.Tensor:
        ids, (w_gate_up, _, w_down, _) = self.routes[i % len(self.routes)][1], self.layers[i % LAYERS]
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        ends = (flat[:, None] == torch.arange(EXPERTS, device="cuda")).sum(0).cumsum(0).int()
        ones = torch.ones(EXPERTS, 2 * INTER, device="cuda")
        q, scales = quantize_activation(self.x, per_token=True)
        rows = order // TOP_K
        up = torch._scaled_grouped_mm(
            q[rows], w_gate_up.transpose(1, 2), scales[rows, 0], ones, offs=ends, out_dtype=torch.bfloat16
        )
        gate, up = up.chunk(2, -1)
        q, scales = quantize_activation(F.silu(gate) * up, per_token=True)
        ones = torch.ones(EXPERTS, HIDDEN, device="cuda")
        return torch._scaled_grouped_mm(
            q, w_down.transpose(1, 2), scales[:, 0], ones, offs=ends, out_dtype=torch.bfloat16
        )

    def time(self, fn: Callable[[int], object]) -> list[float]:
        return common.measure_us(fn, calls=self.calls, repeats=9)


def make_layer() -> tuple[torch.Tensor, ...]:
    def random(*shape: int) -> torch.Tensor:
        return torch.cat(
            [torch.randn(1, *shape[1:], device="cuda").to(E4M3).view(torch.uint8) for _ in range(shape[0])]
        )

    scales = (2, INTER // 128, HIDDEN // 128), (HIDDEN // 128, INTER // 128)
    gate_up, down = (torch.rand(EXPERTS, *shape, device="cuda") * 0.02 for shape in scales)
    return (
        random(EXPERTS, 2 * INTER, HIDDEN).view(E4M3), gate_up, random(EXPERTS, HIDDEN, INTER).view(E4M3), down,
    )  # fmt: skip


def best(results: Sequence[tuple[float, AnyConfig | GroupedConfig]]) -> str:
    return "  ".join(f"{us:.1f} {tuple(config)}" for us, config in sorted(results)[:6])


def sweep_dense(data: Dense) -> str:
    num_rows = data.x.shape[0]
    block_m = max(16, 1 << (num_rows - 1).bit_length())
    few: list[AnyConfig] = [*(c._replace(block_m=block_m) for c in FEW_ROWS), *(FEW_HOPPER if num_rows > 16 else ())]
    configs = few if num_rows <= 128 else MANY_ROWS
    times = ((tried(functools.partial(data.time, functools.partial(data.product, c))), c) for c in configs)
    return best([(statistics.median(us), config) for us, config in times if us])


def sweep_experts(data: Experts) -> str:
    """First the gate-up product's tile is varied, or both are one kernel; then the down product's, the other chosen."""
    chosen, lines = kernels.choose_grouped, []
    picked = chosen(data.x.shape[0] * TOP_K, EXPERTS)
    assert not isinstance(picked, GroupedConfig)
    try:
        for place in (0, 1):
            results: list[tuple[float, ExpertConfig]] = []
            for config in (c for c in GROUPED if c.block_m == picked[0].block_m):
                both = isinstance(config, GroupedConfig)
                if both and place:
                    continue
                pair = config if both else (config, picked[1]) if place == 0 else (picked[0], config)
                kernels.choose_grouped = lambda *_, pair=pair: pair  # type: ignore[assignment]
                us = tried(lambda: data.time(data.products))
                results += [(statistics.median(us), config)] if us else []
            lines.append(("gate-up: ", "down: ")[place] + best(results))
    finally:
        kernels.choose_grouped = chosen
    return "\n".join(lines)


def row(times: Timed, num_bytes: float, flops: float) -> dict[str, float | str]:
    floor = common.floor_us(num_bytes, flops, dtype="float8_e4m3fn")
    median = {name: statistics.median(us) if us else "" for name, us in times.items()}
    own = statistics.median(times["gossamer"])
    return {
        "us": own,
        "TB/s": num_bytes / own / 1e6,
        "TFLOP/s": flops / own / 1e6,
        "floor": floor,
        "ratio": floor / own,
        **{f"{name} us": us for name, us in median.items() if name != "gossamer"},
    }


def dense(rows: tuple[int, ...], args: argparse.Namespace) -> tuple[dict[str, Timed], Table]:
    times: dict[str, Timed] = {}
    table: Table = {}
    for num_out, width in SHAPES:
        weights = make_weights(num_out, width)
        for num_rows in rows:
            data, name = Dense(num_rows, weights), f"M={num_rows} N={num_out} K={width}"
            times[name] = {
                "gossamer": data.time(functools.partial(data.product, None)),
                "own": data.time(functools.partial(data.product, data.own())),
                "library": tried(lambda data=data: data.time(data.peer)),
                "read": data.time(data.read) if num_rows <= 128 else [],
            }
            if args.fused:
                norm, residual = torch.ones(width, device="cuda", dtype=torch.bfloat16), data.x.clone()
                fused, plain = functools.partial(add_rms_norm_fp8, eps=1e-6), functools.partial(add_rms_norm, eps=1e-6)
                times[name] |= {
                    "quantise": data.time(lambda _, x=data.x: quantize_activation(x)),
                    "norm fp8": data.time(lambda _, x=data.x, r=residual, w=norm, f=fused: f(x, r, w)),
                    "norm": data.time(lambda _, x=data.x, r=residual, w=norm, f=plain: f(x, r, w)),
                }
            written = num_rows * (width + 2 * num_out)
            table[name] = row(times[name], data.bytes + written, 2.0 * num_rows * num_out * width)
            if args.sweep:
                print(name, sweep_dense(data), flush=True)
    return times, table


def experts(tokens: tuple[int, ...], args: argparse.Namespace) -> tuple[dict[str, Timed], Table]:
    layers, times, table = [make_layer() for _ in range(LAYERS)], {}, {}
    for num_tokens in tokens:
        data, name = Experts(num_tokens, layers), f"T={num_tokens}"
        times[name] = {
            "gossamer": data.time(data.block),
            "products": data.time(data.products),
            "library": tried(lambda data=data: data.time(data.peer)),
        }
        table[name] = {"experts": data.touched, **row(times[name], data.bytes, data.flops)}
        if args.sweep and num_tokens > kernels.GEMV_TOKENS:
            print(name, sweep_experts(data), flush=True)
    return times, table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--sweep", action="store_true")
    parser.add_argument("--fused", action="store_true")
    parser.add_argument("--out")
    args = parser.parse_args()
    print(torch.cuda.get_device_name())
    times: dict[str, Timed] = {}
    tables: Table = {}
    for part, sizes in ((dense, args.rows), (experts, args.tokens)):
        if sizes:
            measured, table = part(tuple(sizes), args)
            common.print_table(table)
            times |= measured
            tables |= table
    shapes = {"dense": SHAPES, "hidden": HIDDEN, "inter": INTER, "experts": EXPERTS, "top_k": TOP_K, "dtype": "e4m3"}
    medians = {name: {what: statistics.median(us) for what, us in by.items() if us} for name, by in times.items()}
    floors = {name: by["floor"] for name, by in tables.items()}
    common.write(args.out, unit="us", shapes=shapes, repeats=9, median=medians, all=times, floor=floors, table=tables)


if __name__ == "__main__":
    main()

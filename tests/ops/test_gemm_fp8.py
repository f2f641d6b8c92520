"""FP8 products against float64 of the dequantised operands; `gpu` runs real shapes in bf16."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from gossamer.ops.gemm_fp8 import fp8_linear, fp8_moe_mlp, quantize_activation, quantize_weight
from gossamer.ops.moe import interleave_gate_up

pytest.importorskip("triton")

from gossamer.ops.gemm_fp8 import triton as kernels
from gossamer.ops.gemm_fp8.hopper import HopperConfig
from gossamer.ops.gemm_fp8.hopper_few import FewConfig
from gossamer.ops.gemm_fp8.hopper_grouped import GroupedConfig
from gossamer.ops.gemm_fp8.triton import library_is_faster

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
E4M3 = torch.float8_e4m3fn
# With bf16 results their rounding alone is 1.7e-3.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 2e-3}
gpu = pytest.mark.gpu
Config = kernels.Config


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh tensors hold NaN (floats) or a large number (ints): whatever is not written shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def rel_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    assert actual.isfinite().all()
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def activation64(q: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    groups = scales.double() if scales.shape[1] == 1 else scales.double().repeat_interleave(128, 1)[:, : q.shape[1]]
    return q.double() * groups


def weight64(q: torch.Tensor, scales: torch.Tensor, kind: str = "block") -> torch.Tensor:
    if kind == "block":
        scales = scales.repeat_interleave(128, 0)[: q.shape[0]].repeat_interleave(128, 1)[:, : q.shape[1]]
    return q.double() * scales.double()


def operands(m: int, n: int, k: int, kind: str, form: torch.dtype = E4M3) -> tuple[torch.Tensor, ...]:
    x = torch.randn(m, k, device=DEVICE) * torch.rand(m, 1, device=DEVICE)
    # Rows of different scales, none of which outweighs the rest: a few numbers' rounding to bf16 is up to 3.9e-3.
    w = torch.randn(n, k, device=DEVICE) * (0.5 + torch.rand(n, 1, device=DEVICE))
    return *quantize_activation(x, per_token=kind != "block", dtype=form), *quantize_weight(w, kind=kind, dtype=form)


SMALL = [
    (1, 21, 272, None),
    (2, 34, 144, None),
    (5, 200, 400, None),
    (3, 40, 144, None),
    (8, 21, 656, None),
    (9, 40, 144, None),
    (150, 300, 272, None),
    (5, 200, 400, Config(16, 64, 2, 4, 2, True, 3)),
    (40, 300, 272, Config(16, 64, 2, 4, 2, False)),
    (40, 200, 272, Config(16, 128, 1, 4, 2, False, 2)),
]
WHOLE = (
    (2112, 7168),
    (4096, 7168),
    (7168, 2048),
    (24576, 1536),
    (32768, 512),
    (5120, 2048),
    (1536, 8960),
    (1000, 2064),
)
MANY = ((1, 1000, 144), (129, 2112, 7168), (500, 1000, 2064), (4096, 7168, 2048), (3000, 5120, 512))
# Programs that stay with a block of rows for a while, to the last of fewer blocks.
STAY = ((4096, 8192, 512), (9000, 5120, 464), (6500, 4104, 512), (4500, 5120, 256))
REAL = [
    *((m, n, k, None) for n, k in WHOLE for m in (1, 2, 3, 8, 17, 64, 128, 129, 500, 4096)),
    *((*shape, HopperConfig(*cut)) for cut in ((3, 1), (2, 2)) for shape in MANY),
    *((*shape, HopperConfig(*cut)) for cut in ((3, 1, 22), (3, 1, 11), (2, 2, 11)) for shape in STAY),
]


@pytest.mark.parametrize("kind", ["block", "channel", "tensor"])
@pytest.mark.parametrize(("m", "n", "k", "config"), SMALL + [pytest.param(*case, marks=gpu) for case in REAL])
def test_fp8_linear(m: int, n: int, k: int, config: Config | HopperConfig | None, kind: str) -> None:
    on_hopper = isinstance(config, HopperConfig)
    if on_hopper and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")
    q, scales, w, w_scales = operands(m, n, k, kind)
    expected = activation64(q, scales) @ weight64(w, w_scales, kind).T
    bias = torch.randn(n, device=DEVICE)
    for dtype in (torch.float32, torch.bfloat16) if DEVICE == "cuda" else (torch.float32, torch.float16):
        if on_hopper and dtype == torch.float32:
            continue
        y = kernels.fp8_linear(q, scales, w, w_scales, out_dtype=dtype, kind=kind, config=config)
        assert y.dtype == dtype
        assert rel_rms(y, expected) < TOLERANCE[dtype]
        if kind == "block" and m > 1:
            beside = scales.t().contiguous().t()
            again = kernels.fp8_linear(q, beside, w, w_scales, out_dtype=dtype, kind=kind, config=config)
            assert rel_rms(again, expected) < TOLERANCE[dtype], "scales of a group side by side"
    if on_hopper:
        y = kernels.fp8_linear(q, scales, w, w_scales, bias, out_dtype=dtype, kind=kind, config=config)
        assert rel_rms(y, expected + bias.double()) < TOLERANCE[dtype]
        return
    for backend in ("triton", "reference"):
        y = fp8_linear(q, scales, w, w_scales, bias, out_dtype=torch.float32, kind=kind, backend=backend)
        assert rel_rms(y, expected + bias.double()) < 1e-5


FEW = [
    (1, 1, 1, 7, 6), (1, 1, 4, 8, 5), (1, 1, 1, 14, 10), (1, 2, 8, 4, 5), (1, 2, 1, 5, 3), (1, 3, 1, 7, 6),
    (1, 4, 3, 5, 7), (2, 1, 1, 5, 4), (2, 1, 2, 10, 8), (2, 1, 4, 7, 3), (2, 2, 2, 6, 7), (2, 3, 1, 5, 6),
]  # fmt: skip


@gpu
@pytest.mark.parametrize("cut", FEW)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1000, 144), (77, 1000, 2064), (64, 2112, 7168), (128, 4096, 1536)])
def test_few_rows_on_hopper(m: int, n: int, k: int, cut: tuple[int, ...]) -> None:
    """Programs that share K, few steps and none, scales in both orders; alone and behind each other."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")
    q, scales, w, w_scales = operands(m, n, k, "block")
    expected = activation64(q, scales) @ weight64(w, w_scales).T
    config, beside = FewConfig(*cut), scales.t().contiguous().t()
    for dtype in (torch.float16, torch.bfloat16):
        y = kernels.fp8_linear(q, scales, w, w_scales, out_dtype=dtype, kind="block", config=config)
        assert rel_rms(y, expected) < TOLERANCE[dtype]
        assert torch.equal(y, kernels.fp8_linear(q, beside, w, w_scales, out_dtype=dtype, kind="block", config=config))
    torch.use_deterministic_algorithms(False)  # its fills between the kernels would keep them apart
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [
            kernels.fp8_linear(q, scales, w, w_scales, out_dtype=dtype, kind="block", config=config) for _ in range(20)
        ]
    for _ in range(5):
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        assert all(torch.equal(result, y) for result in results)


def test_programs_that_share_k_have_groups_and_counters() -> None:
    """Two for each of 132 multiprocessors at most."""
    chosen = {
        (m, n, k): config
        for m in (32, 63, 64, 65, 128, 129, 256)
        for n in range(8, 20000, 136)
        for k in (16, 512, 1536, 2048, 4096, 7168, 16384)
        if (config := kernels.choose_few(m, n, k))
    }
    assert {config.split_k for config in chosen.values()} == {1, 2, 4}
    for (m, n, k), config in chosen.items():
        tiles = -(-m // config.block_m) * -(-n // (64 * config.parts))
        assert config.split_k == 1 or (tiles * config.split_k <= 264 and k >= 1536 * config.split_k)
        assert config.split_k == 1 or tiles * config.tokens * config.parts <= 4096, "a counter for each warpgroup"
    assert not any(kernels.choose_few(m, 2048, 2048) for m in (31, 257))


def test_the_library_multiplies_whole_groups_of_four_blocks() -> None:
    """torch's product refuses a weight's scales that are not padded to four blocks of K, and ours are not."""
    assert library_is_faster(256, 5120, 4096)
    assert not any(library_is_faster(256, 5120, k) for k in (640, 896, 8960))


def test_e5m2_and_activations_in_groups_against_channels() -> None:
    q, scales, w, w_scales = operands(5, 130, 272, "block", torch.float8_e5m2)
    y = fp8_linear(q, scales, w, w_scales, out_dtype=torch.float32, backend="triton")
    assert rel_rms(y, activation64(q, scales) @ weight64(w, w_scales).T) < 1e-5
    q, scales = operands(5, 130, 272, "block")[:2]
    w, w_scales = operands(5, 130, 272, "channel")[2:]
    for backend in ("triton", "reference"):
        y = fp8_linear(q, scales, w, w_scales, out_dtype=torch.float32, kind="channel", backend=backend)
        assert rel_rms(y, activation64(q, scales) @ weight64(w, w_scales, "channel").T) < 1e-5


def test_a_row_that_is_not_finite_spoils_no_other() -> None:
    x = torch.randn(20, 272, device=DEVICE)
    x[3, 7], x[4, 200] = float("nan"), float("inf")
    w, w_scales = quantize_weight(torch.randn(64, 272, device=DEVICE))
    operands = (*quantize_activation(x), w, w_scales)
    y = fp8_linear(*operands, out_dtype=torch.float32, backend="triton")
    # The interpreter multiplies FP8's NaN as a number.
    broken = y if DEVICE == "cuda" else fp8_linear(*operands, out_dtype=torch.float32, backend="reference")
    assert broken[[3, 4]].isnan().all()
    rest = [i for i in range(20) if i not in (3, 4)]
    clean = fp8_linear(*quantize_activation(x[rest]), w, w_scales, out_dtype=torch.float32, backend="triton")
    assert rel_rms(y[rest], clean.double()) < 1e-6


def positive(m: int, n: int, k: int) -> tuple[torch.Tensor, ...]:
    """All-positive operands whose groups all have scale 1."""
    x, w = (torch.rand(rows, k, device=DEVICE) * 400 + 40 for rows in (m, n))
    x[:, ::128] = w[:, ::128] = 448.0
    return *quantize_activation(x), *quantize_weight(w)


def sum_of_14_bits(q: torch.Tensor, w: torch.Tensor, every: int) -> torch.Tensor:
    """The product as Hopper's FP8 tensor cores add it: sums of 32 products, 14 bits kept; in fp32 after `every`."""
    total = torch.zeros(q.shape[0], w.shape[0], dtype=torch.float64, device=q.device)
    for start in range(0, q.shape[1], every):
        acc = torch.zeros_like(total)
        for k in range(start, start + every, 32):
            mantissa, exponent = torch.frexp(acc + q[:, k : k + 32].double() @ w[:, k : k + 32].double().T)
            acc = torch.ldexp((mantissa * 2.0**14).floor(), exponent - 14)
        total += acc
    return total


# FP8 tensor cores run where the result is of 16 bits, whose rounding is what is left of the error.
SUMMED = torch.float32 if DEVICE == "cpu" else torch.bfloat16


@pytest.mark.parametrize(
    "config",
    [
        Config(16, 64, 1, 4, 2, True),
        *(pytest.param(c, marks=gpu) for c in (Config(128, 128, 1, 8, 4, False), HopperConfig(), None)),
    ],
)
def test_long_positive_sums_are_promoted(config: Config | HopperConfig | None) -> None:
    q, scales, w, w_scales = positive(16 if DEVICE == "cpu" else 300, 64, 16384)
    expected = q.double() @ w.double().T
    assert scales.eq(1).all()
    y = kernels.fp8_linear(q, scales, w, w_scales, out_dtype=SUMMED, kind="block", config=config)
    assert rel_rms(y, expected) < TOLERANCE[SUMMED]


def test_without_promotion_long_positive_sums_drift() -> None:
    """The test of the test: an accumulator of 14 bits alone fails what promotion every 128 passes."""
    q, _, w, _ = positive(8, 16, 16384)
    expected = q.double() @ w.double().T
    assert rel_rms(sum_of_14_bits(q, w, 128), expected) < 5e-4
    assert rel_rms(sum_of_14_bits(q, w, 16384), expected) > 5e-3


@gpu
def test_the_kernel_without_promotion_fails() -> None:
    q, scales, w, w_scales = positive(300, 64, 16384)
    expected = q.double() @ w.double().T
    y = kernels.fp8_linear(q, scales, w, w_scales, out_dtype=SUMMED, kind="block", promote=False)
    assert rel_rms(y, expected) > TOLERANCE[SUMMED]


def test_the_variant_without_promotion_is_the_same_product() -> None:
    q, scales, w, w_scales = positive(20, 64, 512)
    config = Config(16, 64, 1, 4, 2, True)
    y = kernels.fp8_linear(q, scales, w, w_scales, out_dtype=torch.float32, kind="block", config=config, promote=False)
    assert rel_rms(y, q.double() @ w.double().T) < 1e-3


def experts(num_experts: int, hidden: int, inter: int) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], ...]:
    shapes = ((inter, hidden), (inter, hidden), (hidden, inter))
    return tuple(
        [quantize_weight(torch.randn(*shape, device=DEVICE) / shape[1] ** 0.5) for _ in range(num_experts)]
        for shape in shapes
    )


def stacked(gate, up, down) -> tuple[torch.Tensor, ...]:
    def values(part) -> torch.Tensor:
        return torch.stack([q.view(torch.uint8) for q, _ in part])

    return (
        interleave_gate_up(values(gate), values(up)).view(E4M3),
        torch.stack([torch.stack((g[1], u[1])) for g, u in zip(gate, up, strict=True)]),
        values(down).view(E4M3),
        torch.stack([scales for _, scales in down]),
    )


def oracle(x, topk_weights, topk_ids, gate, up, down, own=None) -> torch.Tensor:
    """A float64 loop over dequantised operands; between the products it quantises as the definition says.

    own(t, k): what the kernel has between its products. It must be the exact one within the rounding of E4M3, and then
    takes its place: on the device the last of 14 bits decides which way a number on the edge of two falls, and one of
    the few large numbers of a row, rounded the other way, is some percent of the row.
    """
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    rows = activation64(*quantize_activation(x, backend="reference"))
    for t, k in (topk_ids >= 0).nonzero().tolist():
        e = int(topk_ids[t, k])
        act = torch.nn.functional.silu(weight64(*gate[e]) @ rows[t]) * (weight64(*up[e]) @ rows[t])
        if own is None:
            act = activation64(*quantize_activation(act[None].float(), backend="reference"))[0]
        else:
            exact, act = act, own(t, k)
            rms = exact.norm() / len(exact) ** 0.5
            assert ((act - exact).abs() <= exact.abs() / 15 + 2e-3 * rms).all(), "half of E4M3's spacing is 1 / 16"
        out[t] += float(topk_weights[t, k]) * (weight64(*down[e]) @ act)
    return out


class Between:
    """Keeps what lies between the products of `kernels.fp8_moe_mlp`: the quantised rows, by token and choice."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.product, self.experts = kernels._product, kernels.hopper_grouped.experts
        self.rows: torch.Tensor | None = None
        monkeypatch.setattr(kernels, "_product", self.first)
        monkeypatch.setattr(kernels.hopper_grouped, "experts", self.both)

    def first(self, a, a_scales, w, w_scales, out, config, **options) -> None:
        self.product(a, a_scales, w, w_scales, out, config, **options)
        if options.get("gated"):
            self.keep(out, options["out_scales"], **options)

    def both(self, q, scales, w1, w1_scales, w2, w2_scales, act, act_scales, y, config, counters, **options) -> None:
        self.experts(q, scales, w1, w1_scales, w2, w2_scales, act, act_scales, y, config, counters, **options)
        self.keep(act, act_scales, **options)

    def keep(self, act, act_scales, *, order, num_rows: int, top_k: int, **_) -> None:
        self.top_k, places = top_k, order.places.flatten()
        live = places >= 0
        at = places[live].long()
        self.rows = torch.zeros(num_rows, act.shape[1], dtype=torch.float64, device=act.device)
        self.rows[live] = activation64(act[at], act_scales[at])

    def __getitem__(self, place: tuple[int, int]) -> torch.Tensor:
        assert self.rows is not None
        return self.rows[place[0] * self.top_k + place[1]]


def spread(num_tokens: int, num_experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.rand(num_tokens, num_experts, device=DEVICE).argsort(-1)[:, :top_k].int().contiguous()
    return torch.rand(num_tokens, top_k, device=DEVICE), ids


GROUPED = {
    "chosen": None,
    "quantises itself": (Config(16, 128, 2, 4, 2, True), Config(16, 64, 2, 4, 2, True)),
    "many rows": (Config(16, 128, 2, 8, 2, False, 1, True), Config(16, 128, 2, 8, 2, False, 1, True)),
}


@pytest.mark.parametrize("grouped", GROUPED)
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 8, 21])
def test_fp8_moe_mlp(monkeypatch: pytest.MonkeyPatch, num_tokens: int, grouped: str) -> None:
    if GROUPED[grouped] is not None:
        if num_tokens < 3:
            return
        monkeypatch.setattr(kernels, "choose_grouped", lambda *_: GROUPED[grouped])
    parts = experts(5, 160, 144)
    x, (weights, ids) = torch.randn(num_tokens, 160, device=DEVICE), spread(num_tokens, 5, 3)
    for variant in ("spread", "one expert", "padded rows") if num_tokens > 2 else ("padded rows",):
        if variant == "one expert":
            ids[:, 0] = 4
            ids[:, 1:] = -1
        if variant == "padded rows":
            ids[1::2] = -1
            weights[1::2] = float("nan")
        # A number on the edge between two FP8 values may fall to either side.
        expected = oracle(x, weights, ids, *parts)
        assert rel_rms(fp8_moe_mlp(x, weights, ids, *stacked(*parts), backend="triton"), expected) < 1e-3
    q, scales = quantize_activation(x)
    for laid in (scales, scales.t().contiguous().t()):
        y = fp8_moe_mlp(x, weights, ids, *stacked(*parts), quantized=(q, laid), backend="triton")
        assert rel_rms(y, expected) < 1e-3
    assert rel_rms(fp8_moe_mlp(x, weights, ids, *stacked(*parts), backend="reference"), expected) < 1e-3


def test_unsupported_input_is_refused() -> None:
    q, scales, w, w_scales = operands(3, 40, 144, "block")
    options = {"out_dtype": torch.float32, "backend": "triton"}
    assert fp8_linear(q[:0], scales[:0], w, w_scales, **options).shape == (0, 40)
    with pytest.raises(ValueError, match="multiple of 16"):
        fp8_linear(*operands(3, 40, 100, "block"), **options)
    with pytest.raises(ValueError, match="do not fit"):
        fp8_linear(q, scales, w, w_scales, kind="channel", **options)
    with pytest.raises(ValueError, match="do not fit"):
        fp8_linear(q, scales[:2].contiguous(), w, w_scales, **options)
    with pytest.raises(ValueError, match="FP8 values"):
        fp8_linear(q.float(), scales, w, w_scales, **options)
    with pytest.raises(ValueError, match="contiguous"):
        fp8_linear(q, scales, w.T.contiguous().T, w_scales, **options)
    with pytest.raises(ValueError, match="scales of rows"):
        fp8_linear(q, scales[:, None].expand(3, 2, 2)[:, :, 0], w, w_scales, **options)
    x, (weights, ids), tensors = torch.randn(3, 160, device=DEVICE), spread(3, 5, 3), stacked(*experts(5, 160, 144))
    with pytest.raises(ValueError, match="int32"):
        fp8_moe_mlp(x, weights, ids.long(), *tensors, backend="triton")
    with pytest.raises(ValueError, match="do not fit"):
        fp8_moe_mlp(x[:, :144].contiguous(), weights, ids, *tensors, backend="triton")


@gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 8, 16, 33, 64, 128, 200, 513, 1500, 2048, 4096])
def test_fp8_moe_mlp_at_real_shapes(monkeypatch: pytest.MonkeyPatch, num_tokens: int) -> None:
    parts = experts(128, 2048, 768)
    tensors = stacked(*parts)
    x = torch.randn(num_tokens, 2048, device=DEVICE).bfloat16()
    weights, ids = spread(num_tokens, 128, 8)
    ids[-1] = -1
    with monkeypatch.context() as patch:
        between = Between(patch)
        y = fp8_moe_mlp(x, weights, ids, *tensors)
    picked = sorted({0, num_tokens // 2, max(0, num_tokens - 2)})
    own = None if between.rows is None else lambda t, k: between[picked[t], k]
    assert rel_rms(y[picked], oracle(x[picked], weights[picked], ids[picked], *parts, own)) < 5e-3
    assert y.isfinite().all()
    assert y[-1].eq(0).all()
    assert torch.equal(y, fp8_moe_mlp(x, weights, ids, *tensors)), "sums have a fixed order"
    quantized = quantize_activation(x)
    torch.use_deterministic_algorithms(False)  # its fills between the kernels would keep them apart
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fp8_moe_mlp(x, weights, ids, *tensors, quantized=quantized)
    for _ in range(5):
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, y)


def ragged(num_tokens: int) -> torch.Tensor:
    """Of 40 experts one has no row, others 1, 17 and 33, and some choices are of none."""
    ids = 4 + torch.rand(num_tokens, 36, device=DEVICE).argsort(-1)[:, :4].int()
    for expert, rows in ((1, 1), (2, 17), (3, 33)):
        ids[torch.randperm(num_tokens, device=DEVICE)[:rows], expert - 1] = expert
    ids[::7, 3] = -1
    return ids.contiguous()


@gpu
@pytest.mark.parametrize("swiglu", [None, (1.702, 7.0)])
@pytest.mark.parametrize("block_m", [16, 32])
@pytest.mark.parametrize(("hidden", "inter"), [(1024, 256), (2048, 768)])
def test_both_products_in_one_kernel(
    monkeypatch: pytest.MonkeyPatch, hidden: int, inter: int, block_m: int, swiglu: tuple[float, float] | None
) -> None:
    """Experts of no row, some, and more than a block; alone, and behind each other with other routes."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs Hopper")
    monkeypatch.setattr(kernels, "choose_grouped", lambda *_: GroupedConfig(block_m))
    parts, x = experts(40, hidden, inter), torch.randn(90, hidden, device=DEVICE).bfloat16()
    tensors, weights = stacked(*parts), torch.rand(90, 4, device=DEVICE)
    routes = [ragged(90) for _ in range(4)]
    routes += [torch.full_like(routes[0], -1), torch.arange(4, device=DEVICE, dtype=torch.int32).repeat(90, 1)]
    with monkeypatch.context() as patch:
        between = Between(patch)
        y = fp8_moe_mlp(x, weights, routes[0], *tensors, swiglu=swiglu)
    if swiglu is None:
        assert rel_rms(y, oracle(x, weights, routes[0], *parts, lambda t, k: between[t, k])) < 5e-3
    assert not kernels.arrival_counters(x).any()
    quantized = quantize_activation(x)
    apart: list[torch.Tensor] = []
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "choose_grouped", lambda *_: (Config(block_m, 128, 2, 4, 3, True),) * 2)
        for ids in routes:
            apart.append(fp8_moe_mlp(x, weights, ids, *tensors, quantized=quantized, swiglu=swiglu).double())
    torch.use_deterministic_algorithms(False)  # its fills between the kernels would keep them apart
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = [fp8_moe_mlp(x, weights, ids, *tensors, quantized=quantized, swiglu=swiglu) for ids in routes * 3]
    for _ in range(5):
        for result in results:
            result.fill_(float("nan"))
        graph.replay()
        for i, result in enumerate(results):
            assert torch.equal(result, results[i % len(routes)])
            assert rel_rms(result, apart[i % len(routes)]) < 1e-2, "a number on the edge of two may fall to either side"


@pytest.mark.parametrize(
    ("num_engines", "hidden", "both"), [(0, 1024, True), (1, 1024, True), (2, 1024, False), (1, 896, False)]
)
def test_two_engines_have_no_kernels_that_wait_for_their_programs(
    monkeypatch: pytest.MonkeyPatch, num_engines: int, hidden: int, both: bool
) -> None:
    def choose(*args: object) -> None:
        raise LookupError(f"both: {args[4]}")

    monkeypatch.setattr(kernels, "is_hopper", lambda _: True)
    monkeypatch.setattr(kernels, "device_users", [object()] * num_engines)
    monkeypatch.setattr(kernels, "choose_grouped", choose)
    x, routes = torch.randn(9, hidden, device=DEVICE).half(), spread(9, 5, 3)
    with pytest.raises(LookupError, match=f"both: {both}"):
        fp8_moe_mlp(x, *routes, *stacked(*experts(5, hidden, 256)), backend="triton")


def test_few_rows_of_an_expert_are_for_one_kernel() -> None:
    chosen = {t: kernels.choose_grouped(8 * t, 128, True, False, True) for t in (3, 8, 160, 161, 256, 257, 384, 385)}
    blocks = {t: config.block_m for t, config in chosen.items() if isinstance(config, GroupedConfig)}
    assert blocks == {3: 16, 8: 16, 160: 16, 161: 32, 256: 32}
    assert isinstance(chosen[384][0], Config)
    assert isinstance(chosen[385][0], HopperConfig)
    assert not isinstance(kernels.choose_grouped(8 * 64, 128, True), GroupedConfig)

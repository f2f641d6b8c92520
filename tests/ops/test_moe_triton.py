"""The MoE kernels against float64: the interpreter on tiny shapes, the device (marker gpu) on real ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch

from gossamer.ops.moe import (
    add_rms_norm_router,
    interleave_gate_up,
    moe_mlp,
    moe_mlp_add_rms_norm,
    route_topk,
    router,
)
from gossamer.ops.norm import add_rms_norm
from gossamer.ops.quantize_fp8 import quantize_activation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fresh tensors hold NaN (floats) or a large number (ints): whatever is not written shows."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def oracle(x, topk_weights, topk_ids, gate, up, down):
    out = torch.zeros(x.shape, dtype=torch.float64, device=x.device)
    gate, up, down = gate.double(), up.double(), down.double()
    for t, k in (topk_ids >= 0).nonzero().tolist():
        e, row = int(topk_ids[t, k]), x[t].double()
        act = torch.nn.functional.silu(gate[e] @ row) * (up[e] @ row)
        out[t] += float(topk_weights[t, k]) * (down[e] @ act)
    return out


def rel_rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected).norm() / expected.norm().clamp_min(1e-30))


def experts(num_experts: int, hidden: int, inter: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return tuple(
        (torch.randn(num_experts, *shape, device=DEVICE) / shape[1] ** 0.5).to(dtype)
        for shape in ((inter, hidden), (inter, hidden), (hidden, inter))
    )


def captured(fn: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = fn()
    return graph, out


def spread(num_tokens: int, num_experts: int, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.rand(num_tokens, num_experts, device=DEVICE).argsort(-1)[:, :top_k].int().contiguous()
    return torch.rand(num_tokens, top_k, device=DEVICE), ids


@pytest.mark.parametrize("score_func", ["softmax", "sigmoid"])
@pytest.mark.parametrize("renormalize", [True, False])
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(0, 4, 2), (1, 4, 4), (7, 60, 8), (5, 300, 16)])
def test_routing_equals_the_reference(score_func, renormalize, num_tokens, num_experts, top_k) -> None:
    logits = (torch.randn(num_tokens, num_experts, device=DEVICE) * 4).round() / 4  # ties are frequent
    slots = torch.arange(num_tokens, dtype=torch.int32, device=DEVICE) - 1
    options = {"renormalize": renormalize, "score_func": score_func, "token_slots": slots}
    expected_weights, expected_ids = route_topk(logits, top_k, backend="reference", **options)
    weights, ids = route_topk(logits, top_k, backend="triton", **options)
    assert ids.dtype == torch.int32
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "hidden"), [(0, 4, 16), (1, 12, 48), (5, 20, 64), (20, 40, 32), (70, 8, 32)]
)
def test_router_equals_the_reference(num_tokens: int, num_experts: int, hidden: int) -> None:
    x = torch.randn(num_tokens, hidden, device=DEVICE)
    weight = torch.randn(num_experts, hidden, device=DEVICE)
    slots = torch.arange(num_tokens, dtype=torch.int32, device=DEVICE) - 1
    arrivals = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    for _ in range(2):  # the second call finds the counter as the first left it
        weights, ids = router(x, weight, 3, renormalize=True, token_slots=slots, arrivals=arrivals, backend="triton")
        expected_weights, expected_ids = router(x, weight, 3, renormalize=True, token_slots=slots, backend="reference")
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_tokens", [1, 6])
def test_one_token_and_several_break_ties_and_survive_nan_alike(num_tokens: int) -> None:
    """A single token's experts are chosen by rank, those of several one after the other."""
    x = torch.randn(num_tokens, 16, device=DEVICE)
    weight = torch.randn(4, 16, device=DEVICE).repeat(5, 1)  # of five equal logits each the lowest ids win
    _, expected = router(x, weight, 8, renormalize=True, backend="reference")
    _, ids = router(x, weight, 8, renormalize=True, backend="triton")
    assert torch.equal(ids, expected)
    weights, ids = router(torch.full_like(x, float("nan")), weight, 8, renormalize=True, backend="triton")
    assert weights.isnan().all()
    assert ids.tolist() == [list(range(8))] * num_tokens


def test_many_tokens_and_too_many_experts_for_one_program(monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.ops.moe import triton_router

    monkeypatch.setattr(triton_router, "ROUTER_TOKENS", 4)
    x, weight = torch.randn(40, 300, device=DEVICE), torch.randn(80, 300, device=DEVICE)
    expected_weights, expected_ids = router(x, weight, 3, renormalize=False, backend="reference")
    for tokens, most in ((8, 128), (8, 8), (64, 8)):
        monkeypatch.setattr(triton_router, "WHOLE_TOKENS", tokens)
        monkeypatch.setattr(triton_router, "WHOLE_EXPERTS", most)
        weights, ids = router(x, weight, 3, renormalize=False, backend="triton")
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-5)
    expected_weights, expected_ids = router(x, weight[:32], 3, renormalize=False, backend="reference")
    weights, ids = router(x, weight[:32], 3, renormalize=False, backend="triton")  # a program of few tokens has all
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-5)


GROUPED = [
    {"score_func": "sigmoid", "group_top": 2},
    {"score_func": "sigmoid", "num_groups": 6, "topk_groups": 3, "group_top": 2, "scale": 2.5, "num_shared": 1},
    {"num_groups": 4, "topk_groups": 1, "scale": 16.0, "num_shared": 2},
    {"num_groups": 5, "topk_groups": 2, "group_top": 2},
]


@pytest.mark.parametrize("options", GROUPED)
@pytest.mark.parametrize("shift", [None, 0.0, -5.0])
def test_grouped_routing_with_a_bias_equals_the_reference(options, shift, monkeypatch: pytest.MonkeyPatch) -> None:
    """In every form of the router; biases below zero must not let a dropped group in."""
    from gossamer.ops.moe import triton_router

    x, weight = torch.randn(40, 32, device=DEVICE), torch.randn(60, 32, device=DEVICE) / 4
    bias = None if shift is None else torch.randn(60, device=DEVICE) / 4 + shift
    slots = torch.arange(40, dtype=torch.int32, device=DEVICE) - 1
    options = {"bias": bias, "renormalize": shift != 0.0, "token_slots": slots, **options}
    expected = router(x, weight, 5, backend="reference", **options)
    logits = x @ weight.t()
    for few, whole in ((64, 1024), (8, 1024), (8, 8)):
        monkeypatch.setattr(triton_router, "ROUTER_TOKENS", few)
        monkeypatch.setattr(triton_router, "WHOLE_TOKENS", whole)
        weights, ids = router(x, weight, 5, backend="triton", **options)
        assert torch.equal(ids, expected[1])
        torch.testing.assert_close(weights, expected[0], rtol=1e-5, atol=1e-5)
    weights, ids = route_topk(logits, 5, backend="triton", **options)
    assert torch.equal(ids, expected[1])
    weights, ids = route_topk(torch.full_like(logits, float("nan")), 5, backend="triton", **options)
    assert weights[1:, :5].isnan().all()
    assert all(len(set(row)) == len(row) and min(row) >= 0 for row in ids[1:].tolist())


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 11])
def test_add_norm_and_router_in_one(num_tokens: int) -> None:
    x, residual = torch.randn(2, num_tokens, 48, device=DEVICE)
    norm, weight = torch.rand(48, device=DEVICE), torch.randn(10, 48, device=DEVICE)
    slots = torch.arange(num_tokens, dtype=torch.int32, device=DEVICE) - int(num_tokens > 1)
    arrivals = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    options = {"renormalize": True, "token_slots": slots}
    expected_normed = add_rms_norm(x, expected_residual := residual.clone(), norm, 1e-6, backend="reference")
    expected = router(expected_normed, weight, 3, backend="reference", **options)
    for backend in ("triton", "triton", "reference"):  # the second call finds the counter as the first left it
        *found, quantized = add_rms_norm_router(
            x, residual.clone(), norm, 1e-6, weight, 3, arrivals=arrivals, quantize=True, backend=backend, **options
        )
        torch.testing.assert_close(found, [*expected, expected_residual, expected_normed], rtol=1e-5, atol=1e-5)
        of_kernel = quantize_activation(found[3], backend="reference")
        assert torch.equal(quantized[1], of_kernel[1])
        assert torch.equal(quantized[0].view(torch.uint8), of_kernel[0].view(torch.uint8))


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 12])
def test_sum_norm_and_experts_in_one(num_tokens: int) -> None:
    gate, up, down = experts(5, 48, 32, torch.float32)
    x, residual = torch.randn(2, num_tokens, 48, device=DEVICE)
    norm, (weights, ids) = torch.rand(48, device=DEVICE), spread(num_tokens, 5, 3)
    ids[1::3] = -1
    total = residual.double() + oracle(x, weights, ids, gate, up, down)
    expected = total * (total.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm
    for backend in ("triton", "reference"):
        kept = residual.clone()
        w = interleave_gate_up(gate, up)
        normed = moe_mlp_add_rms_norm(x, weights, ids, w, down, kept, norm, 1e-6, backend=backend)
        assert rel_rms(kept, total) < 1e-6
        assert rel_rms(normed, expected) < 1e-6


def test_nan_logits_give_nan_weights_and_distinct_ids_in_range() -> None:
    logits = torch.randn(3, 6, device=DEVICE)
    logits[1] = float("nan")
    weights, ids = route_topk(logits, 4, renormalize=True, backend="triton")
    assert weights[1].isnan().all()
    assert weights[[0, 2]].isfinite().all()
    assert sorted(ids[1].tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize("num_tokens", [0, 1, 2, 3, 21])
@pytest.mark.parametrize(("hidden", "inter", "num_experts", "top_k"), [(48, 80, 5, 3), (32, 16, 33, 1)])
def test_moe_mlp_equals_float64(num_tokens: int, hidden: int, inter: int, num_experts: int, top_k: int) -> None:
    gate, up, down = experts(num_experts, hidden, inter, torch.float32)
    x = torch.randn(num_tokens, hidden, device=DEVICE)
    weights, ids = spread(num_tokens, num_experts, top_k)
    for variant in ("spread", "one expert", "padded rows"):
        if variant == "one expert":
            ids[:, 0] = num_experts - 1
            ids[:, 1:] = -1
        if variant == "padded rows":
            ids[1::2] = -1
            weights[1::2] = float("nan")
        actual = moe_mlp(x, weights, ids, interleave_gate_up(gate, up), down, backend="triton")
        assert rel_rms(actual, oracle(x, weights, ids, gate, up, down)) < 1e-6


@pytest.mark.parametrize("top_k", [1, 3])
def test_many_rows(monkeypatch: pytest.MonkeyPatch, top_k: int) -> None:
    """The sort and the persistent products that long prompts get, at a size the interpreter can afford."""
    from gossamer.ops.moe import triton

    config = triton.GroupedConfig(16, 16, 16, 4, 2, persistent=True)
    monkeypatch.setattr(triton, "SMALL_SORT", 4)
    monkeypatch.setattr(triton, "RANKED", 32)
    monkeypatch.setattr(triton, "grouped_configs", lambda *_: (config, config))
    gate, up, down = experts(4, 32, 16, torch.float32)
    x = torch.randn(40, 32, device=DEVICE)
    weights, ids = spread(40, 4, top_k)
    ids[ids == 2] = -1
    actual = moe_mlp(x, weights, ids, interleave_gate_up(gate, up), down, backend="triton")
    assert rel_rms(actual, oracle(x, weights, ids, gate, up, down)) < 1e-6


@pytest.mark.parametrize("block_m", [16, 192])
@pytest.mark.parametrize("num_tokens", [3, 150])
def test_sort_fills_whole_blocks_of_one_expert(monkeypatch: pytest.MonkeyPatch, block_m: int, num_tokens: int) -> None:
    from gossamer.ops.moe import triton

    monkeypatch.setattr(triton, "SMALL_SORT", 64)
    _, ids = spread(num_tokens, 4, 3)
    ids[ids == 2] = -1
    order = triton.sort_by_expert(ids, 4, block_m)
    num_blocks, *counters = order.num_blocks.tolist()
    assert counters == [0, 0, 0]
    blocks = order.rows.view(-1, block_m)[:num_blocks]
    listed = blocks[blocks < ids.numel()]
    assert sorted(listed.tolist()) == (ids.flatten() >= 0).nonzero().flatten().tolist()
    present, places = ids.flatten() >= 0, order.places.flatten()
    assert (places[~present] == -1).all()
    assert order.rows[places[present].long()].tolist() == present.nonzero().flatten().tolist()
    for rows, expert in zip(blocks, order.block_expert.tolist(), strict=False):
        count = int((rows < ids.numel()).sum())
        assert count > 0
        assert (ids.flatten()[rows[:count].long()] == expert).all()
        assert (rows[count:] == ids.numel()).all()


def test_what_the_hopper_kernel_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.ops.moe import triton

    many = triton.HOPPER_ROWS
    x = mock.Mock(is_cuda=True, shape=(2048, 128), **{"element_size.return_value": 2, "numel.return_value": 2**18})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(torch.version, "hip", None)
    assert triton.hopper_serves(x, 64, many)
    assert not triton.hopper_serves(x, 64, many - 1)
    assert not triton.hopper_serves(x, 96, many)
    assert not triton.hopper_serves(torch.empty(2048, 128), 64, many)
    x.numel.return_value = 2**31
    assert not triton.hopper_serves(x, 64, many)
    x.numel.return_value = 2**18
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (10, 0))
    assert not triton.hopper_serves(x, 64, many)


def test_fp16_and_the_reference() -> None:
    gate, up, down = experts(6, 32, 48, torch.float16)
    x = torch.randn(9, 32, device=DEVICE).half()
    weights, ids = spread(9, 6, 2)
    ids[4] = -1
    for backend in ("triton", "reference"):
        actual = moe_mlp(x, weights, ids, interleave_gate_up(gate, up), down, backend=backend)
        assert actual.dtype == torch.float16
        assert rel_rms(actual, oracle(x, weights, ids, gate, up, down)) < 2e-3


def test_unsupported_input_is_refused() -> None:
    gate, up, down = experts(4, 32, 16, torch.float32)
    x, (weights, ids) = torch.randn(3, 32, device=DEVICE), spread(3, 4, 2)
    w = interleave_gate_up(gate, up)
    with pytest.raises(ValueError, match="not int32"):
        moe_mlp(x, weights, ids.long(), w, down, backend="triton")
    with pytest.raises(ValueError, match="multiples of 16"):
        moe_mlp(
            x[:, :24].contiguous(), weights, ids, w[..., :24].contiguous(), down[:, :24].contiguous(), backend="triton"
        )
    with pytest.raises(ValueError, match="not contiguous"):
        moe_mlp(x, weights, ids, w, down.transpose(1, 2), backend="triton")
    with pytest.raises(ValueError, match="top-5 of 4"):
        route_topk(torch.randn(2, 4, device=DEVICE), 5, renormalize=True)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 8, 33, 64, 200, 513, 1500, 4096, 8192])
@pytest.mark.parametrize("num_padded", [0, 1])
def test_moe_mlp_bf16_at_real_shapes(num_tokens: int, num_padded: int) -> None:
    gate, up, down = experts(128, 2048, 768, torch.bfloat16)
    x = torch.randn(num_tokens, 2048, device=DEVICE).bfloat16()
    weights, ids = spread(num_tokens, 128, 8)
    if num_padded:
        ids[-1] = -1
    actual = moe_mlp(x, weights, ids, interleave_gate_up(gate, up), down)
    picked = sorted({0, num_tokens // 2, num_tokens - 1})
    expected = oracle(x[picked], weights[picked], ids[picked], gate, up, down)
    assert rel_rms(actual[picked], expected) < 5e-3
    assert actual.isfinite().all()
    again = moe_mlp(x, weights, ids, interleave_gate_up(gate, up), down)
    assert torch.equal(actual, again), "sums have a fixed order"


@pytest.mark.gpu
@pytest.mark.parametrize("hopper", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("hidden", "inter", "num_tokens"), [(2048, 768, 700), (448, 320, 1100), (64, 64, 2500), (128, 192, 300)]
)
def test_many_rows_per_expert(
    monkeypatch: pytest.MonkeyPatch, hopper: bool, dtype: torch.dtype, hidden: int, inter: int, num_tokens: int
) -> None:
    """Both grouped products, with an expert of no row, one of a single row and one of half of all tokens."""
    from gossamer.ops.moe import triton

    monkeypatch.setattr(triton, "HOPPER_ROWS", 0 if hopper else 2**31)
    if hopper and torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper device")
    gate, up, down = experts(6, hidden, inter, dtype)
    x = torch.randn(num_tokens, hidden, device=DEVICE).to(dtype)
    scores = torch.rand(num_tokens, 6, device=DEVICE)
    scores[:, :2] = -1
    scores[5, 1] = 2
    scores[: num_tokens // 2, 2] = 2
    ids = scores.topk(2).indices.int()
    ids[7] = -1
    ids[10:40, 1] = -1
    weights = torch.rand(num_tokens, 2, device=DEVICE)
    w_gate_up = interleave_gate_up(gate, up)
    actual = moe_mlp(x, weights, ids, w_gate_up, down)
    assert rel_rms(actual, oracle(x, weights, ids, gate, up, down)) < 5e-3
    assert torch.equal(actual, moe_mlp(x, weights, ids, w_gate_up, down)), "no result depends on the order of tiles"
    ids.fill_(-1)
    assert not moe_mlp(x, weights, ids, w_gate_up, down).any()


@pytest.mark.gpu
@pytest.mark.parametrize(("num_tokens", "tolerance"), [(1, 1e-5), (16, 1e-5), (64, 1e-5), (65, 1e-5), (3000, 1e-5)])
def test_router_is_exact_at_real_shapes(num_tokens: int, tolerance: float) -> None:
    x = torch.randn(num_tokens, 2048, device=DEVICE).bfloat16()
    weight = torch.randn(128, 2048, device=DEVICE) * 0.02
    weights, ids = router(x, weight, 8, renormalize=True)
    scores = (x.double() @ weight.double().T).softmax(-1).gather(1, ids.long())
    torch.testing.assert_close(weights.double(), scores / scores.sum(-1, keepdim=True), rtol=0, atol=tolerance)
    best = (x.double() @ weight.double().T).softmax(-1).topk(8, -1).values
    torch.testing.assert_close(scores, best, rtol=0, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 8, 9, 64, 500, 5000])
def test_fused_ops_equal_the_ops_they_fuse(num_tokens: int) -> None:
    gate, up, down = experts(128, 2048, 768, torch.bfloat16)
    w, weight = interleave_gate_up(gate, up), (torch.randn(128, 2048, device=DEVICE) * 0.02).bfloat16()
    x, residual = torch.randn(2, num_tokens, 2048, device=DEVICE).bfloat16()
    norm = torch.rand(2048, device=DEVICE).bfloat16() + 0.5
    slots = torch.arange(num_tokens, dtype=torch.int32, device=DEVICE) - int(num_tokens > 1)
    expected = residual.clone()
    normed = add_rms_norm(x, expected, norm, 1e-6)
    options = {"renormalize": True, "token_slots": slots}
    weights, ids, stream, rows, _ = add_rms_norm_router(x, residual.clone(), norm, 1e-6, weight, 8, **options)
    assert torch.equal(stream, expected)
    assert rel_rms(rows, normed.double()) < 1e-3
    expected_weights, expected_ids = router(rows, weight, 8, **options)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(weights, expected_weights, rtol=0, atol=1e-5)
    after = add_rms_norm(moe_mlp(rows, weights, ids, w, down), expected, norm, 1e-6)
    assert torch.equal(moe_mlp_add_rms_norm(rows, weights, ids, w, down, stream, norm, 1e-6), after)
    assert torch.equal(stream, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 8, 64, 300, 2000, 7000])
def test_a_graph_replays_what_eager_gives(num_tokens: int) -> None:
    """Kernels of a graph overlap (programmatic dependent launch): none may read what is not yet written."""
    gate, up, down = experts(128, 2048, 768, torch.bfloat16)
    w_gate_up, weight = interleave_gate_up(gate, up), torch.randn(128, 2048, device=DEVICE) * 0.02
    norm = torch.ones(2048, device=DEVICE).bfloat16()
    x = torch.randn(num_tokens, 2048, device=DEVICE).bfloat16()
    arrivals = torch.zeros(16, dtype=torch.int32, device=DEVICE)
    torch.use_deterministic_algorithms(False)  # its fills between the kernels would keep them apart

    def block() -> torch.Tensor:
        y, stream = x, torch.zeros_like(x)
        for _ in range(3):
            weights, ids, stream, y, _ = add_rms_norm_router(
                y, stream, norm, 1e-6, weight, 8, renormalize=True, arrivals=arrivals
            )
            y = moe_mlp_add_rms_norm(y, weights, ids, w_gate_up, down, stream, norm, 1e-6)
        return y

    block()
    graph, out = captured(block)
    for _ in range(5):
        x.copy_(torch.randn_like(x))
        expected = block()
        out.fill_(float("nan"))
        graph.replay()
        assert torch.equal(out, expected)

"""The MoE block: routing to top-k experts and the grouped expert MLP (TECHNIQUES 1)."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from gossamer.ops.dispatch import require_reference, use_kernel
from gossamer.ops.moe import reference
from gossamer.ops.norm import add_rms_norm
from gossamer.ops.quantize_fp8 import Quantized, quantize_activation

MAX_EXPERTS, MAX_TOP_K = 512, 16


def route_topk(
    router_logits: torch.Tensor, top_k: int, *, token_slots: torch.Tensor | None = None, backend: str = "auto",
    **choice: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Chooses experts: router_logits [num_tokens, num_experts] -> weights fp32, ids int32 [num_tokens, top_k + shared].

    The options and their defaults are those of `_choice`. Scores are softmax or sigmoid (`score_func`) of the logits in
    fp32; of equals the lower id wins. `bias`, fp32 [num_experts], is added for the choice alone. With `topk_groups` of
    `num_groups` consecutive groups only those with the largest sum of `group_top` best scores have a chance
    (DeepSeek-V3, arXiv:2412.19437, section 2.1.2). `renormalize` makes the kept weights sum to 1 before they are
    multiplied by `scale`. Ids num_experts .. num_experts + num_shared - 1 follow, with weight 1. token_slots: int32
    [num_tokens]; tokens of slot -1 are padding: weights 0, ids -1.
    """
    options = _choice(router_logits.shape[1], top_k, **choice) | {"token_slots": token_slots}
    if not use_kernel(router_logits, backend):
        return reference.route_topk(router_logits, top_k, **options)
    from gossamer.ops.moe import triton_router

    return triton_router.route_topk(router_logits, top_k, **options)


def router(
    x: torch.Tensor, weight: torch.Tensor, top_k: int, *, token_slots: torch.Tensor | None = None,
    arrivals: torch.Tensor | None = None, backend: str = "auto", **choice: Any,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`route_topk`, with its options, of the fp32 product of x [num_tokens, hidden] with weight [num_experts, hidden].

    arrivals: zeroed int32 [16] that the kernel leaves zeroed; calls that share one must not run at the same time.
    Without it every call clears one of its own. `weight` is read before the preceding kernel has ended: a constant.
    """
    options = _choice(weight.shape[0], top_k, **choice) | {"token_slots": token_slots}
    if not use_kernel(x, backend):
        return reference.router(x, weight, top_k, **options)
    _check_contiguous("router", x=x, weight=weight)
    from gossamer.ops.moe import triton_router

    return triton_router.router(x, weight, top_k, arrivals=arrivals, **options)


def add_rms_norm_router(
    x: torch.Tensor, residual: torch.Tensor, norm_weight: torch.Tensor, eps: float, weight: torch.Tensor, top_k: int, *,
    token_slots: torch.Tensor | None = None, arrivals: torch.Tensor | None = None, quantize: bool = False,
    backend: str = "auto", **choice: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Quantized | None]:  # fmt: skip
    """`ops.norm.add_rms_norm` and `router` of what it returns, for few tokens in one launch.

    x, residual [num_tokens, hidden]; norm_weight [hidden]; else as `router`. Returns the router's weights and ids, the
    new residual stream x + residual, its normed rows and, to `quantize`, their FP8 form (`quantize_activation`).
    `residual` itself may hold either stream afterwards.
    """
    options = _choice(weight.shape[0], top_k, **choice) | {"token_slots": token_slots}
    if not use_kernel(x, backend):
        normed = add_rms_norm(x, residual, norm_weight, eps, backend="reference")
        weights, ids = reference.router(normed, weight, top_k, **options)
        quantized = quantize_activation(normed, backend="reference") if quantize else None
        return weights, ids, residual, normed, quantized
    _check_contiguous("add_rms_norm_router", x=x, residual=residual, norm_weight=norm_weight, weight=weight)
    if x.shape != residual.shape or norm_weight.shape != x.shape[1:] or weight.shape[1:] != x.shape[1:]:
        raise ValueError(f"add_rms_norm_router: x {x.shape}, residual {residual.shape}, router {weight.shape} differ")
    from gossamer.ops.moe import triton_router

    return triton_router.add_rms_norm_router(
        x, residual, norm_weight, eps, weight, top_k, arrivals=arrivals, quantize=quantize, **options
    )


def interleave_gate_up(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gate, up [..., inter, hidden] -> [..., 2 * inter, hidden] as `moe_mlp` wants it: gate 0, up 0, gate 1, ...

    A gate and its up value are neighbours in one thread's accumulator there, so that SiLU*mul needs no exchange. A
    loader may as well write into `w_gate_up.view(num_experts, inter, 2, hidden)[e, :, 0 or 1]`.
    """
    return torch.stack((gate, up), dim=-2).flatten(-3, -2)


def moe_mlp(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor,
    *, swiglu: tuple[float, float] | None = None, backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """sum_k topk_weights[t, k] * down(silu(gate(x[t])) * up(x[t])) with the matrices of expert topk_ids[t, k].

    x [num_tokens, hidden]; topk_weights fp32, topk_ids int32 [num_tokens, top_k], ids distinct within a token, -1 for
    none; w_gate_up [num_experts, 2 * inter, hidden] interleaved (`interleave_gate_up`); w_down [num_experts, hidden,
    inter]. Returns [num_tokens, hidden]. Experts without tokens are not read; sums over k are in fp32 and in order.
    swiglu: as for `ops.activation.silu_mul`.
    """
    if not use_kernel(x, backend):
        return reference.moe_mlp(x, topk_weights, topk_ids, w_gate_up, w_down, swiglu)
    _check_mlp(x, topk_weights, topk_ids, w_gate_up, w_down)
    from gossamer.ops.moe import triton

    return triton.moe_mlp(x, topk_weights, topk_ids, w_gate_up, w_down, swiglu=swiglu)


def moe_mlp_add_rms_norm(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor,
    residual: torch.Tensor, norm_weight: torch.Tensor, eps: float, *, swiglu: tuple[float, float] | None = None,
    backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """`moe_mlp` and `ops.norm.add_rms_norm` of its result: residual [num_tokens, hidden] += it in place, then the norm.

    norm_weight [hidden]; bit for bit what the two ops give. Returns the normed rows [num_tokens, hidden].
    """
    if not use_kernel(x, backend):
        y = reference.moe_mlp(x, topk_weights, topk_ids, w_gate_up, w_down, swiglu)
        return add_rms_norm(y, residual, norm_weight, eps, backend="reference")
    _check_mlp(x, topk_weights, topk_ids, w_gate_up, w_down)
    _check_contiguous("moe_mlp_add_rms_norm", residual=residual, norm_weight=norm_weight)
    if residual.shape != x.shape or norm_weight.shape != x.shape[1:]:
        raise ValueError(f"moe_mlp_add_rms_norm: residual {residual.shape} or norm {norm_weight.shape} for x {x.shape}")
    from gossamer.ops.moe import triton

    return triton.moe_mlp(x, topk_weights, topk_ids, w_gate_up, w_down, residual, norm_weight, eps, swiglu)


def grouped_mlp(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor,
    experts: Sequence[Callable[[torch.Tensor], torch.Tensor]], *, backend: str = "auto",
) -> torch.Tensor:  # fmt: skip
    """sum_k topk_weights[t, k] * experts[topk_ids[t, k]](x[t]) for x [num_tokens, hidden].

    Tokens are permuted so that each expert sees its own as one contiguous matrix; experts without tokens cost nothing.
    """
    require_reference(x, backend, "grouped_mlp")
    return reference.grouped_mlp(x, topk_weights, topk_ids, experts)


def _choice(
    num_experts: int, top_k: int, *, renormalize: bool, score_func: str = "softmax", bias: torch.Tensor | None = None,
    num_groups: int = 1, topk_groups: int = 1, group_top: int = 1, scale: float = 1.0, num_shared: int = 0,
) -> dict[str, Any]:  # fmt: skip
    """The options of `route_topk`, complete and checked."""
    if score_func not in ("softmax", "sigmoid"):
        raise ValueError(f"score_func {score_func!r} is neither softmax nor sigmoid")
    if not 1 <= top_k <= num_experts or top_k + num_shared > MAX_TOP_K or num_experts + num_shared > MAX_EXPERTS:
        raise ValueError(
            f"top-{top_k} of {num_experts} experts and {num_shared} shared ones: up to {MAX_TOP_K} for a token, up to "
            f"{MAX_EXPERTS} in all are supported"
        )
    size = num_experts // num_groups if num_groups >= 1 else 0
    if num_groups * size != num_experts or not top_k <= topk_groups * size <= num_experts or group_top not in (1, 2):
        raise ValueError(
            f"top-{top_k} of the best {topk_groups} of {num_groups} groups of {num_experts} experts, by their best "
            f"{group_top} (1 or 2)"
        )
    if group_top > size:
        raise ValueError(f"groups of {size} experts have no {group_top} best")
    if bias is not None and (bias.dtype != torch.float32 or bias.shape != (num_experts,)):
        raise ValueError(f"the bias is {bias.dtype} {[*bias.shape]}, not fp32 [{num_experts}]")
    return {
        "renormalize": renormalize, "score_func": score_func, "bias": bias, "num_groups": num_groups,
        "topk_groups": topk_groups, "group_top": group_top, "scale": scale, "num_shared": num_shared,
    }  # fmt: skip


def _check_mlp(
    x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor, w_gate_up: torch.Tensor, w_down: torch.Tensor
) -> None:
    _check_contiguous("moe_mlp", x=x, topk_weights=topk_weights, topk_ids=topk_ids, w_gate_up=w_gate_up, w_down=w_down)
    num_experts, hidden, inter = w_down.shape
    if w_gate_up.shape != (num_experts, 2 * inter, hidden) or x.shape[1] != hidden:
        raise ValueError(f"moe_mlp: x {x.shape}, w_gate_up {w_gate_up.shape}, w_down {w_down.shape} do not fit")
    if topk_ids.dtype != torch.int32 or topk_weights.dtype != torch.float32:
        raise ValueError(f"moe_mlp: ids are {topk_ids.dtype} and weights {topk_weights.dtype}, not int32 and float32")
    if not x.dtype == w_gate_up.dtype == w_down.dtype:
        raise ValueError(f"moe_mlp: x is {x.dtype}, the experts {w_gate_up.dtype} and {w_down.dtype}")
    if hidden % 16 or inter % 16 or num_experts > MAX_EXPERTS or topk_ids.shape[1] > MAX_TOP_K:
        raise ValueError(
            f"moe_mlp: hidden {hidden} and inter {inter} must be multiples of 16, experts {num_experts} at most "
            f"{MAX_EXPERTS}, top-k {topk_ids.shape[1]} at most {MAX_TOP_K}"
        )


def _check_contiguous(op: str, **tensors: torch.Tensor) -> None:
    for name, tensor in tensors.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{op}: {name} is not contiguous")

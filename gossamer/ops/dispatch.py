"""The one rule that picks an op's implementation: CPU tensors use the reference, CUDA tensors the kernel."""

from __future__ import annotations

import torch


def require_reference(x: torch.Tensor, backend: str, op: str) -> None:
    """Raises NotImplementedError where `op` has no kernel for `x` and the reference was not asked for."""
    if not x.is_cpu and backend != "reference":
        raise NotImplementedError(
            f"{op} has no kernel for {x.device.type} tensors; --ops-backend reference runs the torch reference there"
        )


def use_kernel(x: torch.Tensor, backend: str) -> bool:
    """True where the Triton kernel serves `x`: backend "triton", or "auto" on a CUDA tensor."""
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"backend {backend!r} is none of auto, reference, triton")
    return backend == "triton" or (backend == "auto" and not x.is_cpu)

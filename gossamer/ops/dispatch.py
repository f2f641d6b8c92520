"""The one rule that picks an op's implementation: CPU tensors use the reference, CUDA tensors the kernel."""

import functools
import weakref

import torch

device_users: weakref.WeakSet[object] = weakref.WeakSet()
"""Who runs kernels on a stream of its own. With a second one in the process, kernels whose programs wait for each other
are not run: each might hold half of the device."""


def require_reference(x: torch.Tensor, backend: str, op: str) -> None:
    """Raises NotImplementedError where `op` has no kernel for `x` and the reference was not asked for."""
    if not x.is_cpu and backend != "reference":
        raise NotImplementedError(
            f"{op} has no kernel for {x.device.type} tensors; --ops-backend reference runs the torch reference there"
        )


def use_kernel(x: torch.Tensor, backend: str, op: str = "this op") -> bool:
    """True where the Triton kernel serves `x`: backend "triton", or "auto" on a CUDA tensor.

    Raises ValueError for an unknown backend and NotImplementedError for other devices.
    """
    if backend not in ("auto", "reference", "triton"):
        raise ValueError(f"backend {backend!r} is none of auto, reference, triton")
    if not (x.is_cuda or x.is_cpu):
        require_reference(x, backend, op)
    return backend == "triton" or (backend == "auto" and x.is_cuda)


def overlap_options(x: torch.Tensor) -> dict[str, bool]:
    """Keyword arguments of a Triton launch that may start before the kernel ahead of it has ended.

    Programmatic dependent launch (Hopper on): `PDL` is a constexpr of the kernel. Such a kernel, in every program and
    on every path, calls gdc_wait() before it reads what an earlier kernel wrote and before it writes anything at all,
    and gdc_launch_dependents() as early as it likes: what waits for it waits until all of it has ended. Before the wait
    it may read weights, which no kernel writes, and what was complete when the kernel ahead let it start: what that one
    itself had waited for, and what earlier steps left (a copy between steps waits for all).
    """
    if not x.is_cuda or torch.version.hip is not None or _capability(x.device.index) < (9, 0):
        return {"PDL": False}
    return {"PDL": True, "launch_pdl": True}


def is_hopper(x: torch.Tensor) -> bool:
    """Whether Hopper's own kernels run on x's device: no later one has their instructions."""
    return x.is_cuda and torch.version.hip is None and _capability(x.device.index) == (9, 0)


@functools.cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)

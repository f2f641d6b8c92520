"""What this machine has, measured once at start."""

import importlib.util
import os
import platform
from pathlib import Path

import torch

from gossamer.config import Hardware
from gossamer.core import StartupError

MIN_CAPABILITY = (8, 0)
"""Ampere: the first with bf16 products."""
FP8_CAPABILITY = (8, 9)
"""Ada: the first with FP8 products."""


def detect(device: str) -> Hardware:
    """The device named by --device; `auto` is a CUDA GPU that the kernels support, else the CPU.

    Raises StartupError if the device asked for is absent, too old, or unusable by this build of torch.
    """
    if device == "cpu" or (device == "auto" and _cuda_obstacle() is not None):
        return Hardware("cpu", _cpu_name(), available_memory(), physical_cores())
    obstacle = _cuda_obstacle()
    if obstacle is not None:
        raise StartupError(f"--device cuda: {obstacle}")
    free, _ = torch.cuda.mem_get_info()
    return Hardware("cuda", torch.cuda.get_device_name(), free, physical_cores())


def _cuda_obstacle() -> str | None:
    """Why no CUDA device can be used, with the remedy; None if one can."""
    if not torch.cuda.is_available():
        build = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "a build without CUDA"
        return (
            f"torch sees no CUDA device here (torch {torch.__version__} is {build}).\n"
            "Install a matching CUDA build and driver, or use --device cpu."
        )
    capability = torch.cuda.get_device_capability()
    if capability < MIN_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name()} has compute capability {capability[0]}.{capability[1]}; the kernels need "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]} (Ampere) or newer.\nUse --device cpu."
        )
    if importlib.util.find_spec("triton") is None:
        return "the kernels need the package triton, which is not installed.\npip install triton, or use --device cpu."
    return None


def has_fp8(hardware: Hardware) -> bool:
    """Whether the device has FP8 products; on a CPU torch computes them."""
    return hardware.device != "cuda" or torch.cuda.get_device_capability() >= FP8_CAPABILITY


def require_fp8(hardware: Hardware, instead: str = "--quantization none") -> None:
    """Raises StartupError on a GPU without FP8 products."""
    if not has_fp8(hardware):
        raise StartupError(f"{hardware.name} has no FP8 products (compute capability 8.9 or newer has); use {instead}.")


def available_memory() -> int:
    """Bytes that a process can still take without swapping, the limit of its control group included."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].isdigit():
        available = min(available, int(limit[0]) - int(used[0]))
    return available


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once: torch's products gain nothing from the second."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in allowed:
        listed = _lines(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(listed[0] if listed else str(cpu))
    return max(1, len(siblings))


def _cpu_name() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "CPU"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if os.path.exists(path) else []

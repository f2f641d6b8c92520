"""What this machine has, measured once at start."""

from __future__ import annotations

import os
import platform

import torch

from gossamer.config import Hardware
from gossamer.core import StartupError


def detect(device: str) -> Hardware:
    """The device named by --device; `auto` is the CPU until CUDA kernels exist. Raises StartupError if it is absent."""
    if device == "cuda":
        if not torch.cuda.is_available():
            raise StartupError(
                "--device cuda: torch sees no CUDA device here.\n"
                f"torch is {torch.__version__}; install a CUDA build and a driver, or use --device cpu."
            )
        free, _ = torch.cuda.mem_get_info()
        return Hardware("cuda", torch.cuda.get_device_name(), free, physical_cores())
    return Hardware("cpu", _cpu_name(), available_memory(), physical_cores())


def available_memory() -> int:
    """Bytes that a process can still take without swapping, the limit of its control group included."""
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    for line in _lines("/proc/meminfo"):
        if line.startswith("MemAvailable:"):
            available = int(line.split()[1]) * 1024
    limit, used = _lines("/sys/fs/cgroup/memory.max"), _lines("/sys/fs/cgroup/memory.current")
    if limit and used and limit[0].strip().isdigit():
        available = min(available, int(limit[0]) - int(used[0]))
    return available


def physical_cores() -> int:
    """Cores this process may use, hyper-threads counted once: torch's products gain nothing from the second."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(range(os.cpu_count() or 1))
    siblings = set()
    for cpu in allowed:
        listed = _lines(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        siblings.add(listed[0].strip() if listed else str(cpu))
    return max(1, len(siblings))


def _cpu_name() -> str:
    for line in _lines("/proc/cpuinfo"):
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or "CPU"


def _lines(path: str) -> list[str]:
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return file.readlines()

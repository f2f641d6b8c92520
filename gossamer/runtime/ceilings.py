"""What this machine's device can do at best, measured once and kept in a file: what MFU and MBU are fractions of."""

import datetime
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gossamer.config import DeviceCeilings, Hardware
from gossamer.ops.cpu import wide_linear, wide_products
from gossamer.runtime.hardware import has_fp8

logger = logging.getLogger(__name__)

FILE_NAME = "ceilings.json"
READ_BYTES = {"cpu": 1 << 29, "cuda": 1 << 33}
MATRIX_SIZE = {"cpu": 2048, "cuda": 8192}
DTYPES = ("bfloat16", "float32")
FP8 = "float8_e4m3fn"
REPEATS = 7


def measure(hardware: Hardware, num_threads: int | None = None) -> dict[str, Any]:
    """Times reading and copying memory, and square matrix products: the best of a few runs each.

    A quarter of the free memory is the most that it takes. On a CPU `num_threads` threads work (default: all cores).
    """
    device = torch.device(hardware.device)
    if device.type == "cpu":
        torch.set_num_threads(num_threads or hardware.num_cores)
    dtypes = (*DTYPES, FP8) if device.type == "cuda" and has_fp8(hardware) else DTYPES
    read, copy = _memory_rates(min(READ_BYTES[device.type], hardware.memory_bytes // 4), device)
    return {
        "read_bytes_per_second": read,
        "copy_bytes_per_second": copy,
        "flops_per_second": {dtype: _matmul_rate(MATRIX_SIZE[device.type], dtype, device) for dtype in dtypes},
        "torch": torch.__version__,
        "date": datetime.date.today().isoformat(),
    }


def save(folder: str | None, hardware: Hardware, measured: dict[str, Any]) -> Path:
    """Adds the figures to the file in `folder`, under the device's name; returns the file's path."""
    path = _path(folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(_read(path) | {_key(hardware): measured}, indent=1) + "\n")
    return path


def load(folder: str | None, hardware: Hardware, dtype: str) -> DeviceCeilings | None:
    """What was measured for this device and a model of `dtype`; None if nothing was."""
    found = _read(_path(folder)).get(_key(hardware), {})
    flops = found.get("flops_per_second", {}).get(dtype)
    return None if flops is None else DeviceCeilings(flops, found["read_bytes_per_second"])


def _path(folder: str | None) -> Path:
    return (Path(folder) if folder else Path.home() / ".cache" / "gossamer") / FILE_NAME


def _key(hardware: Hardware) -> str:
    return hardware.name if hardware.device == "cuda" else f"{hardware.name}, {hardware.num_cores} cores"


def _read(path: Path) -> dict[str, Any]:
    """The file's content; nothing if it is not there, or not what `save` writes."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
        for device in content.values():
            DeviceCeilings(float(device["flops_per_second"][DTYPES[0]]), float(device["read_bytes_per_second"]))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        logger.warning("%s is not what `gossamer info --measure` writes: %r", path, error)
        return {}
    return content


def _memory_rates(size: int, device: torch.device) -> tuple[float, float]:
    """Bytes a second of reading, and of copying (read and written bytes together)."""
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    half = data.numel() // 2
    source, target = data[:half], data[half : 2 * half]
    read = min(_best_seconds(data.sum, device), _best_seconds(data.amax, device))
    return data.nbytes / read, data.nbytes / _best_seconds(lambda: target.copy_(source), device)


def _matmul_rate(n: int, dtype: str, device: torch.device) -> float:
    a, b = (torch.randn(n, n, device=device).to(getattr(torch, dtype)) for _ in range(2))
    one = torch.ones((), device=device)

    def product() -> torch.Tensor:
        if dtype == FP8:
            return torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)
        return wide_linear(a, b) if wide_products(a) else a @ b  # as the layers multiply

    return 2 * n**3 / _best_seconds(product, device)


def _best_seconds(work: Callable[[], object], device: torch.device) -> float:
    def seconds() -> float:
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    return min(seconds() for _ in range(REPEATS + 1))

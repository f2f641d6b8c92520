"""What an engine says about itself once it is built: plain, torch-free data, which the wire encodes as it is."""

from collections.abc import Callable
from dataclasses import dataclass, field

from gossamer.config import DeviceCeilings, EngineConfig, ModelConfig
from gossamer.core import RequestLimits

ProgressCallback = Callable[[str, float], None]
"""Called while an engine is built with the name of the stage and the fraction of it that is done, 0 to 1."""


@dataclass(frozen=True, slots=True)
class EngineInfo:
    """The engine as built: every automatic choice made, and where the memory went."""

    config: EngineConfig
    """Resolved: no field is auto any more."""
    model: ModelConfig
    limits: RequestLimits
    num_pages: int
    ledger: list[tuple[str, int]] = field(default_factory=list)
    """Who holds how many bytes of device memory: (name, bytes)."""
    device_name: str = ""
    ceilings: DeviceCeilings | None = None
    """What the device can do at best, if `gossamer info --measure` has measured it."""

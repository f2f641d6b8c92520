from __future__ import annotations

from gossamer.core import DeviceCeilings, EngineStats
from gossamer.server.metrics import ServerMetrics

BUSY = EngineStats(device_seconds=2.0, model_flops=4e9, model_bytes=3e9, decode_seconds=0.9, decode_idle_seconds=0.1)


def scrape(stats: EngineStats, ceilings: DeviceCeilings | None) -> dict[str, float]:
    lines = ServerMetrics("m", lambda: stats, ceilings).render().decode().splitlines()
    return {
        name.split("{")[0]: float(value)
        for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
        if name.startswith("gossamer:")
    }


def test_utilisation_is_of_the_measured_ceilings() -> None:
    found = scrape(BUSY, DeviceCeilings(flops_per_second=8e9, bytes_per_second=2e9))
    assert found["gossamer:model_flops_utilization"] == 0.25
    assert found["gossamer:model_bytes_utilization"] == 0.75
    assert found["gossamer:device_idle_fraction"] == 0.1
    assert found["gossamer:model_flops_total"] == 4e9
    assert found["gossamer:device_peak_bytes_per_second"] == 2e9


def test_without_a_measurement_nothing_is_guessed() -> None:
    assert not [name for name in scrape(BUSY, None) if "utilization" in name]
    found = scrape(EngineStats(), DeviceCeilings(8e9, 2e9))
    assert not [name for name in found if "utilization" in name or "fraction" in name]

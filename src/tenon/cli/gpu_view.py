"""The load of GPUs in one line, from their newest `gpu` events. This module does not know where they come from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from tenon.units import format_bytes

GpuEvent = Mapping[str, Any]


def gpu_text(events: Iterable[GpuEvent]) -> str:
    """`GPU 97% busy, 45.0 GB, 412 W, 61 °C, 1,755 MHz, held back by power cap`; of several the range or the sum."""
    gpus = list(events)
    watts, temperatures = _figures(gpus, "power_watts"), _figures(gpus, "temperature_celsius")
    used, clocks = _figures(gpus, "memory_used_bytes"), _figures(gpus, "sm_clock_mhz")
    reasons = dict.fromkeys(name for gpu in gpus for name in str(gpu.get("throttled") or "").split(", ") if name)
    facts = [
        gpu_busy(gpus),
        format_bytes(sum(used)) if used else "",
        f"{sum(watts):.0f} W" if watts else "",
        f"{max(temperatures):.0f} °C" if temperatures else "",
        f"{min(clocks):,.0f} MHz" if clocks else "",
        f"held back by {', '.join(reasons)}" if reasons else "",
    ]
    return ", ".join(fact for fact in facts if fact)


def gpu_busy(events: Iterable[GpuEvent]) -> str:
    """`GPU 97% busy`, `2 GPUs 91% to 97% busy`; "" when none says."""
    percents = _figures(events, "utilisation_percent")
    if not percents:
        return ""
    low, high = f"{min(percents):.0f}%", f"{max(percents):.0f}%"
    name = "GPU" if len(percents) == 1 else f"{len(percents)} GPUs"
    return f"{name} {low if low == high else f'{low} to {high}'} busy"


def _figures(events: Iterable[GpuEvent], key: str) -> list[float]:
    return [float(value) for event in events if isinstance(value := event.get(key), int | float)]

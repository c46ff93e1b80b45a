"""Where one step's time goes: `python -m benchmarks.ours.profile SPEC`, one line `RESULT {…}` out.

Three readings of the same work on the same GPU: its kernels by what they do (torch's profiler), the power and the
clock while it runs undisturbed (NVML), and its large products alone, back to back for as long as a step would be slowed
down by its power. This module draws no conclusions.
"""

from __future__ import annotations

import json
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.works import Shape, Spec
from benchmarks.ours.contact import build, compute_dtype, random_products
from benchmarks.ours.step import parse_spec, windows
from tenon.runs.nvml import GpuSample, open_nvml

PROFILED_STEPS = 2
SUSTAINED_SECONDS = 3.0
# A product whose smallest side is at most this many ranks wide is one of the low-rank terms.
_THIN = 256
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::_scaled_mm", "aten::linear", "aten::bmm")
_GROUPS = {
    "attention": ("flash", "cudnn", "fmha", "sdpa"),
    "activation": ("swiglu",),
    "norms": ("norm_kernel", "norm_backward", "_row_kernel", "_row_backward"),
    "heads and rotation": ("heads", "rotary"),
    "low-rank kernels": ("_project", "_add_kernel", "_gradient_kernel", "_reduce_kernel"),
    "quantisation": ("quantise", "transpose", "dequant"),
    "loss": ("cross_entropy",),
}


@contextmanager
def watch(samples: list[GpuSample]) -> Iterator[None]:
    """Sample the first visible GPU twenty times a second."""
    sensor, done = open_nvml(None, most=1), threading.Event()

    def sampling() -> None:
        while not done.wait(0.05):
            samples.extend(sensor.sample())

    thread = threading.Thread(target=sampling)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        sensor.close()


def load_of(samples: list[GpuSample]) -> dict[str, Any]:
    """Medians of power and clock over the second half, when the card has warmed up, and what slowed it down."""
    late = samples[len(samples) // 2 :]
    watts = [s.power_watts for s in late if s.power_watts is not None]
    clocks = [s.sm_clock_mhz for s in late if s.sm_clock_mhz is not None]
    return {
        "watts": round(statistics.median(watts)) if watts else None,
        "mhz": round(statistics.median(clocks)) if clocks else None,
        "slowed_by": sorted({name for s in late for name in s.throttled}),
    }


def kernels_by_group(run: Callable[[], object]) -> tuple[dict[str, float], list[tuple[str, float, int]]]:
    """(milliseconds a step by what the kernels do, the longest kernels with their calls) of some profiled steps."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], record_shapes=True) as found:
        for _ in range(PROFILED_STEPS):
            run()
        torch.cuda.synchronize()
    groups: dict[str, float] = defaultdict(float)
    products_ms = all_ms = 0.0
    for event in found.key_averages(group_by_input_shape=True):
        ms = event.self_device_time_total / 1e3 / PROFILED_STEPS
        if event.device_type.name == "CPU" and event.key in _PRODUCTS:
            # The two factors; a quantised product's scales come after them.
            shapes = [shape for shape in event.input_shapes if len(shape) == 2][:2]
            thin = bool(shapes) and min(min(shape) for shape in shapes) <= _THIN
            groups["thin products" if thin else "large products"] += ms
            products_ms += ms
    kernels = [e for e in found.key_averages() if e.device_type.name == "CUDA"]
    for event in kernels:
        ms = event.self_device_time_total / 1e3 / PROFILED_STEPS
        all_ms += ms
        for group, words in _GROUPS.items():
            if any(word in event.key for word in words):
                groups[group] += ms
                break
    groups["all else"] = all_ms - sum(groups.values())
    longest = sorted(kernels, key=lambda e: -e.self_device_time_total)[:25]
    return (
        {name: round(ms, 2) for name, ms in sorted(groups.items(), key=lambda item: -item[1])},
        [
            (e.key[:90], round(e.self_device_time_total / 1e3 / PROFILED_STEPS, 2), e.count // PROFILED_STEPS)
            for e in longest
        ],
    )


def sustained_products(spec: Spec) -> dict[str, Any]:
    """The step's large products alone: their rate after some seconds, and the card's load meanwhile."""
    shape = Shape(**spec.shape)  # pyright: ignore[reportArgumentType]
    device = torch.device(spec.device)
    run, flops = random_products(shape, spec.base, spec.rows * spec.row_tokens, device, compute_dtype(device))
    samples: list[GpuSample] = []
    seconds: list[float] = []
    with watch(samples):
        until = time.perf_counter() + SUSTAINED_SECONDS
        while time.perf_counter() < until:
            begun = time.perf_counter()
            run()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
    late = statistics.median(seconds[len(seconds) // 2 :])
    first = statistics.median(seconds[1:4])
    return {
        "tflop_a_step": round(flops * shape.layers / 1e12, 1),
        "ms_a_step": round(late * shape.layers * 1e3, 1),
        "tflops": round(flops / late / 1e12),
        "tflops_at_first": round(flops / first / 1e12),
        **load_of(samples),
    }


def measure(spec: Spec) -> dict[str, Any]:
    """All three readings."""
    found = whole_steps(spec)
    torch.cuda.empty_cache()
    alone = sustained_products(spec) if spec.row_tokens and spec.base in ("bf16", "fp8") else None
    return {**found, "products_alone": alone}


def whole_steps(spec: Spec) -> dict[str, Any]:
    """The step undisturbed, then under the profiler."""
    taken = windows(spec)
    step = build(spec)
    for rows in taken[: spec.warm]:
        step(rows)
    torch.cuda.synchronize()
    samples: list[GpuSample] = []
    seconds = []
    with watch(samples):
        for rows in taken[spec.warm :]:
            begun = time.perf_counter()
            step(rows)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
    groups, longest = kernels_by_group(lambda: step(taken[-1]))
    return {
        "step_ms": round(statistics.median(seconds) * 1e3, 1),
        "tokens": sum(len(row.ids) for row in taken[-1]),
        **load_of(samples),
        "kernels_ms": groups,
        "longest": longest,
    }


def main() -> None:
    """Measure what the command line says."""
    print("RESULT " + json.dumps(measure(parse_spec(sys.argv[1]))), flush=True)


if __name__ == "__main__":
    main()

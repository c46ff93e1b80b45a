"""The kernels of quantised bases on one GPU, at the widest matrix of an 8B model: bytes a second beside a plain copy.

Also fp8 products with and without fast accumulation: their speed, and their error against float64 of the same bytes.

Run on a GPU: python -m benchmarks.gpu_frozen
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

from benchmarks.report import Row, write
from tenon.kernels import fp8, int8, nf4
from tenon.kernels.fp8 import Fp8Rows

OUTPUTS, INPUTS, TOKENS = 28_672, 4_096, 8_192
REPEATS = 21
# More than the second-level cache holds, written before every run.
CACHE_BYTES = 256_000_000


def seconds_of(run: Callable[[], object]) -> float:
    """Median of the GPU's own clock, with a cold cache."""
    cold = torch.empty(CACHE_BYTES, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(REPEATS + 3):
        cold.zero_()
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times[3:])


def bandwidth(what: str, moved_bytes: float, run: Callable[[], object]) -> Row:
    """Bytes that must be moved, once each, over the time."""
    return Row(what, moved_bytes / seconds_of(run) / 1e9, "GB/s")


def kernel_rows() -> list[Row]:
    """Every kernel that reads or writes a whole weight, or a whole batch of rows."""
    torch.manual_seed(0)
    count, bf16 = OUTPUTS * INPUTS, torch.bfloat16
    weight_OD = torch.randn(OUTPUTS, INPUTS, device="cuda", dtype=bf16) * 0.02
    out_OD, out8_OD = torch.empty_like(weight_OD), torch.empty_like(weight_OD, dtype=fp8.FP8_DTYPE)
    out8_DO = torch.empty(INPUTS, OUTPUTS, device="cuda", dtype=fp8.FP8_DTYPE)
    packed, bytes_rows = nf4.quantise(weight_OD), int8.quantise_rows(weight_OD)
    inverse_O, scale_O = fp8.FP8_MAX / nf4.row_amax(packed), torch.rand(OUTPUTS, device="cuda")
    x_TD, dy_TO = weight_OD[:TOKENS], torch.randn(TOKENS, OUTPUTS, device="cuda", dtype=bf16)
    nf4_bytes = packed.size_bytes
    return [
        bandwidth("a copy of bf16", 4 * count, lambda: out_OD.copy_(weight_OD)),
        bandwidth("nf4 to bf16", nf4_bytes + 2 * count, lambda: nf4.dequantise(packed, out_OD)),
        bandwidth("nf4 to fp8", nf4_bytes + count, lambda: nf4.dequantise_fp8(packed, inverse_O, out8_OD)),
        bandwidth(
            "nf4 to fp8, transposed",
            nf4_bytes + count,
            lambda: nf4.dequantise_fp8_transposed(packed, inverse_O, out8_DO),
        ),
        bandwidth("int8 to bf16", 3 * count, lambda: int8.dequantise_rows(bytes_rows, bf16)),
        bandwidth("fp8 transposed", 2 * count, lambda: fp8.transposed(out8_OD)),
        bandwidth("x to fp8", 3 * x_TD.numel(), lambda: fp8.quantise_rows(x_TD)),
        bandwidth("dy to fp8, scales folded in", 3 * dy_TO.numel(), lambda: fp8.quantise_rows(dy_TO, scale_O)),
    ]


def product_rows() -> list[Row]:
    """dX = dY W at 8,192 tokens, whose sums are the longest."""
    torch.manual_seed(0)
    dy = fp8.quantise_rows(torch.randn(TOKENS, OUTPUTS, device="cuda"))
    w = fp8.quantise_rows(torch.randn(INPUTS, OUTPUTS, device="cuda"))
    few = Fp8Rows(dy.values_TD[:256], dy.scale_T[:256])
    exact = fp8.product_reference(few, w, None, torch.float64)
    rows = []
    for fast in (True, False):
        how = "fast" if fast else "exact"
        seconds = seconds_of(lambda: fp8.product(dy, w, None, torch.bfloat16, fast=fast))  # noqa: B023 (run at once)
        rows.append(Row(f"fp8 dgrad, {how} sums", 2 * TOKENS * OUTPUTS * INPUTS / seconds / 1e12, "TFLOP/s"))
        found = fp8.product(few, w, None, torch.bfloat16, fast=fast).double()
        rows.append(Row(f"fp8 dgrad, {how} sums, error", float((found - exact).norm() / exact.norm()), "relative"))
        scale = float((found * exact).sum() / exact.square().sum())
        rows.append(Row(f"fp8 dgrad, {how} sums, size", scale, "of the exact size"))
    return rows


def main() -> None:
    """Measure everything and write benchmarks/results/gpu_frozen.json."""
    rows = kernel_rows() + product_rows()
    path = write("gpu_frozen", rows, device=torch.cuda.get_device_name())
    for row in rows:
        print(f"{row.what}: {row.value:,.4g} {row.unit}")
    print(path)


if __name__ == "__main__":
    main()

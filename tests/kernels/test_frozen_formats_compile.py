"""The kernels of nf4, fp8 and int8 compile for the GPUs that they are for: wide loads and stores, no fused sums."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("triton", reason="Triton is not installed")

from tenon.kernels import fp8_triton, int8_triton, nf4_triton
from tests.kernels.compiled import ptx_of

WIDE_LOAD, WIDE_STORE = "ld.global.v4.b32", "st.global.v4.b32"
NF4: dict[str, str] = {
    "packed_ptr": "*u8",
    "absmax_ptr": "*u8",
    "map_ptr": "*fp32",
    "nested_ptr": "*fp32",
    "offset_ptr": "*fp32",
    "levels_ptr": "*fp32",
    "inverse_scale_ptr": "*fp32",
    "row_blocks": "i32",
}


@pytest.mark.parametrize(
    ("capability", "out", "scaled"),
    [(75, "fp16", False), (80, "bf16", False), (90, "bf16", False), (89, "fp8e4nv", True), (90, "fp8e4nv", True)],
)
def test_nf4_to_rows(capability: int, out: str, scaled: bool) -> None:
    arguments = NF4 | {"out_ptr": f"*{out}", "blocks": "i32"}
    constants = {"NESTED": True, "SCALED": scaled, "BLOCKS": nf4_triton.FLAT_BLOCKS}
    ptx = ptx_of(nf4_triton._dequantise_kernel, arguments, constants, capability=capability, warps=4, fused_sums=False)
    assert WIDE_LOAD in ptx and WIDE_STORE in ptx and "fma.rn.f32" not in ptx


@pytest.mark.parametrize("capability", [89, 90])
def test_nf4_to_the_transpose(capability: int) -> None:
    arguments = NF4 | {"out_ptr": "*fp8e4nv", "out_stride": "i32", "outputs": "i32"}
    constants = {"NESTED": True, "ROWS": nf4_triton.TILE_ROWS, "BLOCKS": nf4_triton.TILE_BLOCKS}
    ptx = ptx_of(nf4_triton._transposed_kernel, arguments, constants, capability=capability, warps=8, fused_sums=False)
    assert WIDE_LOAD in ptx and WIDE_STORE in ptx and "fma.rn.f32" not in ptx


@pytest.mark.parametrize("folded", [False, True])
@pytest.mark.parametrize(("width", "warps"), [(576, 1), (4096, 4), (28_672, 16), (57_344, 16)])
def test_fp8_rows(width: int, warps: int, folded: bool) -> None:
    arguments = {
        "x_ptr": "*bf16",
        "x_stride": "i32",
        "column_scale_ptr": "*fp32",
        "values_ptr": "*fp8e4nv",
        "scale_ptr": "*fp32",
        "fp8_max": "fp32",
        "smallest_amax": "fp32",
    }
    columns = min(fp8_triton.power_of_two(width, least=128), fp8_triton.LONGEST)
    constants: dict[str, Any] = {"WIDTH": width, "FOLD": folded, "COLUMNS": columns, "WHOLE": width <= columns}
    ptx = ptx_of(fp8_triton._quantise_kernel, arguments, constants, capability=90, warps=warps, fused_sums=False)
    assert WIDE_LOAD in ptx and "cvt.rn.satfinite.e4m3x2.f32" in ptx and "div.rn.f32" in ptx


def test_transposed_bytes() -> None:
    arguments = {"x_ptr": "*u8", "out_ptr": "*u8", "rows": "i32", "columns": "i32"}
    ptx = ptx_of(fp8_triton._transpose_kernel, arguments, {"TILE": fp8_triton.TILE}, capability=90, warps=8)
    assert WIDE_LOAD in ptx and WIDE_STORE in ptx


@pytest.mark.parametrize(("capability", "out"), [(75, "fp16"), (80, "bf16"), (90, "bf16")])
def test_int8_rows(capability: int, out: str) -> None:
    arguments = {"values_ptr": "*i8", "scale_ptr": "*fp32", "out_ptr": f"*{out}", "width": "i32"}
    constants = {"COLUMNS": int8_triton.COLUMNS}
    ptx = ptx_of(int8_triton._dequantise_kernel, arguments, constants, capability=capability, warps=4)
    assert WIDE_LOAD in ptx and WIDE_STORE in ptx

"""Triton kernels compiled for a GPU that is not here: what the compiler refuses shows on any machine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from triton import compiler
from triton.backends.compiler import GPUTarget


def ptx_of(
    kernel: Any,
    arguments: Mapping[str, str],
    constants: Mapping[str, Any],
    *,
    capability: int,
    warps: int,
    fused_sums: bool = True,
) -> str:
    """The assembly of a kernel for a compute capability (90: Hopper).

    arguments: the types of those that are no constants (`*bf16`, `i32`); pointers and whole numbers count as multiples
    of 16, as they are in the models that we run.
    """
    names: list[str] = kernel.arg_names
    source = compiler.ASTSource(
        fn=kernel,
        signature={name: arguments.get(name, "constexpr") for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name, kind in arguments.items() if kind[0] in "*i"},
    )
    options = {"num_warps": warps, "enable_fp_fusion": fused_sums}
    return compiler.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]

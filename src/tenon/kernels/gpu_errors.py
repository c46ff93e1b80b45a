"""What CUDA, Triton and cuDNN say when they fail, told as Tenon's errors: the one seam for them.

torch raises torch.AcceleratorError or RuntimeError for all of them, and only the message tells them apart; Triton has
exceptions of its own. Everything is told from class names and messages, so that nothing is imported here. A lack of
memory is no error of this seam: whoever can do with less memory catches it (`is_out_of_memory`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

from tenon.errors import PlanError, TenonError, TrainError
from tenon.runs.nvml import gpu_lost

_OUT_OF_MEMORY = re.compile(
    r"CUDA out of memory|CUDA error: out of memory|CUDA driver error: out of memory"
    r"|Triton Error \[CUDA\]: out of memory|CUBLAS_STATUS_ALLOC_FAILED|CUDNN_STATUS_ALLOC_FAILED"
)
_DRIVER_TOO_OLD = re.compile(
    r"driver on your system is too old|driver version is insufficient for CUDA runtime"
    r"|compiled with an unsupported toolchain|forward compatibility was attempted"
)
_DRIVER_BROKEN = re.compile(
    r"unsupported display driver / cuda driver combination|system not yet initialized|CUDA driver is a stub library"
    r"|Driver/library version mismatch|Found no NVIDIA driver"
)
_NO_CODE_FOR_GPU = re.compile(
    r"no kernel image is available for execution|CUDA error: invalid device function"
    r"|Value 'sm_\w+' is not defined for option 'gpu-name'"
)
_LOST = re.compile(
    r"device\(s\) is/are busy or unavailable|CUDA-capable devices are busy or unavailable|no CUDA-capable device"
    r"|uncorrectable (?:ECC|NVLink) error|or a hardware error|CUDA (?:driver )?error: unknown error"
    r"|GPU is lost|fallen off the bus|device unavailable"
)
_NO_COMPILER = re.compile(r"Failed to find C compiler")
_KERNEL = re.compile(
    r"CUDA error:|CUDA driver error:|Triton Error \[CUDA\]|CUBLAS_STATUS_|CUDNN_STATUS_|cuDNN (?:Frontend )?error"
    r"|CUSPARSE_STATUS_|CUSOLVER_STATUS_|nvrtc: error|Internal Triton PTX codegen error|`ptxas` failed"
    r"|out of resource: shared memory|No available kernel"
)
_COMPILERS = ("triton", "torch._inductor", "torch._dynamo")
_GOT_LENGTH = 300


@contextmanager
def gpu_errors(*, resume: str) -> Iterator[None]:
    """Work on a GPU: what its libraries raise leaves as a TenonError (see `explain_gpu_error`), all else as it is.

    resume: the command that goes on with this work.
    """
    try:
        yield
    except TenonError:
        raise
    except Exception as error:  # these libraries' exceptions have no base class of their own
        told = explain_gpu_error(error, resume=resume)
        if told is None:
            raise
        raise told from error


def explain_gpu_error(error: Exception, *, resume: str) -> TenonError | None:
    """Our error for one that a GPU's libraries raised; None when it is none of theirs, or a lack of memory.

    resume: the command that goes on with this work. Gives PlanError plan-driver, plan-gpu-unsupported; TrainError
    train-gpu-lost, train-kernel-failed.
    """
    text = str(error)
    if not _is_foreign(error) or is_out_of_memory(error):
        return None
    if _DRIVER_TOO_OLD.search(text):
        return _driver(text, "the NVIDIA driver is older than this torch needs")
    if _DRIVER_BROKEN.search(text):
        return _driver(text, "the NVIDIA driver does not work")
    if _NO_CODE_FOR_GPU.search(text):
        return PlanError(
            "plan-gpu-unsupported",
            "the installed torch (or Triton) has no code for this GPU",
            got=first_line(error),
            hint="install a torch build that knows this GPU; `tenon doctor` shows what works here; or plan device=cpu",
        )
    if _LOST.search(text):
        return gpu_lost(first_line(error), resume=resume)
    if _NO_COMPILER.search(text):
        return _kernel(error, f"install a C compiler, which Triton needs (apt install gcc); then {resume}")
    if _KERNEL.search(text) or _from_compiler(error):
        return _kernel(error, f"`tenon doctor` shows which kernels work here; checkpoints are kept: {resume}")
    return None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the GPU had no memory left for what was asked."""
    return isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error)) is not None


def first_line(error: BaseException) -> str:
    """The first line that says something, with the class: for people who look for the message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"[:_GOT_LENGTH]


def _is_foreign(error: Exception) -> bool:
    # A torch without CUDA says so by an assertion.
    return isinstance(error, RuntimeError) or _from_compiler(error)


def _from_compiler(error: Exception) -> bool:
    """Whether a compiler of kernels raised it, or it derives from what one raises."""
    return any(kind.__module__.startswith(_COMPILERS) for kind in type(error).__mro__)


def _driver(text: str, what: str) -> PlanError:
    return PlanError(
        "plan-driver",
        what,
        got=text.strip().splitlines()[0][:_GOT_LENGTH],
        hint="type `tenon doctor`: it says which driver or which torch build to install; or plan with device=cpu",
    )


def _kernel(error: Exception, hint: str) -> TrainError:
    return TrainError("train-kernel-failed", "a GPU kernel failed", got=first_line(error), hint=hint)

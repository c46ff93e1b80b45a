"""What CUDA, Triton and cuDNN say, in their own words, and the error that each becomes."""

from __future__ import annotations

import pytest

from tenon.errors import PlanError, StopRequestedError, TrainError
from tenon.kernels.gpu_errors import explain_gpu_error, first_line, gpu_errors, is_out_of_memory

# torch adds this to every asynchronous CUDA error.
TAIL = (
    "\nCUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be "
    "incorrect.\nFor debugging consider passing CUDA_LAUNCH_BLOCKING=1\n"
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.\n"
)
TOO_OLD = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: "
    "https://pytorch.org to install a PyTorch version that has been compiled with your version of the CUDA driver."
)
MESSAGES = [
    ("plan-driver", TOO_OLD),
    ("plan-driver", "CUDA error: CUDA driver version is insufficient for CUDA runtime version" + TAIL),
    ("plan-driver", "CUDA error: the provided PTX was compiled with an unsupported toolchain." + TAIL),
    ("plan-driver", "Unexpected error from cudaGetDeviceCount(). Error 803: system has unsupported display driver / cuda driver combination"),  # noqa: E501
    ("plan-driver", "Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized"),
    ("plan-driver", "CUDA error: forward compatibility was attempted on non supported HW" + TAIL),
    ("plan-driver", "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU and installed a driver from http://www.nvidia.com/Download/index.aspx"),  # noqa: E501
    ("plan-gpu-unsupported", "CUDA error: no kernel image is available for execution on the device" + TAIL),
    ("plan-gpu-unsupported", "CUDA error: invalid device function" + TAIL),
    ("train-gpu-lost", "CUDA error: CUDA-capable device(s) is/are busy or unavailable" + TAIL),
    ("train-gpu-lost", "CUDA error: all CUDA-capable devices are busy or unavailable" + TAIL),
    ("train-gpu-lost", "CUDA error: uncorrectable ECC error encountered" + TAIL),
    ("train-gpu-lost", "CUDA error: uncorrectable NVLink error detected during the execution" + TAIL),
    ("train-gpu-lost", "CUDA error: Invalid access of peer GPU memory over nvlink or a hardware error" + TAIL),
    ("train-gpu-lost", "CUDA error: unknown error" + TAIL),
    ("train-gpu-lost", "CUDA error: no CUDA-capable device is detected" + TAIL),
    ("train-kernel-failed", "CUDA error: unspecified launch failure" + TAIL),
    ("train-kernel-failed", "CUDA error: an illegal memory access was encountered" + TAIL),
    ("train-kernel-failed", "CUDA error: misaligned address" + TAIL),
    ("train-kernel-failed", "CUDA error: device-side assert triggered" + TAIL),
    ("train-kernel-failed", "CUDA error: the launch timed out and was terminated" + TAIL),
    ("train-kernel-failed", "CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx( handle, opa)`"),
    ("train-kernel-failed", "CUDA driver error: device kernel image is invalid"),
    ("train-kernel-failed", "Triton Error [CUDA]: an illegal memory access was encountered"),
    ("train-kernel-failed", "cuDNN Frontend error: [cudnn_frontend] Error: No execution plans support the graph."),
    ("train-kernel-failed", "cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    ("train-kernel-failed", "No available kernel. Aborting execution."),
    ("train-kernel-failed", "Internal Triton PTX codegen error: \nptxas fatal   : Ptx assembly aborted due to errors"),
    ("train-kernel-failed", "Failed to find C compiler. Please specify via CC environment variable or set triton.knobs.build.impl."),  # noqa: E501
]  # fmt: skip
NOT_OURS = [
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.19 GiB",
    "CUDA error: out of memory" + TAIL,
    "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
    "Triton Error [CUDA]: out of memory",
    "The size of tensor a (3) must match the size of tensor b (4) at non-singleton dimension 0",
    "",
]


class AcceleratorError(RuntimeError):
    """torch's, by name: torch without a GPU never raises it."""


@pytest.mark.parametrize(("code", "message"), MESSAGES)
@pytest.mark.parametrize("kind", [RuntimeError, AcceleratorError])
def test_messages(kind: type[RuntimeError], code: str, message: str) -> None:
    told = explain_gpu_error(kind(message), resume="tenon resume runs/one")
    assert told is not None and told.code == code
    assert isinstance(told, PlanError if code.startswith("plan") else TrainError)
    assert "\n" not in told.got and told.hint
    if code.startswith("train"):
        assert "tenon resume runs/one" in told.hint


@pytest.mark.parametrize("message", NOT_OURS)
def test_a_lack_of_memory_and_other_errors_pass_through(message: str) -> None:
    assert explain_gpu_error(RuntimeError(message), resume="") is None
    assert is_out_of_memory(RuntimeError(message)) == ("memory" in message or "ALLOC" in message)


def triton_error(name: str, message: str, base: type[Exception]) -> Exception:
    """An exception that Triton's compiler raises: of a class of its own that is no RuntimeError."""
    return type(name, (base,), {"__module__": "triton.compiler.errors"})(message)


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (triton_error("CompilationError", "at 5:8:\n    tl.dot(a, b)\n", Exception), "train-kernel-failed"),
        (
            triton_error(
                "OutOfResources",
                "out of resource: shared memory, Required: 131072, Hardware limit: 101376. Reducing block sizes or "
                "`num_stages` may help.",
                Exception,
            ),
            "train-kernel-failed",
        ),
        (
            triton_error(
                "PTXASError",
                "PTXAS error: Internal Triton PTX codegen error\n`ptxas` stderr:\n"
                "ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'",
                Exception,
            ),
            "plan-gpu-unsupported",
        ),
    ],
)
def test_what_triton_raises(error: Exception, code: str) -> None:
    told = explain_gpu_error(error, resume="x")
    assert told is not None and told.code == code
    assert type(error).__name__ in told.got


def test_a_torch_without_the_real_exception_of_triton_is_left_alone() -> None:
    assert explain_gpu_error(ValueError("CUDA error: unspecified launch failure"), resume="x") is None


def test_the_seam_keeps_the_cause_and_lets_everything_else_pass() -> None:
    cause = AcceleratorError("CUDA error: unspecified launch failure" + TAIL)
    with pytest.raises(TrainError) as told, gpu_errors(resume="tenon resume RUN"):
        raise cause
    assert told.value.__cause__ is cause
    assert told.value.got == "AcceleratorError: CUDA error: unspecified launch failure"
    with pytest.raises(ZeroDivisionError), gpu_errors(resume="x"):
        raise ZeroDivisionError
    stopped = StopRequestedError("run-stopped", "CUDA error:", hint="h")
    with pytest.raises(StopRequestedError) as same, gpu_errors(resume="x"):
        raise stopped
    assert same.value is stopped


def test_the_first_line_that_says_something() -> None:
    assert first_line(RuntimeError("\n\n  a\nb")) == "RuntimeError: a"
    assert first_line(RuntimeError("")) == "RuntimeError: no message"
    assert len(first_line(RuntimeError("x" * 1000))) == 300

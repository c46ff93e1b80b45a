"""The checks of kernels: they pass what is right, and find what is wrong, not finite, or raised."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tenon.kernels import attention_cudnn
from tenon.kernels.attention_checks import (
    attention_reference,
    cudnn_rows_error,
    largest_error,
    random_tensor,
    rows_reference,
)
from tenon.kernels.attention_cudnn import Offsets, Shape
from tenon.kernels.checks import KernelCheck, kernel_checks, run_check, still_answers
from tenon.kernels.matmul_checks import quantise_rows

CPU = torch.device("cpu")
CHECKS = kernel_checks()


@pytest.mark.parametrize("check", [c for c in CHECKS if c.needs == "cpu"], ids=lambda c: c.name)
def test_what_runs_on_a_cpu_works_on_this_one(check: KernelCheck) -> None:
    outcome = run_check(check, CPU)
    assert outcome.problem == "" and outcome.error is not None and 0 <= outcome.error <= check.bound
    assert still_answers(CPU)


@pytest.mark.gpu
@pytest.mark.parametrize("check", [c for c in CHECKS if c.needs == "cuda"], ids=lambda c: c.name)
def test_what_runs_on_a_gpu_is_right_or_says_that_it_fails(check: KernelCheck) -> None:
    outcome = run_check(check, torch.device("cuda"))
    assert outcome.problem or (outcome.error is not None and outcome.error <= check.bound)


def test_every_check_has_a_name_of_its_own_and_says_what_is_used_instead() -> None:
    keys = [(check.name, check.needs) for check in CHECKS]
    assert len(set(keys)) == len(keys) >= 28
    assert ("attention cuDNN, rows of any lengths", "cuda") in keys
    assert all(check.instead and 0 < check.bound < 0.1 for check in CHECKS)


def raises(_device: torch.device) -> float:
    raise RuntimeError("no kernel image is available\nand more")


def test_what_a_kernel_raises_is_its_outcome() -> None:
    outcome = run_check(KernelCheck("x", "cpu", raises, 1e-3), CPU)
    assert outcome.error is None and outcome.problem == "RuntimeError: no kernel image is available"


def test_what_is_missing_is_said_and_nothing_is_run() -> None:
    outcome = run_check(KernelCheck("x", "cpu", raises, 1e-3, missing=lambda _device: "no package; install it"), CPU)
    assert (outcome.ran, outcome.error, outcome.problem) == (False, None, "no package; install it")
    assert run_check(KernelCheck("x", "cpu", raises, 1e-3), CPU).ran


def test_a_check_without_a_gpu_does_not_pass_by_chance() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    outcomes = [run_check(check, torch.device("cuda")) for check in CHECKS if check.needs == "cuda"]
    assert len(outcomes) >= 9 and all(outcome.problem for outcome in outcomes)


def test_the_error_is_relative_and_the_largest() -> None:
    one, two = torch.ones(3), torch.full((3,), 2.0)
    assert largest_error([one, two], [one, one]) == pytest.approx(1.0)
    assert largest_error([one, torch.tensor([math.nan, 1, 1])], [one, one]) == math.inf
    assert largest_error([torch.tensor([math.inf, 1, 1])], [one]) == math.inf


def test_the_reference_is_causal_and_grouped() -> None:
    q, k, v = (random_tensor((heads, 5, 8), seed, torch.float64, CPU) for seed, heads in ((0, 4), (1, 2), (2, 2)))
    out = attention_reference(q, k, v)
    assert torch.allclose(out[:, 0], v.repeat_interleave(2, dim=0)[:, 0])
    later = v.clone()
    later[:, -1] += 100
    assert torch.equal(attention_reference(q, k, later)[:, :-1], out[:, :-1])


@pytest.mark.parametrize("trembles", [False, True])
def test_cudnn_attention_is_right_only_with_the_same_bits_twice(
    trembles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over a stand-in for cuDNN: plain torch, whose second backward pass may differ in the last bit."""
    calls: list[int] = []

    def forward(q: Tensor, k: Tensor, v: Tensor, shape: Shape, offsets: Offsets) -> tuple[Tensor, Tensor]:
        assert (shape.heads, shape.kv_heads, shape.rows, shape.equal) == (4, 2, 4, False)
        assert offsets.lengths is not None and offsets.lengths.tolist() == [1, 37, 64, 65]
        return rows_reference([q, k, v]), q

    def backward(
        dout: Tensor, inputs: tuple[Tensor, Tensor, Tensor], *_given: object, groups: int
    ) -> tuple[Tensor, ...]:
        assert groups == 2
        own = [x.detach().requires_grad_() for x in inputs]
        grads = torch.autograd.grad(rows_reference(own), own, dout)
        calls.append(len(calls))
        return tuple(grad.nextafter(grad + 1) for grad in grads) if trembles and calls[-1] else grads

    monkeypatch.setattr(attention_cudnn, "forward", forward)
    monkeypatch.setattr(attention_cudnn, "backward", backward)
    error = cudnn_rows_error(CPU, dtype=torch.float32, kv_heads=2)
    assert error == math.inf if trembles else error < 1e-5


def test_rows_of_a_stream_never_see_each_other() -> None:
    tokens = 1 + 37 + 64 + 65
    q, k, v = (random_tensor((tokens, 2, 8), seed, torch.float64, CPU) for seed in range(3))
    out = rows_reference([q, k, v])
    v[0] += 100  # the only token of the first row
    changed = rows_reference([q, k, v])
    assert not torch.equal(changed[0], out[0]) and torch.equal(changed[1:], out[1:])


def test_quantised_rows_are_close_and_use_the_whole_range() -> None:
    x_MK = random_tensor((7, 64), 0, torch.float32, CPU)
    x_MK[3] = 0
    x8_MK, scale_M1 = quantise_rows(x_MK)
    assert x8_MK.dtype == torch.float8_e4m3fn and scale_M1.shape == (7, 1)
    assert torch.isfinite(x8_MK.float()).all() and x8_MK.float().abs().amax(1)[0] == 448
    assert (x8_MK.float() * scale_M1 - x_MK).norm() / x_MK.norm() < 0.04

"""cuDNN's attention where there is none: the reason is kept, with what helps; and how shapes are shared."""

from __future__ import annotations

import sys

import pytest
import torch

from tenon.kernels import attention_cudnn
from tenon.kernels.attention_cudnn import Groups, Shape, groups_within, rounded_up, shape_of

CPU = torch.device("cpu")


def shape(rows: int, longest: int, tokens: int) -> Shape:
    q_THE, k_TKE = torch.empty(tokens, 4, 64), torch.empty(tokens, 2, 64)
    return shape_of(q_THE, k_TKE, rows, longest, scale=0.125, window=0)


def test_a_package_that_is_missing_or_finds_no_cudnn_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cudnn", None)
    found, reason = attention_cudnn._found.__wrapped__()
    assert found is None and reason.startswith("ModuleNotFoundError: ") and "cudnn" in reason


def test_without_it_no_head_is_taken_and_the_reason_says_what_to_install() -> None:
    if attention_cudnn.frontend() is not None:
        pytest.skip("there is a cuDNN here")
    groups = groups_within(shape(4, 65, 167), 10**9)
    assert groups == Groups(0, groups.problem)
    assert "Error: " in groups.problem and "pip install 'tenonlm[train]'" in groups.problem


def test_shapes_are_rounded_so_that_batches_share_them() -> None:
    assert [rounded_up(count) for count in (1, 7, 8, 9, 65, 1000)] == [1, 7, 8, 10, 80, 1024]
    assert shape(5, 1100, 3000) == shape(5, 1200, 3050) != shape(5, 1400, 3050)
    assert shape(4, 512, 2048).equal and (shape(4, 512, 2048).longest, shape(4, 512, 2048).tokens) == (512, 2048)

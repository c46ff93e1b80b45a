"""Small work is done in one thread, large work in all, and the number is as before afterwards."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tenon.kernels.threads import WORTH_THREADS, threads_for


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    usual = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(usual)


@pytest.mark.parametrize(("multiplications", "inside"), [(0, 1), (WORTH_THREADS - 1, 1), (WORTH_THREADS, 3)])
def test_the_number_of_threads_follows_the_work(multiplications: int, inside: int) -> None:
    with threads_for(multiplications):
        assert torch.get_num_threads() == inside
    assert torch.get_num_threads() == 3


def test_the_number_is_as_before_after_an_error_and_inside_another() -> None:
    with pytest.raises(RuntimeError), threads_for(1):
        torch.mm(torch.ones(2, 2), torch.ones(3, 3))
    assert torch.get_num_threads() == 3
    with threads_for(1):
        with threads_for(1):
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == 3

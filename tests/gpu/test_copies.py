"""Many matrices copied at once: sizes of no block, targets whose rows lie apart, factors, what lies beside them."""

from __future__ import annotations

import pytest
import torch

from tenon.kernels.copy_many import ScaledCopy, copy_many, copy_many_reference, copy_table
from tests.gpu.kit import DTYPES, INTERPRETED, Draw

pytestmark = pytest.mark.usefixtures("poisoned")
# (rows, columns, elements between a target's rows beyond them, its first column)
ALIGNED = ((64, 16, 48, 16), (16, 896, 64, 0), (513, 8, 8, 8), (8, 4104, 0, 0), (1, 8, 16, 8))
ODD = ((7, 5, 3, 1), (16, 100, 7, 2), (3, 1, 1, 0), (1, 5000, 0, 0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("shapes", "vectors"), [(ALIGNED, True), (ODD, False), (ALIGNED + ODD, False)])
def test_copies_are_those_of_plain_torch_to_the_bit(
    shapes: tuple[tuple[int, int, int, int], ...], vectors: bool, dtype: torch.dtype, device: torch.device
) -> None:
    """And touch nothing else. The interpreter runs in fp32, which it does not round."""
    draw, ends = Draw(3, dtype, device), []
    sources = [draw(rows, columns) for rows, columns, _, _ in shapes]
    for apart in (False, True):
        places = [
            torch.full((rows, columns + more), 7.0, dtype=dtype, device=device) for rows, columns, more, _ in shapes
        ]
        copies = [
            ScaledCopy(source, place[:, first : first + source.shape[1]], 0.7 + i)
            for i, (source, place, (_, _, _, first)) in enumerate(zip(sources, places, shapes, strict=True))
        ]
        if apart:
            copy_many_reference(copies)
        else:
            table = copy_table(copies)
            assert table.vectors == vectors and (not INTERPRETED or dtype == torch.float32)
            copy_many(table)
        ends.append(places)
    assert all(torch.equal(found, wanted) for found, wanted in zip(*ends, strict=True))


def test_a_table_is_read_again_when_its_sources_have_changed(device: torch.device) -> None:
    source = torch.ones(16, 8, device=device)
    target = torch.zeros(16, 24, device=device)
    table = copy_table([ScaledCopy(source, target[:, 8:16], 2.0)])
    copy_many(table)
    source.fill_(3.0)
    copy_many(table)
    assert bool((target[:, 8:16] == 6.0).all()) and not target[:, :8].any() and not target[:, 16:].any()

"""What `tenon show` says of the proof of the fast path: it holds, it fails and is not used, it could not be made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tenon.cli.proof_view import proof_text
from tenon.runs.events import Scalar
from tenon.runs.folder import RunFolder
from tests.cli.conftest import Command

HOLDS: dict[str, Scalar] = {
    "verdict": "holds", "problem": "", "tokens": 2496, "cosine": 0.99834, "matrix": "demo: layers.4.mlp.up_proj A",
    "loss_difference": 0.00021, "seconds": 0.84,
}  # fmt: skip
FAILS: dict[str, Scalar] = {**HOLDS, "verdict": "fails", "problem": "RuntimeError: out of resource: shared memory"}
UNKNOWN: dict[str, Scalar] = {**HOLDS, "verdict": "unknown", "problem": "there is too little memory left to compare"}


@pytest.mark.parametrize(
    ("event", "line", "path"),
    [
        (
            HOLDS,
            "fused kernels hold against plain torch on 2,496 tokens: gradients agree to a cosine of 0.99834 or better "
            "(demo: layers.4.mlp.up_proj A), losses to 0.021%, in 840 ms",
            "fused kernels, proven",
        ),
        (FAILS, "fused kernels are not used: RuntimeError: out of resource: shared memory", "plain torch"),
        (
            UNKNOWN,
            "fused kernels were not held against plain torch: there is too little memory left to compare",
            "fused kernels, not proven",
        ),
    ],
)
def test_p05_show_says_whether_the_fast_path_holds(
    event: dict[str, Scalar], line: str, path: str, tenon: Command, workplace: Path
) -> None:
    tenon("train", "demo.yaml", "-q")
    (folder,) = (workplace / "runs").iterdir()
    RunFolder.open(folder).events.emit("proof", **(FAILS if event is HOLDS else HOLDS))
    RunFolder.open(folder).events.emit("proof", **event)
    shown = tenon("show", "demo").out
    assert f"  {line}\n" in shown
    (row,) = (cells for cells in map(str.split, shown.splitlines()) if cells[:1] == ["path"])
    assert " ".join(row) == f"path fused kernels {path}"
    assert json.loads(tenon("show", "demo", "--json").out)["proof"].items() >= event.items()


def test_a_run_in_plain_torch_has_nothing_to_show(tenon: Command) -> None:
    tenon("train", "demo.yaml", "-q")
    assert "plain torch" not in tenon("show", "demo").out
    assert json.loads(tenon("show", "demo", "--json").out)["proof"] is None
    assert proof_text(None) == ""

"""The machine of a run: written down, and refused when its driver is too old."""

from __future__ import annotations

import pytest

from tenon.errors import PlanError
from tenon.pipeline.gpu_watch import require_driver, this_machine
from tenon.runs.machine import MachineRecord
from tenon.settings import Settings


def test_torch_says_what_it_was_built_for(settings: Settings) -> None:
    import torch

    record = this_machine(settings)
    assert record.torch_cuda == (torch.version.cuda or "")
    assert record.packages["torch"] == torch.__version__
    assert MachineRecord.from_json(record.to_json()) == record


def test_an_old_driver_is_refused_unless_cuda_answers_all_the_same() -> None:
    old = MachineRecord(
        python="3.12", system="Linux", cores=1, packages={}, torch_cuda="13.0", driver="535.104.05", driver_cuda="12.2"
    )
    with pytest.raises(PlanError) as error:
        require_driver(old, works=False)
    assert error.value.code == "plan-driver"
    require_driver(old, works=True)
    require_driver(old.model_copy(update={"driver_cuda": "13.0"}), works=False)

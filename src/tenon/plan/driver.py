"""Whether the NVIDIA driver is new enough for the installed torch: arithmetic on two versions, nothing is asked.

A driver runs every CUDA of its own major version (minor version compatibility) and all older ones. Source: NVIDIA, CUDA
Compatibility. This module does not know where the versions come from.
"""

from __future__ import annotations

import re

from tenon.errors import PlanError

# The oldest Linux driver that runs a major version of CUDA.
OLDEST_DRIVERS = {11: "450.80.02", 12: "525.60.13", 13: "580.65.06"}


def driver_problem(driver: str, driver_cuda: str, torch_cuda: str) -> PlanError | None:
    """PlanError plan-driver when this torch cannot use this driver, else None.

    driver: its version. driver_cuda, torch_cuda: `12.8`: the CUDA that the driver speaks and that torch was built for;
    "" when there is none.
    """
    speaks, built = _major(driver_cuda), _major(torch_cuda)
    if speaks == 0 or built == 0 or speaks >= built:
        return None
    oldest = OLDEST_DRIVERS.get(built)
    newer = f"driver {oldest} or newer" if oldest else f"a driver that speaks CUDA {built}"
    return PlanError(
        "plan-driver",
        f"the NVIDIA driver {driver} speaks CUDA {driver_cuda}, and this torch was built for CUDA {torch_cuda}",
        got=f"driver {driver}",
        hint=f"install {newer}, or the torch build for CUDA {speaks}.x: pytorch.org, Get Started",
    )


def _major(version: str) -> int:
    found = re.match(r"\d+", version)
    return int(found[0]) if found else 0

"""The server under Ray Serve, with two replicas on this machine, one of which is killed.

Runs in an environment of its own (.venvs/ray, with the extra `ray`): Ray is large. Skipped where there is none.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.journeys.world import make_world

REPOSITORY = Path(__file__).resolve().parents[2]
PYTHON = REPOSITORY / ".venvs" / "ray" / "bin" / "python"


@pytest.mark.slow
def test_two_replicas_behind_rays_proxy_answer_stream_and_are_replaced(tmp_path: Path) -> None:
    if not PYTHON.exists():
        pytest.skip("no environment with Ray: make ray")
    world = make_world(tmp_path / "world", rows=1)
    done = subprocess.run(
        [str(PYTHON), str(Path(__file__).with_name("ray_program.py")), str(world.root / "base")],
        env={**world.environment, "PYTHONPATH": f"{REPOSITORY / 'src'}", "RAY_USAGE_STATS_ENABLED": "0",
             # Ray gives its own proxy 15 s to come up, which a busy machine with a cold disk does not manage.
             "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60", "HOME": os.environ.get("HOME", "/")},
        capture_output=True, text=True, check=False, timeout=540,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    assert done.stdout.splitlines()[-1] == "all is well"

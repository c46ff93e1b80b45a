"""The soak for seconds and with a tiny base: the same load and the same sums; memory needs longer."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from benchmarks.serve_soak import soak, started
from tests.journeys.world import make_world


@pytest.mark.slow
def test_after_ten_seconds_of_everything_all_counters_add_up(tmp_path: Path) -> None:
    world = make_world(tmp_path / "world", rows=1)
    with started(tmp_path, str(world.root / "base"), world.settings, context_tokens=256) as place:
        rows = asyncio.run(soak(place, 10))
    short = [row for row in rows if row.met is False and "growth" not in row.what]
    assert not short
    assert sum(row.met is True for row in rows) >= 9
    found = {row.what: row.value for row in rows}
    assert found["requests sent"] > 60 and found["of them cut off by their client"] > 3
    assert found["adapters registered and removed"] >= 1 and found["seeded requests repeated under load"] > 3

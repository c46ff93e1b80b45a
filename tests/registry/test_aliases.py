"""Aliases stand for versions, move in one instant, and go back; what they need cannot be removed."""

from __future__ import annotations

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenon.errors import AdapterError
from tenon.registry.aliases import FILE_NAME, Guard, Target, draw_of
from tenon.registry.store import Registry
from tenon.runs.results import Metric
from tests.conftest import REPOSITORY
from tests.registry.samples import DRAFT, write_adapter

FLIPS = """
import sys
from pathlib import Path
from tenon.registry.store import Registry

registry = Registry(Path(sys.argv[1]))
for turn in range(200):
    registry.set_alias("bot@prod", {1 + turn % 2: 1.0})
"""


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    registry = Registry(tmp_path / "adapters")
    for _ in range(3):
        registry.register("bot", write_adapter(tmp_path / "source"), DRAFT)
    return registry


def refused(code: str, registry: Registry, spec: str, shares: dict[int, float], shadow: int | None = None) -> None:
    with pytest.raises(AdapterError) as error:
        registry.set_alias(spec, shares, shadow)
    assert error.value.code == code and error.value.hint


def test_an_alias_is_a_name_for_a_version(registry: Registry) -> None:
    registry.set_alias("bot@prod", {2: 1.0})
    assert registry.get("bot@prod").label == "bot@2"
    assert registry.get("bot").label == "bot@3", "without an alias the newest"
    assert registry.target("bot@prod").versions == {2} and registry.target("bot@1").shares == {1: 1.0}
    assert registry.verify("bot@prod").version == 2


def test_it_moves_and_goes_back(registry: Registry) -> None:
    for version in (1, 2):
        registry.set_alias("bot@prod", {version: 1.0})
    registry.set_alias("bot@prod", {2: 95.0, 3: 5.0}, shadow=1)
    assert registry.target("bot@prod").describe() == "2 95%, 3 5%; shadow 1"
    assert registry.get("bot@prod").version == 2, "of several the one with most parts"
    assert registry.roll_back("bot@prod").target.shares == {2: 1.0}
    assert registry.roll_back("bot@prod").target.shares == {2: 95.0, 3: 5.0}, "the way back has a way back"
    registry.remove_alias("bot@prod")
    assert registry.aliases("bot") == {}


def test_what_an_alias_needs_is_not_removed(registry: Registry) -> None:
    registry.set_alias("bot@prod", {2: 1.0}, shadow=3)
    for version in (2, 3):
        with pytest.raises(AdapterError) as error:
            registry.remove(f"bot@{version}")
        assert error.value.code == "adapter-in-use"
    assert registry.remove("bot@1") == "bot@1"
    registry.set_alias("bot@prod", {3: 1.0})
    assert registry.remove("bot@2") == "bot@2"
    with pytest.raises(AdapterError) as error:
        registry.roll_back("bot@prod")
    assert error.value.code == "adapter-unknown", "what it stood for is gone"


def test_bad_words_are_refused_and_change_nothing(registry: Registry) -> None:
    registry.set_alias("bot@prod", {2: 1.0})
    refused("adapter-bad-alias", registry, "bot@7", {2: 1.0})
    refused("adapter-bad-alias", registry, "bot@../x", {2: 1.0})
    refused("adapter-bad-alias", registry, "bot", {2: 1.0})
    refused("adapter-bad-alias", registry, "bot@prod", {})
    refused("adapter-bad-alias", registry, "bot@prod", {2: 0.0})
    refused("adapter-bad-alias", registry, "bot@prod", {2: float("nan")})
    refused("adapter-unknown", registry, "bot@prod", {9: 1.0})
    refused("adapter-unknown", registry, "bot@prod", {2: 1.0}, shadow=9)
    refused("adapter-unknown", registry, "nobody@prod", {1: 1.0})
    for spec, code in (("bot@none", "adapter-alias-unknown"), ("bot@prod", "adapter-no-way-back")):
        with pytest.raises(AdapterError) as error:
            registry.roll_back(spec)
        assert error.value.code == code
    assert registry.target("bot@prod").shares == {2: 1.0}


def test_a_damaged_file_is_said_so(registry: Registry) -> None:
    registry.set_alias("bot@prod", {2: 1.0})
    (registry.root / "bot" / FILE_NAME).write_text("{")
    with pytest.raises(AdapterError) as error:
        registry.get("bot@prod")
    assert error.value.code == "adapter-damaged"
    assert registry.get("bot@2").version == 2, "versions are still there"


def test_a_reader_sees_one_state_or_the_other(registry: Registry) -> None:
    registry.set_alias("bot@prod", {1: 1.0})
    writer = subprocess.Popen([sys.executable, "-c", FLIPS, str(registry.root)], cwd=REPOSITORY)
    seen = set()
    while writer.poll() is None:
        seen.add(registry.get("bot@prod").version)
    assert writer.returncode == 0 and seen == {1, 2}


@given(
    shares=st.dictionaries(st.integers(1, 9), st.floats(0.01, 100.0), min_size=1, max_size=5),
    draw=st.floats(0.0, 1.0, exclude_max=True),
)
def test_a_draw_picks_each_version_by_its_share(shares: dict[int, float], draw: float) -> None:
    target, total = Target(shares=shares), sum(shares.values())
    picked = target.pick(draw)
    before = sum(share for version, share in sorted(shares.items()) if version < picked)
    assert before - 1e-9 * total <= draw * total <= before + shares[picked] + 1e-9 * total


def test_a_guard_watches_what_the_last_move_let_in(registry: Registry) -> None:
    registry.set_alias("bot@prod", {1: 1.0})
    guarded = registry.guard_alias("bot@prod", Guard(errors=0.1))
    assert guarded.watched == frozenset(), "there is nothing to go back to"
    canary = registry.set_alias("bot@prod", {1: 95.0, 2: 5.0})
    assert canary.guard == guarded.guard and canary.watched == {2}
    assert registry.set_alias("bot@prod", {1: 50.0, 2: 50.0}).watched == {2}, "it got more"
    assert registry.set_alias("bot@prod", {1: 90.0, 2: 10.0}).watched == {1}
    whole = registry.set_alias("bot@prod", {2: 1.0})
    assert whole.watched == {2}
    back = registry.roll_back_from("bot@prod", whole.target, "it failed")
    assert back is not None and back.target.shares == {1: 90.0, 2: 10.0} and back.watched == frozenset()
    assert back.rolled_back is not None and back.rolled_back.left == whole.target
    assert back.rolled_back.reason == "it failed"
    assert abs(back.rolled_back.at - time.time()) < 60 and back.guard == guarded.guard
    moved = registry.set_alias("bot@prod", {3: 1.0})
    assert moved.rolled_back is None and moved.watched == {3}
    assert registry.guard_alias("bot@prod", None).watched == frozenset()


def test_only_the_first_of_many_rolls_back(registry: Registry) -> None:
    registry.set_alias("bot@prod", {1: 1.0})
    bad = registry.set_alias("bot@prod", {2: 1.0})
    with ThreadPoolExecutor(8) as several:
        found = list(several.map(lambda n: registry.roll_back_from("bot@prod", bad.target, f"server {n}"), range(8)))
    assert sum(each is not None for each in found) == 1
    assert registry.target("bot@prod").shares == {1: 1.0}
    # Somebody moved it to the very same version again: that is another move, and nobody's to undo.
    again = registry.set_alias("bot@prod", {2: 1.0})
    assert registry.roll_back_from("bot@prod", bad.target, "late") is None
    assert registry.aliases("bot")["prod"] == again
    registry.remove_alias("bot@prod")
    assert registry.roll_back_from("bot@prod", again.target, "gone") is None


@pytest.mark.parametrize(("metric", "figures"), [("accuracy", (0.9, 0.88, 0.6)), ("loss", (1.0, 1.01, 9.0))])
def test_a_version_that_was_judged_worse_is_kept_out(tmp_path: Path, metric: str, figures: tuple[float, ...]) -> None:
    registry = Registry(tmp_path / "adapters")
    source = write_adapter(tmp_path / "source")
    for figure in figures:
        judged = DRAFT.model_copy(update={"metrics": (Metric(name=metric, value=figure, low=0.0, high=1.0),)})
        registry.register("bot", source, judged)
    registry.register("bot", source, DRAFT)
    registry.set_alias("bot@prod", {1: 1.0})
    registry.guard_alias("bot@prod", Guard(metric=metric, drop=0.05))
    for version in (2, 3, 4):
        registry.set_alias("bot@prod", {1: 1.0}, force=True)
        if version == 2:
            registry.set_alias("bot@prod", {1: 95.0, version: 5.0})
            continue
        refused("adapter-guard", registry, "bot@prod", {1: 95.0, version: 5.0})
        assert registry.target("bot@prod").shares == {1: 1.0}
        registry.set_alias("bot@prod", {version: 1.0}, force=True)
        assert registry.roll_back("bot@prod").target.shares == {1: 1.0}, "back is always allowed"


def test_older_files_are_read(registry: Registry) -> None:
    text = '{"aliases":{"prod":{"before":[],"target":{"shadow":null,"shares":{"2":1.0},"since":5.0}}}}'
    (registry.root / "bot" / FILE_NAME).write_text(text)
    assert registry.target("bot@prod") == Target(shares={2: 1.0}, since=5.0)
    assert registry.aliases("bot")["prod"].to_json() in text, "and written as they were"


def test_a_draw_depends_on_who_asks_and_not_on_the_shares() -> None:
    draws = [draw_of("bot@prod", "acme", f"user-{number}") for number in range(4000)]
    assert draws == [draw_of("bot@prod", "acme", f"user-{number}") for number in range(4000)]
    few, more = Target(shares={1: 95.0, 2: 5.0}), Target(shares={1: 80.0, 2: 20.0})
    dealt_few, dealt_more = ([target.pick(draw) for draw in draws] for target in (few, more))
    assert 0.04 < dealt_few.count(2) / 4000 < 0.06 and 0.185 < dealt_more.count(2) / 4000 < 0.215
    assert all(after == 2 for before, after in zip(dealt_few, dealt_more, strict=True) if before == 2)


def test_a_kill_at_any_instant_leaves_one_state_or_the_other(registry: Registry) -> None:
    """SIGKILL in the middle of moves and rollbacks: what is read is whole, and the next writer is not kept waiting."""
    draw = random.Random(7)
    stood = registry.set_alias("bot@prod", {1: 1.0})
    moved = 0
    for _ in range(40):
        at_work, tell = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                registry.set_alias("bot@prod", {2: 1.0})
                os.write(tell, b"!")
                for version in itertools.cycle((2, 3, 1)):
                    registry.set_alias("bot@prod", {version: 95.0, 1 + version % 3: 5.0}, shadow=version)
                    registry.guard_alias("bot@prod", Guard(errors=0.1))
                    registry.roll_back("bot@prod")
            finally:
                os._exit(1)
        assert os.read(at_work, 1) == b"!"
        os.close(at_work)
        os.close(tell)
        time.sleep(draw.uniform(0.0, 0.02))
        os.kill(child, signal.SIGKILL)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        alias = registry.aliases("bot")["prod"]
        moved += alias != stood
        assert alias.target.versions <= {1, 2, 3} and registry.get("bot@prod").version == alias.target.main
        stood = registry.set_alias("bot@prod", {1: 1.0})
        assert stood.before[0] == alias.target
    assert moved == 40
    assert sorted(place.name for place in (registry.root / "bot").iterdir() if place.name.isdigit()) == ["1", "2", "3"]
    registry.register("bot", registry.root / "bot" / "1", DRAFT)
    left = {place.name for place in (registry.root / "bot").iterdir()}
    assert left == {"1", "2", "3", "4", FILE_NAME, "lock"}, "what killed writers left is cleaned up"

"""Aliases stand for versions, move in one instant, and go back; what they need cannot be removed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tenon.errors import AdapterError
from tenon.registry.aliases import FILE_NAME, Target
from tenon.registry.store import Registry
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

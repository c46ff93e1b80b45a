"""Checkpoints are complete or absent, whatever happens to their writer."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tenon.errors import RunError
from tenon.runs.atomic import ASIDE
from tenon.runs.checkpoints import MANIFEST, Checkpoint, CheckpointStore, checkpoint_name, verify_folder
from tests.conftest import REPOSITORY
from tests.runs.writer import FILES, content, fill

KILLS = 20


def _put(store: CheckpointStore, *steps: int) -> None:
    for step in steps:
        store.write(step, lambda folder, step=step: fill(step, folder))


def _newest(store: CheckpointStore) -> Checkpoint:
    found = store.newest()
    assert found is not None
    return found


def _kill_after(folder: Path, first_step: int, *, steps: int, delay_seconds: float) -> list[int]:
    """Start a writer, kill it with SIGKILL `delay_seconds` after it published `steps` more; the steps that it said."""
    writer = subprocess.Popen(
        [sys.executable, "-m", "tests.runs.writer", str(folder), str(first_step)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "ready\n"
    said = [writer.stdout.readline() for _ in range(steps)]
    time.sleep(delay_seconds)
    writer.kill()
    said += writer.stdout.read().splitlines()
    writer.wait()
    writer.stdout.close()
    return [int(step) for step in said]


def test_p22_a_writer_killed_at_any_instant_leaves_a_complete_newest_checkpoint(tmp_path: Path) -> None:
    draw = random.Random(22)
    published, caught_aside, written = 0, 0, 0
    damage: list[str] = []
    for _ in range(KILLS):
        said = _kill_after(tmp_path, published + 1, steps=draw.randrange(3), delay_seconds=draw.uniform(0.0, 0.03))
        written += len(said)
        store = CheckpointStore(tmp_path, keep=2, on_damage=lambda name, _why: damage.append(name))
        found = store.newest()
        assert damage == []
        if found is None:
            assert published == 0
            assert not said
        else:
            # What was said to be published is there; at most the one being written may have been published unsaid.
            assert max(said, default=published) <= found.step <= max(said, default=published) + 1
            assert {name: (found.folder / name).read_bytes() for name in FILES} == {
                name: content(found.step, name) for name in FILES
            }
            published = found.step
            assert all(step in store.steps() for step in store.best_steps().values())
        caught_aside += any(tmp_path.glob(f"{ASIDE}*"))
        store.open()
        assert not list(tmp_path.glob(f"{ASIDE}*"))
        assert len(store.steps()) <= 4  # two newest, the best, and one whose pruning was cut short
    # The kills must have met the writer at work, or this test says nothing.
    assert written >= 10
    assert caught_aside >= 3


@pytest.mark.parametrize(
    ("harm", "named"),
    [
        (lambda folder: (folder / "adapter.bin").write_bytes(b"short"), "adapter.bin has 5 bytes instead of"),
        (lambda folder: _flip_a_byte(folder / "optimizer/state.bin"), "optimizer/state.bin does not hold what was"),
        (lambda folder: (folder / "loop.json").unlink(), "loop.json is missing"),
        (lambda folder: (folder / MANIFEST).unlink(), "manifest.json is missing"),
        (lambda folder: (folder / MANIFEST).write_text("{"), "manifest.json is damaged"),
    ],
)
def test_p22_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path: Path, harm, named: str) -> None:
    told: list[tuple[str, str]] = []
    store = CheckpointStore(tmp_path, keep=3, on_damage=lambda name, why: told.append((name, why)))
    _put(store, 10, 20)
    harm(tmp_path / checkpoint_name(20))
    assert _newest(store).step == 10
    assert _newest(store).step == 10
    assert [name for name, _ in told] == ["step-00000020"]  # once
    assert told[0][1].startswith(named)


def _flip_a_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_p22_a_damaged_checkpoint_is_written_again_and_then_whole(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    _put(store, 10, 20)
    _flip_a_byte(tmp_path / "step-00000020" / "adapter.bin")
    assert _newest(store).step == 10
    _put(store, 20)
    assert _newest(store).step == 20
    assert store.steps() == (10, 20)


def test_only_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    _put(store, 1)
    store.mark_best(1, "a")
    _put(store, 2)
    store.mark_best(2, "b")
    _put(store, 3, 4, 5)
    assert store.steps() == (1, 2, 4, 5)
    store.mark_best(5, "a")
    _put(store, 6)
    assert store.steps() == (2, 5, 6)
    best = store.best("b")
    assert best is not None
    assert best.step == 2
    assert store.best("c") is None
    assert CheckpointStore(tmp_path).best_steps() == {"a": 5, "b": 2}


def test_pruning_counts_no_damaged_checkpoint_among_those_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=2)
    _put(store, 1, 2)
    _flip_a_byte(tmp_path / "step-00000002" / "adapter.bin")
    assert _newest(store).step == 1
    _put(store, 3)
    assert store.steps() == (1, 3)


def test_a_writer_that_fails_leaves_nothing_and_removes_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep=1)
    _put(store, 1)

    def broken(folder: Path) -> None:
        (folder / "half").write_bytes(b"half")
        raise ZeroDivisionError("a bug")

    with pytest.raises(ZeroDivisionError):
        store.write(2, broken)
    assert _newest(store).step == 1
    assert sorted(place.name for place in tmp_path.iterdir()) == ["step-00000001"]


def test_the_log_is_synced_before_a_checkpoint_gets_its_name(tmp_path: Path) -> None:
    seen: list[tuple[int, ...]] = []
    store = CheckpointStore(tmp_path, before_publish=lambda: seen.append(store.steps()))
    _put(store, 1, 2)
    assert seen == [(), (1,)]


def test_p23_space_is_asked_for_before_each_write(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    _put(store, 1)
    called: list[Path] = []
    with pytest.raises(RunError) as caught:
        store.write(2, called.append, need_bytes=10**18)
    assert caught.value.code == "run-disk-full"
    assert "the checkpoint of step 2" in caught.value.what
    assert "needed 1.0 EB, free " in caught.value.got
    assert called == []
    assert _newest(store).step == 1


def test_a_best_step_without_a_checkpoint_is_our_own_bug(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="step 7 has no checkpoint"):
        CheckpointStore(tmp_path).mark_best(7)
    with pytest.raises(ValueError, match="at least one"):
        CheckpointStore(tmp_path, keep=0)


def test_a_damaged_best_file_forgets_the_best_and_nothing_else(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    _put(store, 1)
    for text in ("{", "[1]", '{"a": "x"}'):
        (tmp_path / "best.json").write_text(text)
        assert store.best_steps() == {}
    assert _newest(store).step == 1


def test_the_manifest_lists_every_file(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    _put(store, 1)
    manifest = verify_folder(tmp_path / "step-00000001")
    assert not isinstance(manifest, str)
    assert set(manifest.files) == set(FILES)
    assert manifest.size_bytes == sum(len(content(1, name)) for name in FILES)

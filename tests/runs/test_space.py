"""A disk that is really full: by a file size limit, and by a small file system where one may be mounted."""

from __future__ import annotations

import errno
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tenon.errors import RunError
from tenon.runs.atomic import write_file_atomic
from tenon.runs.checkpoints import CheckpointStore
from tenon.runs.events import EventLog, read_events
from tenon.runs.space import free_bytes, is_full, require_space

LIMITED = """
import resource, sys
from pathlib import Path
from tenon.errors import RunError
from tenon.runs.checkpoints import CheckpointStore
from tenon.runs.events import EventLog

folder = Path(sys.argv[1])
store = CheckpointStore(folder / "checkpoints", keep=1)
store.write(1, lambda place: (place / "weights").write_bytes(b"w" * 10_000) and None)
log = EventLog(folder / "events.jsonl")
log.emit("step", step=1)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

def attempt(what):
    try:
        what()
    except RunError as error:
        print(error.code, "|", error.what, "|", error.got)

attempt(lambda: store.write(2, lambda place: (place / "weights").write_bytes(b"w" * 50_000) and None))
attempt(lambda: [log.emit("step", step=step, text="x" * 100) for step in range(2, 1000)])
attempt(lambda: log.emit("step", step=1000))
"""


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting a small file system is not permitted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_p23_a_file_size_limit_loses_no_earlier_checkpoint(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", LIMITED, str(tmp_path)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3
    assert lines[0].startswith(f"run-disk-full | {tmp_path}/checkpoints/step-00000002: no space for writing")
    assert "needed 10.0 kB, free " in lines[0]
    assert lines[1].startswith("run-disk-full | ")
    assert "the event log" in lines[1]
    assert lines[2].startswith("run-disk-full | ")
    newest = CheckpointStore(tmp_path / "checkpoints").newest()
    assert newest is not None
    assert newest.step == 1
    assert [place.name for place in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    # The event that met the limit is torn; with room again, the log goes on behind it and every whole event is read.
    log = EventLog(tmp_path / "events.jsonl")
    log.emit("resume", step=1)
    log.close()
    events = list(read_events(tmp_path / "events.jsonl"))
    assert events[-1]["kind"] == "resume"
    assert [event["step"] for event in events[:-1]] == list(range(1, len(events)))
    assert len(events) > 100


def test_p23_a_full_disk_loses_no_earlier_checkpoint(tiny_disk: Path) -> None:
    store = CheckpointStore(tiny_disk, keep=1)
    store.write(1, lambda place: _fill(place / "weights", 400_000))
    (tiny_disk / "other").write_bytes(b"o" * 100_000)
    # Asked for beforehand when the size is known …
    with pytest.raises(RunError) as caught:
        store.write(2, lambda place: _fill(place / "weights", 900_000), need_bytes=900_000)
    assert caught.value.code == "run-disk-full"
    # … and met while writing when it is not.
    with pytest.raises(RunError) as caught:
        store.write(2, lambda place: _fill(place / "weights", 900_000))
    assert caught.value.code == "run-disk-full"
    assert isinstance(caught.value.__cause__, OSError)
    assert sorted(place.name for place in tiny_disk.iterdir()) == ["other", "step-00000001"]
    newest = store.newest()
    assert newest is not None
    assert newest.step == 1
    # A small file that no longer fits leaves the old one.
    write_file_atomic(tiny_disk / "best.json", b"old")
    with pytest.raises(RunError):
        write_file_atomic(tiny_disk / "best.json", b"n" * 900_000)
    assert (tiny_disk / "best.json").read_bytes() == b"old"
    # With room again, it goes on.
    (tiny_disk / "other").unlink()
    store.write(2, lambda place: _fill(place / "weights", 500_000))
    assert store.steps() == (2,)


def _fill(path: Path, size_bytes: int) -> None:
    path.write_bytes(b"w" * size_bytes)


def test_p23_space_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    require_space(tmp_path, 1, "anything")
    with pytest.raises(RunError) as caught:
        require_space(tmp_path / "not" / "yet" / "there", 10**18, "the checkpoints of this run")
    assert caught.value.code == "run-disk-full"
    assert "the checkpoints of this run" in caught.value.what
    assert free_bytes(tmp_path / "not") == pytest.approx(free_bytes(tmp_path), rel=0.1)


def test_only_a_full_disk_counts_as_full() -> None:
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        assert is_full(OSError(number, "words"))
    assert not is_full(OSError(errno.EACCES, "No space left on device"))
    assert is_full(RuntimeError("I/O error: No space left on device (os error 28)"))
    assert not is_full(RuntimeError("shapes differ"))

"""Measuring a disk: bounded, removed again, and never an error."""

from __future__ import annotations

from pathlib import Path

from tenon.service.disk import measure_disk


def test_a_disk_is_measured_and_left_as_it_was(tmp_path: Path) -> None:
    speed = measure_disk(tmp_path / "cache", file_bytes=3_000_000)
    assert speed.problem == "" and speed.free_bytes > 0
    assert speed.write_bytes_per_second and speed.read_bytes_per_second
    assert list((tmp_path / "cache").iterdir()) == []


def test_it_ends_in_time(tmp_path: Path) -> None:
    """A disk so slow that time is up at once still has a figure for what was written."""
    speed = measure_disk(tmp_path, file_bytes=3_000_000, most_seconds=0.0)
    assert speed.problem == "" and speed.write_bytes_per_second == 0.0


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    speed = measure_disk(tmp_path / "file" / "cache", file_bytes=1000)
    assert "Not a directory" in speed.problem and speed.write_bytes_per_second is None


def test_too_little_space_is_a_sentence(tmp_path: Path) -> None:
    assert "too little free space" in measure_disk(tmp_path, file_bytes=10**18).problem

"""Files and folders appear whole or not at all; leftovers of the dead go, work of the living stays."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tenon.runs.atomic import ASIDE, clean_leftovers, remove_folder, write_file_atomic, write_folder_atomic

HANGS = """
import sys, time
from pathlib import Path
from tenon.runs.atomic import write_folder_atomic

def writer(folder):
    (folder / "half").write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)

write_folder_atomic(Path(sys.argv[1]) / "name", writer)
"""


def _names(folder: Path) -> list[str]:
    return sorted(place.name for place in folder.iterdir())


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    write_file_atomic(tmp_path / "a", b"one")
    write_file_atomic(tmp_path / "a", b"two")
    assert (tmp_path / "a").read_bytes() == b"two"
    assert _names(tmp_path) == ["a"]


def test_a_folder_appears_with_all_its_files(tmp_path: Path) -> None:
    def writer(folder: Path) -> None:
        assert not (tmp_path / "name").exists()
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_bytes(b"deep")

    write_folder_atomic(tmp_path / "name", writer)
    assert (tmp_path / "name" / "sub" / "file").read_bytes() == b"deep"
    assert _names(tmp_path) == ["name"]


def test_an_existing_folder_is_replaced_only_when_asked(tmp_path: Path) -> None:
    def writer(folder: Path) -> None:
        (folder / "new").touch()

    (tmp_path / "name").mkdir()
    (tmp_path / "name" / "old").touch()
    with pytest.raises(FileExistsError):
        write_folder_atomic(tmp_path / "name", writer)
    assert _names(tmp_path / "name") == ["old"]
    write_folder_atomic(tmp_path / "name", writer, replace=True)
    assert _names(tmp_path / "name") == ["new"]
    assert _names(tmp_path) == ["name"]


def test_an_interrupt_leaves_nothing(tmp_path: Path) -> None:
    def writer(folder: Path) -> None:
        (folder / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_folder_atomic(tmp_path / "name", writer)
    assert _names(tmp_path) == []


def test_a_removed_folder_is_gone_and_a_missing_one_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "name").mkdir()
    (tmp_path / "name" / "file").touch()
    remove_folder(tmp_path / "name")
    remove_folder(tmp_path / "name")
    assert _names(tmp_path) == []


def test_p22_leftovers_go_when_their_writer_is_dead_and_not_before(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HANGS, str(tmp_path)], stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == "writing\n"
        assert clean_leftovers(tmp_path) == ()
        (aside,) = tmp_path.glob(f"{ASIDE}*")
        assert _names(aside) == ["half"]
        writer.kill()
        writer.wait()
    assert clean_leftovers(tmp_path) == (aside.name,)
    assert _names(tmp_path) == []


def test_leftover_files_go_too(tmp_path: Path) -> None:
    (tmp_path / f"{ASIDE}0123-best.json").write_bytes(b"half")
    (tmp_path / "best.json").write_bytes(b"whole")
    clean_leftovers(tmp_path)
    assert _names(tmp_path) == ["best.json"]

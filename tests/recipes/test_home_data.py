"""The home data set is what its generator makes, and it is as varied, balanced and unambiguous as its README says."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

HOME = Path(__file__).resolve().parents[2] / "recipes" / "home"

ROOM = "kitchen|bedroom|bathroom|hall|office|kids|living|attic"
DOOR = "front|back|garage|gate"
MUSIC = "jazz|blues|rock|pop|techno|reggae|classical|lullabies|news"
COMMAND = re.compile(
    rf"(on|off) (light|fan|tv) ({ROOM})"
    rf"|(open|close) (blinds|curtains|window) ({ROOM})"
    rf"|dim ({ROOM}) [1-9][05]"
    rf"|temp ({ROOM}) (1[6-9]|2[0-5])"
    rf"|(lock|unlock) ({DOOR})"
    rf"|play ({MUSIC}) ({ROOM})"
    rf"|(pause|clean) ({ROOM})"
    r"|timer [1-9][0-9]?"
    r"|alarm (0[5-9]|10):(00|15|30|45)"
    r"|buy [a-z]+"
)


def load_rows(name: str) -> list[tuple[str, str]]:
    """(what is said, the command) of each row; every row is one user and one assistant message."""
    rows: list[tuple[str, str]] = []
    for line in (HOME / name).read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        rows.append((user["content"], assistant["content"]))
    return rows


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    """make_home.py as a module."""
    spec = importlib.util.spec_from_file_location("make_home", HOME / "make_home.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_the_generator_makes_the_shipped_files_byte_for_byte(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(HOME / "make_home.py"), str(tmp_path)], check=True)
    made = sorted(path.name for path in tmp_path.iterdir())
    assert made == ["test.jsonl", "train.jsonl"]
    for name in made:
        assert (tmp_path / name).read_bytes() == (HOME / name).read_bytes(), name


def test_the_sizes_are_those_of_the_readme() -> None:
    assert (len(load_rows("train.jsonl")), len(load_rows("test.jsonl"))) == (1000, 200)


def test_every_command_follows_the_grammar() -> None:
    rows = load_rows("train.jsonl") + load_rows("test.jsonl")
    assert [command for _, command in rows if not COMMAND.fullmatch(command)] == []


def test_no_utterance_occurs_twice_or_on_both_sides() -> None:
    rows = load_rows("train.jsonl") + load_rows("test.jsonl")
    keys = Counter(" ".join(re.findall(r"[a-z0-9%']+", said.lower())) for said, _ in rows)
    assert len(rows) == 1200
    assert [key for key, count in keys.items() if count > 1] == []


def test_no_slot_and_no_stray_space_is_left_in_an_utterance() -> None:
    rows = load_rows("train.jsonl") + load_rows("test.jsonl")
    assert [said for said, _ in rows if re.search(r"[{}]|  |^\s|\s$", said)] == []


def test_the_wording_is_varied(generator: ModuleType) -> None:
    train, _ = generator.build()
    wordings = generator.read_wordings(HOME / "phrases.txt")
    assert len(set(wordings)) == len(wordings) >= 500
    assert len({row.wording for row in train}) >= 340
    assert max(Counter(row.wording for row in train).values()) <= 8
    assert len({row.said.split()[0].lower() for row in train}) >= 150


def test_half_of_the_test_uses_wordings_that_train_never_has(generator: ModuleType) -> None:
    train, test = generator.build()
    known = {row.wording.text for row in train}
    unseen = [row for row in test if row.wording.text not in known]
    assert len(unseen) == 100
    assert len({row.wording for row in unseen}) >= 80


def test_verbs_rooms_and_numbers_are_balanced() -> None:
    train = load_rows("train.jsonl")
    verbs = Counter(command.split()[0] for _, command in train)
    assert len(verbs) == 14
    assert min(verbs.values()) >= 35 and max(verbs.values()) <= 120
    rooms = Counter(word for _, command in train for word in command.split() if word in ROOM.split("|"))
    assert len(rooms) == 8
    assert max(rooms.values()) <= 1.3 * min(rooms.values())
    assert {command for _, command in load_rows("test.jsonl") if command.startswith("lock")} <= {c for _, c in train}


def test_what_is_said_twice_with_the_same_words_means_the_same(generator: ModuleType) -> None:
    texts = [wording.text for wording in generator.read_wordings(HOME / "phrases.txt")]
    assert len(texts) == len(set(texts))

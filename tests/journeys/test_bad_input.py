"""What users get wrong, through the real commands: one clear message with what to type, a non-zero exit."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.journeys.world import RECIPE, World, make_world


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world in which nothing was done yet; cases add files and change nothing."""
    return make_world(tmp_path_factory.mktemp("bad") / "world")


def chat(*turns: tuple[str, str]) -> str:
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n"


GOOD = chat(("user", "the house"), ("assistant", "THE HOUSE"))


def missing_file(world: World) -> list[str]:
    return ["data.train=absent.jsonl"]


def empty_file(world: World) -> list[str]:
    (world.root / "empty.jsonl").write_text("")
    return ["data.train=empty.jsonl"]


def broken_json(world: World) -> list[str]:
    (world.root / "broken.jsonl").write_text(GOOD * 16 + '{"messages": [\n')
    return ["data.train=broken.jsonl"]


def wrong_encoding(world: World) -> list[str]:
    text = json.dumps({"text": "a"}) + "\n"
    (world.root / "latin.jsonl").write_bytes(text.encode() * 3 + '{"text": "häuser"}\n'.encode("latin-1"))
    return ["data.train=latin.jsonl"]


def no_assistant(world: World) -> list[str]:
    (world.root / "mute.jsonl").write_text(GOOD * 16 + chat(("user", "the house"), ("user", "again")))
    return ["data.train=mute.jsonl"]


def too_long(world: World) -> list[str]:
    (world.root / "long.jsonl").write_text(GOOD * 16 + chat(("user", "the house " * 200), ("assistant", "X")))
    return ["data.train=long.jsonl", "data.max_tokens=64"]


def unseen_label(world: World) -> list[str]:
    (world.root / "labels.csv").write_text("text,label\n" + "".join(f"the house {n},{n % 2}\n" for n in range(20)))
    (world.root / "unseen.csv").write_text("text,label\nthe lake,7\n")
    return ["data.train=labels.csv", "evaluate.data=unseen.csv"]


def no_supervised(world: World) -> list[str]:
    (world.root / "silent.jsonl").write_text(chat(("user", "the house"), ("assistant", "")) * 4)
    return ["data.train=silent.jsonl"]


def no_model(world: World) -> list[str]:
    (world.root / "nothing").mkdir(exist_ok=True)
    return ["base=./nothing"]


def truncated_weights(world: World) -> list[str]:
    cut = world.root / "cut"
    shutil.copytree(world.root / "base", cut, dirs_exist_ok=True)
    data = (cut / "model.safetensors").read_bytes()
    (cut / "model.safetensors").write_bytes(data[: len(data) // 2])
    return ["base=./cut"]


def target_matches_nothing(world: World) -> list[str]:
    return ["lora.targets=x_proj"]


def rank_too_large(world: World) -> list[str]:
    return ["lora.rank=4096"]


def loss_not_finite(world: World) -> list[str]:
    return ["lora.alpha=1e30", "optimizer.lr=100", "schedule.warmup=0"]


Case = Callable[[World], list[str]]
# Case, pattern of the code, what the message names.
CASES: tuple[tuple[Case, str, str], ...] = (
    (missing_file, "data-file-missing", "absent.jsonl"),
    (empty_file, "data-file-empty", "empty.jsonl"),
    (broken_json, "data-json-broken", "broken.jsonl:17"),
    (wrong_encoding, "data-encoding", "latin.jsonl:4"),
    (no_assistant, "data-no-assistant", "mute.jsonl:17"),
    (too_long, "data-row-too-long", "long.jsonl:17"),
    (unseen_label, "data-unseen-label", "7"),
    (no_supervised, "data-(no-supervised|row-unsupervised|row-empty)", "silent.jsonl"),
    (no_model, "base-(not-a-model|empty)", "nothing"),
    (truncated_weights, "base-damaged", "model.safetensors"),
    (target_matches_nothing, "plan-target-(unmatched|pattern)|recipe-bad-value", "x_proj"),
    (rank_too_large, "plan-rank-too-large", "4096"),
    (loss_not_finite, "train-not-finite", "step"),
)


def train(world: World, case: Case, run: Path) -> subprocess.CompletedProcess[str]:
    recipe = world.root / f"{case.__name__}.yaml"
    text = RECIPE.replace("  heldout: 0.1\n", "").replace("validation:\n  every: 10\n", "")
    recipe.write_text(text)
    return world.tenon("train", recipe.name, *case(world), f"run={run}")


@pytest.mark.parametrize(("case", "code", "named"), CASES, ids=[case.__name__ for case, _, _ in CASES])
def test_p27_bad_input_is_one_clear_message(world: World, tmp_path: Path, case: Case, code: str, named: str) -> None:
    done = train(world, case, tmp_path / "run")
    found = re.search(r"^error\[([a-z-]+)\]: (.*)$", done.stderr, flags=re.MULTILINE)
    assert found is not None, done.stderr
    assert re.fullmatch(code, found[1]), done.stderr
    assert named in done.stderr.partition("error[")[2]
    assert "\n  hint: " in done.stderr and "Traceback" not in done.stderr
    assert done.returncode in (1, 2) and "registered" not in done.stdout
    assert done.stderr.count("error[") == 1


def test_there_is_a_case_for_every_kind_of_bad_input() -> None:
    """The others of the list: an adapter of another base (test_commands), no disk space and a run in use
    (test_survival, tests/cli/test_train), an unsupported Python or torch (tests/cli/test_start, tests/service).
    """
    assert len({case for case, _, _ in CASES}) == 13

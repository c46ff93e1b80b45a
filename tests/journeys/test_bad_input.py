"""Bad data, bases and recipes, through the real commands: one clear message, a documented exit, nothing left behind."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.journeys.typed import Keyboard, contents
from tests.journeys.world import World, make_world

RECIPE = """\
base: base
name: echo
data:
  train: rows.jsonl
batch:
  rows: 8
limits:
  steps: 4
register: echo
"""


def chat(user: str, *rest: tuple[str, str]) -> str:
    turns = [("user", user), *rest]
    return json.dumps({"messages": [{"role": role, "content": text} for role, text in turns]}) + "\n"


GOOD = "".join(chat(f"the house {number}", ("assistant", f"THE HOUSE {number}")) for number in range(16))
LONG = chat("the house " * 100, ("assistant", "X"))
MUTED = json.dumps({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", "weight": 0}]})
TRAIN_LABELS = "text,label\n" + "".join(
    f"the house {number},{'odd' if number % 2 else 'even'}\n" for number in range(20)
)
TEST_LABELS = "text,label\nthe lake 1,odd\nthe lake 2,prime\nthe lake 3,round\n"
FILES: dict[str, bytes] = {
    "empty.jsonl": b"",
    "broken.jsonl": (GOOD + '{"messages": [{"role": "user", "content": "hi"\n' + GOOD).encode(),
    "latin.jsonl": GOOD.encode() + chat("h\x00user", ("assistant", "X")).replace("\\u0000", "ä").encode("latin-1"),
    "utf16.jsonl": GOOD.encode("utf-16"),
    "unanswered.jsonl": (GOOD + chat("the house") + chat("the lake")).encode(),
    "long.jsonl": (GOOD + LONG).encode(),
    "muted.jsonl": f"{MUTED}\n".encode() * 12,
    "train.csv": TRAIN_LABELS.encode(),
    "test.csv": TEST_LABELS.encode(),
    "json.jsonl": (chat("a", ("assistant", '{"x": 1}')) * 3 + chat("b", ("assistant", "no JSON"))).encode(),
}


@dataclass(frozen=True)
class Case:
    """One thing that is wrong: what is typed after the recipe, and what has to be told.

    what, got, hint: pieces of the message's parts.
    """

    name: str
    words: tuple[str, ...]
    code: str
    what: tuple[str, ...]
    got: str = ""
    hint: str = ""
    status: int = 1


DATA = (
    Case("missing file", ("data.train=absent.jsonl",), "data-file-missing", ("absent.jsonl",)),
    Case("misspelt file", ("data.train=row.jsonl",), "data-file-missing", ("row.jsonl",), hint="rows.jsonl?"),
    Case("empty file", ("data.train=empty.jsonl",), "data-file-empty", ("empty.jsonl",), hint="at least one row"),
    Case(
        "broken JSON line", ("data.train=broken.jsonl",), "data-json-broken", ("broken.jsonl:17:", "column 47"),
        got='"content": "hi"', hint="data.on_bad: drop",
    ),
    Case(
        "wrong encoding", ("data.train=latin.jsonl",), "data-encoding", ("latin.jsonl:17:", "not UTF-8"),
        got="byte 0xe4 at column", hint="iconv -f LATIN1 -t UTF-8",
    ),
    Case("UTF-16", ("data.train=utf16.jsonl",), "data-encoding", ("utf16.jsonl",), hint="UTF-8"),
    Case(
        "a row without an assistant turn", ("data.train=unanswered.jsonl",), "data-no-assistant",
        ("unanswered.jsonl:17:", "1 further"), got="roles user", hint="add an assistant message",
    ),
    Case(
        "a row longer than the limit", ("data.train=long.jsonl", "data.max_tokens=64"), "data-row-too-long",
        ("long.jsonl:17:", "the limit is 64"), hint="data.on_long: truncate or drop",
    ),
    Case(
        "a label in validation that train never had", ("data.train=train.csv", "data.validation=test.csv"),
        "data-unseen-label", ("test.csv:3:", "2 labels", "prime"), got="prime, round", hint="add training rows",
    ),
    Case(
        "a label in evaluation that train never had", ("data.train=train.csv", "evaluate.data=test.csv"),
        "data-unseen-label", ("test.csv:3:", "2 labels", "prime"), got="prime, round", hint="add training rows",
    ),
    Case("answers of weight 0", ("data.train=muted.jsonl",), "data-row-empty", ("muted.jsonl:1:", "11 further")),
    Case(
        "no supervised token",
        ("data.train=rows.jsonl", "data.max_tokens=4", "data.on_long=truncate", "data.on_bad=drop"),
        "data-no-supervised", ("no row of the data has a supervised token",), got="120 rows", hint="tenon data",
    ),
)  # fmt: skip
RECIPES = (
    Case(
        "a base that is no model", ("base=./nothing",), "base-not-a-model", ("nothing is no model", "config.json"),
        hint="*.safetensors",
    ),
    Case("a base that is nowhere", ("base=nowhere",), "base-missing", ("nowhere",), hint="smollm2-135m"),
    Case("rows as the base", ("base=./rows.jsonl",), "base-not-a-model", ("rows.jsonl",), hint="give its folder"),
    Case(
        "truncated weights", ("base=./cut",), "base-damaged", ("cut/model.safetensors", "ends inside the tensor"),
        got="bytes", hint="download",
    ),
    Case("truncated header", ("base=./beheaded",), "base-damaged", ("model.safetensors", "header"), hint="download"),
    Case(
        "a target that matches nothing", ("lora.targets=layers\\..*\\.x_proj",), "plan-target-unmatched",
        ("lora.targets", "x_proj", "matches no matrix"), hint="layers.0.self_attn.q_proj",
    ),
    Case("a misspelt target", ("lora.targets=q_prj",), "plan-target-unmatched", ("'q_prj'",), hint="mean q_proj?"),
    Case(
        "a rank larger than the layer", ("lora.rank=33",), "plan-rank-too-large",
        ("lora.rank 33", "k_proj, which is 32 x 64"),
        hint="at most 32",
    ),
)  # fmt: skip
METRICS = (
    Case(
        "a metric that does not fit the rows to judge", ("data.heldout=0.1", "evaluate.metrics=accuracy"),
        "recipe-metric-inapplicable", ("evaluate.metrics: accuracy", "not labels"), hint="exact, rouge_l", status=2,
    ),
    Case(
        "a metric that does not fit the validation rows",
        ("data.train=json.jsonl", "data.validation=rows.jsonl", "validation.metric=json_valid"),
        "recipe-metric-inapplicable", ("validation.metric: json_valid", "not all JSON"), hint="rouge_l", status=2,
    ),
)  # fmt: skip
CASES = DATA + RECIPES + METRICS


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with everything that is wrong in it."""
    made = make_world(tmp_path_factory.mktemp("bad") / "world", recipe=RECIPE)
    for name, content in FILES.items():
        (made.root / name).write_bytes(content)
    (made.root / "nothing").mkdir()
    (made.root / "nothing" / "readme.txt").write_text("no model")
    for name, kept in (("cut", 0.5), ("beheaded", 0.0001)):
        shutil.copytree(made.root / "base", made.root / name)
        weights = made.root / name / "model.safetensors"
        data = weights.read_bytes()
        weights.write_bytes(data[: int(kept * len(data))])
    return made


@pytest.fixture
def keyboard(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Keyboard:
    monkeypatch.chdir(world.root)
    return Keyboard(world, capsys)


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_p27_bad_input_is_one_clear_message_and_leaves_nothing(keyboard: Keyboard, case: Case) -> None:
    root = keyboard.world.root
    before = outside_home(root)
    told = keyboard.refused("train", "recipe.yaml", *case.words, "run=runs/new", "--quiet")
    assert (told.status, told.code) == (case.status, case.code)
    assert [piece for piece in case.what if piece not in told.what] == [], told
    assert case.got in told.got and case.hint in told.hint, told
    # No run was begun, no file was touched, and the same command may be typed again.
    assert outside_home(root) == before
    assert list((root / "runs").glob("*")) == []


def outside_home(root: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(root).items() if not name.startswith("home/")}


def test_what_is_wrong_is_corrected_and_the_same_command_works(keyboard: Keyboard) -> None:
    """Also with a run folder of a fixed name: what was refused does not stand in the way."""
    rows = keyboard.world.root / "growing.jsonl"
    rows.write_text(GOOD + chat("the house"))
    words = ("train", "recipe.yaml", "data.train=growing.jsonl", "limits.steps=1", "run=runs/again", "--quiet")
    assert keyboard.refused(*words).code == "data-no-assistant"
    rows.write_text(GOOD)
    status, out, err = keyboard.type(*words)
    assert status == 0, err
    assert "registered echo@1" in out
    shutil.rmtree(keyboard.world.root / "runs")


def test_tenon_data_lists_every_problem_and_fails(keyboard: Keyboard) -> None:
    rows = keyboard.world.root / "several.jsonl"
    rows.write_text(GOOD + chat("the house") + "{\n" + LONG)
    status, out, err = keyboard.type("data", "recipe.yaml", "data.train=several.jsonl", "data.max_tokens=64")
    assert status == 1 and "Traceback" not in err
    for code, line in (("data-no-assistant", 17), ("data-row-too-long", 19)):
        assert f"problem[{code}]: {rows}:{line}: " in out
    assert "broken JSON" in out and f"{rows}:18" in out
    rows.unlink()


def test_every_kind_of_bad_input_has_its_case() -> None:
    """The rest of the list (other bases, NaN, disk, busy runs, versions) is in test_bad_state."""
    assert len(CASES) == len({case.name for case in CASES}) == 22

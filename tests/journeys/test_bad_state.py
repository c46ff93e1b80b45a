"""Runs that go wrong on the way, adapters of another base, versions that are too old: told once, and nothing lost."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from tenon.cli.main import python_complaint
from tenon.data.tokenizer import load_tokenizer
from tenon.registry.store import Registry
from tenon.runs.folder import RunFolder
from tenon.service.subjects import open_subject
from tests.journeys.typed import Keyboard, contents, read_error
from tests.journeys.world import World, make_world

REPOSITORY = Path(__file__).resolve().parents[2]
SYSTEM = "Answer in capitals."
RECIPE = """\
base: base
name: echo
data:
  train: rows.jsonl
  shuffle: false
  system: Answer in capitals.
lora:
  rank: 4
batch:
  rows: 8
limits:
  steps: 9
checkpoint:
  every: 3
  keep: 9
evaluate:
  metrics: []
register: echo
"""
# Runs the command line with files that may not grow beyond so many bytes.
SMALL_DISK = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
from tenon.cli.run import run_as_program
sys.exit(run_as_program(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with two bases of one shape: `base`, and `other`, whose embedding of `~` is NaN."""
    made = make_world(tmp_path_factory.mktemp("state") / "world", recipe=RECIPE)
    other = made.root / "other"
    shutil.copytree(made.root / "base", other)
    weights = load_file(other / "model.safetensors")
    (tilde,) = load_tokenizer(other).encode("~")
    weights["model.embed_tokens.weight"][tilde] = float("nan")
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    return made


@pytest.fixture(scope="module")
def trained(world: World) -> Path:
    """The run of one step that registered echo@1."""
    done = world.tenon("train", "recipe.yaml", "limits.steps=1", "run=runs/first", "--quiet")
    assert done.returncode == 0, done.stderr
    return world.root / "runs" / "first"


@pytest.fixture
def keyboard(world: World, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Keyboard:
    monkeypatch.chdir(world.root)
    return Keyboard(world, capsys)


def test_p15_a_loss_that_is_not_finite_ends_the_run_and_names_the_row(keyboard: Keyboard) -> None:
    root = keyboard.world.root
    lines = (root / "rows.jsonl").read_text().splitlines()
    lines[59] = json.dumps({"messages": [{"role": "user", "content": "a ~"}, {"role": "assistant", "content": "A"}]})
    (root / "tilde.jsonl").write_text("\n".join(lines) + "\n")
    told = keyboard.refused("train", "recipe.yaml", "base=./other", "data.train=tilde.jsonl", "run=runs/nan", "--quiet")
    assert (told.status, told.code, told.got) == (1, "train-not-finite", "nan")
    assert told.what == f"the loss of adapter echo is not finite at step 8; rows: {root / 'tilde.jsonl'}:60"
    assert "optimizer.lr" in told.hint
    run = RunFolder.open(root / "runs" / "nan")
    newest = run.checkpoints.newest()
    assert newest is not None and newest.step == 6
    assert [entry for entry in Registry(keyboard.world.settings.registry).list() if entry.run == "nan"] == []
    assert not list(run.path.glob("adapter/*"))
    status, out, _ = keyboard.type("runs")
    assert status == 0 and re.search(r"^nan +failed +7 +6 .*train-not-finite", out, flags=re.MULTILINE)


def test_p15_an_absurd_learning_rate_ends_the_run(keyboard: Keyboard) -> None:
    absurd = ("optimizer.kind=sgd", "optimizer.lr=100", "optimizer.clip_norm=0", "lora.alpha=1e10", "schedule.warmup=0")
    told = keyboard.refused("train", "recipe.yaml", *absurd, "run=runs/absurd", "--quiet")
    assert (told.status, told.code) == (1, "train-not-finite")
    assert re.search(r"adapter echo is not finite at step \d+", told.what)
    assert "rows.jsonl:" in told.what or "gradient" in told.what
    assert list((keyboard.world.root / "runs" / "absurd" / "adapter").glob("*")) == []


def test_p23_a_full_disk_is_told_and_the_run_goes_on_when_there_is_room(keyboard: Keyboard) -> None:
    world = keyboard.world
    done = subprocess.run(
        [sys.executable, "-c", SMALL_DISK, "50000", "train", "recipe.yaml", "run=runs/full", "--quiet"],
        cwd=world.root, env=world.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    told = read_error(done.returncode, done.stdout, done.stderr)
    assert (told.status, told.code) == (1, "run-disk-full")
    assert "step-00000003" in told.what and told.got.startswith("File too large; ")
    assert "tenon resume runs/full" in told.hint or f"tenon resume {world.root / 'runs' / 'full'}" in told.hint
    assert list((world.root / "runs" / "full" / "checkpoints").iterdir()) == []
    status, _, err = keyboard.type("resume", "full", "--quiet")
    assert status == 0, err
    assert (world.root / "runs" / "full" / "adapter" / "echo" / "adapter_model.safetensors").is_file()


def test_a_run_in_use_is_refused_and_left_alone(keyboard: Keyboard) -> None:
    run = RunFolder.open(keyboard.world.plan_run(keyboard.world.root / "runs" / "busy"))
    with run.lock():
        before = contents(run.path)
        for words in (("resume", "runs/busy"), ("train", "recipe.yaml", "run=runs/busy")):
            told = keyboard.refused(*words)
            assert (told.status, told.code) == (1, "run-busy")
            assert f"process {os.getpid()}" in told.what and "kill -TERM" in told.hint
        assert contents(run.path) == before


OTHER_BASE = (
    ("chat", "echo", "--base", "./other", "--say", "hi"),
    ("eval", "echo", "--base", "./other", "--data", "rows.jsonl"),
    ("compare", "base", "echo@1", "--base", "./other", "--data", "rows.jsonl"),
    ("generate", "echo", "--base", "./other", "--input", "prompts.txt", "--output", "answers.jsonl"),
    ("eval", "runs/first", "--base", "./other"),
    ("eval", "runs/first/adapter/echo", "--base", "./other", "--data", "rows.jsonl"),
    ("eval", "home/adapters/echo/1", "--base", "./other", "--data", "rows.jsonl"),
    ("train", "recipe.yaml", "base=./other", "lora.start_from=echo", "run=runs/new"),
    ("train", "recipe.yaml", "base=./other", "lora.start_from=runs/first/adapter/echo", "run=runs/new"),
)


@pytest.mark.parametrize("words", OTHER_BASE, ids=[" ".join(words[:2] + words[-2:-1]) for words in OTHER_BASE])
def test_p18_an_adapter_of_another_base_is_refused(keyboard: Keyboard, trained: Path, words: tuple[str, ...]) -> None:
    root = keyboard.world.root
    (root / "prompts.txt").write_text("hi\n")
    told = keyboard.refused(*words)
    assert (told.status, told.code) == (1, "adapter-other-base")
    assert "echo" in told.what and f"belongs to the base {root / 'base'}" in told.what
    assert f"--base {root / 'base'}" in told.hint or "recipe's base" in told.hint
    assert trained.is_dir() and not (root / "runs" / "new").exists() and not (root / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("words", "code", "hint"),
    [
        (("lora.start_from=echo", "lora.rank=8"), "plan-start-differs", "set lora.rank: 4 and lora.alpha: 8"),
        (("lora.start_from=echo", "lora.alpha=4"), "plan-start-differs", "set lora.rank: 4 and lora.alpha: 8"),
        (("lora.start_from=echo", "lora.targets=qv"), "plan-start-differs", "set lora.targets and lora.layers"),
        (("lora.start_from=ecoh",), "adapter-unknown", "did you mean echo?"),
        (("lora.start_from=./nowhere",), "adapter-missing", "tenon adapters list"),
        (("lora.start_from=base",), "adapter-missing", "tenon adapters list"),
    ],
)
def test_a_start_that_is_none_is_refused_when_planning(
    keyboard: Keyboard, trained: Path, words: tuple[str, ...], code: str, hint: str
) -> None:
    assert trained.is_dir()
    told = keyboard.refused("plan", "recipe.yaml", *words)
    assert (told.status, told.code) == (1, code) and hint in told.hint


def test_training_starts_from_a_registered_adapter_and_says_so(keyboard: Keyboard, trained: Path) -> None:
    assert trained.is_dir()
    status, out, err = keyboard.type(
        "train", "recipe.yaml", "lora.start_from=echo@1", "limits.steps=1", "register=more", "run=runs/more", "--quiet"
    )
    assert status == 0 and "registered more@1" in out, err
    assert Registry(keyboard.world.settings.registry).get("more").parent == "echo@1"


def test_p09_an_adapter_is_asked_with_its_own_system_message(keyboard: Keyboard, trained: Path) -> None:
    """Also when its run is gone: the entry holds it."""
    world = keyboard.world
    assert Registry(world.settings.registry).get("echo@1").system == SYSTEM
    hidden = trained.rename(trained.with_name("elsewhere"))
    try:
        opened = open_subject("echo@1", None, world.settings)
        assert opened.subject.system == opened.data.system == SYSTEM
        assert open_subject("base", str(world.root / "base"), world.settings).subject.system is None
    finally:
        hidden.rename(trained)


def test_an_old_torch_is_refused_before_anything_is_made(world: World) -> None:
    """The first torch on the path counts, as it would when it is imported."""
    meta = world.root / "old" / "torch-2.5.0.dist-info"
    meta.mkdir(parents=True)
    (meta / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 2.5.0\n")
    done = subprocess.run(
        [sys.executable, "-m", "tenon.cli.main", "train", "recipe.yaml", "run=runs/old"],
        cwd=world.root, env={**world.environment, "PYTHONPATH": str(meta.parent)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    told = read_error(done.returncode, done.stdout, done.stderr)
    assert (told.status, told.code, told.got) == (1, "plan-torch-version", "torch 2.5.0")
    assert "2.11" in told.what and told.hint == "pip install --upgrade 'torch>=2.11'"
    assert not (world.root / "runs" / "old").exists()


@pytest.mark.parametrize("version", [(3, 10, 13), (3, 9, 0), (2, 7, 18)])
def test_an_old_python_is_refused(version: tuple[int, int, int]) -> None:
    told = read_error(2, "", python_complaint(version).rstrip("\n"))
    assert told.code == "usage-python-version" and "3.11 or newer" in told.what
    assert told.got == "Python {}.{}.{}".format(*version) and "python3.11 -m venv" in told.hint


def test_an_old_python_can_read_the_complaint() -> None:
    """With a real one, where there is one; that the source suits it is held by tests/cli/test_start."""
    for name in ("python3.10", "python3.9", "python3.8", "python3.7", "python2.7"):
        found = shutil.which(name)
        if found is None or subprocess.run([found, "--version"], capture_output=True, check=False).returncode != 0:
            continue
        done = subprocess.run(
            [found, "-B", "-m", "tenon.cli.main", "--help"],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY / "src")}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert read_error(done.returncode, done.stdout, done.stderr.rstrip("\n")).code == "usage-python-version"
        assert done.returncode == 2
        return
    pytest.skip("there is no Python older than 3.11 here")

"""The registry: versions appear whole, never change, say when they were changed, and belong to one base."""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tenon.errors import AdapterError
from tenon.registry.entry import Entry, check_base
from tenon.registry.entry_files import ENTRY_NAME, PEFT_FILES
from tenon.registry.store import Registry
from tenon.runs.results import Metric
from tests.conftest import REPOSITORY
from tests.registry.samples import DRAFT, tensors, write_adapter

REGISTERS = """
import sys
from pathlib import Path
from tenon.registry.store import Registry
from tests.registry.samples import DRAFT

registry = Registry(Path(sys.argv[1]))
print("ready", flush=True)
sys.stdin.readline()
for _ in range(int(sys.argv[3])):
    print(registry.register("shared", Path(sys.argv[2]), DRAFT).version, flush=True)
"""


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    return Registry(tmp_path / "adapters")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_adapter(tmp_path / "source")


def _code(error: pytest.ExceptionInfo[AdapterError]) -> str:
    assert error.value.hint
    return error.value.code


def test_p18_an_entry_binds_what_it_was_made_of(registry: Registry, source: Path) -> None:
    metric = Metric(name="exact", value=0.9, low=0.8, high=0.95)
    draft = DRAFT.model_copy(update={"metrics": (metric,), "parent": "older@2", "template_hash": "t" * 64})
    entry = registry.register("intents", source, draft)
    assert (entry.label, entry.rank, entry.alpha, entry.scale) == ("intents@1", 4, 8.0, 2.0)
    assert (entry.base_hash, entry.data_hash, entry.template_hash) == ("b" * 64, "d" * 64, "t" * 64)
    assert (entry.metrics, entry.parent, entry.run, entry.base_format) == ((metric,), "older@2", "run-1", "nf4")
    assert (entry.targets, entry.matrices) == (("q_proj", "v_proj"), 4)
    assert abs(entry.created - time.time()) < 60
    assert entry.size_bytes == sum((source / name).stat().st_size for name in PEFT_FILES)
    again = registry.get("intents@1")
    assert again == entry
    assert again.content_hash == entry.content_hash
    assert Entry.from_json(entry.to_json()) == entry
    assert {place.name for place in registry.folder(entry).iterdir()} == {*PEFT_FILES, ENTRY_NAME}


def test_p18_another_base_is_refused(registry: Registry, source: Path) -> None:
    entry = registry.register("intents", source, DRAFT)
    check_base(entry, "b" * 64)
    with pytest.raises(AdapterError) as caught:
        check_base(entry, "c" * 64)
    assert _code(caught) == "adapter-other-base"
    assert "intents@1 belongs to the base tiny (bbbbbbbbbbbb)" in caught.value.what


def test_versions_count_up_and_the_newest_is_meant(registry: Registry, source: Path, tmp_path: Path) -> None:
    first = registry.register("a", source, DRAFT)
    second = registry.register("a", write_adapter(tmp_path / "other", tensors(seed=1)), DRAFT)
    registry.register("b", source, DRAFT)
    assert registry.get("a") == second
    assert registry.get("a@1") == first
    assert first.adapter_hash != second.adapter_hash
    assert registry.get("b").adapter_hash == first.adapter_hash
    assert registry.labels() == ("a@1", "a@2", "b@1")
    assert [entry.label for entry in registry.list()] == ["a@1", "a@2", "b@1"]


def test_a_removed_version_is_gone_and_its_number_never_comes_again(registry: Registry, source: Path) -> None:
    for _ in range(3):
        registry.register("a", source, DRAFT)
    assert registry.remove("a@1") == "a@1"
    assert registry.remove("a") == "a@3"
    assert registry.versions("a") == (2,)
    assert registry.register("a", source, DRAFT).version == 4
    for label in ("a@2", "a@4"):
        registry.remove(label)
    assert registry.names() == ()
    assert registry.register("a", source, DRAFT).version == 5


def test_what_is_not_there_is_named_with_the_nearest(registry: Registry, source: Path) -> None:
    assert registry.list() == ()
    registry.register("intents", source, DRAFT)
    for spec in ("poems", "intents@2", "intents@0", "intents@", "intents@x", "intents@1@1", "intents@-1"):
        for ask in (registry.get, registry.verify, registry.remove):
            with pytest.raises(AdapterError) as caught:
                ask(spec)
            assert _code(caught) == "adapter-unknown"
    with pytest.raises(AdapterError) as caught:
        registry.get("intent")
    assert "did you mean intents?" in caught.value.hint


@pytest.mark.parametrize("name", ["", "..", "../x", "a/b", "/tmp/x", ".a", "a b", "ä", "a\n", "x" * 101, "-a"])
def test_p35_names_that_lead_out_of_the_registry_are_refused(registry: Registry, source: Path, name: str) -> None:
    with pytest.raises(AdapterError) as caught:
        registry.register(name, source, DRAFT)
    assert _code(caught) == "adapter-bad-name"
    with pytest.raises(AdapterError) as caught:
        registry.get(name)
    assert _code(caught) == "adapter-bad-name"
    assert not registry.root.exists()


def test_p35_links_lead_nowhere(registry: Registry, source: Path, tmp_path: Path) -> None:
    entry = registry.register("a", source, DRAFT)
    (registry.root / "linked").symlink_to(registry.root / "a")
    (registry.root / "a" / "7").symlink_to(registry.folder(entry))
    assert registry.labels() == ("a@1",)
    weights = registry.folder(entry) / "adapter_model.safetensors"
    weights.rename(tmp_path / "elsewhere")
    weights.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(AdapterError) as caught:
        registry.verify("a")
    assert _code(caught) == "adapter-damaged"
    assert "adapter_model.safetensors is a link" in caught.value.what


@pytest.mark.parametrize(
    ("harm", "words"),
    [
        (lambda folder: _flip(folder / "adapter_model.safetensors"), "does not hold what was registered"),
        (lambda folder: (folder / "adapter_model.safetensors").write_bytes(b""), "has 0 bytes instead of"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json is missing"),
        (lambda folder: (folder / "evil.py").touch(), "evil.py does not belong there"),
        (lambda folder: (folder / ENTRY_NAME).unlink(), "tenon.json is missing"),
        (lambda folder: (folder / ENTRY_NAME).write_text("{}"), "tenon.json is no entry"),
        (lambda folder: _rename_entry(folder), "tenon.json says that it is other@1"),
    ],
)
def test_p14_verify_says_what_was_changed(registry: Registry, source: Path, harm, words: str) -> None:
    entry = registry.register("a", source, DRAFT)
    assert registry.verify("a") == entry
    harm(registry.folder(entry))
    with pytest.raises(AdapterError) as caught:
        registry.verify("a@1")
    assert _code(caught) == "adapter-damaged"
    assert words in caught.value.what
    assert "tenon adapters remove a@1" in caught.value.hint
    assert registry.remove("a@1") == "a@1"


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def _rename_entry(folder: Path) -> None:
    text = (folder / ENTRY_NAME).read_text()
    (folder / ENTRY_NAME).write_text(text.replace('"name":"a"', '"name":"other"'))


def test_one_damaged_entry_does_not_hide_the_others(registry: Registry, source: Path) -> None:
    for name in ("a", "b"):
        registry.register(name, source, DRAFT)
    (registry.root / "a" / "1" / ENTRY_NAME).write_text("{")
    with pytest.raises(AdapterError, match="adapter-damaged"):
        registry.list()
    told: list[AdapterError] = []
    assert [entry.label for entry in registry.list(on_damaged=told.append)] == ["b@1"]
    assert [error.code for error in told] == ["adapter-damaged"]


def test_p15_what_is_no_whole_adapter_is_never_registered(registry: Registry, tmp_path: Path) -> None:
    weights = tensors()
    next(iter(weights.values()))[0, 0] = float("nan")
    with pytest.raises(AdapterError) as caught:
        registry.register("a", write_adapter(tmp_path / "bad", weights), DRAFT)
    assert _code(caught) == "adapter-not-finite"
    assert registry.labels() == ()


def test_export_writes_what_peft_loads_and_nothing_else(registry: Registry, source: Path, tmp_path: Path) -> None:
    registry.register("a", source, DRAFT)
    target = tmp_path / "out" / "adapter"
    assert registry.export("a", target).label == "a@1"
    assert sorted(place.name for place in target.iterdir()) == sorted(PEFT_FILES)
    for name in PEFT_FILES:
        assert (target / name).read_bytes() == (source / name).read_bytes()
    (tmp_path / "empty").mkdir()
    registry.export("a", tmp_path / "empty")
    assert len(list((tmp_path / "empty").iterdir())) == 2
    (tmp_path / "file").touch()
    for taken in (target, tmp_path / "file"):
        with pytest.raises(AdapterError) as caught:
            registry.export("a", taken)
        assert _code(caught) == "adapter-export-not-empty"


def test_an_import_knows_its_base_and_nothing_else(registry: Registry, source: Path) -> None:
    (source / "README.md").write_text("left behind")
    entry = registry.import_peft(source, "a", base_spec="tiny", base_hash="b" * 64)
    assert (entry.base_spec, entry.run, entry.data_hash, entry.recipe_hash) == ("tiny", None, None, None)
    assert registry.verify("a") == entry


def _start(registry: Registry, source: Path, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", REGISTERS, str(registry.root), str(source), str(count)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=REPOSITORY)


def test_processes_that_register_at_once_each_get_their_own_version(registry: Registry, source: Path) -> None:
    workers = [_start(registry, source, 4) for _ in range(3)]
    for worker in workers:
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
    given: list[int] = []
    for worker in workers:
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
    for worker in workers:
        out, _ = worker.communicate()
        given += [int(line) for line in out.split()]
    assert sorted(given) == list(range(1, 13))
    assert registry.versions("shared") == tuple(range(1, 13))
    assert all(registry.verify(label).label == label for label in registry.labels())


def test_a_registration_that_is_killed_is_complete_or_absent(registry: Registry, source: Path) -> None:
    draw = random.Random(35)
    for _ in range(5):
        worker = _start(registry, source, 1000)
        assert worker.stdout is not None
        assert worker.stdout.readline() == "ready\n"
        assert worker.stdin is not None
        worker.stdin.write("\n")
        worker.stdin.flush()
        first = worker.stdout.readline()
        time.sleep(draw.uniform(0.0, 0.03))
        worker.kill()
        rest, _ = worker.communicate()
        said = [int(line) for line in [first, *rest.split()]]
        assert set(said) <= set(registry.versions("shared"))
        assert registry.versions("shared") == tuple(range(1, len(registry.versions("shared")) + 1))
        for version in registry.versions("shared")[said[0] - 1 :]:
            registry.verify(f"shared@{version}")
    registry.register("shared", source, DRAFT)
    assert not list((registry.root / "shared").glob(".aside-*"))


def test_p29_the_registry_is_read_without_numpy_or_torch(registry: Registry, source: Path) -> None:
    registry.register("a", source, DRAFT)
    code = (
        "import sys; from pathlib import Path; from tenon.registry.store import Registry\n"
        "assert Registry(Path(sys.argv[1])).list()[0].label == 'a@1'\n"
        "print(sorted({'torch', 'numpy', 'transformers', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(registry.root)], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


def test_a_registry_on_a_full_disk_keeps_what_it_has(registry: Registry, source: Path) -> None:
    code = (
        "import resource, sys; from pathlib import Path; from tenon.errors import RunError\n"
        "from tenon.registry.store import Registry; from tests.registry.samples import DRAFT\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "try: Registry(Path(sys.argv[1])).register('a', Path(sys.argv[2]), DRAFT)\n"
        "except RunError as error: print(error.code)"
    )
    registry.register("a", source, DRAFT)
    command = [sys.executable, "-c", code, str(registry.root), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=REPOSITORY)
    assert done.stdout == "run-disk-full\n"
    assert registry.labels() == ("a@1",)
    assert not list((registry.root / "a").glob(".aside-*"))

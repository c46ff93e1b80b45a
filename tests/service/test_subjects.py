"""From what is typed to who answers: refusals that need no worker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tenon.errors import TenonError
from tenon.registry.entry import EntryDraft
from tenon.registry.store import Registry
from tenon.service.bases import describe_base
from tenon.service.plans import make_plan
from tenon.service.subjects import open_subject, open_subjects
from tenon.service.training import create_run
from tests.journeys.world import World, make_world
from tests.registry.samples import config, write_adapter


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """Two bases with an adapter each, and a run of two slots."""
    made = make_world(tmp_path_factory.mktemp("subjects") / "world")
    weights = (made.root / "base" / "model.safetensors").read_bytes()
    other = made.root / "other"
    other.mkdir()
    for place in (made.root / "base").iterdir():
        (other / place.name).write_bytes(place.read_bytes())
    (other / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    files = write_adapter(made.root / "files")
    for name in ("base", "other"):
        found = describe_base(str(made.root / name), made.settings)
        draft = EntryDraft(base_spec=found.spec, base_hash=found.base_hash, system=f"of {name}")
        Registry(made.settings.registry).register(f"for-{name}", files, draft)
    return made


def refusal(*names: str, world: World, base: str | None = None) -> TenonError:
    with pytest.raises(TenonError) as caught:
        open_subjects(names, base, world.settings)
    return caught.value


def test_subjects_of_two_bases_are_not_judged_together(world: World) -> None:
    error = refusal("for-base", "for-other", world=world)
    assert error.code == "usage-two-bases" and "for-base@1 and for-other@1" in error.what
    assert "tenon compare A.json B.json" in error.hint


def test_an_adapter_that_names_no_base(world: World, tmp_path: Path) -> None:
    nameless = config()
    del nameless["base_model_name_or_path"]
    folder = write_adapter(tmp_path / "made-elsewhere", settings=nameless)
    error = refusal(str(folder), world=world)
    assert error.code == "adapter-no-base" and error.hint == "name it: --base SPEC"
    opened = open_subject(str(folder), str(world.root / "base"), world.settings)
    assert opened.subject.label == "made-elsewhere" and opened.subject.system is None


def test_p18_a_copy_of_a_registered_adapter_knows_its_base(world: World, tmp_path: Path) -> None:
    registry = Registry(world.settings.registry)
    copied = tmp_path / "copied"
    copied.mkdir()
    for place in registry.folder(registry.get("for-base")).iterdir():
        (copied / place.name).write_bytes(place.read_bytes())
    assert open_subject(str(copied), None, world.settings).subject.system == "of base"
    assert refusal(str(copied), world=world, base=str(world.root / "other")).code == "adapter-other-base"
    (copied / "tenon.json").write_text(json.dumps({"name": "for-base"}))
    assert refusal(str(copied), world=world).code == "adapter-damaged"


def test_a_run_of_several_adapters_needs_one_named(world: World) -> None:
    recipe = (world.root / "recipe.yaml").read_text()
    recipes = [world.root / f"{name}.yaml" for name in ("one", "two")]
    for path in recipes:
        path.write_text(recipe.replace("name: echo", f"name: {path.stem}").replace("register: echo\n", ""))
    run = world.root / "runs" / "both"
    planned = make_plan(recipes, [f"run={run}"], world.settings)
    create_run(planned.plan, planned.recipe_texts)
    for name in (str(run), f"{run}:three"):
        error = refusal(name, world=world)
        assert (error.code, error.got) == ("run-which-slot", "one, two") and error.hint.endswith(f"{run}:one")
    assert refusal(f"{run}:two", world=world).code == "run-unfinished"

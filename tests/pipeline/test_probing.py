"""What training records of a few rows: what the registered adapter says of them when somebody else loads it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch

from tenon.adapters.bank import AdapterBank
from tenon.adapters.peft_files import load_adapter, read_adapter
from tenon.batch import NO_SLOT
from tenon.data.store import TokenRow
from tenon.errors import AdapterError
from tenon.infer.generate import generate
from tenon.infer.requests import Request
from tenon.pipeline.base import find_base
from tenon.pipeline.engine import load_workbench
from tenon.pipeline.probing import record_probes
from tenon.pipeline.subjects import Subjects
from tenon.pipeline.training import train
from tenon.registry.probes import ANSWER_TOKENS, PROBES_NAME, WINDOW_TOKENS, Probes
from tenon.registry.store import Registry
from tenon.service.bases import describe_base
from tenon.service.plans import make_plan
from tenon.service.subjects import open_subject
from tests.journeys.world import World, make_world
from tests.plan.situations import CPU
from tests.tiny import CPU as DEVICE

OWN = (
    "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    """A world with two short runs: one that keeps probes, and one that does not and has a template of its own."""
    made = make_world(tmp_path_factory.mktemp("probing") / "world", rows=60)
    short = ("limits.steps=3", "validation.every=0", "evaluate.metrics=[]")
    train(made.plan_run(made.root / "runs" / "kept", *short), made.settings)
    (made.root / "own.jinja").write_text(OWN)
    own = ("serve.probes=0", "register=silent", "data.template=own.jinja", "serve.temperature=0", "serve.stop=[END]")
    train(made.plan_run(made.root / "runs" / "none", *short, *own), made.settings)
    return made


@pytest.fixture(scope="module")
def probes(world: World) -> Probes:
    registry = Registry(world.settings.registry)
    found = registry.probes(registry.get("echo"))
    assert found is not None
    return found


def test_training_records_what_the_registered_adapter_says(world: World, probes: Probes) -> None:
    assert (probes.precision, probes.base_format, probes.device) == ("fp32", "dense", "cpu")
    assert len(probes.probes) == 4
    base = describe_base(str(world.root / "base"), world.settings)
    bench = load_workbench(find_base(base, world.settings), base, CPU, "fp32")
    registry = Registry(world.settings.registry)
    bank = AdapterBank(base.facts, dtype=torch.float32, device=DEVICE)
    slot = load_adapter(bank, "echo", read_adapter(registry.folder(registry.get("echo"))))
    for place, attribute in ((slot, "logprobs"), (NO_SLOT, "base_logprobs")):
        asked = [Request(p.prompt_ids, slot=place, draft_ids=p.answer_ids, max_new_tokens=64) for p in probes.probes]
        for probe, found in zip(probes.probes, generate(bench.decoder, bank, asked), strict=True):
            assert found.draft_logprobs == pytest.approx(getattr(probe, attribute), abs=1e-4)
    assert any(probe.logprobs != probe.base_logprobs for probe in probes.probes)


def test_the_file_is_bound_by_the_entry(world: World, probes: Probes) -> None:
    registry = Registry(world.settings.registry)
    entry = registry.verify("echo")
    file = registry.folder(entry) / PROBES_NAME
    assert entry.beside[PROBES_NAME].size_bytes == file.stat().st_size < 10_000
    assert Probes.from_json(file.read_bytes()) == probes
    registry.export("echo", world.root / "out")
    assert not (world.root / "out" / PROBES_NAME).exists(), "rows of the data do not leave with the adapter"


def test_a_recipe_may_keep_none(world: World) -> None:
    registry = Registry(world.settings.registry)
    entry = registry.verify("silent")
    assert registry.probes(entry) is None and not (registry.folder(entry) / PROBES_NAME).exists()


def test_what_the_recipe_says_travels_with_the_adapter(world: World) -> None:
    registry = Registry(world.settings.registry)
    entry = registry.verify("silent")
    assert entry.generation.said == {"temperature": 0.0, "stop": ("END",)}
    assert registry.template(entry) == OWN and registry.template(registry.get("echo")) is None
    # It is asked and judged with its template, also where its run is gone.
    opened = open_subject("silent", str(world.root / "base"), world.settings)
    bench = load_workbench(find_base(opened.engine.base, world.settings), opened.engine.base, CPU, "fp32")
    renderer = Subjects(bench, bench.renderer(None)).renderer(opened.subject)
    assert renderer.template_hash == entry.template_hash != bench.renderer(None).template_hash
    assert opened.data.template == opened.subject.template


@dataclass
class _Rows:
    """Rows as a store has them."""

    rows: list[TokenRow]

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> TokenRow:
        return self.rows[index]


def _row(length: int, *answers: tuple[int, int]) -> TokenRow:
    supervised = np.zeros(length, dtype=bool)
    for first, last in answers:
        supervised[first:last] = True
    return TokenRow(np.arange(length, dtype=np.int32) % 50, supervised, "row")


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        (_row(10, (4, 8)), (0, 4), (4, 8)),
        (_row(10, (0, 10)), (0, 1), (1, 10)),
        (_row(30, (4, 8), (20, 25)), (0, 20), (20, 25)),
        (_row(900, (600, 900)), (600 - (WINDOW_TOKENS - ANSWER_TOKENS), 600), (600, 600 + ANSWER_TOKENS)),
        (_row(900, (899, 900)), (899 - (WINDOW_TOKENS - 1), 899), (899, 900)),
    ],
)
def test_a_probe_is_a_bounded_part_of_its_row(
    world: World, row: TokenRow, prompt: tuple[int, int], answer: tuple[int, int]
) -> None:
    base = describe_base(str(world.root / "base"), world.settings)
    bench = load_workbench(find_base(base, world.settings), base, CPU, "fp32")
    plan = make_plan([world.root / "recipe.yaml"], [], world.settings).plan
    silent = _row(5)  # nothing in it is supervised: it is passed over
    (probe,) = record_probes(bench, NO_SLOT, _Rows([silent, row, silent]), count=2, plan=plan).probes
    assert probe.prompt_ids == tuple(row.ids[slice(*prompt)].tolist())
    assert probe.answer_ids == tuple(row.ids[slice(*answer)].tolist())
    assert probe.logprobs == pytest.approx(probe.base_logprobs, abs=1e-4) and max(probe.logprobs) < 0.0


def test_a_damaged_file_is_refused(world: World) -> None:
    registry = Registry(world.settings.registry)
    entry = registry.get("echo")
    file = registry.folder(entry) / PROBES_NAME
    whole = file.read_bytes()
    try:
        for content in (whole[:-1], whole.replace(b"cpu", b"gpu"), b""):
            file.write_bytes(content)
            for ask in (lambda: registry.probes(entry), lambda: registry.verify("echo")):
                with pytest.raises(AdapterError) as error:
                    ask()
                assert error.value.code == "adapter-damaged"
    finally:
        file.write_bytes(whole)

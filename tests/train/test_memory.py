"""Memory that runs out: the step is made again with less, and the adapter is that of the undisturbed run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tenon.adapters.bank import AdapterBank
from tenon.errors import TrainError
from tenon.models.decoder import Decoder
from tenon.models.layer import Keep
from tenon.plan.activations import Activations, Pass, adapted
from tenon.plan.keeping import Steps, may_keep
from tenon.plan.values import Frozen, Keeping, MachineFacts
from tenon.train.memory import AS_PLANNED, Limits, Measured, StepMemory, layer_keeps, memory_errors
from tenon.train.slot import SlotTraining
from tenon.train.step import StepOptions
from tests.tiny import CPU, tiny_decoder, tiny_facts

from .short_memory import MESSAGE, FakeMemory, ShortWalk
from .world import Asked, Ports, make_slot, make_trainer, some_rows

LAYERS, MICRO_TOKENS = 6, 64
FACTS = tiny_facts(layers=LAYERS)
MACHINE = MachineFacts(
    device="cuda",
    device_name="a GPU",
    device_count=1,
    device_memory_bytes=10**9,
    host_memory_bytes=10**9,
    cores=1,
    threads=1,
    bf16=True,
    free_disk_bytes=10**9,
)
ASKED = (Asked("one", steps=6, rows=9), Asked("two", seed=1, steps=6, rows=7))


class World:
    """A run of two slots over a decoder whose memory a test governs."""

    def __init__(
        self,
        folder: Path,
        *,
        fails: Callable[[int, str], bool] = lambda _walk, _way: False,
        room_bytes: int | None = None,
        every: int = 0,
        levels: str = "auto",
        limit_bytes: int | None = None,
    ) -> None:
        """room_bytes: of a measured memory; None: steps as planned, everything kept."""
        self.ports, self.decoder = Ports(folder), tiny_decoder(FACTS)
        self.walk = ShortWalk(self.decoder.walk, fails)
        self.decoder.walk = self.walk
        bank = AdapterBank(FACTS, dtype=torch.float32, device=CPU)
        self.slots = [make_slot(self.decoder, bank, one, some_rows(30, seed=i)) for i, one in enumerate(ASKED)]
        self.memory = FakeMemory(total_bytes=room_bytes or 0)
        memory: StepMemory = AS_PLANNED
        if room_bytes is not None:
            memory = measured(self, levels, limit_bytes)
        self.trainer = make_trainer(self.decoder, bank, self.slots, self.ports, every=every, memory=memory)

    def run(self) -> dict[str, torch.Tensor]:
        """The adapters after all steps."""
        self.trainer.run()
        return {t.plan.name: t.slot.parameters_P.clone() for t in self.slots}

    def decisions(self) -> list[tuple[int, int]]:
        """Of every memory event: tokens at once, and how many layers keep everything."""
        found = self.ports.of("memory")
        return [(int(str(event["micro_tokens"])), int(str(event["all_layers"]))) for event in found]


def steps_of(slots: list[SlotTraining], levels: str = "auto") -> Steps:
    ranks = [{site: at.rank for site, at in t.slot.shape.sites.items()} for t in slots]
    return Steps(
        of=Pass(FACTS, adapted(ranks, dropout=False), "cpu", "fp32", Frozen()),
        machine=MACHINE.model_copy(update={"device": "cpu"}),
        longest_tokens=12,
        step_tokens=128,
        row_tokens=8,
        token_flops=1e6,
        levels=may_keep(levels, "cpu"),
    )


def measured(world: World, levels: str, limit_bytes: int | None) -> Measured:
    return Measured(
        steps_of(world.slots, levels),
        world.memory,
        world.slots,
        keeping=Keeping(micro_tokens=MICRO_TOKENS, all_layers=LAYERS),
        limits=Limits(limit_bytes, 0.0),
        emit=world.ports.emit,
        libraries_bytes=0,
    )


def peak(slots: list[SlotTraining], *counts: int, tokens: int = MICRO_TOKENS) -> int:
    return Activations(steps_of(slots).of, tokens).peak_bytes(counts)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    return World(tmp_path_factory.mktemp("undisturbed")).run()


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


ROOMY = 10**9


@pytest.mark.parametrize(
    "fails",
    [
        lambda walk, way: (walk, way) == (1, "up"),
        lambda walk, way: (walk, way) == (1, "down"),
        # The second batch of a window: the first one's gradient is there already, and goes.
        lambda walk, way: (walk, way) == (8, "down"),
        lambda walk, way: walk in (5, 6, 20) and way == "down",
    ],
    ids=["forward", "backward", "second batch", "again and again"],
)
def test_an_adapter_after_lack_of_memory_has_the_bits_of_the_undisturbed_run(
    fails: Callable[[int, str], bool], tmp_path: Path, undisturbed: dict[str, torch.Tensor]
) -> None:
    world = World(tmp_path, fails=fails, room_bytes=ROOMY)
    assert same(world.run(), undisturbed)
    warnings = world.ports.of("warning")
    assert warnings and all(event["code"] == "train-memory-short" for event in warnings)
    assert "is made again: keeps everything of" in str(warnings[0]["text"])
    decided = world.decisions()
    assert decided[0] == (MICRO_TOKENS, LAYERS) and len(decided) == 1 + len(warnings)
    assert {tokens for tokens, _ in decided} == {MICRO_TOKENS}
    kept = [layers for _, layers in decided]
    assert kept == sorted(kept, reverse=True) and len(set(kept)) == len(kept), "each time a notch less"
    assert world.memory.released == 1 + len(warnings)
    assert [e["step"] for e in world.ports.of("step", "one")] == [1, 2, 3, 4, 5, 6]


def test_a_decision_follows_what_a_neighbour_leaves(tmp_path: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    """One retry: the room that is measured then is room for what is chosen."""
    world = World(tmp_path, fails=lambda walk, _way: walk == 7, room_bytes=ROOMY)
    left = peak(world.slots, 2, 0, 4, 0)

    def neighbour(kind: str, fields: dict[str, object]) -> None:
        if kind == "step":
            world.memory.others_bytes = ROOMY - round(left / 0.98) - 1000

    world.ports.on_event = neighbour
    assert same(world.run(), undisturbed)
    assert world.decisions()[1:] == [(MICRO_TOKENS, 2)]
    (event,) = [event for event in world.ports.of("memory") if event["step"] is not None]
    assert int(str(event["used_bytes"])) <= int(str(event["usable_bytes"]))


def test_tokens_are_halved_when_no_layer_keeps_more_than_its_input(tmp_path: Path) -> None:
    """Then the sums have another order: the same adapter, to rounding."""
    world = World(tmp_path, fails=lambda walk, _way: walk < 12, room_bytes=ROOMY)
    world.trainer.run()
    tokens = [tokens for tokens, _ in world.decisions()]
    assert tokens == sorted(tokens, reverse=True) and set(tokens) == {64, 32}
    # A last layer that keeps everything costs nothing more: it is the first to go on the way back.
    assert [layers for tokens, layers in world.decisions() if tokens == 64][-1] <= 1
    reference = World(tmp_path / "reference").run()
    for t in world.slots:
        torch.testing.assert_close(t.slot.parameters_P, reference[t.plan.name], rtol=1e-3, atol=1e-5)


def test_nothing_left_to_tighten_is_one_clear_error(tmp_path: Path) -> None:
    world = World(tmp_path, fails=lambda _walk, _way: True, room_bytes=ROOMY)
    with pytest.raises(TrainError) as caught:
        world.trainer.run()
    error = caught.value
    assert error.code == "train-memory" and "step 1" in error.what and MESSAGE[:18] in error.got
    assert "nvidia-smi" in error.hint and error.__context__ is None
    assert 5 < len(world.ports.of("warning")) < 30, "an end comes soon"


def test_memory_that_cannot_be_measured_runs_out_once(tmp_path: Path) -> None:
    world = World(tmp_path, fails=lambda _walk, _way: True)
    with pytest.raises(TrainError, match="train-memory"):
        world.trainer.run()
    assert world.walk.walks == 1


def test_other_errors_are_not_caught(tmp_path: Path) -> None:
    class Broken(Decoder):
        def record(self, *_args: object, **_rest: object) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    world = World(tmp_path, room_bytes=ROOMY)
    world.trainer._decoder = Broken(FACTS, dtype=torch.float32, device=CPU)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        world.trainer.run()
    assert world.ports.of("warning") == []


# --- before the first step


def test_steps_are_settled_by_what_is_free(tmp_path: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    world = World(tmp_path / "a", room_bytes=ROOMY)
    room = round((peak(world.slots, 3, 0, 3, 0) + coming_bytes(world)) / 0.98) + 1000
    world = World(tmp_path / "b", room_bytes=room)
    assert same(world.run(), undisturbed)
    assert world.decisions() == [(MICRO_TOKENS, 3)]
    (event,) = world.ports.of("memory")
    assert "keeps everything of 3 layers, 3 layers computed again; 64 tokens at once" in str(event["text"])
    assert event["step"] is None and world.memory.limited == []
    # Base and adapters are held by the real thing; here only the moments are to come.
    assert event["used_bytes"] == peak(world.slots, 3, 0, 3, 0) + coming_bytes(World(tmp_path / "c"))


def coming_bytes(world: World) -> int:
    """Both moments of AdamW, fp32."""
    return sum(8 * t.slot.parameters_P.numel() for t in world.slots)


def test_a_limit_is_kept_to_and_set(tmp_path: Path, undisturbed: dict[str, torch.Tensor]) -> None:
    world = World(tmp_path / "a")
    limit = round((peak(world.slots, 1, 0, 5, 0) + coming_bytes(world)) / 0.98) + 1000
    limited = World(tmp_path / "b", room_bytes=ROOMY, limit_bytes=limit)
    assert same(limited.run(), undisturbed)
    assert limited.decisions() == [(MICRO_TOKENS, 1)] and limited.memory.limited == [limit]
    assert limited.ports.of("memory")[0]["usable_bytes"] == limit


def test_fewer_tokens_at_once_only_where_no_way_fits(tmp_path: Path) -> None:
    world = World(tmp_path / "a")
    room = round(peak(world.slots, 0, 0, 6, 0) / 0.98 + coming_bytes(world)) - 5000
    world = World(tmp_path / "b", room_bytes=room)
    world.trainer.run()
    assert world.decisions()[0][0] == 32
    (warning,) = world.ports.of("warning")
    assert str(warning["text"]).startswith("64 tokens at once do not fit the memory that is free: ")


def test_a_room_for_nothing_is_refused_at_once(tmp_path: Path) -> None:
    world = World(tmp_path, room_bytes=20_000)
    with pytest.raises(TrainError) as caught:
        world.trainer.run()
    assert caught.value.code == "train-memory" and world.walk.walks == 0
    assert "beside base and adapters" in caught.value.what and "nvidia-smi" in caught.value.hint


def test_checkpointing_that_was_asked_is_heeded(tmp_path: Path) -> None:
    world = World(tmp_path / "a", room_bytes=ROOMY, levels="full")
    world.trainer.run()
    assert world.decisions() == [(MICRO_TOKENS, 0)]
    short = World(tmp_path / "b", room_bytes=ROOMY, levels="none", fails=lambda walk, _way: walk == 1)
    short.trainer.run()
    assert short.decisions() == [(64, LAYERS), (32, LAYERS)]


def test_p21_a_resumed_run_has_the_tokens_at_once_that_it_stopped_with(tmp_path: Path) -> None:
    """They were halved in step 1; the steps after a checkpoint have the same bits in both lives."""

    def short(walk: int, _way: str) -> bool:
        return walk < 12

    whole = World(tmp_path / "whole", fails=short, room_bytes=ROOMY, every=3)
    wanted = whole.run()
    assert whole.decisions()[-1][0] == 32
    first = World(tmp_path / "cut", fails=short, room_bytes=ROOMY, every=3)
    first.ports.on_event = lambda kind, fields: first.ports.stop.request() if fields.get("step") == 4 else None
    with pytest.raises(Exception, match="run-stopped"):
        first.trainer.run()
    again = World(tmp_path / "cut", room_bytes=ROOMY, every=3)
    assert again.trainer.resume() >= 3
    assert same(again.run(), wanted)
    assert again.decisions() == [(32, LAYERS)]


# --- pieces


def test_levels_as_the_decoder_takes_them() -> None:
    keeping = Keeping(micro_tokens=1, all_layers=1, most_layers=1, input_layers=1)
    assert layer_keeps(keeping, 4) == (Keep.ALL, Keep.INPUT, Keep.MOST, Keep.ALL)
    assert StepOptions(1, share_prefix=True).keep == ()


def test_lack_of_memory_elsewhere_is_told() -> None:
    with pytest.raises(TrainError) as caught, memory_errors(resume="tenon resume runs/one"):
        raise torch.OutOfMemoryError(MESSAGE)
    assert caught.value.code == "train-memory" and "tenon resume runs/one" in caught.value.hint
    with pytest.raises(RuntimeError, match="something else"), memory_errors(resume=""):
        raise RuntimeError("something else")


def test_steps_that_are_not_measured_stay_as_planned() -> None:
    options = StepOptions(64, share_prefix=True)
    assert AS_PLANNED.settle(options) is options

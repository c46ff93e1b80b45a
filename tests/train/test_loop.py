"""The loop: what it does in which order, how it ends, and that a stopped run is the run that was never stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tenon.adapters.bank import AdapterBank
from tenon.errors import EXIT_RESUME, StopRequestedError, TrainError
from tenon.models.decoder import Decoder
from tenon.train.interrupt import StopNow, StopSignal
from tenon.train.loop import Trainer
from tenon.train.slot import SlotTraining
from tenon.train.step import StepOptions, accumulate_window
from tenon.train.windows import Cursor
from tests.tiny import CPU, tiny_decoder
from tests.train.world import Asked, Ports, make_slot, make_trainer, optimizer_plan, schedule_plan, some_rows

COSINE = schedule_plan("cosine", warmup=0.2)


def build(
    ports: Ports, *asked: Asked, rows: int = 10, every: int = 0, scale: float = 1.0
) -> tuple[Trainer, list[SlotTraining]]:
    """A trainer of some slots over a fresh tiny decoder."""
    decoder = tiny_decoder()
    bank = AdapterBank(decoder.facts, dtype=torch.float32, device=CPU)
    slots = [make_slot(decoder, bank, one, some_rows(rows, seed=i)) for i, one in enumerate(asked)]
    return make_trainer(decoder, bank, slots, ports, every=every, scale=scale), slots


def weights(slots: list[SlotTraining]) -> dict[str, torch.Tensor]:
    return {t.plan.name: t.slot.parameters_P.clone() for t in slots}


def losses(ports: Ports, slot: str = "one") -> dict[object, object]:
    """step -> loss, as it was done last."""
    return {event["step"]: event["loss"] for event in ports.of("step", slot)}


def test_a_run_makes_its_steps_validates_and_saves_in_that_order(tmp_path: Path) -> None:
    ports = Ports(tmp_path, judge=lambda _slot, step: 10.0 - step)
    trainer, slots = build(ports, Asked(steps=5, every=2), every=3)
    trainer.run()
    kinds = [(event["kind"], event["step"]) for event in ports.events]
    assert kinds == [
        ("step", 1),
        ("step", 2),
        ("validation", 2),
        ("checkpoint", 2),
        ("step", 3),
        ("checkpoint", 3),
        ("step", 4),
        ("validation", 4),
        ("checkpoint", 4),
        ("step", 5),
        ("validation", 5),
        ("checkpoint", 5),
    ]
    assert slots[0].ended == "done" and ports.checkpoints.best_steps() == {"one": 5}
    assert [event["progress"] for event in ports.of("step")] == [0.2, 0.4, 0.6, 0.8, 1.0]


def test_one_checkpoint_holds_all_slots_that_are_at_their_best(tmp_path: Path) -> None:
    ports = Ports(tmp_path, judge=lambda _slot, step: 10.0 - step)
    trainer, _ = build(ports, Asked(steps=2, every=2), Asked("two", steps=2, every=2), every=2)
    trainer.run()
    assert [event["step"] for event in ports.of("checkpoint")] == [2]
    assert ports.checkpoints.best_steps() == {"one": 2, "two": 2}


def test_the_loss_falls_on_rows_that_are_seen_again(tmp_path: Path) -> None:
    ports = Ports(tmp_path)
    build(ports, Asked(epochs=15, rows=5, rank=4, optimizer=optimizer_plan(lr=1e-2)), rows=5)[0].run()
    found = list(losses(ports).values())
    assert len(found) == 15 and float(str(found[-1])) < 0.5 * float(str(found[0]))


def test_attention_that_is_slower_than_it_could_be_is_said_once(tmp_path: Path) -> None:
    ports = Ports(tmp_path)
    decoder = tiny_decoder()
    bank = AdapterBank(decoder.facts, dtype=torch.float32, device=CPU)
    slots = [make_slot(decoder, bank, Asked(steps=3), some_rows(10))]
    # A pass on a GPU writes it there.
    decoder.attention_problem = "ModuleNotFoundError: No module named 'cudnn'; install it"
    make_trainer(decoder, bank, slots, ports).run()
    (warning,) = ports.of("warning")
    assert warning["code"] == "train-attention-slow"
    assert str(warning["text"]).endswith("cannot be used: ModuleNotFoundError: No module named 'cudnn'; install it")
    decoder.use_plain()
    assert decoder.attention_problem == ""


def test_early_stopping_ends_one_slot_and_takes_its_best(tmp_path: Path) -> None:
    """Slot one is best at step 2 and stops at 4; slot two goes on to its end."""
    values = {"one": {1: 3.0, 2: 1.0, 3: 2.0, 4: 2.0}}
    ports = Ports(tmp_path, judge=lambda slot, step: values[slot][step] if slot == "one" else 1.0 / step)
    trainer, slots = build(
        ports, Asked(steps=9, every=1, patience=2), Asked("two", seed=1, steps=7, every=3, patience=5)
    )
    at_best: list[torch.Tensor] = []

    def remember(kind: str, fields: dict[str, object]) -> None:
        if kind == "validation" and fields["slot"] == "one" and fields["step"] == 2:
            at_best.append(slots[0].slot.parameters_P.clone())

    ports.on_event = remember
    trainer.run()
    assert (slots[0].ended, slots[0].cursor.step) == ("early stop", 4)
    assert (slots[1].ended, slots[1].cursor.step) == ("done", 7)
    assert [v for v in ports.validated if v[0] == "two"] == [("two", 3), ("two", 6), ("two", 7)]
    assert not torch.equal(slots[0].slot.parameters_P, at_best[0])
    assert trainer.take_best(slots[0]) == 2
    assert torch.equal(slots[0].slot.parameters_P, at_best[0])


def test_without_patience_the_last_weights_are_kept(tmp_path: Path) -> None:
    ports = Ports(tmp_path, judge=lambda _slot, step: float(step))
    trainer, slots = build(ports, Asked(steps=4, every=1))
    trainer.run()
    last = weights(slots)["one"]
    assert ports.checkpoints.best_steps() == {"one": 1}
    assert trainer.take_best(slots[0]) == 4 and torch.equal(slots[0].slot.parameters_P, last)


def test_a_slot_without_validation_rows_is_asked_once_a_time(tmp_path: Path) -> None:
    ports = Ports(tmp_path)
    build(ports, Asked(steps=4, every=2))[0].run()
    assert ports.validated == [("one", 2), ("one", 4)] and not ports.of("validation")


def test_p06_slots_of_different_length_end_as_each_would_alone(tmp_path: Path) -> None:
    asked = [
        Asked("short", seed=1, steps=2, rank=2, rows=3),
        Asked("long", seed=2, epochs=3, rank=4, rows=2, schedule=COSINE),
        Asked("tokens", seed=3, epochs=1, rank=1, tokens=25),
    ]
    together = Ports(tmp_path / "together")
    trainer, slots = build(together, *asked)
    trainer.run()
    assert [(t.cursor.step, t.ended) for t in slots[:2]] == [(2, "done"), (15, "done")]
    for i, one in enumerate(asked):
        alone = Ports(tmp_path / str(i))
        decoder = tiny_decoder()
        bank = AdapterBank(decoder.facts, dtype=torch.float32, device=CPU)
        slot = make_slot(decoder, bank, one, some_rows(10, seed=i))
        make_trainer(decoder, bank, [slot], alone).run()
        assert slot.cursor.step == slots[i].cursor.step
        assert losses(alone, one.name) == pytest.approx(losses(together, one.name), rel=1e-4)
        assert float((slot.slot.parameters_P - slots[i].slot.parameters_P).abs().max()) < 1e-4


def test_a_time_limit_ends_the_run(tmp_path: Path) -> None:
    ports = Ports(tmp_path)
    trainer, slots = build(ports, Asked(minutes=0.05 / 60))
    trainer.run()
    assert slots[0].ended == "done" and slots[0].cursor.seconds >= 0.05
    assert slots[0].steps == 0 and 1 <= slots[0].cursor.step < 1000


def stop_at(ports: Ports, kind: str, step: int) -> None:
    """Ask for a stop when an event of a step comes."""

    def on_event(found: str, fields: dict[str, object]) -> None:
        if (found, fields.get("step")) == (kind, step):
            ports.stop.request()

    ports.on_event = on_event


TWO = (
    Asked(steps=9, every=2, patience=3, drop=0.1, schedule=COSINE, rows=3),
    Asked("two", seed=1, epochs=2, every=3, rank=3, tokens=30, optimizer=optimizer_plan("sgd", lr=1e-2)),
)


def fall_and_rise(slot: str, step: int) -> float:
    return abs(step - 4.0) + len(slot)


@pytest.mark.parametrize("kind", ["step", "validation", "checkpoint"])
@pytest.mark.parametrize("step", [2, 6])
def test_p21_p24_a_stopped_run_resumed_is_the_run_that_never_stopped(tmp_path: Path, kind: str, step: int) -> None:
    whole = Ports(tmp_path / "whole", judge=fall_and_rise)
    trainer, slots = build(whole, *TWO, every=2)
    trainer.run()
    expected, best = weights(slots), [t.best for t in slots]

    ports = Ports(tmp_path / "stopped", judge=fall_and_rise)
    stop_at(ports, kind, step)
    with pytest.raises(StopRequestedError) as caught:
        build(ports, *TWO, every=2)[0].run()
    assert caught.value.exit_status == EXIT_RESUME
    saved = ports.checkpoints.newest()
    assert saved is not None and saved.step == step
    ports.stop, ports.on_event = StopSignal(), lambda _kind, _fields: None
    trainer, slots = build(ports, *TWO, every=2)
    assert trainer.resume() == step
    trainer.run()
    assert [t.best for t in slots] == best
    for name, tensor in weights(slots).items():
        assert torch.equal(tensor, expected[name]), name
        assert losses(ports, name) == losses(whole, name)
    assert ports.checkpoints.best_steps() == whole.checkpoints.best_steps()


def test_p24_a_stop_in_the_middle_of_a_step_or_of_a_validation_ends_it_at_once(tmp_path: Path) -> None:
    """Whatever the length of a step: a signal ends the gradient that is being made, and nothing of it is kept."""
    whole = Ports(tmp_path / "whole", judge=fall_and_rise)
    trainer, slots = build(whole, TWO[0])
    trainer.run()
    ports = Ports(tmp_path / "stopped")

    def judge(_slot: str, step: int) -> float:
        if step == 4 and not ports.stop.requested:
            ports.stop.request()  # raises StopNow here, as a signal would
        return fall_and_rise(_slot, step)

    ports = Ports(tmp_path / "stopped", judge=judge)
    with pytest.raises(StopRequestedError):
        build(ports, TWO[0])[0].run()
    assert ports.of("validation")[-1]["step"] == 2
    ports.stop = StopSignal()
    ports.stop.requested = True
    trainer, _ = build(ports, TWO[0])
    trainer.resume()
    with pytest.raises(StopRequestedError):
        trainer.run()
    ports = Ports(tmp_path / "stopped", judge=fall_and_rise)
    trainer, resumed = build(ports, TWO[0])
    assert trainer.resume() == 4
    trainer.run()
    assert torch.equal(weights(resumed)["one"], weights(slots)["one"])
    assert ports.validated[0] == ("one", 4)


def test_a_stop_signal_marks_or_raises_by_what_is_going_on() -> None:
    stop = StopSignal()
    stop.request()
    assert stop.requested
    with pytest.raises(StopNow), stop.interruptible():
        pytest.fail("not reached")
    fresh = StopSignal()
    with pytest.raises(StopNow), fresh.interruptible():
        fresh.request()


def test_a_finished_run_resumed_does_nothing_more(tmp_path: Path) -> None:
    ports = Ports(tmp_path, judge=fall_and_rise)
    trainer, slots = build(ports, *TWO, every=2)
    trainer.run()
    expected, events = weights(slots), len(ports.events)
    trainer, slots = build(ports, *TWO, every=2)
    trainer.resume()
    trainer.run()
    assert len(ports.events) == events
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(slots).items())


def test_p22_a_mark_that_a_kill_left_out_is_mended(tmp_path: Path) -> None:
    ports = Ports(tmp_path, judge=fall_and_rise)
    stop_at(ports, "checkpoint", 4)
    with pytest.raises(StopRequestedError):
        build(ports, TWO[0])[0].run()
    (tmp_path / "best.json").write_text('{"one": 2}')  # as if killed between the checkpoint and its mark
    build(ports, TWO[0])[0].resume()
    assert ports.checkpoints.best_steps() == {"one": 4}


def spoil_token(decoder: Decoder, token: int) -> None:
    """Give one token of the vocabulary an embedding that no number is."""
    decoder.embedding_VD[token] = float("nan")


def test_p15_a_loss_that_is_not_finite_names_step_rows_and_adapter(tmp_path: Path) -> None:
    """Only slot two holds the bad token, in its third row; nothing of the step is applied and checkpoints stay."""
    ports = Ports(tmp_path)
    trainer, slots = build(ports, Asked(steps=4, rows=10), Asked("two", steps=4, rows=10), every=1)
    stop_at(ports, "step", 1)
    with pytest.raises(StopRequestedError):
        trainer.run()

    decoder = tiny_decoder()
    bank = AdapterBank(decoder.facts, dtype=torch.float32, device=CPU)
    good, bad = some_rows(10, seed=0), some_rows(10, seed=1)
    for rows in (good, bad):
        rows.rows = [replace(row, ids=row.ids.clip(1, 90)) for row in rows.rows]
    bad.rows[2].ids[1] = 96
    ports.stop, ports.on_event = StopSignal(), lambda _kind, _fields: None
    slots = [
        make_slot(decoder, bank, Asked(steps=4, rows=10), good),
        make_slot(decoder, bank, Asked("two", steps=4, rows=10), bad),
    ]
    trainer = make_trainer(decoder, bank, slots, ports, every=1)
    assert trainer.resume() == 1
    before = weights(slots)
    # An untied head keeps the loss of all other rows finite.
    decoder.head_VD = decoder.embedding_VD.clone()
    spoil_token(decoder, 96)
    with pytest.raises(TrainError) as caught:
        trainer.run()
    assert caught.value.code == "train-not-finite"
    assert "adapter two" in caught.value.what and "step 2" in caught.value.what
    assert caught.value.what.endswith("rows: rows.jsonl:3")
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(slots).items())
    assert ports.checkpoints.steps() == (1,)


def test_p15_a_gradient_that_is_not_finite_names_the_adapter(tmp_path: Path) -> None:
    ports = Ports(tmp_path)
    trainer, slots = build(ports, Asked(steps=4))
    slots[0].slot.parameters_P.fill_(1e25)
    slots[0].slot.refresh()
    with pytest.raises(TrainError, match="train-not-finite"):
        trainer.run()
    assert not ports.checkpoints.steps()


def test_a_loss_scale_that_overflows_is_halved_and_the_step_is_exact(tmp_path: Path) -> None:
    """A scale of a power of two changes no bit of the gradient; the scale that works is kept by checkpoints."""
    plain = Ports(tmp_path / "plain")
    trainer, slots = build(plain, Asked(steps=3))
    trainer.run()
    ports = Ports(tmp_path / "scaled")
    scaled, own = build(ports, Asked(steps=3), scale=2.0**130)
    scaled.run()
    halvings = [event for event in ports.of("warning") if event["code"] == "train-loss-scale"]
    assert 2 <= len(halvings) <= 20
    torch.testing.assert_close(weights(own)["one"], weights(slots)["one"], rtol=1e-5, atol=1e-6)
    again, _ = build(ports, Asked(steps=5), scale=2.0**130)
    again.resume()
    again.run()
    assert len(ports.of("warning")) == len(halvings)


def test_memory_does_not_grow_with_steps(tmp_path: Path) -> None:
    """No step keeps its graph: as many tensors are alive after forty steps as after ten."""
    import gc

    alive: list[int] = []

    def count(kind: str, fields: dict[str, object]) -> None:
        if kind == "step" and fields["step"] in (10, 40):
            gc.collect()
            alive.append(sum(1 for thing in gc.get_objects() if type(thing) is torch.Tensor))

    ports = Ports(tmp_path)
    ports.on_event = count
    build(ports, Asked(steps=40, drop=0.1))[0].run()
    assert len(alive) == 2 and alive[1] <= alive[0]


def test_p02_the_last_shorter_window_is_divided_by_its_own_tokens(tmp_path: Path) -> None:
    """Ten rows in steps of four: the third step has two rows, and is the step that these two make alone."""
    ports = Ports(tmp_path)
    trainer, (training,) = build(ports, Asked(epochs=1, optimizer=optimizer_plan(clip=0.0)))
    before_last: list[torch.Tensor] = []

    def remember(kind: str, fields: dict[str, object]) -> None:
        if (kind, fields.get("step")) == ("step", 2):
            before_last.append(training.slot.parameters_P.clone())

    ports.on_event = remember
    trainer.run()
    last = ports.of("step")[-1]
    assert (last["step"], last["rows"]) == (3, 2)

    decoder = tiny_decoder()
    bank = AdapterBank(decoder.facts, dtype=torch.float32, device=CPU)
    again = make_slot(decoder, bank, Asked(epochs=1), some_rows(10))
    again.slot.parameters_P.copy_(before_last[0])
    again.cursor = Cursor(2, 8)
    rows = again.window()
    assert len(rows) == 2
    total, count = 0.0, 0
    for row in rows:
        found = accumulate_window(decoder, bank, [row], StepOptions(64, share_prefix=False))[0]
        total, count = total + found.loss * found.supervised_tokens, count + found.supervised_tokens
    assert last["supervised_tokens"] == count
    assert last["loss"] == pytest.approx(total / count, rel=1e-5)
    gradient = again.slot.gradients_P
    assert gradient is not None
    gradient.zero_()
    accumulate_window(decoder, bank, rows, StepOptions(64, share_prefix=False))
    assert last["grad_norm"] == pytest.approx(float(gradient.norm()), rel=1e-5)

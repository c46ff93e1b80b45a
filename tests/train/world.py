"""Slots in training over a tiny decoder: plans, rows in memory, and ports that remember what they were told."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tenon.adapters.bank import AdapterBank, initialise
from tenon.data.order import RowOrder
from tenon.models.decoder import Decoder
from tenon.plan.values import (
    BatchPlan,
    DataPlan,
    EvaluationPlan,
    LimitsPlan,
    LoraPlan,
    OptimizerPlan,
    SchedulePlan,
    SlotPlan,
    SourcePlan,
    ValidationPlan,
)
from tenon.runs.checkpoints import CheckpointStore
from tenon.train.interrupt import StopSignal
from tenon.train.loop import RunPorts, Trainer, Validation
from tenon.train.memory import AS_PLANNED, StepMemory
from tenon.train.optimizers import SlotOptimizer
from tenon.train.slot import SlotTraining
from tenon.train.step import StepOptions
from tenon.train.windows import WindowFeed
from tests.tiny import slot_shape

VOCAB = 97


@dataclass(frozen=True)
class Row:
    """A tokenised row in memory."""

    ids: np.ndarray
    supervised: np.ndarray
    source: str


class MemoryRows:
    """Rows in a list; `asked` remembers which were taken."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows, self.asked = list(rows), list[int]()

    def row(self, index: int) -> Row:
        self.asked.append(index)
        return self.rows[index]

    def length(self, index: int) -> int:
        return len(self.rows[index].ids)


def some_rows(count: int, *, seed: int = 0, empty: Sequence[int] = ()) -> MemoryRows:
    """Rows of 4 to 12 tokens whose second half is supervised; those in `empty` were dropped."""
    draw = np.random.default_rng(seed)
    rows = []
    for index in range(count):
        length = 0 if index in empty else int(draw.integers(4, 13))
        ids = draw.integers(1, VOCAB, length).astype(np.int32)
        rows.append(Row(ids, np.arange(length) >= length // 2, f"rows.jsonl:{index + 1}"))
    return MemoryRows(rows)


def schedule_plan(
    kind: str = "constant", *, warmup: float = 0.0, decay: float = 0.0, cycles: int = 1, floor: float = 0.0
) -> SchedulePlan:
    return SchedulePlan.model_validate(
        {"kind": kind, "warmup": warmup, "decay": decay, "cycles": cycles, "floor": floor}
    )


def optimizer_plan(kind: str = "adamw", *, lr: float = 1e-3, clip: float = 1.0, b_ratio: float = 1.0) -> OptimizerPlan:
    return OptimizerPlan.model_validate(
        {
            "kind": kind,
            "lr": lr,
            "b_ratio": b_ratio,
            "weight_decay": 0.01,
            "beta1": 0.9,
            "beta2": 0.999,
            "eps": 1e-8,
            "momentum": 0.9,
            "clip_norm": clip,
        }
    )


@dataclass(frozen=True)
class Asked:
    """What the tests vary of a slot's plan."""

    name: str = "one"
    seed: int = 0
    rank: int = 2
    drop: float = 0.0
    rows: int = 4
    tokens: int = 0
    epochs: float = 0.0
    steps: int = 0
    minutes: float = 0.0
    every: int = 0
    patience: int = 0
    min_delta: float = 0.0
    optimizer: OptimizerPlan = field(default_factory=optimizer_plan)
    schedule: SchedulePlan = field(default_factory=schedule_plan)

    def plan(self) -> SlotPlan:
        return SlotPlan(
            name=self.name,
            recipe_hash="0" * 64,
            seed=self.seed,
            lora=LoraPlan(
                rank=self.rank,
                alpha=2.0 * self.rank,
                rslora=False,
                scale=2.0,
                dropout=self.drop,
                init="kaiming",
                sites=("layers.0.self_attn.q_proj",),
            ),
            optimizer=self.optimizer,
            schedule=self.schedule,
            data=DataPlan(
                train=(SourcePlan(path="rows.jsonl"),),
                max_tokens=64,
                on_long="stop",
                on_bad="stop",
                on_duplicate="keep",
                supervise="assistant",
            ),
            batch=BatchPlan(rows=0 if self.tokens else self.rows, tokens=self.tokens),
            limits=LimitsPlan(epochs=self.epochs, steps=self.steps, minutes=self.minutes),
            validation=ValidationPlan(
                every=self.every,
                metric="loss",
                patience=self.patience,
                min_delta=self.min_delta,
                rows=0,
                max_new_tokens=1,
            ),
            evaluation=EvaluationPlan(sources=(), metrics=("loss",), rows=0, max_new_tokens=1, enabled=False),
            register_as=None,
        )


def feed_of(plan: SlotPlan, rows: MemoryRows, *, shuffle: bool = True) -> WindowFeed:
    order = RowOrder([len(rows.rows)], [1.0], seed=plan.seed, shuffle=shuffle)
    return WindowFeed(order, plan.batch, plan.limits, rows.length)


def make_slot(decoder: Decoder, bank: AdapterBank, asked: Asked, rows: MemoryRows) -> SlotTraining:
    """A slot in the bank at its start, with everything that training it needs."""
    plan = asked.plan()
    shape = slot_shape(decoder.facts, rank=asked.rank, drop=asked.drop)
    number = bank.add(plan.name, shape, trained=True)
    slot = bank.slots[number]
    initialise(slot, "kaiming", plan.seed)
    return SlotTraining(number, plan, slot, feed_of(plan, rows), rows, SlotOptimizer(slot, plan.optimizer))


class Ports:
    """Events in a list, checkpoints in a folder, validations from a function of (slot, step)."""

    def __init__(self, folder: Path, judge: Callable[[str, int], float | None] = lambda _slot, _step: None) -> None:
        self.events: list[dict[str, object]] = []
        self.checkpoints = CheckpointStore(folder, keep=2)
        self.stop = StopSignal()
        self.validated: list[tuple[str, int]] = []
        self._judge = judge
        self.on_event: Callable[[str, dict[str, object]], None] = lambda _kind, _fields: None

    def emit(self, kind: str, **fields: str | float | bool | None) -> None:
        self.events.append({"kind": kind, **fields})
        self.on_event(kind, dict(fields))

    def validate(self, training: SlotTraining) -> Validation | None:
        name, step = training.plan.name, training.cursor.step
        self.validated.append((name, step))
        value = self._judge(name, step)
        return None if value is None else Validation({"loss": value}, value, higher_is_better=False)

    def ports(self, memory: StepMemory = AS_PLANNED) -> RunPorts:
        return RunPorts(self.emit, self.checkpoints, self.validate, self.stop, "base", memory=memory)

    def of(self, kind: str, slot: str | None = None) -> list[dict[str, object]]:
        return [e for e in self.events if e["kind"] == kind and (slot is None or e["slot"] == slot)]


def make_trainer(
    decoder: Decoder,
    bank: AdapterBank,
    slots: Sequence[SlotTraining],
    ports: Ports,
    *,
    every: int = 0,
    scale: float = 1.0,
    memory: StepMemory = AS_PLANNED,
) -> Trainer:
    options = StepOptions(micro_tokens=64, share_prefix=True, loss_scale=scale)
    return Trainer(decoder, bank, slots, options=options, checkpoint_every=every, ports=ports.ports(memory))

"""Every repetition that was measured, in a result file that adds up over several calls and machines.

A measurement is one (work, system, settings). Of its repetitions those stand that were made on the machine and with the
code of the newest one; a figure is their median. This module runs nothing.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.gpu.machine import Machine

Key = tuple[str, str, str]
UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Repetition:
    """One process. figures: what it printed, summed up (see `summarise`); empty when it failed, with the reason.

    call: the moment when the call began that it belongs to. code: hash of what was measured. wall_s: of the process.
    """

    work: str
    system: str
    settings: str
    machine: str
    code: str
    call: str
    date: str
    commit: str
    wall_s: float
    figures: dict[str, float | None] = field(default_factory=dict)
    failed: str = ""

    @property
    def key(self) -> Key:
        """Which measurement it repeats."""
        return self.work, self.system, self.settings

    @property
    def identity(self) -> tuple[object, ...]:
        """What no two processes share; the commit is no part of it, since it may be written in later."""
        return self.key, self.machine, self.code, self.call, self.date, self.wall_s


@dataclass(slots=True)
class Records:
    """All repetitions of a result file, oldest first, and the machines by their keys."""

    machines: dict[str, Machine] = field(default_factory=dict)
    repetitions: list[Repetition] = field(default_factory=list)

    def add(self, repetition: Repetition, machine: Machine) -> None:
        """Take a repetition in, once."""
        self.machines[machine.key] = machine
        if all(one.identity != repetition.identity for one in self.repetitions):
            self.repetitions.append(repetition)

    def merge(self, other: Records) -> None:
        """Take in what another file holds, and bring all into the order of time."""
        for repetition in other.repetitions:
            self.add(repetition, other.machines[repetition.machine])
        self.repetitions.sort(key=lambda one: one.date)

    def drop(self, keys: Iterable[Key]) -> None:
        """Forget measurements."""
        gone = set(keys)
        self.repetitions = [one for one in self.repetitions if one.key not in gone]

    def standing(self, key: Key) -> list[Repetition]:
        """The repetitions that count; those that failed only where all did."""
        mine = [one for one in self.repetitions if one.key == key]
        if not mine:
            return []
        newest = mine[-1]
        mine = [one for one in mine if (one.machine, one.code) == (newest.machine, newest.code)]
        return [one for one in mine if not one.failed] or mine[-1:]

    def missing(self, key: Key, *, repeat: int, machine: str, code: str) -> int:
        """How many repetitions are still to be made on this machine with this code; none after a failure."""
        mine = [one for one in self.standing(key) if (one.machine, one.code) == (machine, code)]
        return 0 if mine and mine[0].failed else max(0, repeat - len(mine))

    def figure(self, key: Key, name: str) -> float | None:
        """The median of one figure over the standing repetitions; None where there is none."""
        values = [value for one in self.standing(key) if (value := one.figures.get(name)) is not None]
        return statistics.median(values) if values else None

    def failure(self, key: Key) -> str:
        """Why a measurement has no figures; "" when it has some or was not made."""
        return next((one.failed for one in self.standing(key)), "")

    def wall_seconds(self, key: Key, default: float) -> float:
        """How long a process of this measurement takes, from the newest one whatever its code."""
        return next((one.wall_s for one in reversed(self.repetitions) if one.key == key), default)

    def stamp(self, commit: str, codes: Iterable[str]) -> int:
        """Name the commit of repetitions whose code is one of these and whose machine knew no commit; how many."""
        known, count = set(codes), 0
        for i, one in enumerate(self.repetitions):
            if one.commit == UNKNOWN and one.code in known:
                self.repetitions[i] = replace(one, commit=commit)
                count += 1
        return count

    def tree(self) -> dict[str, Any]:
        """What a result file keeps of them."""
        used = {one.machine for one in self.repetitions}
        return {
            "machines": {key: asdict(machine) for key, machine in sorted(self.machines.items()) if key in used},
            "repetitions": [asdict(one) for one in self.repetitions],
        }


def read_records(path: Path) -> Records:
    """The records of a result file; none when it is not there."""
    if not path.is_file():
        return Records()
    tree = json.loads(path.read_text("utf-8"))
    machines = {key: Machine(**fields) for key, fields in tree.get("machines", {}).items()}
    return Records(machines, [Repetition(**fields) for fields in tree.get("repetitions", [])])


def summarise(result: dict[str, Any]) -> dict[str, float | None]:
    """The figures of one process: the median step's seconds and tokens a second, and what else it printed.

    Rows of real lengths give every step another number of tokens; the median is taken of the rates.
    """
    rates = [tokens / seconds for tokens, seconds in zip(result["tokens"], result["seconds"], strict=True)]
    kept = ("first_s", "load_s", "peak_gb", "reserved_gb", "loss")
    return {
        "tokens_s": round(statistics.median(rates), 1),
        "step_s": round(statistics.median(result["seconds"]), 5),
        **{name: result.get(name) for name in kept},
    }

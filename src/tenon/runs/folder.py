"""A run on disk: everything that the run is. Every view, resume and replay starts from here.

    RUN/recipe.yaml           the recipe as given (recipe-SLOT.yaml each, when a run trains several)
    RUN/plan.json             the Plan; written last, so that a folder with a plan is a run
    RUN/events.jsonl          what happened, one event a line
    RUN/data.json             the data report
    RUN/machine.json          the machine of its newest life: versions, driver, GPUs (runs.machine)
    RUN/checkpoints/          see runs.checkpoints
    RUN/adapter/SLOT/         the finished adapter of each slot, in PEFT's layout
    RUN/results/NAME.json     evaluations
    RUN/lock                  held by the process that works on the run

This module does not know what a plan, a report or an adapter holds.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

from pydantic import ValidationError

from tenon.errors import RunError
from tenon.runs.atomic import clean_leftovers, write_file_atomic
from tenon.runs.checkpoints import CheckpointStore
from tenon.runs.events import EventLog
from tenon.runs.lock import Holder, hold, not_writable
from tenon.runs.results import Result

_SAFE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


class RunFolder:
    """One run. Make it with `create` or `open`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls, path: Path, *, plan_json: str, recipe_text: str | Mapping[str, str]) -> RunFolder:
        """A new run from its plan. recipe_text: the recipe, or slot -> recipe.

        Raises RunError run-folder-not-empty, run-busy, run-not-writable, run-disk-full.
        """
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise not_writable(path, error) from error
        with hold(path / "lock"):
            clean_leftovers(path)
            found = sorted(place.name for place in path.iterdir() if place.name != "lock")
            if found:
                raise RunError(
                    "run-folder-not-empty",
                    f"{path}: the folder is not empty",
                    got=", ".join(found[:3]),
                    hint=f"go on with it by `tenon resume {path}`, or choose another folder",
                )
            for name, text in _recipe_files(recipe_text).items():
                write_file_atomic(path / name, text.encode())
            write_file_atomic(path / "plan.json", plan_json.encode())
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> RunFolder:
        """An existing run. Raises RunError run-missing when there is no folder, run-not-a-run without a plan."""
        if not path.is_dir():
            raise RunError("run-missing", f"{path}: there is no such run folder", hint="see the runs with `tenon runs`")
        if not (path / "plan.json").is_file():
            raise RunError(
                "run-not-a-run",
                f"{path}: the folder holds no plan.json, so it is no run",
                hint="see the runs with `tenon runs`, or start one with `tenon train RECIPE`",
            )
        return cls(path)

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.path.name

    @contextmanager
    def lock(self) -> Iterator[Holder]:
        """Work on the run alone; what a killed process left half written is removed first. Raises RunError run-busy."""
        with hold(self.path / "lock") as holder:
            clean_leftovers(self.path)
            for folder in (self.path / "adapter", self.path / "results"):
                clean_leftovers(folder)
            self.checkpoints.open()
            yield holder

    @cached_property
    def events(self) -> EventLog:
        """The event log."""
        return EventLog(self.path / "events.jsonl")

    @cached_property
    def checkpoints(self) -> CheckpointStore:
        """The checkpoints; as many are kept as the plan says. Damaged ones become warning events."""
        return CheckpointStore(
            self.path / "checkpoints",
            self._planned_keep(),
            on_damage=self._report_damage,
            before_publish=lambda: self.events.sync(),
        )

    def plan_json(self) -> str:
        """The plan as it was written."""
        return (self.path / "plan.json").read_text()

    def recipe_texts(self) -> dict[str, str]:
        """File name -> recipe as given."""
        return {place.name: place.read_text() for place in sorted(self.path.glob("recipe*.yaml"))}

    def write_data_report(self, report_json: str) -> Path:
        """Keep the data report of the run as data.json."""
        place = self.path / "data.json"
        write_file_atomic(place, report_json.encode())
        return place

    def write_machine(self, record_json: str) -> Path:
        """Keep the record of the machine that this life of the run works on as machine.json."""
        place = self.path / "machine.json"
        write_file_atomic(place, record_json.encode())
        return place

    def machine(self) -> str | None:
        """The record of the machine of the newest life, or None before the first."""
        place = self.path / "machine.json"
        return place.read_text() if place.is_file() else None

    def data_report(self) -> str | None:
        """The data report, or None before the data were read."""
        place = self.path / "data.json"
        return place.read_text() if place.is_file() else None

    def adapter_folder(self, slot_name: str) -> Path:
        """Where the finished adapter of a slot lies; its parent exists. Raises RunError run-bad-name."""
        folder = self.path / "adapter" / safe_name(slot_name)
        folder.parent.mkdir(exist_ok=True)
        return folder

    def write_result(self, name: str, result: Result) -> Path:
        """Keep one evaluation as results/NAME.json. Raises RunError run-bad-name."""
        folder = self.path / "results"
        folder.mkdir(exist_ok=True)
        place = folder / f"{safe_name(name)}.json"
        write_file_atomic(place, result.to_json().encode())
        return place

    def read_result(self, name: str) -> Result:
        """One evaluation. Raises RunError run-no-result, or run-damaged when the file is no result."""
        place = self.path / "results" / f"{safe_name(name)}.json"
        try:
            return Result.from_json(place.read_bytes())
        except FileNotFoundError as error:
            raise RunError(
                "run-no-result",
                f"{self.path}: the run has no result {name!r}",
                got=", ".join(self.result_names()) or "no results at all",
                hint=f"make one with `tenon eval {self.path}`",
            ) from error
        except ValidationError as error:
            raise RunError(
                "run-damaged",
                f"{place}: the file is no result of this version",
                hint=f"make it again with `tenon eval {self.path}`",
            ) from error

    def result_names(self) -> tuple[str, ...]:
        """Names of the evaluations so far."""
        return tuple(sorted(place.stem for place in (self.path / "results").glob("*.json")))

    def _planned_keep(self) -> int:
        """The one number of the plan that this floor reads: how many checkpoints stay."""
        try:
            keep = json.loads(self.plan_json())["checkpoint"]["keep"]
        except (KeyError, TypeError, FileNotFoundError):
            return 2
        except ValueError as error:
            raise RunError(
                "run-damaged",
                f"{self.path / 'plan.json'}: the plan is no JSON",
                hint="restore the file, or start the run again with `tenon train RECIPE`",
            ) from error
        return max(1, int(keep))

    def _report_damage(self, checkpoint: str, why: str) -> None:
        self.events.emit(
            "warning",
            code="run-checkpoint-damaged",
            checkpoint=checkpoint,
            text=f"checkpoint {checkpoint} is damaged and was passed over: {why}",
        )


def safe_name(name: str) -> str:
    """`name`, if it is safe as a file name. Raises RunError run-bad-name."""
    if _SAFE_NAME.fullmatch(name) is None:
        raise RunError(
            "run-bad-name",
            "a name within a run has letters, digits, . _ - and begins with a letter, a digit or _",
            got=repr(name[:80]),
            hint="choose another name",
        )
    return name


def _recipe_files(recipe_text: str | Mapping[str, str]) -> dict[str, str]:
    if isinstance(recipe_text, str):
        return {"recipe.yaml": recipe_text}
    return {f"recipe-{safe_name(slot)}.yaml": text for slot, text in recipe_text.items()}

"""Ours and the peers, one LoRA step on one GPU, interleaved: `python benchmarks/gpu_step.py`.

Each measurement is a process of its own; ours and the peers of a work take turns, `--repeat` times; figures are
medians. What is measured already on this machine with this code is not measured again, so that the works can be
spread over several calls: results add up in one file. Results of another machine are taken in by
`python -m benchmarks.gpu.adopt FOLDER`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from rich.console import Console

from benchmarks.gpu.machine import OUR_CODE, PEER_CODE, Machine, code_hash, installed, read_machine
from benchmarks.gpu.processes import OUT_OF_TIME, Budget, Outcome, run
from benchmarks.gpu.records import Key, Records, Repetition, read_records, summarise
from benchmarks.gpu.table import our_key, peer_key, save, show
from benchmarks.gpu.works import WORKS, Peer, Spec, Work, peer_spec, spec_of
from benchmarks.report import REPOSITORY, RESULTS, current_commit

# What a process is expected to take before one like it was seen, in seconds.
EXPECTED_SECONDS = {"8b": 60.0, "1b": 35.0, "tiny": 10.0}
_LONGEST_SECONDS = 240.0
_NEEDED = {
    "peft": "peft",
    "liger": "liger-kernel",
    "peft4": "bitsandbytes",
    "unsloth": "unsloth",
    "unsloth4": "unsloth",
}
# Processes are given the same allocator, and threads that wait without spinning.
_ENVIRONMENT = {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True", "OMP_WAIT_POLICY": "PASSIVE"}
_PEERS = REPOSITORY / "benchmarks" / "peers"


@dataclass(frozen=True, slots=True)
class Bench:
    """What all measurements of a call share. shape, steps: instead of each work's own, to try the scripts."""

    machine: Machine
    call: str
    commit: str
    codes: dict[str, str]
    device: str
    work_folder: Path
    rows_folder: Path
    log: Path
    peer_python: str
    peer_path: str
    shape: str = ""
    steps: int = 0
    left_out: dict[tuple[Key, str], int] = field(default_factory=dict)

    def spec(self, work: Work) -> Spec:
        """The spec of ours at a work."""
        return spec_of(work, device=self.device, rows_folder=str(self.rows_folder), steps=self.steps, shape=self.shape)

    def leave_out(self, key: Key, reason: str) -> None:
        """Take note of a process that was not started."""
        self.left_out[key, reason] = self.left_out.get((key, reason), 0) + 1

    def run(
        self,
        command: Sequence[str],
        *,
        peer: bool,
        timeout: float | None,
        extra: Mapping[str, str] = MappingProxyType({}),
    ) -> Outcome:
        """One process: ours in the repository, a peer's in a scratch folder with its own packages.

        extra: more of its environment.
        """
        environment = {**os.environ, **_ENVIRONMENT, **extra}
        if peer:
            environment["PYTHONPATH"] = self.peer_path
        folder = self.work_folder if peer else REPOSITORY
        folder.mkdir(parents=True, exist_ok=True)
        return run(command, environment=environment, folder=folder, log=self.log, timeout=timeout)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    names = ", ".join(work.name for work in WORKS)
    parser = argparse.ArgumentParser(prog="gpu_step.py", description=__doc__, epilog=f"works: {names}")
    parser.add_argument("--only", default="", help="works, by name or a part of it, comma-separated")
    parser.add_argument("--systems", default="", help="ours, peft, liger, unsloth, peft4, unsloth4; comma-separated")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=0, help="start nothing that would end later; 0: no limit")
    parser.add_argument("--steps", type=int, default=0, help="measured steps a process; 0: the work's own")
    parser.add_argument("--again", action="store_true", help="forget what was measured of the chosen works and systems")
    parser.add_argument("--results", type=Path, default=RESULTS / "gpu_step.json")
    parser.add_argument("--show", action="store_true", help="print the table, and measure nothing")
    parser.add_argument("--peer-python", default=sys.executable)
    parser.add_argument("--peer-path", default="", help="folder of the peers' packages")
    parser.add_argument("--prepared", type=Path, default=REPOSITORY / ".peers", help="what prepare_gpu.sh made")
    parser.add_argument("--work-folder", type=Path, default=Path(tempfile.gettempdir()) / "tenon-gpu")
    parser.add_argument("--log", type=Path, default=Path(tempfile.gettempdir()) / "tenon-gpu" / "gpu_step.log")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--shape", default="", help="instead of every work's own; tiny tries the scripts on a CPU")
    a = parser.parse_args(words)
    if (a.shape or a.device == "cpu") and a.results.resolve().parent == RESULTS.resolve():
        parser.error("--shape and --device cpu only try the scripts: name another file with --results")
    return a


def main(words: Sequence[str] | None = None) -> int:
    """Measure what is missing, write after every process, print the table. 1 when nothing was measured or shown."""
    a = parse(words)
    console = Console(width=None if sys.stdout.isatty() else 180)
    records = read_records(a.results)
    if not a.show:
        bench = open_bench(a)
        works = choose(a.only)
        if a.again:
            records.drop(key for work in works for key, _ in systems(work, a.systems))
        measure(bench, works, records, a, console)
        for (key, reason), count in bench.left_out.items():
            console.print(f"left out, {count} x: {', '.join(key)}: {reason}", style="yellow", highlight=False)
    if not records.repetitions:
        console.print(f"nothing is measured in {a.results}")
        return 1
    show(console, records)
    console.print(str(a.results))
    return 0


def open_bench(a: argparse.Namespace) -> Bench:
    """The machine, the hashes of what is measured, and where things lie."""
    return Bench(
        machine=read_machine(a.device, a.peer_path),
        call=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=current_commit(),
        codes={"ours": code_hash(OUR_CODE), "peers": code_hash(PEER_CODE)},
        device=a.device,
        work_folder=a.work_folder,
        rows_folder=a.prepared.resolve(),
        log=a.log,
        peer_python=a.peer_python,
        peer_path=a.peer_path,
        shape=a.shape,
        steps=a.steps,
    )


def choose(only: str) -> list[Work]:
    """The works whose names hold one of the given parts; a part that is a whole name stands for it alone."""
    parts = [part.strip() for part in only.split(",") if part.strip()]
    names = {work.name for work in WORKS}
    found = [w for w in WORKS if not parts or any(w.name == p or (p not in names and p in w.name) for p in parts)]
    if not found:
        raise SystemExit(f"--only {only}: no work is named so; there are {', '.join(sorted(names))}")
    return found


def systems(work: Work, wanted: str) -> list[tuple[Key, Peer | None]]:
    """Ours (None) and the peers of a work that are wanted; all when nothing is said."""
    modes = {part.strip() for part in wanted.split(",") if part.strip()}
    unknown = modes - {"ours", *_NEEDED}
    if unknown:
        raise SystemExit(f"--systems {wanted}: no system is named {', '.join(sorted(unknown))}")
    ours: list[tuple[Key, Peer | None]] = [(our_key(work), None)] if not modes or "ours" in modes else []
    return ours + [(peer_key(work, peer), peer) for peer in work.peers if not modes or peer.mode in modes]


@dataclass(frozen=True, slots=True)
class Turn:
    """One process that a table wants: a system at a work, the n-th time (from 0). peer: None for ours."""

    work: Work
    number: int
    key: Key
    peer: Peer | None


def turns(works: Sequence[Work], repeat: int, wanted: str) -> Iterator[Turn]:
    """Work by work, repetition by repetition, system by system."""
    for work in works:
        for number in range(repeat):
            for key, peer in systems(work, wanted):
                yield Turn(work, number, key, peer)


def measure(bench: Bench, works: Sequence[Work], records: Records, a: argparse.Namespace, console: Console) -> None:
    """Make the processes that are missing while the budget lasts, and write the file after each."""
    budget = Budget(a.seconds)
    for turn in turns(works, a.repeat, a.systems):
        code = bench.codes["ours" if turn.peer is None else "peers"]
        missing = records.missing(turn.key, repeat=a.repeat, machine=bench.machine.key, code=code)
        # What is missing is made in the last turns, so that the systems of a turn follow each other.
        if missing < a.repeat - turn.number:
            continue
        needed = records.wall_seconds(turn.key, EXPECTED_SECONDS[bench.shape or turn.work.shape])
        reason = unable(bench, turn.peer)
        if not reason and not budget.allows(needed):
            reason = f"{needed:.0f} s are needed"
        if reason:
            bench.leave_out(turn.key, reason)
            continue
        timeout = min(_LONGEST_SECONDS, budget.left)
        one = measure_one(bench, turn, timeout)
        if one.failed == OUT_OF_TIME and timeout < _LONGEST_SECONDS:
            bench.leave_out(turn.key, "the time ran out")
            continue
        records.add(one, bench.machine)
        save(a.results, records)
        said = one.failed or f"{one.figures['tokens_s']:,.0f} tokens/s, {one.figures['peak_gb']} GB"
        console.print(f"{', '.join(turn.key)}: {said} ({one.wall_s:.0f} s)", highlight=False)


def unable(bench: Bench, peer: Peer | None) -> str:
    """Why a peer cannot run here at all; "" when it may."""
    if peer is None:
        return ""
    if bench.device == "cpu" and (peer.mode != "peft" or peer.layout == "trainer"):
        return "needs a GPU"
    packages = {**bench.machine.versions, **installed([bench.peer_path] if bench.peer_path else [])}
    own = bench.peer_python != sys.executable  # another interpreter's packages are not looked up
    return "" if own or _NEEDED[peer.mode] in packages else f"{_NEEDED[peer.mode]} is not installed"


def measure_one(bench: Bench, turn: Turn, timeout: float) -> Repetition:
    """One process, as a repetition."""
    if turn.peer is None:
        outcome = run_ours(bench, turn.work, timeout)
    else:
        outcome = run_peer(bench, turn.work, turn.peer, timeout)
    return Repetition(
        *turn.key,
        machine=bench.machine.key,
        code=bench.codes["ours" if turn.peer is None else "peers"],
        call=bench.call,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        commit=bench.commit,
        wall_s=outcome.wall_s,
        figures={} if outcome.result is None else summarise(outcome.result),
        failed=outcome.failed,
    )


def run_ours(bench: Bench, work: Work, timeout: float | None) -> Outcome:
    """Our process."""
    spec = json.dumps(asdict(bench.spec(work)))
    return bench.run([sys.executable, "-m", "benchmarks.ours.step", spec], peer=False, timeout=timeout)


def run_peer(bench: Bench, work: Work, peer: Peer, timeout: float | None) -> Outcome:
    """A peer's process, after the base that it loads, if any, was written once."""
    spec = bench.spec(work)
    needs_files = peer.mode not in ("peft", "liger")
    weights = ""
    if needs_files:
        weights, failed = make_base(bench, work.shape, spec)
        if failed is not None:
            return failed
    script = "lora_trainer.py" if peer.layout == "trainer" else "lora_step.py"
    words = [bench.peer_python, str(_PEERS / script), json.dumps(asdict(peer_spec(spec, peer, weights)))]
    return bench.run(words, peer=True, timeout=timeout)


def make_base(bench: Bench, shape: str, spec: Spec) -> tuple[str, Outcome | None]:
    """The folder of a random base, written where it is not there yet; and the outcome when that failed."""
    folder = bench.work_folder / "bases" / (bench.shape or shape)
    if folder.is_dir():
        return str(folder), None
    fresh = folder.with_name(f"{folder.name}.part")
    fresh.mkdir(parents=True, exist_ok=True)
    script, tokenizer = str(_PEERS / "lora_step.py"), str(bench.rows_folder / "tokenizer")
    words = [bench.peer_python, script, "make", json.dumps(asdict(spec)), str(fresh), tokenizer]
    outcome = bench.run(words, peer=True, timeout=_LONGEST_SECONDS)
    if outcome.result is None:
        return "", outcome
    fresh.rename(folder)
    return str(folder), None


if __name__ == "__main__":
    sys.exit(main())

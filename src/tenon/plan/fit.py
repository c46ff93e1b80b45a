"""How a run fits the machine: the base's format, tokens at once, recompute or not, room for checkpoints; or what would.

Pure arithmetic over the estimates of `memory`.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tenon.bases.facts import ModelFacts
from tenon.errors import PlanError
from tenon.plan.memory import USABLE_SHARE, MemoryTerm, Shape, memory_terms
from tenon.plan.values import Frozen, LoraPlan, MachineFacts, OptimizerPlan, Precision
from tenon.units import format_bytes

MOST_TOKENS = {"cpu": 2048, "cuda": 16_384}


@dataclass(frozen=True, slots=True)
class Load:
    """What is to fit.

    longest_tokens: no row is longer. step_tokens: of one optimiser step, about. micro_tokens: asked, or None.
    recompute: asked, or None. formats: what the base may be kept in, best first. shards: over how many devices it may
    be spread, ascending. machine: what each of the devices has.
    """

    facts: ModelFacts
    slots: tuple[tuple[LoraPlan, OptimizerPlan], ...]
    machine: MachineFacts
    precision: Precision
    longest_tokens: int
    step_tokens: float
    formats: tuple[Frozen, ...]
    micro_tokens: int | None = None
    recompute: bool | None = None
    shards: tuple[int, ...] = (1,)


@dataclass(frozen=True, slots=True)
class Tried:
    """One way to compute, with its estimate."""

    frozen: Frozen
    micro_tokens: int
    recompute: bool
    size_bytes: int
    shards: int = 1


@dataclass(frozen=True, slots=True)
class Fit:
    """What was chosen, its estimate, and what did not fit before it."""

    frozen: Frozen
    micro_tokens: int
    recompute: bool
    terms: tuple[MemoryTerm, ...]
    too_large: tuple[Tried, ...]
    shards: int = 1

    @property
    def total_bytes(self) -> int:
        """The whole estimate."""
        return sum(term.size_bytes for term in self.terms)


def find_fit(load: Load) -> Fit:
    """The first format that fits, on as few devices as hold it, in its fastest way: many tokens at once first.

    Raises PlanError: plan-micro-tokens, plan-memory with what would fit.
    """
    if load.micro_tokens is not None and load.micro_tokens < load.longest_tokens:
        raise PlanError(
            "plan-micro-tokens",
            f"batch.micro_tokens {load.micro_tokens} is less than the longest row ({load.longest_tokens} tokens)",
            got=str(load.micro_tokens),
            hint="raise batch.micro_tokens, or lower data.max_tokens",
        )
    fit, too_large = _search(load)
    if fit is not None:
        return fit
    need = min(tried.size_bytes for tried in too_large)
    raise PlanError(
        "plan-memory",
        f"the run needs about {format_bytes(need)} and {format_bytes(usable_bytes(load.machine))} may be used",
        got=_largest(load),
        hint=_what_would_fit(load),
    )


def usable_bytes(machine: MachineFacts) -> int:
    """Memory that a plan may fill."""
    memory = machine.device_memory_bytes if machine.device == "cuda" else machine.host_memory_bytes
    return round(memory * USABLE_SHARE)


def check_disk(machine: MachineFacts, need_bytes: int, *, keep: int, folder: str) -> None:
    """Room for the kept checkpoints, the best one, and the one that is being written. Raises PlanError plan-disk."""
    if need_bytes > machine.free_disk_bytes:
        raise PlanError(
            "plan-disk",
            f"{folder}: checkpoints need {format_bytes(need_bytes)} ({keep} kept, the best, one being written)",
            got=f"{format_bytes(machine.free_disk_bytes)} free",
            hint="free some space, set run to a folder on another disk, or lower checkpoint.keep",
        )


def _search(load: Load) -> tuple[Fit | None, list[Tried]]:
    too_large: list[Tried] = []
    recomputes = [False, True] if load.recompute is None else [load.recompute]
    # Of one format, keeping it twice saves less than recomputing or small batches cost: it is given up first.
    groups = [tuple(group) for _, group in itertools.groupby(load.formats, key=lambda frozen: frozen.format)]
    ways = itertools.chain.from_iterable(
        itertools.product((shards,), recomputes, _sizes(load), group) for group in groups for shards in load.shards
    )
    for shards, recompute, micro_tokens, frozen in ways:
        at_once = min(micro_tokens, max(load.longest_tokens, round(1.5 * load.step_tokens)))
        shape = Shape(load.machine.device, load.precision, at_once, recompute, frozen, shards)
        terms = memory_terms(load.facts, load.slots, shape)
        total_bytes = sum(term.size_bytes for term in terms)
        if total_bytes <= usable_bytes(load.machine):
            return Fit(frozen, micro_tokens, recompute, terms, tuple(too_large), shards), too_large
        too_large.append(Tried(frozen, micro_tokens, recompute, total_bytes, shards))
    return None, too_large


def _sizes(load: Load) -> Sequence[int]:
    """Tokens at once that are tried: halved from the device's most down to the longest row."""
    if load.micro_tokens is not None:
        return [load.micro_tokens]
    most = max(MOST_TOKENS[load.machine.device], load.longest_tokens)
    sizes = []
    while most > load.longest_tokens:
        sizes.append(most)
        most //= 2
    return [*sizes, load.longest_tokens]


def _largest(load: Load) -> str:
    recompute = load.recompute is not False
    shape = Shape(
        load.machine.device, load.precision, load.longest_tokens, recompute, load.formats[-1], load.shards[-1]
    )
    terms = sorted(memory_terms(load.facts, load.slots, shape), key=lambda term: -term.size_bytes)
    return ", ".join(f"{term.what} {format_bytes(term.size_bytes)}" for term in terms[:3])


def _what_would_fit(load: Load) -> str:
    """Changes to the recipe that make the run fit, each alone and then together; or the memory that it takes."""
    halves = [load.longest_tokens // 2**power for power in range(1, 8) if load.longest_tokens // 2**power >= 64]
    smaller: Precision | None = None
    if load.precision == "fp32":
        smaller = "bf16" if load.machine.device == "cpu" or load.machine.bf16 else "fp16"
    tries: list[tuple[str, Load]] = []
    if load.recompute is False:
        tries.append(("checkpointing=full", _changed(load, recompute=True)))
    if smaller is not None:
        tries.append((f"precision={smaller}", _changed(load, precision=smaller)))
    quantised = [] if "nf4" in {one.format for one in load.formats} else [Frozen(format="nf4")]
    fewer_bytes = [(f"precision.base={one.format}", _changed(load, formats=(one,))) for one in quantised]
    # The bases that a CPU trains are small: shorter rows save more, and are named first.
    tries += fewer_bytes if load.machine.device == "cuda" else []
    tries += [(f"data.max_tokens={tokens}", _changed(load, tokens=tokens)) for tokens in halves]
    if smaller is not None:
        tries += [
            (f"precision={smaller} data.max_tokens={tokens}", _changed(load, precision=smaller, tokens=tokens))
            for tokens in halves
        ]
    tries += fewer_bytes if load.machine.device == "cpu" else []
    fitting = [words for words, changed in tries if _search(changed)[0] is not None][:2]
    if load.machine.device == "cuda":
        more = [2**power for power in range(1, 7) if 2**power > load.shards[-1]]
        enough = [count for count in more if _search(_changed(load, shards=(count,)))[0] is not None]
        fitting += [f"{count} such GPUs" for count in enough[:1]]
    if fitting:
        return f"what would fit: {' or '.join(fitting)}"
    smallest = _changed(load, tokens=64, formats=(Frozen(format="nf4"),))
    need = min(tried.size_bytes for tried in _search(smallest)[1])
    return f"it takes a smaller base, or a machine with {format_bytes(need / USABLE_SHARE)} of memory"


def _changed(
    load: Load,
    *,
    precision: Precision | None = None,
    tokens: int | None = None,
    recompute: bool | None = None,
    formats: tuple[Frozen, ...] = (),
    shards: tuple[int, ...] = (),
) -> Load:
    return Load(
        load.facts,
        load.slots,
        load.machine,
        precision or load.precision,
        min(tokens or load.longest_tokens, load.longest_tokens),
        load.step_tokens,
        formats or load.formats,
        None if tokens else load.micro_tokens,
        load.recompute if recompute is None else recompute,
        shards or load.shards,
    )

"""How a run fits the machine: the base's format, what layers keep, tokens at once, room for checkpoints; or what would.

Pure arithmetic over the estimates of `memory` and `keeping`.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

from tenon.bases.facts import ModelFacts
from tenon.errors import PlanError
from tenon.plan.activations import Pass, adapted_by, attention_room
from tenon.plan.keeping import Chosen, Room, Steps, choose_keeping, keep_same, may_keep
from tenon.plan.memory import (
    PROCESS_BYTES,
    USABLE_SHARE,
    MemoryTerm,
    adapter_parameters,
    resident_terms,
    trained_layers,
)
from tenon.plan.time import flops_per_token
from tenon.plan.values import Frozen, Keeping, Level, LoraPlan, MachineFacts, OptimizerPlan, Plan, Precision
from tenon.units import format_bytes

# Of what is left beside base and adapters; estimates are right to about one per cent, allocators lose a little.
ROOM_SHARE = 0.98
# What flash attention takes: see `models.flash`.
FLASH_CAPABILITY, FLASH_HEAD = (8, 0), 256
# Of the host's memory that layers' inputs may wait in.
HOST_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class Load:
    """What is to fit.

    longest_tokens … micro_tokens: see `keeping.Steps`. formats: what the base may be kept in, best first. shards: over
    how many devices it may be spread, ascending. machine: what each of the devices has. limit_bytes: asked, or None.
    """

    facts: ModelFacts
    slots: tuple[tuple[LoraPlan, OptimizerPlan], ...]
    machine: MachineFacts
    precision: Precision
    longest_tokens: int
    step_tokens: float
    row_tokens: float
    token_flops: float
    formats: tuple[Frozen, ...]
    levels: tuple[Level, ...]
    micro_tokens: int | None = None
    shards: tuple[int, ...] = (1,)
    limit_bytes: int | None = None

    def steps(self, frozen: Frozen) -> Steps:
        """The steps with the base in one format."""
        slots = adapted_by([lora for lora, _ in self.slots])
        return Steps(
            of=Pass(
                self.facts,
                slots,
                self.machine.device,
                self.precision,
                frozen,
                self._has_flash(),
                attention_room(usable_bytes(self.machine, self.limit_bytes), self.machine.capability),
                max(1, self.longest_tokens),
            ),
            machine=self.machine,
            longest_tokens=self.longest_tokens,
            step_tokens=self.step_tokens,
            row_tokens=self.row_tokens,
            token_flops=self.token_flops,
            levels=self.levels,
            micro_tokens=self.micro_tokens,
        )

    def _has_flash(self) -> bool:
        """See `models.flash.fits`."""
        size, capability = self.facts.head_dim, self.machine.capability
        return capability is not None and capability >= FLASH_CAPABILITY and size % 8 == 0 and size <= FLASH_HEAD

    def resident(self, frozen: Frozen, shards: int) -> tuple[MemoryTerm, ...]:
        """What is held all the time."""
        return resident_terms(
            self.facts,
            self.slots,
            device=self.machine.device,
            precision=self.precision,
            frozen=frozen,
            shards=shards,
        )

    def room(self, frozen: Frozen, shards: int) -> Room:
        """What is left for the steps."""
        left = usable_bytes(self.machine, self.limit_bytes) - _total(self.resident(frozen, shards))
        return Room(ROOM_SHARE * left, host_room_bytes(self.machine))


@dataclass(frozen=True, slots=True)
class Tried:
    """One format over so many devices, with the best that can be made of it."""

    frozen: Frozen
    shards: int
    chosen: Chosen
    terms: tuple[MemoryTerm, ...]

    @property
    def total_bytes(self) -> int:
        """The whole estimate, of one device."""
        return _total(self.terms)


@dataclass(frozen=True, slots=True)
class Fit:
    """What was chosen; what was too large before it; and what more memory would have been for.

    whole_bytes: what it would take to keep everything. larger: the best with twice the tokens at once; None where that
    is asked, or no step has so many.
    """

    best: Tried
    too_large: tuple[Tried, ...]
    whole_bytes: int
    larger: Tried | None

    @property
    def keeping(self) -> Keeping:
        """How layers are kept."""
        return self.best.chosen.keeping


def load_of(plan: Plan, *, longest_tokens: int, step_tokens: float) -> Load:
    """What a plan's steps are to fit, on one of its devices. step_tokens: of a step of all its slots, about."""
    facts, count, loras = plan.base.facts, plan.devices.count, [slot.lora for slot in plan.slots]
    rows = sum(slot.batch.rows or slot.batch.tokens / slot.data.max_tokens for slot in plan.slots)
    row_tokens = min(float(longest_tokens), step_tokens / max(rows, 1.0))
    return Load(
        facts=facts,
        slots=tuple((slot.lora, slot.optimizer) for slot in plan.slots),
        machine=plan.machine,
        precision=plan.precision,
        longest_tokens=longest_tokens,
        step_tokens=step_tokens / count,
        row_tokens=row_tokens,
        token_flops=flops_per_token(
            facts,
            lora_parameters=max(adapter_parameters(facts, lora) for lora in loras),
            row_tokens=row_tokens,
            supervised_share=0.5,
            trained_share=max(trained_layers(facts, lora) for lora in loras) / facts.layers,
        ),
        formats=(plan.frozen,),
        levels=plan.may_keep,
        shards=(count if plan.devices.sharded else 1,),
        limit_bytes=plan.memory_limit_bytes,
    )


def find_fit(load: Load) -> Fit:
    """The first format that fits, on as few devices as hold it, in its fastest way.

    Raises PlanError: plan-micro-tokens, plan-memory with what would fit.
    """
    if load.micro_tokens is not None and load.micro_tokens < load.longest_tokens:
        raise PlanError(
            "plan-micro-tokens",
            f"batch.micro_tokens {load.micro_tokens} is less than the longest row ({load.longest_tokens} tokens)",
            got=str(load.micro_tokens),
            hint="raise batch.micro_tokens, or lower data.max_tokens",
        )
    best, too_large = search(load)
    if best is None:
        raise _refusal(load, too_large)
    keeping = best.chosen.keeping
    everything = _try_same(replace(load, levels=("all",)), best, keeping.micro_tokens)
    more = 2 * keeping.micro_tokens
    possible = load.micro_tokens is None and load.steps(best.frozen).at_once(more) > keeping.micro_tokens
    larger = _try_same(load, best, more) if possible and everything.chosen.keeping != keeping else None
    return Fit(best, tuple(too_large), everything.total_bytes, larger)


def usable_bytes(machine: MachineFacts, limit_bytes: int | None = None) -> int:
    """Memory that a plan may fill. limit_bytes: what the run may take, on a GPU beside what CUDA itself takes."""
    if machine.device == "cpu":
        return min(round(machine.host_memory_bytes * USABLE_SHARE), limit_bytes or machine.host_memory_bytes)
    usable = round(machine.device_memory_bytes * USABLE_SHARE)
    return usable if limit_bytes is None else min(usable, limit_bytes + PROCESS_BYTES["cuda"])


def host_room_bytes(machine: MachineFacts) -> float:
    """Memory of the host that layers' inputs may wait in."""
    return HOST_SHARE * machine.host_memory_bytes if machine.device == "cuda" else 0.0


def check_disk(machine: MachineFacts, need_bytes: int, *, keep: int, folder: str) -> None:
    """Room for the kept checkpoints, the best one, and the one that is being written. Raises PlanError plan-disk."""
    if need_bytes > machine.free_disk_bytes:
        raise PlanError(
            "plan-disk",
            f"{folder}: checkpoints need {format_bytes(need_bytes)} ({keep} kept, the best, one being written)",
            got=f"{format_bytes(machine.free_disk_bytes)} free",
            hint="free some space, set run to a folder on another disk, or lower checkpoint.keep",
        )


def search(load: Load) -> tuple[Tried | None, list[Tried]]:
    """(the best that fits, what does not fit). Of one format the fastest is taken: fp8 kept once or twice."""
    too_large: list[Tried] = []
    for _, group in itertools.groupby(load.formats, key=lambda frozen: frozen.format):
        formats = list(group)
        for shards in load.shards:
            tried = [_try(load, frozen, shards) for frozen in formats]
            fitting = [one for one in tried if one.chosen.fits]
            too_large += [one for one in tried if not one.chosen.fits]
            if fitting:
                return min(fitting, key=lambda one: one.chosen.seconds), too_large
    return None, too_large


def _try(load: Load, frozen: Frozen, shards: int) -> Tried:
    return _tried(load, frozen, shards, choose_keeping(load.steps(frozen), load.room(frozen, shards)))


def _try_same(load: Load, best: Tried, micro_tokens: int) -> Tried:
    """The same base with so many tokens at once."""
    room = load.room(best.frozen, best.shards)
    return _tried(load, best.frozen, best.shards, keep_same(load.steps(best.frozen), micro_tokens, room))


def _tried(load: Load, frozen: Frozen, shards: int, chosen: Chosen) -> Tried:
    terms = (*load.resident(frozen, shards), MemoryTerm("activations", chosen.peak_bytes))
    return Tried(frozen, shards, chosen, terms)


def _total(terms: tuple[MemoryTerm, ...]) -> int:
    return sum(term.size_bytes for term in terms)


# ---- what would fit -------------------------------------------------------------------------------------------------


def _refusal(load: Load, too_large: list[Tried]) -> PlanError:
    least = min(too_large, key=lambda one: one.total_bytes)
    usable = usable_bytes(load.machine, load.limit_bytes)
    terms = sorted(least.terms, key=lambda term: -term.size_bytes)
    return PlanError(
        "plan-memory",
        f"the run needs about {format_bytes(least.total_bytes)} and {format_bytes(usable)} may be used",
        got=", ".join(f"{term.what} {format_bytes(term.size_bytes)}" for term in terms[:3]),
        hint=_what_would_fit(load),
    )


def _what_would_fit(load: Load) -> str:
    """Changes to the recipe that make the run fit, each alone and then together; or the memory that it takes."""
    fitting = [words for words, changed in _changes(load) if search(changed)[0] is not None][:2]
    if load.machine.device == "cuda":
        more = [2**power for power in range(1, 7) if 2**power > load.shards[-1]]
        enough = [count for count in more if search(replace(load, shards=(count,)))[0] is not None]
        fitting += [f"{count} such GPUs" for count in enough[:1]]
    if fitting:
        return f"what would fit: {' or '.join(fitting)}"
    levels = may_keep("auto", load.machine.device)
    smallest = replace(_shorter(load, 64), formats=(Frozen(format="nf4"),), levels=levels)
    need_bytes = min(tried.total_bytes for tried in search(replace(smallest, limit_bytes=0))[1])
    return f"it takes a smaller base, or a machine with {format_bytes(need_bytes / USABLE_SHARE)} of memory"


def _changes(load: Load) -> list[tuple[str, Load]]:
    """What may be changed, as it is typed, in the order in which it is proposed."""
    on_gpu = load.machine.device == "cuda"
    halves = [load.longest_tokens // 2**power for power in range(1, 8) if load.longest_tokens // 2**power >= 64]
    shorter = [(f"data.max_tokens={tokens}", _shorter(load, tokens)) for tokens in halves]
    changes: list[tuple[str, Load]] = []
    if load.limit_bytes is not None:
        changes.append(("memory=auto", replace(load, limit_bytes=None)))
    if load.levels != may_keep("auto", load.machine.device):
        changes.append(("checkpointing=auto", replace(load, levels=may_keep("auto", load.machine.device))))
    smaller: Precision | None = None
    if load.precision == "fp32":
        smaller = "bf16" if not on_gpu or load.machine.bf16 else "fp16"
        changes.append((f"precision={smaller}", replace(load, precision=smaller)))
    quantised = [] if "nf4" in {one.format for one in load.formats} else [Frozen(format="nf4")]
    fewer_bytes = [(f"precision.base={one.format}", replace(load, formats=(one,))) for one in quantised]
    # The bases that a CPU trains are small: shorter rows save more, and are named first.
    changes += [*fewer_bytes, *shorter] if on_gpu else shorter
    if smaller is not None:
        changes += [(f"precision={smaller} {words}", replace(one, precision=smaller)) for words, one in shorter]
    return changes if on_gpu else [*changes, *fewer_bytes]


def _shorter(load: Load, tokens: int) -> Load:
    return replace(load, longest_tokens=min(tokens, load.longest_tokens), micro_tokens=None)

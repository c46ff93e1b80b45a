"""What one engine of a server holds, how much of it keys and values get, and what would fit where that is too much.

Pure: this module knows no tensors. What is estimated lies on one GPU, or in the host's memory where a CPU computes.
What is refused here is not looked at again by the engines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from tenon.bases.facts import MODULE_PATHS, STACKS, ModelFacts
from tenon.errors import PlanError
from tenon.plan.fit import usable_bytes
from tenon.plan.memory import PRECISION_BYTES, PROCESS_BYTES, MemoryTerm, base_bytes, dequantised_bytes
from tenon.plan.precision import DENSE
from tenon.plan.requests import Engine, Replicas
from tenon.plan.values import Frozen, MachineFacts
from tenon.units import format_bytes

# Most tokens of one pass: a long prompt must not keep those who wait for their next token.
PASS_TOKENS = {"cpu": 256, "cuda": 2048}
# Keys and values of all sequences, where nobody says how much and there is so much.
CACHE_BYTES = 2 << 30
# The longest sequence, where nobody says and the base reads as much.
CONTEXT_TOKENS = 4096
# Ranks of a slot for which the shelf has room (`adapters.shelf`), and which a slot is planned with: most have no more.
SLOT_RANK = 16
# Scores of a pass are held in fp32 at most this often at a time: as they are, steered, and sorted for a draw.
_SCORES_AT_ONCE, _MOST_SCORE_BYTES = 3, 128 * 1024 * 1024
# Passes whose tensors live at a time: the one that is made, and on a GPU the memory of the recorded ones.
_PASSES = {"cpu": 1, "cuda": 2}
# A sequence may need a block of the cache beyond its own tokens, at most so large a one (ours: `models.blocks`).
_BLOCK_TOKENS = {"tenon": 64, "vllm": 128}


@dataclass(frozen=True, slots=True)
class Room:
    """What one engine is to have room for: adapters in slots, sequences at a time, and tokens of the longest one."""

    slots: int
    rows: int
    context_tokens: int


@dataclass(frozen=True, slots=True)
class ServerPlan:
    """What each engine of a server gets. memory: what it will hold, in words; None where vLLM is to count it."""

    context_tokens: int
    cache_bytes: int
    memory: str | None


def plan_server(
    engine: Engine,
    *,
    slots: int,
    rows: int,
    context_tokens: int | None = None,
    cache_bytes: int | None = None,
    replicas: Replicas | None = None,
    by_vllm: bool = False,
) -> ServerPlan:
    """Room, keys and values of each engine, as asked or as is usual (None).

    Raises PlanError plan-context, plan-cache, plan-memory, each with what to type instead.
    """
    room = Room(slots, rows, plan_context(engine, context_tokens))
    if by_vllm:
        cache = CACHE_BYTES if cache_bytes is None else cache_bytes
        _require_one_sequence(room, cache, _sequence_bytes(engine, room, "vllm"))
        return ServerPlan(room.context_tokens, cache, None)
    machines = [engine.machine] if replicas is None else [seat.machine for seat in replicas.seats]
    cache = plan_cache(engine, machines, room, cache_bytes)
    return ServerPlan(room.context_tokens, cache, describe_memory(engine, min(machines, key=usable_bytes), room, cache))


def plan_context(engine: Engine, asked: int | None) -> int:
    """The longest sequence in tokens; None takes what is usual. Raises PlanError plan-context."""
    most = engine.facts.context_tokens
    if asked is not None and asked > most:
        raise PlanError(
            "plan-context",
            f"{engine.base.spec} reads at most {most:,} tokens",
            got=f"{asked:,}",
            hint=f"type --context {most}, or less",
        )
    return min(CONTEXT_TOKENS, most) if asked is None else asked


def server_terms(engine: Engine, machine: MachineFacts, room: Room) -> tuple[MemoryTerm, ...]:
    """What an engine holds beside keys and values. machine: what this engine may use of it."""
    facts, precision, frozen = engine.facts, engine.precision, engine.frozen
    each = PRECISION_BYTES[precision]
    base = base_bytes(facts, precision, frozen) + dequantised_bytes(facts, machine.device, precision, frozen)
    if machine.device == "cuda" and frozen == DENSE:
        base += room.slots * SLOT_RANK * _shelf_width(facts) * each
    elements = room.slots * SLOT_RANK * facts.layers * sum(sum(facts.linear_shape(module)) for module in MODULE_PATHS)
    passes = _PASSES[machine.device] * _pass_bytes(facts, PASS_TOKENS[machine.device], room.rows, each)
    kept = precision if frozen.format == "dense" else frozen.format
    return (
        MemoryTerm(f"base in {kept}", base),
        MemoryTerm(f"{room.slots} adapters of rank {SLOT_RANK}", elements * (4 if precision == "fp32" else 4 + each)),
        MemoryTerm("passes", passes),
        MemoryTerm("process", PROCESS_BYTES[machine.device]),
    )


def plan_cache(engine: Engine, machines: Sequence[MachineFacts], room: Room, asked: int | None) -> int:
    """Bytes of keys and values of one engine. machines: what each engine may use. asked: None takes what is usual, or
    what is left where that is less.

    Raises PlanError plan-cache where it is to hold no sequence, plan-memory with what would fit.
    """
    machine = min(machines, key=usable_bytes)
    terms = server_terms(engine, machine, room)
    left = usable_bytes(machine) - _sum(terms)
    one = _sequence_bytes(engine, room, "tenon")
    if asked is not None:
        _require_one_sequence(room, asked, one)
    cache = min(CACHE_BYTES, left) if asked is None else asked
    if one <= cache <= left:
        return cache
    raise _refusal(engine, machine, room, (*terms, MemoryTerm("cache", max(cache, one))), left=left, one=one)


def token_bytes(engine: Engine) -> int:
    """Keys and values of one token, in all layers."""
    return engine.facts.kept_elements * PRECISION_BYTES[engine.precision]


def describe_memory(engine: Engine, machine: MachineFacts, room: Room, cache_bytes: int) -> str:
    """What one engine will hold, in words."""
    terms = (*server_terms(engine, machine, room), MemoryTerm("cache", cache_bytes))
    total, usable = _sum(terms), usable_bytes(machine)
    return f"about {format_bytes(total)} of {format_bytes(usable)} that may be used: {_words(terms)}"


def _sequence_bytes(engine: Engine, room: Room, by: Literal["tenon", "vllm"]) -> int:
    """What the cache of either engine must have for the longest sequence."""
    return (room.context_tokens + _BLOCK_TOKENS[by]) * token_bytes(engine)


def _require_one_sequence(room: Room, cache_bytes: int, one: int) -> None:
    """Raises PlanError plan-cache."""
    if cache_bytes < one:
        raise PlanError(
            "plan-cache",
            f"a cache of {format_bytes(cache_bytes)} does not hold one sequence of {room.context_tokens:,} tokens",
            got=f"{format_bytes(one)} a sequence",
            hint="give more with --cache, or shorter sequences with --context",
        )


def _shelf_width(facts: ModelFacts) -> int:
    """Elements that one rank takes below all frozen weights: a row for each module of a stack."""
    return facts.layers * sum(len(modules) * facts.stack_shape(stack)[1] for stack, modules in STACKS.items())


def _pass_bytes(facts: ModelFacts, tokens: int, rows: int, each: int) -> int:
    """The tensors of one pass: of a layer at its widest, and the scores of as many rows as there are, in fp32."""
    widest = 4 * facts.hidden + max(facts.stack_shape(stack)[0] for stack in STACKS) + facts.feed_forward
    scores = min(4 * rows * facts.vocab, _MOST_SCORE_BYTES)
    return tokens * widest * each + _SCORES_AT_ONCE * scores


def _refusal(
    engine: Engine, machine: MachineFacts, room: Room, terms: tuple[MemoryTerm, ...], *, left: int, one: int
) -> PlanError:
    usable = format_bytes(usable_bytes(machine))
    fitting = [f"--cache {left // 1_000_000}MB"] if left >= one else _changes(engine, machine, room, one)
    least = "fewer --replicas, a shorter --context, a smaller base, or a machine with more memory"
    return PlanError(
        "plan-memory",
        f"an engine with this base needs about {format_bytes(_sum(terms))}, and {usable} may be used",
        got=_words(terms),
        hint=f"what would fit: {' or '.join(fitting)}" if fitting else least,
    )


def _changes(engine: Engine, machine: MachineFacts, room: Room, one: int) -> list[str]:
    """What may be typed, each alone, so that one sequence at least has its keys and values."""
    formats: tuple[Literal["int8", "nf4"], ...] = ("int8", "nf4") if machine.device == "cuda" else ()
    ways = [
        (f"--base-precision {word}", engine.model_copy(update={"frozen": Frozen(format=word)}), room)
        for word in formats
    ]
    ways.append(("--slots 1", engine, replace(room, slots=1)))
    usable = usable_bytes(machine) - one
    return [words for words, changed, less in ways if _sum(server_terms(changed, machine, less)) <= usable]


def _sum(terms: Sequence[MemoryTerm]) -> int:
    return sum(term.size_bytes for term in terms)


def _words(terms: Sequence[MemoryTerm]) -> str:
    largest = sorted(terms, key=lambda term: -term.size_bytes)
    return ", ".join(f"{term.what} {format_bytes(term.size_bytes)}" for term in largest)

"""What layers keep for the way back and how many tokens are computed at once: the fastest way that fits the memory.

A layer may keep all that its backward pass reads, or less and compute the rest again (`activations.LEVELS`). Layers are
thinned by the time that it costs for each byte that it saves, the lowest first: when their turn comes on the way back,
what the layers above them kept is gone, and there is room for what is made again. Smaller batches save memory too, and
cost time for each batch: weights are dequantised anew, kernels are launched, products are less than full.

How layers are kept changes no bit of the result, so it may change at any time; how many tokens are computed at once
changes the order of sums. Pure: knows no tensors.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tenon.bases.facts import ModelFacts
from tenon.plan.activations import Activations, Pass
from tenon.plan.memory import FORMAT_BYTES, PRECISION_BYTES, stack_shapes
from tenon.plan.time import STEP_OVERHEAD_SECONDS, device_rate
from tenon.plan.values import LEVELS, Keeping, Level, MachineFacts
from tenon.units import format_bytes, format_tokens

MOST_TOKENS = {"cpu": 2048, "cuda": 16_384}
# A batch of so many tokens takes twice the time for each: its products do not fill the device.
_HALF_SPEED_TOKENS = {"cpu": 32, "cuda": 256}
# A layer's kernels are launched in about this time; a batch takes no less.
_LAUNCH_SECONDS = {"cpu": 0.0003, "cuda": 0.001}
# FLOP that a GPU does, in half precision, in the time in which it moves a byte of its memory: 400 TFLOP/s, 2 TB/s.
_FLOPS_PER_BYTE = 200.0
# Bytes a second between the GPU and pinned memory, and the share of a copy that is felt although it runs beside.
_HOST_RATE, _FELT_SHARE = 20e9, 0.1
# Pinned memory is handed out in powers of two.
_PINNED_ROUNDING = 2
# A longer step than the mean one is not rare.
_LONG_STEP = 1.5
# When memory ran out, at least this share of what was needed has to go.
_NOTCH = 0.05


@dataclass(frozen=True, slots=True)
class Steps:
    """The steps that are to be made.

    longest_tokens: no row is longer. step_tokens: of one optimiser step, about. row_tokens: of a row, about.
    token_flops: FLOP of a token when nothing is computed twice. levels: what layers may keep. micro_tokens: asked, or
    None; then most_tokens are the most that may be chosen.
    """

    of: Pass
    machine: MachineFacts
    longest_tokens: int
    step_tokens: float
    row_tokens: float
    token_flops: float
    levels: tuple[Level, ...]
    micro_tokens: int | None = None
    most_tokens: int = MOST_TOKENS["cuda"]

    def at_once(self, micro_tokens: int) -> int:
        """Tokens that a batch may really have."""
        return min(micro_tokens, max(self.longest_tokens, math.ceil(_LONG_STEP * self.step_tokens)))


@dataclass(frozen=True, slots=True)
class Room:
    """Memory beside base and adapters: of the device, and of the host for what is put there."""

    device_bytes: float
    host_bytes: float


@dataclass(frozen=True, slots=True)
class Chosen:
    """A way to keep layers. peak_bytes: beside base and adapters. seconds: of a step, about. fits: False for the
    smallest way there is, which is too large all the same.
    """

    keeping: Keeping
    peak_bytes: int
    seconds: float
    fits: bool = True


def may_keep(checkpointing: str, device: str) -> tuple[Level, ...]:
    """The levels that a recipe's `checkpointing` leaves open: `none` keeps everything, `full` only layers' inputs."""
    if checkpointing != "auto":
        return ("all",) if checkpointing == "none" else ("input",)
    return LEVELS if device == "cuda" else LEVELS[:-1]


def choose_keeping(steps: Steps, room: Room) -> Chosen:
    """The fastest way that fits; where none does, the smallest, with fits=False."""
    found = [_first_fit(steps, micro_tokens, room) for micro_tokens in _sizes(steps)]
    fitting = [one for one in found if one.fits]
    if fitting:
        return min(fitting, key=lambda one: one.seconds)
    return min(found, key=lambda one: one.peak_bytes)


def tighten(steps: Steps, current: Keeping, room: Room) -> Chosen | None:
    """Less memory than `current` takes, and no more than the room: at the same tokens at once if that can be, for the
    result keeps its bits then; None when there is no such way.
    """
    now_bytes = peak_bytes(steps, current)
    less = Room(min(room.device_bytes, (1 - _NOTCH) * now_bytes), room.host_bytes)
    same = _first_fit(steps, current.micro_tokens, less)
    if same.fits or same.peak_bytes < min(now_bytes, room.device_bytes):
        return replace(same, fits=True)
    sizes = [tokens for tokens in _sizes(replace(steps, micro_tokens=None)) if tokens < current.micro_tokens]
    smaller = (_first_fit(steps, tokens, less) for tokens in sizes)
    return next((one for one in smaller if one.fits), None)


def keep_same(steps: Steps, micro_tokens: int, room: Room) -> Chosen:
    """The fastest way with so many tokens at once."""
    return _first_fit(steps, micro_tokens, room)


def peak_bytes(steps: Steps, keeping: Keeping) -> int:
    """What a way takes beside base and adapters."""
    return Activations(steps.of, steps.at_once(keeping.micro_tokens)).peak_bytes(keeping.counts)


def computed_twice(facts: ModelFacts, row_tokens: float, keeping: Keeping) -> float:
    """FLOP of a token that are done a second time."""
    flops = _twice(facts, row_tokens)
    return sum(count * flops[level] for level, count in zip(LEVELS, keeping.counts, strict=True))


def describe(keeping: Keeping) -> str:
    """`keeps everything of 20 layers, gate and up of 12 layers are computed again`."""
    if keeping.all_layers == sum(keeping.counts):
        return "keeps everything, computes nothing twice"
    words = (
        "keeps everything of {}",
        "gate and up of {} are computed again",
        "{} computed again",
        "{} computed again from inputs in the host's memory",
    )
    parts = [
        word.format(f"{count} layer{'' if count == 1 else 's'}")
        for word, count in zip(words, keeping.counts, strict=True)
        if count
    ]
    return ", ".join(parts)


def describe_use(keeping: Keeping, used_bytes: float, usable_bytes: float) -> str:
    """`keeps everything, computes nothing twice; 8,192 tokens at once; about 42.2 GB of 72.0 GB`."""
    memory = f"about {format_bytes(used_bytes)} of {format_bytes(usable_bytes)}"
    return f"{describe(keeping)}; {format_tokens(keeping.micro_tokens)} at once; {memory}"


def _sizes(steps: Steps) -> Sequence[int]:
    """Tokens at once that are tried: halved from the device's most down to the longest row."""
    if steps.micro_tokens is not None:
        return [steps.micro_tokens]
    most = max(min(MOST_TOKENS[steps.of.device], steps.most_tokens), steps.longest_tokens)
    sizes = []
    while most > steps.longest_tokens:
        sizes.append(most)
        most //= 2
    return [*sizes, steps.longest_tokens]


def _first_fit(steps: Steps, micro_tokens: int, room: Room) -> Chosen:
    """The way with so many tokens at once that fits and computes least twice; else the smallest."""
    activations = Activations(steps.of, steps.at_once(micro_tokens))
    smallest: tuple[int, tuple[int, ...]] | None = None
    for counts in _thinner(steps, activations):
        inputs_bytes = counts[-1] * (activations.kept["input"] - activations.kept["host"])
        if _PINNED_ROUNDING * inputs_bytes > room.host_bytes:
            continue
        peak = activations.peak_bytes(counts)
        if peak <= room.device_bytes:
            return _chosen(steps, micro_tokens, counts, peak, fits=True)
        if smallest is None or peak < smallest[0]:
            smallest = peak, counts
    assert smallest is not None
    return _chosen(steps, micro_tokens, smallest[1], smallest[0], fits=False)


def _chosen(steps: Steps, micro_tokens: int, counts: tuple[int, ...], peak: int, *, fits: bool) -> Chosen:
    keeping = Keeping(
        micro_tokens=micro_tokens,
        all_layers=counts[0],
        most_layers=counts[1],
        input_layers=counts[2],
        host_layers=counts[3],
    )
    return Chosen(keeping, peak, _seconds(steps, keeping), fits)


def _thinner(steps: Steps, activations: Activations) -> Iterator[tuple[int, ...]]:
    """Layers at each level, from most memory to least: each time the cheapest byte is given up next."""
    layers = activations.layers
    levels: list[Level] = [level for level in LEVELS if level in steps.levels]
    yield _counts(layers, {levels[0]: layers})
    cost = _level_seconds(steps, activations.tokens)
    for at, path in _cheapest_moves(levels, activations, cost):
        for moved in range(layers):
            for level in path:
                there: dict[Level, int] = {path[-1]: moved}
                there[level] = there.get(level, 0) + 1
                yield _counts(layers, {at: layers - moved - 1, **there})


def _counts(layers: int, given: dict[Level, int]) -> tuple[int, ...]:
    assert sum(given.values()) == layers
    return tuple(given.get(level, 0) for level in LEVELS)


def _cheapest_moves(
    levels: Sequence[Level], activations: Activations, cost: dict[Level, float]
) -> list[tuple[Level, list[Level]]]:
    """(from, the levels on the way down) so that each move costs more for a byte than the one before.

    Where the second of two moves is the cheaper one they are made together.
    """

    def price(a: int, b: int) -> float:
        saved = activations.kept[levels[a]] - activations.kept[levels[b]]
        return (cost[levels[b]] - cost[levels[a]]) / max(saved, 1e-9)

    corners: list[int] = []
    for index in range(len(levels)):
        while len(corners) > 1 and price(corners[-2], corners[-1]) >= price(corners[-1], index):
            corners.pop()
        corners.append(index)
    return [(levels[a], list(levels[a + 1 : b + 1])) for a, b in itertools.pairwise(corners)]


# ---- time -----------------------------------------------------------------------------------------------------------


def _twice(facts: ModelFacts, row_tokens: float) -> dict[Level, float]:
    """FLOP of a token that a layer computes twice. Its product with down is never made again: `layer.rebuild`."""
    qkv, o, gate_up, _ = (2.0 * outputs * inputs for outputs, inputs in stack_shapes(facts))
    attention = 2.0 * row_tokens * facts.heads * facts.head_dim
    whole = qkv + o + gate_up + attention
    return {"all": 0.0, "most": gate_up, "input": whole, "host": whole}


def _level_seconds(steps: Steps, tokens: float) -> dict[Level, float]:
    """Seconds more that a layer takes for a batch than one that keeps everything."""
    rate = device_rate(steps.machine, steps.of.precision, steps.of.frozen)
    qkv, o, gate_up, _ = (outputs * inputs for outputs, inputs in stack_shapes(steps.of.facts))
    twice, inner = _twice(steps.of.facts, steps.row_tokens), qkv + o + gate_up
    again: dict[Level, int] = {"all": 0, "most": gate_up, "input": inner, "host": inner}
    forward, _ = _weight_seconds(steps)
    seconds: dict[Level, float] = {level: tokens * twice[level] / rate + again[level] * forward for level in LEVELS}
    copy = tokens * steps.of.facts.hidden * PRECISION_BYTES[steps.of.precision] / _HOST_RATE
    # The way up takes about a third of a layer's time, the way down the rest.
    layer = tokens * steps.token_flops / rate / steps.of.facts.layers
    seconds["host"] += sum(max(0.0, copy - part * layer) + _FELT_SHARE * copy for part in (1 / 3, 2 / 3))
    return seconds


def _weight_seconds(steps: Steps) -> tuple[float, float]:
    """Seconds to bring one weight into the form in which it is multiplied: forward, and backward."""
    frozen = steps.of.frozen
    if steps.of.device == "cpu" or frozen.format == "dense" or frozen.fp8_twice:
        return 0.0, 0.0
    made = 1 if frozen.fp8_compute else PRECISION_BYTES[steps.of.precision]
    rate = device_rate(steps.machine, "bf16", steps.of.frozen.model_copy(update={"fp8_compute": False}))
    seconds = (FORMAT_BYTES[frozen.format] + made) * _FLOPS_PER_BYTE / rate
    return (0.0 if frozen.format == "fp8" else seconds), seconds


def _seconds(steps: Steps, keeping: Keeping) -> float:
    """Seconds of a step, about: enough to tell ways apart."""
    device, facts = steps.of.device, steps.of.facts
    batches = math.ceil(steps.step_tokens / keeping.micro_tokens)
    tokens = steps.step_tokens / batches
    rate = device_rate(steps.machine, steps.of.precision, steps.of.frozen)
    compute = (tokens + _HALF_SPEED_TOKENS[device]) * steps.token_flops / rate
    weights = sum(outputs * inputs for outputs, inputs in stack_shapes(facts))
    forward, backward = _weight_seconds(steps)
    compute += weights * (facts.layers * forward + sum(keeping.counts) * backward)
    extra = _level_seconds(steps, tokens)
    compute += sum(count * extra[level] for level, count in zip(LEVELS, keeping.counts, strict=True))
    return STEP_OVERHEAD_SECONDS[device] + batches * max(compute, facts.layers * _LAUNCH_SECONDS[device])

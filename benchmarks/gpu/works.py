"""The works of `gpu_step` as data: shapes, rows, base formats, bounds, and which peers run beside ours.

A work's bounds are the ones that its kind of step is held to on one H100 80 GB; GB are 10^9 bytes. Every token has a
label but in banking77's rows, which keep their loss mask. This module measures nothing and imports nothing heavy.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Literal

# nf4-fp8: kept as nf4, dequantised to fp8 and multiplied so.
BaseFormat = Literal["bf16", "fp8", "nf4", "nf4-fp8"]

# The rows that `benchmarks.gpu.prepare` made, in the folder that is given on the command line.
REAL_ROWS = "banking77.npz"


@dataclass(frozen=True, slots=True)
class Shape:
    """A decoder of Llama's architecture, as numbers."""

    title: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    feed_forward: int
    vocab: int
    tied_head: bool


SHAPES = {
    "8b": Shape("8B", 32, 4096, 32, 8, 14336, 128256, tied_head=False),  # Llama-3.1-8B
    "1b": Shape("1B", 16, 2048, 32, 8, 8192, 128256, tied_head=True),  # Llama-3.2-1B
    "tiny": Shape("tiny", 2, 128, 4, 2, 256, 49152, tied_head=True),  # to try the scripts on a CPU
}


@dataclass(frozen=True, slots=True)
class Peer:
    """How a peer runs. mode: of peers/lora_step.py. checkpoint: none, full, or own (the peer's own way).

    layout: how rows of different lengths reach it: padded with a mask; packed as one row with restarting positions; or
    as TRL's trainer hands them over, where the peer does its own packing.
    """

    system: str
    mode: Literal["peft", "liger", "unsloth", "peft4", "unsloth4"]
    checkpoint: Literal["none", "full", "own"]
    layout: Literal["padded", "packed", "trainer"] = "padded"
    default: bool = False

    @property
    def settings(self) -> str:
        """The settings in words."""
        words = {"none": "no checkpointing", "full": "checkpointing", "own": "checkpointing with offload"}
        layouts = {"padded": [], "packed": ["packed"], "trainer": ["in TRL's trainer"]}
        parts = [words[self.checkpoint], *layouts[self.layout]]
        return ", ".join([*parts, *(["its default"] if self.default else [])])


@dataclass(frozen=True, slots=True)
class Work:
    """One row of the table.

    row_tokens: of every row; 0 for banking77's rows as they are. ranks: one slot each; rows are dealt to them in turn.
    at_least: tokens/s that ours must reach. at_most_gb: peak memory that ours must keep to, and is told to.
    of_best_peer, of_work: the bound is a multiple of the best peer's median, or of ours at another work.
    """

    name: str
    shape: str
    rows: int
    row_tokens: int
    base: BaseFormat
    at_least: float | None = None
    at_most_gb: float | None = None
    ranks: tuple[int, ...] = (16,)
    of_best_peer: float | None = None
    of_work: tuple[str, float] | None = None
    peers: tuple[Peer, ...] = ()
    steps: int = 8

    @property
    def title(self) -> str:
        """The work in words."""
        rows = f"{self.rows} x {self.row_tokens:,}" if self.row_tokens else f"banking77, {self.rows} rows a step"
        slots = "" if len(self.ranks) == 1 else f", {len(self.ranks)} slots"
        memory = f", at most {self.at_most_gb:g} GB" if self.at_most_gb else ""
        return f"{SHAPES[self.shape].title} {rows} {self.base}{slots}{memory}"

    @property
    def system(self) -> str:
        """Ours, as the table calls it: a step that computes in fp8 says so."""
        return f"Tenon, {self.base} base"


@dataclass(frozen=True, slots=True)
class Spec:
    """What one measuring process is told, as JSON on its command line.

    shape: a Shape's numbers. warm: steps before the measured ones. memory_gb: what ours may use, None for all that is
    free. rows_file: where real rows lie ("" for drawn ids). weights: a folder to load them from, "" for random ones
    made on the device. peer: a Peer's fields for a peer's process.
    """

    shape: dict[str, object]
    base: BaseFormat
    rows: int
    row_tokens: int
    ranks: tuple[int, ...]
    steps: int
    device: str = "cuda"
    warm: int = 3
    memory_gb: float | None = None
    rows_file: str = ""
    weights: str = ""
    peer: dict[str, object] = field(default_factory=dict)


def spec_of(work: Work, *, device: str, rows_folder: str, steps: int = 0, shape: str = "") -> Spec:
    """The spec of ours. steps, shape: instead of the work's own."""
    return Spec(
        shape=asdict(SHAPES[shape or work.shape]),
        base=work.base,
        rows=work.rows,
        row_tokens=work.row_tokens,
        ranks=work.ranks,
        steps=steps or work.steps,
        device=device,
        memory_gb=work.at_most_gb,
        rows_file="" if work.row_tokens else f"{rows_folder}/{REAL_ROWS}",
    )


def peer_spec(ours: Spec, peer: Peer, weights: str) -> Spec:
    """The same work for a peer."""
    return replace(ours, peer=asdict(peer), weights=weights, memory_gb=None)


_PEFT_FULL = Peer("transformers + PEFT", "peft", "full")
_PEFT = Peer("transformers + PEFT", "peft", "none", default=True)
_LIGER_FULL = Peer("PEFT + Liger", "liger", "full")
_LIGER = Peer("PEFT + Liger", "liger", "none")
_UNSLOTH_DEFAULT = Peer("Unsloth", "unsloth", "own", default=True)
_UNSLOTH = Peer("Unsloth", "unsloth", "none")
_QLORA_FULL = Peer("QLoRA: transformers + PEFT + bitsandbytes", "peft4", "full")
_QLORA_UNSLOTH_DEFAULT = Peer("QLoRA: Unsloth", "unsloth4", "own", default=True)
_QLORA_UNSLOTH = Peer("QLoRA: Unsloth", "unsloth4", "none")
_REAL_PEERS = (
    _PEFT,
    replace(_PEFT, layout="packed", default=False),
    _LIGER,
    replace(_LIGER, layout="packed"),
    _UNSLOTH_DEFAULT,
    _UNSLOTH,
    replace(_UNSLOTH, layout="trainer"),
)

# All different, 16 on average: together they have the low-rank work of one slot of rank 16 over the same tokens.
SLOT_RANKS = (4, 6, 8, 12, 16, 20, 24, 38)
# At most 8% slower: a step may take 1.08 times as long.
SLOTS_SHARE = 1 / 1.08

WORKS: tuple[Work, ...] = (
    Work(
        *("8b-4x2048-bf16", "8b", 4, 2048, "bf16", 19_000, 50),
        peers=(_PEFT_FULL, _LIGER_FULL, _LIGER, _UNSLOTH_DEFAULT, _UNSLOTH),
    ),
    Work("8b-4x2048-fp8", "8b", 4, 2048, "fp8", 28_000, 46),
    Work("8b-4x2048-nf4-small", "8b", 4, 2048, "nf4-fp8", 12_500, 8.6, peers=(_QLORA_FULL, _QLORA_UNSLOTH_DEFAULT)),
    Work("8b-4x2048-nf4", "8b", 4, 2048, "nf4", 20_000, 39, peers=(_QLORA_UNSLOTH,)),
    Work("8b-4x2048-nf4-fp8", "8b", 4, 2048, "nf4-fp8", 20_000, 39),
    Work(
        *("1b-16x64-bf16", "1b", 16, 64, "bf16", 36_000),
        peers=(_PEFT, _LIGER, _UNSLOTH_DEFAULT, _UNSLOTH),
        steps=30,
    ),
    Work("1b-4x2048-bf16", "1b", 4, 2048, "bf16", 95_000, peers=(_LIGER, _UNSLOTH_DEFAULT, _UNSLOTH)),
    Work("1b-4x2048-fp8", "1b", 4, 2048, "fp8", 125_000),
    Work("1b-banking77-bf16", "1b", 16, 0, "bf16", of_best_peer=3.0, peers=_REAL_PEERS, steps=30),
    Work("8b-1x2048-bf16", "8b", 1, 2048, "bf16", 15_000, 80, peers=(_UNSLOTH_DEFAULT, _UNSLOTH)),
    Work("8b-16x512-bf16", "8b", 16, 512, "bf16", 19_500, 80, peers=(_UNSLOTH_DEFAULT, _UNSLOTH)),
    Work("8b-2x8192-bf16", "8b", 2, 8192, "bf16", 16_500, 80, peers=(_UNSLOTH_DEFAULT, _UNSLOTH)),
    Work("8b-1x2048-fp8", "8b", 1, 2048, "fp8", 18_500, 80),
    Work("8b-16x512-fp8", "8b", 16, 512, "fp8", 28_000, 80),
    Work("8b-2x8192-fp8", "8b", 2, 8192, "fp8", 22_000, 80),
    Work("8b-8x2048-bf16", "8b", 8, 2048, "bf16", at_most_gb=80),
    Work(
        *("8b-8x2048-bf16-slots", "8b", 8, 2048, "bf16"),
        at_most_gb=80,
        ranks=SLOT_RANKS,
        of_work=("8b-8x2048-bf16", SLOTS_SHARE),
    ),
)

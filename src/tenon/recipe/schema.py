"""The Recipe: what the user asks, typed and frozen. A field that is None is left to the planner.

Every field says its unit and what it clashes with; docs/recipe.md is made from these descriptions. This module does not
know files, other tools' names for things (aliases), nor what the planner decides.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field

from tenon.units import parse_bytes
from tenon.values import Value

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"


def _as_tuple(value: Any) -> Any:
    """YAML gives lists; a single item stands for a list of one."""
    if isinstance(value, list):
        return tuple(value)
    return value if value is None or isinstance(value, tuple) else (value,)


def _as_sources(value: Any) -> Any:
    """A path, or a list of paths and of {path, weight, format, columns}, as a tuple of sources."""
    items = _as_tuple(value)
    if items is None:
        return None
    return tuple({"path": item} if isinstance(item, str) else item for item in items)


def _text_or_tuple(value: Any) -> Any:
    """One word stays a word; anything else becomes a tuple."""
    return value if isinstance(value, str) else _as_tuple(value)


def _size(value: str) -> str:
    """`auto`, or a size with its unit."""
    if value != "auto":
        size_bytes = parse_bytes(value)
        if value.strip()[-1:].isdigit() or not size_bytes:
            raise ValueError(f"{value!r} has no unit: write 8 GB or 8 GiB, or auto")
    return value


class Section(Value):
    """A group of fields. Strict: `rank: "16"` is text, not a number, and is refused."""

    model_config = ConfigDict(strict=True)


class Source(Section):
    """One source of rows."""

    path: str = Field(
        min_length=1, description="File, folder, glob or hub id; relative to the folder of the recipe file."
    )
    weight: float = Field(
        default=1.0, gt=0, le=1000, description="Passes over this source in one epoch; 0.5 takes half of it."
    )
    format: str = Field(
        default="auto", min_length=1, description="Row format; `auto` detects it and prints what it found."
    )
    columns: dict[str, str] = Field(default={}, description="Our field name -> the file's column, where they differ.")


Sources = Annotated[tuple[Source, ...], BeforeValidator(_as_sources), Field(min_length=1)]
Words = Annotated[tuple[str, ...], BeforeValidator(_as_tuple)]
LayerText = Annotated[str, Field(pattern=r"^\s*\d+(-\d*)?(\s*,\s*\d+(-\d*)?)*\s*$")]
LayerNumber = Annotated[int, Field(ge=0)]
BaseChoice = Literal["auto", "same", "bf16", "fp8", "int8", "nf4"]
Share = Annotated[float, Field(ge=0, lt=1)]


class DataSection(Section):
    """Where rows come from and what becomes of them."""

    train: Sources = Field(
        description="What to learn from: a path, or a list of paths and of {path, weight, format, columns}."
    )
    validation: Sources | None = Field(
        default=None,
        description="Sources of their own for validation, written like `data.train`. Clashes with `data.heldout`.",
    )
    heldout: Share | None = Field(
        default=None,
        description="Share of unique rows kept from training for validation. Clashes with `data.validation`.",
    )
    heldout_by: Literal["fraction", "content"] | None = Field(
        default=None,
        description="`fraction` draws exactly that share with the seed; `content` decides each row by its own hash, so "
        "that it stays on its side when the data grow. Needs `data.heldout`.",
    )
    max_tokens: int | None = Field(
        default=None, ge=2, description="Longest row, in tokens, prompt and answer together."
    )
    on_long: Literal["stop", "truncate", "drop"] | None = Field(
        default=None,
        description="What becomes of a row longer than `data.max_tokens`; each one is counted and reported.",
    )
    on_bad: Literal["stop", "drop"] | None = Field(
        default=None, description="What becomes of a row that cannot be used."
    )
    on_duplicate: Literal["keep", "drop"] | None = Field(
        default=None, description="What becomes of a row that occurs twice."
    )
    supervise: Literal["assistant", "last", "all"] | None = Field(
        default=None, description="Which tokens are learned: every assistant turn, only the last one, or all tokens."
    )
    system: str | None = Field(default=None, description="System message for chats that have none of their own.")
    prompt: str | None = Field(
        default=None,
        description="How a labelled row is asked: `{text}` stands for its text, `{column}` for any column.",
    )
    template: str | None = Field(
        default=None, description="File of a Jinja chat template, used instead of the tokenizer's own."
    )
    shuffle: bool | None = Field(default=None, description="Draw a new order of rows for each epoch, from the seed.")
    workers: int | None = Field(default=None, ge=1, le=256, description="Processes that turn rows into tokens.")


class PrecisionSection(Section):
    """Number formats. One word stands for the whole section: `precision: bf16` says `precision.compute`, and
    `precision: nf4` says `precision.base`. The adapter itself and its optimiser are always fp32.
    """

    base: BaseChoice | None = Field(
        default=None,
        description="Format that the frozen linear layers are kept in; `same` is that of `precision.compute`, `bf16` "
        "sets both. Embeddings, norms and head are as `precision.compute`. fp8 needs a GPU with it; a CPU imitates it.",
    )
    compute: Literal["auto", "fp32", "bf16", "fp16"] | None = Field(
        default=None,
        description="Format of activations, and of an unquantised base. fp16 needs a GPU.",
    )
    products: Literal["auto", "same", "fp8"] | None = Field(
        default=None,
        description="How what nf4 stands for is multiplied: in fp8, or in `same`, the format of `precision.compute`. "
        "Only with `precision.base: nf4`.",
    )


class LoraSection(Section):
    """The low-rank matrices."""

    rank: int | None = Field(
        default=None, ge=1, description="Inner dimension of B A; at most the smaller side of each matrix."
    )
    alpha: float | None = Field(
        default=None, gt=0, description="B A x is multiplied by alpha/rank, with `lora.rslora` by alpha/sqrt(rank)."
    )
    dropout: Share | None = Field(
        default=None, description="Share of the adapter's inputs that is zeroed while training."
    )
    targets: Annotated[str | tuple[str, ...] | None, BeforeValidator(_text_or_tuple)] = Field(
        default=None,
        description="Adapted matrices: `all`, `attention`, `mlp`, `qv`, module names (`q_proj`), or a regular "
        "expression over full names such as `layers.3.self_attn.q_proj`; or a list of these.",
    )
    layers: Annotated[LayerText | tuple[LayerNumber, ...] | None, BeforeValidator(_text_or_tuple)] = Field(
        default=None,
        description="Layers that are adapted, counted from 0: `8-15`, `8-`, `0-3,12`, or a list of numbers.",
    )
    rslora: bool | None = Field(
        default=None, description="Rank-stabilised scale, alpha/sqrt(rank) instead of alpha/rank."
    )
    init: Literal["kaiming", "gaussian", "orthogonal"] | None = Field(
        default=None, description="How A starts (B starts at zero). Clashes with `lora.start_from`."
    )
    start_from: str | None = Field(
        default=None,
        min_length=1,
        description="Adapter whose weights are the start: a folder, a registered name, or a run. Its rank, scale and "
        "matrices must be the recipe's.",
    )


class OptimizerSection(Section):
    """How gradients become updates."""

    kind: Literal["adamw", "sgd", "adamw8bit"] | None = Field(default=None, description="`adamw8bit` needs a GPU.")
    lr: float | None = Field(default=None, gt=0, le=100, description="Peak learning rate of the A matrices.")
    b_ratio: float | None = Field(
        default=None, gt=0, le=1000, description="LoRA+: the B matrices learn at lr x b_ratio; 1 is plain LoRA."
    )
    weight_decay: float | None = Field(
        default=None, ge=0, le=10, description="Decoupled weight decay, times the learning rate."
    )
    beta1: Share | None = Field(default=None, description="Decay of the first moment. Not with `optimizer.kind: sgd`.")
    beta2: Share | None = Field(default=None, description="Decay of the second moment. Not with `optimizer.kind: sgd`.")
    eps: float | None = Field(
        default=None, gt=0, lt=1, description="Added to the root of the second moment. Not with `optimizer.kind: sgd`."
    )
    momentum: Share | None = Field(default=None, description="Momentum of SGD. Only with `optimizer.kind: sgd`.")
    clip_norm: float | None = Field(
        default=None, ge=0, description="Each adapter's gradient is scaled down to this norm; 0 never clips."
    )


class ScheduleSection(Section):
    """How the learning rate moves over the run."""

    kind: Literal["cosine", "cosine_restarts", "linear", "constant", "wsd"] | None = Field(
        default=None, description="Shape after the warm-up; `wsd` holds the peak and decays at the end."
    )
    warmup: float | None = Field(
        default=None,
        ge=0,
        description="Below 1 a share of the run, from 1 on a whole number of steps; the rate rises from 0.",
    )
    decay: float | None = Field(
        default=None, gt=0, le=1, description="Share of the run that decays at the end. Only with `schedule.kind: wsd`."
    )
    cycles: int | None = Field(
        default=None, ge=1, le=1000, description="Number of cosines. Only with `schedule.kind: cosine_restarts`."
    )
    floor: float | None = Field(
        default=None,
        ge=0,
        le=1,
        description="Lowest share of the peak after warm-up. Not with `schedule.kind: constant`.",
    )


class BatchSection(Section):
    """What one optimiser step sees. Accumulation follows from it and from memory."""

    rows: int | None = Field(default=None, ge=1, description="Rows of one step. Clashes with `batch.tokens`.")
    tokens: int | None = Field(
        default=None, ge=1, description="Whole rows up to so many tokens make one step. Clashes with `batch.rows`."
    )
    micro_tokens: int | None = Field(
        default=None, ge=2, description="Tokens computed at once; changes memory and speed, never what is learned."
    )


class LimitsSection(Section):
    """The run ends at whichever limit comes first."""

    epochs: float | None = Field(default=None, gt=0, description="Passes over the training rows.")
    steps: int | None = Field(default=None, ge=1, description="Optimiser steps.")
    minutes: float | None = Field(
        default=None, gt=0, description="Minutes of training; the schedule then follows the clock."
    )


class ValidationSection(Section):
    """Measuring while training. Needs `data.validation` or held-out rows."""

    every: int | None = Field(default=None, ge=0, description="Steps between validations; 0 is once, at the end.")
    metric: str | None = Field(
        default=None, min_length=1, description="What `best` means; `loss` is always measured too."
    )
    patience: int | None = Field(
        default=None,
        ge=1,
        description="Validations without improvement before an early stop. Needs `validation.every`.",
    )
    min_delta: float | None = Field(
        default=None, ge=0, description="Smaller gains are no improvement. Needs `validation.patience`."
    )
    rows: int | None = Field(default=None, ge=0, description="At most so many rows are measured; 0 is all of them.")


class CheckpointSection(Section):
    """What is kept while training, so that any stop can be resumed."""

    every: int | None = Field(
        default=None, ge=0, description="Steps between checkpoints; 0 is only at a stop and at the end."
    )
    keep: int | None = Field(
        default=None, ge=1, description="Newest checkpoints kept; the best one is kept beside them."
    )


class EvaluateSection(Section):
    """What is measured after training, base against adapter."""

    data: Sources | None = Field(
        default=None, description="Sources written like `data.train`; left out, the validation rows are used."
    )
    metrics: Words | None = Field(
        default=None,
        description="Names of metrics; left out, they follow from the kind of rows; `[]` turns evaluation off.",
    )
    rows: int | None = Field(default=None, ge=0, description="At most so many rows are used; 0 is all of them.")
    max_new_tokens: int | None = Field(
        default=None, ge=1, description="Longest generated answer, in tokens, in evaluation and validation."
    )


class ServeSection(Section):
    """What is kept with the registered adapter for whoever serves it: how it is asked where a request does not say it,
    and what it said when it was trained.
    """

    temperature: float | None = Field(default=None, ge=0, le=2, description="How freely tokens are drawn; 0 is greedy.")
    top_p: float | None = Field(
        default=None, gt=0, le=1, description="Only the likeliest tokens that together reach this probability."
    )
    top_k: int | None = Field(default=None, ge=0, description="Only so many of the likeliest tokens; 0 is all of them.")
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="Only tokens with this share of the likeliest one's probability."
    )
    repetition_penalty: float | None = Field(
        default=None, gt=0, le=2, description="Above 1, tokens that were there already become less likely."
    )
    frequency_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="Subtracted from a token's score for every time that it was said."
    )
    presence_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="Subtracted from a token's score once it was said."
    )
    max_tokens: int | None = Field(default=None, ge=1, description="Longest answer, in tokens.")
    stop: Words | None = Field(
        default=None, max_length=16, description="Texts that end an answer; they are not part of it."
    )
    stop_tokens: Words | None = Field(
        default=None,
        max_length=16,
        description="Tokens of the base, written as text, that end an answer beside those of the chat template.",
    )
    probes: int | None = Field(
        default=None,
        ge=0,
        le=64,
        description="Rows of the data that are kept with the adapter, as tokens, with what it said of them; a server "
        "checks by them that it still says so. 0 keeps none.",
    )


class Recipe(Section):
    """One adapter: what it learns from, on which base, and how. Only `base` and `data.train` have to be said."""

    base: str = Field(min_length=1, description="Name of an embedded base, a folder, a .gguf file, or a hub id.")
    name: str | None = Field(
        default=None,
        pattern=NAME_PATTERN,
        description="Name of the adapter: letters, digits, dots, hyphens, underscores.",
    )
    data: DataSection
    lora: LoraSection = LoraSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    batch: BatchSection = BatchSection()
    limits: LimitsSection = LimitsSection()
    validation: ValidationSection = ValidationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    evaluate: EvaluateSection = EvaluateSection()
    serve: ServeSection = ServeSection()
    precision: PrecisionSection = PrecisionSection()
    device: Literal["auto", "cpu", "cuda"] | None = Field(default=None, description="Where the run computes.")
    devices: Literal["auto"] | Annotated[int, Field(ge=1, le=64)] | None = Field(
        default=None,
        description="How many GPUs of this machine share the work of each step, or on a CPU how many processes; what "
        "is learned stays the same. A base that one GPU cannot hold is spread over them.",
    )
    memory: Annotated[str, AfterValidator(_size)] | None = Field(
        default=None,
        description="What the run may take of the memory, such as `8.6 GB`, on a GPU beside what CUDA itself takes; "
        "`auto` is what is free. What layers keep and how many tokens are computed at once follows from it.",
    )
    checkpointing: Literal["auto", "none", "full"] | None = Field(
        default=None,
        description="What layers keep for the way back: `none` everything, `full` their inputs alone, the rest is "
        "computed again; `auto` decides for each layer by memory.",
    )
    register_as: bool | Annotated[str, Field(pattern=NAME_PATTERN)] | None = Field(
        default=None,
        alias="register",
        description="Name under which the finished adapter is registered; `true` takes `name`, `false` means not.",
    )
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="Start of all randomness.")
    run: str | None = Field(
        default=None, min_length=1, description="Folder that the run writes; relative to the folder of the recipe file."
    )
    trackers: Annotated[tuple[Literal["tensorboard", "wandb", "mlflow"], ...] | None, BeforeValidator(_as_tuple)] = (
        Field(default=None, description="Trackers that get the run's events beside `events.jsonl`.")
    )

    model_config = ConfigDict(strict=True, serialize_by_alias=True)

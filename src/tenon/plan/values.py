"""The Plan: what was decided and why, what was rejected and why. All that the heavy side reads.

Every field is definite: nothing is 'auto' here. The recipe's questions were answered by `plan.decide`.
This module knows no files and no tensors.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tenon.bases.facts import ModelFacts
from tenon.values import Value

Precision = Literal["fp32", "bf16", "fp16"]
# What a layer leaves behind for its backward pass, most memory first: see `models.layer.Keep`, whose values these are.
Level = Literal["all", "most", "input", "host"]
LEVELS: tuple[Level, ...] = ("all", "most", "input", "host")
BaseFormat = Literal["dense", "fp8", "int8", "nf4"]
Origin = Literal["recipe", "command line", "default", "derived", "alias"]


class Choice(Value):
    """One decided value: its recipe key, the value as text, where it came from, and the reason."""

    key: str
    value: str
    origin: Origin
    reason: str = ""


class Rejection(Value):
    """Something that was considered and not taken, with the reason."""

    what: str
    reason: str


class Frozen(Value):
    """What the frozen linear layers are kept in, and how they are multiplied. dense: the precision of the plan.

    fp8_compute: their products are fp8's (always of an fp8 base; of an nf4 base where it is dequantised to fp8).
    fp8_twice: an fp8 base is kept a second time, transposed for the backward pass, instead of being transposed there.
    """

    format: BaseFormat = "dense"
    fp8_compute: bool = False
    fp8_twice: bool = False


class DevicesPlan(Value):
    """How many devices share the work of each step. sharded: each keeps an equal part of every layer of the base, and
    whole layers are gathered as they are computed with; else each keeps all of it.
    """

    count: int = 1
    sharded: bool = False


class MachineFacts(Value):
    """The machine as the planner sees it. memory: what may be used, not what is installed.

    capability: compute capability of the GPU, as (9, 0); None on a CPU. peers_memory_bytes: of the GPUs of the same
    kind that follow the first, in their order.
    """

    device: Literal["cpu", "cuda"]
    device_name: str
    device_count: int
    device_memory_bytes: int
    host_memory_bytes: int
    cores: int
    threads: int
    bf16: bool
    free_disk_bytes: int
    capability: tuple[int, int] | None = None
    peers_memory_bytes: tuple[int, ...] = ()


class BasePlan(Value):
    """The frozen base: as asked, the folder or file it was found at, and the hash of its contents."""

    spec: str
    path: str
    base_hash: str
    facts: ModelFacts


class LoraPlan(Value):
    """One slot's low-rank matrices. `scale` multiplies B A x: alpha/rank, or alpha/sqrt(rank) for rsLoRA.

    sites: every adapted matrix by name (`bases.facts.site_name`), in forward order; never empty.
    start_from: folder of an adapter whose weights are the start, or None for a fresh initialisation.
    """

    rank: int
    alpha: float
    rslora: bool
    scale: float
    dropout: float
    init: Literal["kaiming", "gaussian", "orthogonal"]
    sites: tuple[str, ...]
    start_from: str | None = None


class OptimizerPlan(Value):
    """lr: of the A matrices; B matrices use lr * b_ratio (LoRA+). clip_norm 0 means no clipping."""

    kind: Literal["adamw", "sgd", "adamw8bit"]
    lr: float
    b_ratio: float
    weight_decay: float
    beta1: float
    beta2: float
    eps: float
    momentum: float
    clip_norm: float


class SchedulePlan(Value):
    """Learning-rate factor over progress in [0, 1]; see train.schedule for the formulas.

    warmup, decay: shares of the run; cycles: restarts of `cosine_restarts`; floor: lowest factor.
    """

    kind: Literal["cosine", "cosine_restarts", "linear", "constant", "wsd"]
    warmup: float
    decay: float
    cycles: int
    floor: float


class SourcePlan(Value):
    """One source of rows. weight: passes over it per epoch. columns: our field name -> the file's column."""

    path: str
    weight: float = 1.0
    format: str = "auto"
    columns: dict[str, str] = Field(default={})


class DataPlan(Value):
    """Where rows come from and what becomes of them.

    heldout: share of unique rows kept from training for validation (0 = none); heldout_by: `fraction` draws that
    share exactly, with the seed; `content` decides each row by the hash of its own content, so that a row stays on its
    side when the data grow. validation: sources of their own, whose rows are removed from train when they occur there.
    max_tokens: longest row. template: file of a chat template instead of the tokenizer's.
    """

    train: tuple[SourcePlan, ...]
    validation: tuple[SourcePlan, ...] = ()
    heldout: float = 0.0
    heldout_by: Literal["fraction", "content"] = "fraction"
    max_tokens: int
    on_long: Literal["stop", "truncate", "drop"]
    on_bad: Literal["stop", "drop"]
    on_duplicate: Literal["keep", "drop"]
    supervise: Literal["assistant", "last", "all"]
    system: str | None = None
    prompt: str = "{text}"
    template: str | None = None
    shuffle: bool = True
    seed: int = 0
    workers: int = 1


class BatchPlan(Value):
    """One optimiser step takes `rows` rows, or whole rows up to `tokens` tokens; exactly one is above zero."""

    rows: int
    tokens: int


class LimitsPlan(Value):
    """A slot ends at whichever comes first. epochs: passes over the data; 0 means no such limit."""

    epochs: float
    steps: int
    minutes: float


class ValidationPlan(Value):
    """every: steps between validations (0 = only at the end). metric: its name; `loss` is always computed.

    patience: validations without improvement by min_delta before an early stop (0 = never).
    rows: at most so many rows are used (0 = all). max_new_tokens: for metrics that need generation.
    """

    every: int
    metric: str
    patience: int
    min_delta: float
    rows: int
    max_new_tokens: int


class EvaluationPlan(Value):
    """What is measured after training, base against adapter. sources empty: the held-out rows."""

    sources: tuple[SourcePlan, ...]
    metrics: tuple[str, ...]
    rows: int
    max_new_tokens: int
    enabled: bool


class Generation(Value):
    """How an adapter is asked where a request does not say it; what is None is left to the server.

    stop: texts that end an answer; stop_tokens: tokens of the base, as text, that end it beside those of the template.
    """

    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    max_tokens: int | None = Field(default=None, ge=1)
    stop: tuple[Annotated[str, Field(min_length=1, max_length=1000)], ...] = Field(default=(), max_length=16)
    stop_tokens: tuple[Annotated[str, Field(min_length=1, max_length=1000)], ...] = Field(default=(), max_length=16)

    @property
    def said(self) -> dict[str, float | int | tuple[str, ...]]:
        """What it says, by name."""
        fields = self.model_dump(mode="python")
        return {name: value for name, value in fields.items() if value is not None and value != ()}


class ServingPlan(Value):
    """What is kept with a registered adapter. probes: rows with what it said of them (0 = none)."""

    probes: int = 0
    generation: Generation = Generation()


class SlotPlan(Value):
    """Everything about one adapter of the run: what it is, what it learns from, and how."""

    name: str
    recipe_hash: str
    seed: int
    lora: LoraPlan
    optimizer: OptimizerPlan
    schedule: SchedulePlan
    data: DataPlan
    batch: BatchPlan
    limits: LimitsPlan
    validation: ValidationPlan
    evaluation: EvaluationPlan
    register_as: str | None
    serving: ServingPlan = ServingPlan()


class Keeping(Value):
    """What layers keep for the way back, and how much is computed at once.

    all_layers … host_layers: how many layers there are of each of LEVELS; those that keep least lie lowest. Layers
    below the lowest adapted one keep nothing and are not counted. micro_tokens: most tokens of a batch.
    """

    micro_tokens: int
    all_layers: int
    most_layers: int = 0
    input_layers: int = 0
    host_layers: int = 0

    @property
    def counts(self) -> tuple[int, int, int, int]:
        """Layers of each level, most memory first."""
        return self.all_layers, self.most_layers, self.input_layers, self.host_layers

    def levels(self, layers: int) -> tuple[Level, ...]:
        """Of each of a base's layers, from the first on; of those that keep nothing, the first of LEVELS."""
        kept = [*zip(LEVELS, self.counts, strict=True), (LEVELS[0], layers - sum(self.counts))]
        # From the highest layer down; what nobody keeps lies at the bottom.
        return tuple(level for level, count in reversed(kept) for _ in range(count))


class CheckpointPlan(Value):
    """every: steps between checkpoints (0 = only at stops and at the end). keep: newest ones kept, best apart."""

    every: int
    keep: int


class Estimate(Value):
    """Rough figures before anything is loaded; steps and tokens are exact where `exact_steps` says so."""

    trainable_parameters: int
    trainable_share: float
    train_rows: int
    train_tokens: int
    steps: int
    exact_steps: bool
    memory_bytes: int
    seconds: float
    checkpoint_bytes: int


class Plan(Value):
    """One run: one base, one machine, one or more slots. precision: of activations, norms, embeddings and head.

    base_format, fp8_compute, fp8_twice: see `Frozen`. may_keep: what `keeping` may be changed to when memory turns out
    to be other than planned. memory_limit_bytes: what the run may take of the device's memory, beside CUDA's own; None
    for all that is free.
    """

    version: Literal[1] = 1
    base: BasePlan
    machine: MachineFacts
    precision: Precision
    base_format: BaseFormat = "dense"
    fp8_compute: bool = False
    fp8_twice: bool = False
    devices: DevicesPlan = DevicesPlan()
    keeping: Keeping
    may_keep: tuple[Level, ...]
    memory_limit_bytes: int | None = None
    share_prefix: bool
    slots: tuple[SlotPlan, ...]
    checkpoint: CheckpointPlan
    run_folder: str
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ()
    estimate: Estimate
    choices: tuple[Choice, ...] = ()
    rejected: tuple[Rejection, ...] = ()

    @property
    def frozen(self) -> Frozen:
        """How the base's linear layers are kept and multiplied."""
        return Frozen(format=self.base_format, fp8_compute=self.fp8_compute, fp8_twice=self.fp8_twice)

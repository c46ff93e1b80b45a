"""Keys of axolotl, LLaMA-Factory, TRL (with transformers' TrainingArguments) and PEFT.

Three tables: ALIASES mean exactly the same as a key of ours and are understood; ALWAYS say what Tenon does anyway and
are accepted with that value alone; DIFFERENT look alike and are refused with the difference. Meanings were read in the
tools' own schemas (axolotl 0.12+, LLaMA-Factory 0.9+, TRL 1.x, transformers 5, PEFT 0.21). Knows no files and no plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

AXOLOTL, FACTORY, TRL, PEFT = "axolotl", "LLaMA-Factory", "TRL", "PEFT"


@dataclass(frozen=True, slots=True)
class Alias:
    """A foreign key that means exactly a key of ours. convert raises ValueError with the difference."""

    key: str
    tools: tuple[str, ...]
    canonical: str
    convert: Callable[[Any], Any] | None = None


class Unset:
    """A foreign value that means 'not set'."""


UNSET = Unset()


def _one_of(words: Mapping[Any, Any], otherwise: str) -> Callable[[Any], Any]:
    """A conversion by table; `otherwise` says why any other value is refused."""

    def convert(value: Any) -> Any:
        if isinstance(value, str | bool) and value in words:
            return words[value]
        raise ValueError(otherwise)

    return convert


def _targets(value: Any) -> Any:
    if value in ("all", "all-linear"):
        return "all"
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) and "," in value else value
    names = [names] if isinstance(names, str) and names.isidentifier() else names
    if isinstance(names, list) and all(isinstance(name, str) and name.isidentifier() for name in names):
        return names
    raise ValueError("there a pattern is matched against `model.layers.0…` or by suffix; ours are `layers.0…`, whole")


def _steps_or_share(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0:
        raise ValueError("it must be a number of steps, or a share below 1")
    return float(value)


def _ratio(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 1:
        raise ValueError("it must be a share from 0 up to, but not, 1")
    return float(value)


def _max_steps(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool):
        return value if value > 0 else UNSET
    raise ValueError("it must be a whole number of steps")


def _whole_steps(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise ValueError("a share of the run or `no` has no equal here: write whole steps")


def _share_of_rows(value: Any) -> Any:
    if isinstance(value, float) and 0 < value < 1:
        return value
    if value == 0:
        return 0.0
    raise ValueError("there a whole number counts rows, here it is a share: write data.heldout as a share below 1")


def _init(value: Any) -> Any:
    words = {True: "kaiming", "gaussian": "gaussian", "orthogonal": "orthogonal"}
    return _one_of(words, "only true (kaiming), gaussian and orthogonal leave the base's weights alone")(value)


def _one_folder(value: Any) -> Any:
    if isinstance(value, str) and "," not in value:
        return value
    raise ValueError("several adapters are merged there; here an adapter starts from one folder")


def _loss_only(value: Any) -> Any:
    return _one_of({"loss": "loss", "eval_loss": "loss"}, "names of metrics differ: write validation.metric")(value)


def _trackers(value: Any) -> Any:
    names = value if isinstance(value, list) else [value]
    known = {"tensorboard", "wandb", "mlflow"}
    if names == ["none"]:
        return []
    if all(name in known for name in names):
        return names
    raise ValueError("only tensorboard, wandb and mlflow are known here, each by name")


def _same_number(value: Any) -> Any:
    """A number that some of the tools also take as text (`learning_rate: "2e-4"`)."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError as error:
            raise ValueError("it must be a number") from error
    return value


_OPTIMIZERS = {
    **dict.fromkeys(("adamw_torch", "adamw_torch_fused"), "adamw"),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit"), "adamw8bit"),
    "sgd": "sgd",
}
_optimizer = _one_of(
    _OPTIMIZERS, "only adamw_torch, adamw_torch_fused, adamw_8bit, adamw_bnb_8bit and sgd have an equal"
)
_SCHEDULES = {"cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant"}
_schedule = _one_of(
    _SCHEDULES,
    "only cosine, linear, constant and constant_with_warmup mean the same. cosine_with_restarts has one cycle unless "
    "num_cycles says more (write schedule.kind: cosine_restarts and schedule.cycles); warmup_stable_decay counts its "
    "decay in steps (write schedule.kind: wsd and schedule.decay); a lowest rate is schedule.floor",
)
_recompute = _one_of(
    {True: "full", False: "none"}, "only true and false mean the same; what is offloaded follows from memory"
)

ALIASES: tuple[Alias, ...] = (
    Alias("base_model", (AXOLOTL,), "base"),
    Alias("model_name_or_path", (FACTORY, TRL), "base"),
    Alias("base_model_name_or_path", (PEFT,), "base"),
    Alias("lora_r", (AXOLOTL, TRL), "lora.rank"),
    Alias("lora_rank", (FACTORY,), "lora.rank"),
    Alias("r", (PEFT,), "lora.rank"),
    Alias("lora_alpha", (AXOLOTL, FACTORY, TRL, PEFT), "lora.alpha"),
    Alias("lora_dropout", (AXOLOTL, FACTORY, TRL, PEFT), "lora.dropout"),
    Alias("lora_target_modules", (AXOLOTL, TRL), "lora.targets", _targets),
    Alias("lora_target", (FACTORY,), "lora.targets", _targets),
    Alias("target_modules", (PEFT,), "lora.targets", _targets),
    Alias(
        "lora_target_linear",
        (AXOLOTL,),
        "lora.targets",
        _one_of({True: "all", False: UNSET}, "only true (every linear layer) or false (not set) mean the same"),
    ),
    Alias("peft_layers_to_transform", (AXOLOTL,), "lora.layers"),
    Alias("layers_to_transform", (PEFT,), "lora.layers"),
    Alias("use_rslora", (FACTORY, TRL, PEFT), "lora.rslora"),
    Alias("peft_use_rslora", (AXOLOTL,), "lora.rslora"),
    Alias("init_lora_weights", (PEFT,), "lora.init", _init),
    Alias("peft_init_lora_weights", (AXOLOTL,), "lora.init", _init),
    Alias("lora_model_dir", (AXOLOTL,), "lora.start_from"),
    Alias("adapter_name_or_path", (FACTORY,), "lora.start_from", _one_folder),
    Alias("loraplus_lr_ratio", (AXOLOTL, FACTORY), "optimizer.b_ratio"),
    Alias("learning_rate", (AXOLOTL, FACTORY, TRL), "optimizer.lr", _same_number),
    Alias("optimizer", (AXOLOTL,), "optimizer.kind", _optimizer),
    Alias("optim", (FACTORY, TRL), "optimizer.kind", _optimizer),
    Alias("weight_decay", (AXOLOTL, FACTORY, TRL), "optimizer.weight_decay"),
    Alias("adam_beta1", (AXOLOTL, FACTORY, TRL), "optimizer.beta1"),
    Alias("adam_beta2", (AXOLOTL, FACTORY, TRL), "optimizer.beta2"),
    Alias("adam_epsilon", (AXOLOTL, FACTORY, TRL), "optimizer.eps", _same_number),
    Alias("max_grad_norm", (AXOLOTL, FACTORY, TRL), "optimizer.clip_norm"),
    Alias("lr_scheduler", (AXOLOTL,), "schedule.kind", _schedule),
    Alias("lr_scheduler_type", (FACTORY, TRL), "schedule.kind", _schedule),
    Alias("warmup_ratio", (AXOLOTL, FACTORY, TRL), "schedule.warmup", _ratio),
    Alias("warmup_steps", (AXOLOTL, FACTORY, TRL), "schedule.warmup", _steps_or_share),
    Alias("cosine_min_lr_ratio", (AXOLOTL,), "schedule.floor"),
    Alias("num_epochs", (AXOLOTL,), "limits.epochs"),
    Alias("num_train_epochs", (FACTORY, TRL), "limits.epochs"),
    Alias("max_steps", (AXOLOTL, FACTORY, TRL), "limits.steps", _max_steps),
    Alias("sequence_len", (AXOLOTL,), "data.max_tokens"),
    Alias("cutoff_len", (FACTORY,), "data.max_tokens"),
    Alias("max_length", (TRL,), "data.max_tokens"),
    Alias("max_seq_length", (TRL,), "data.max_tokens"),
    Alias("val_set_size", (AXOLOTL,), "data.heldout", _share_of_rows),
    Alias("val_size", (FACTORY,), "data.heldout", _share_of_rows),
    Alias("train_on_inputs", (AXOLOTL,), "data.supervise", _one_of({True: "all", False: "assistant"}, "true or false")),
    Alias("train_on_prompt", (FACTORY,), "data.supervise", _one_of({True: "all", False: UNSET}, "true or false")),
    Alias("mask_history", (FACTORY,), "data.supervise", _one_of({True: "last", False: UNSET}, "true or false")),
    Alias(
        "assistant_only_loss",
        (TRL,),
        "data.supervise",
        _one_of(
            {True: "assistant"}, "false learns every token of a chat but only the answer of a prompt/completion row"
        ),
    ),
    Alias(
        "completion_only_loss",
        (TRL,),
        "data.supervise",
        _one_of({True: "assistant", False: "all"}, "it must be true or false"),
    ),
    Alias("default_system", (FACTORY,), "data.system"),
    Alias("preprocessing_num_workers", (FACTORY,), "data.workers"),
    Alias("dataset_num_proc", (TRL,), "data.workers"),
    Alias("dataset_processes", (AXOLOTL,), "data.workers"),
    Alias("gradient_checkpointing", (AXOLOTL, FACTORY, TRL), "checkpointing", _recompute),
    Alias("activation_checkpointing", (TRL,), "checkpointing", _recompute),
    Alias("eval_steps", (AXOLOTL, FACTORY, TRL), "validation.every", _whole_steps),
    Alias("metric_for_best_model", (AXOLOTL, FACTORY, TRL), "validation.metric", _loss_only),
    Alias("early_stopping_patience", (AXOLOTL,), "validation.patience"),
    Alias("early_stopping_steps", (FACTORY,), "validation.patience"),
    Alias("save_steps", (AXOLOTL, FACTORY, TRL), "checkpoint.every", _whole_steps),
    Alias("save_total_limit", (AXOLOTL, FACTORY, TRL), "checkpoint.keep"),
    Alias("report_to", (FACTORY, TRL), "trackers", _trackers),
    Alias("output_dir", (AXOLOTL, FACTORY, TRL), "run"),
)

# Foreign keys that Tenon fulfils without being asked, with the only value for which that is true.
ALWAYS: dict[str, Any] = {
    "adapter": "lora",
    "finetuning_type": "lora",
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "lora_task_type": "CAUSAL_LM",
    "use_peft": True,
    "stage": "sft",
    "do_train": True,
    "bias": "none",
    "use_dora": False,
    "peft_use_dora": False,
    "fan_in_fan_out": False,
    "lora_fan_in_fan_out": False,
    "packing": False,
    "neat_packing": False,
    "sample_packing": False,
    "pissa_init": False,
    "group_by_length": False,
    "push_to_hub": False,
    "overwrite_output_dir": False,
}

_BLOCKS = (
    "there a batch then counts packed blocks, here it counts rows: write batch.tokens = rows of blocks x their length"
)
_NAMED_DATA = "write the file, folder or hub id as data.train"
_PER_EPOCH = "it counts per epoch; write steps as"

DIFFERENT: dict[str, str] = {
    "packing": _BLOCKS,
    "neat_packing": _BLOCKS,
    "sample_packing": _BLOCKS,
    "adapter": "only lora and qlora are built",
    "finetuning_type": "only lora is built",
    "stage": "only sft is built",
    "bias": "biases are part of the frozen base",
    "use_dora": "DoRA is not built; lora.rslora changes the scale alone",
    "peft_use_dora": "DoRA is not built; lora.rslora changes the scale alone",
    "load_in_8bit": "LLM.int8 multiplies in int8, outlying features apart; precision.base: int8 keeps int8, and "
    "multiplies what it stands for",
    "bnb_4bit_compute_dtype": "it is the type of the products alone; write precision.compute",
    "bnb_4bit_quant_storage": "it is how the bytes are held; it changes no result; leave it out",
    "pissa_init": "PiSSA changes the base's weights, and here these never change",
    "modules_to_save": "only LoRA matrices are trained",
    "lora_modules_to_save": "only LoRA matrices are trained",
    "additional_target": "only LoRA matrices are trained",
    "rank_pattern": "one adapter has one rank",
    "alpha_pattern": "one adapter has one alpha",
    "datasets": "axolotl's list carries types of its own; " + _NAMED_DATA,
    "test_datasets": "axolotl's list carries types of its own; write data.validation or evaluate.data",
    "dataset": "it names an entry of dataset_info.json; " + _NAMED_DATA,
    "dataset_dir": "it is where dataset_info.json lies; " + _NAMED_DATA,
    "eval_dataset": "it names an entry of dataset_info.json; write the file as data.validation",
    "dataset_name": "it names a hub id with its own splits; " + _NAMED_DATA,
    "dataset_text_field": "write it as data.train: [{path: …, columns: {text: NAME}}]",
    "template": "it is a name in LLaMA-Factory's own list; the tokenizer's template is used, or the file data.template",
    "chat_template": "it is a name in axolotl's own list; the tokenizer's template is used, or the file data.template",
    "chat_template_path": "it may also be a tokenizer; a template file is data.template",
    "max_samples": "it cuts every source; write a weight below 1 in data.train, or validation.rows",
    "batch_size": "axolotl divides it over devices and steps; the rows of one optimiser step are batch.rows",
    "run_name": "it is a label for trackers; the adapter's name is name",
    "logging_steps": "every step is recorded; leave it out",
    "save_strategy": "checkpoints are counted in steps: checkpoint.every",
    "eval_strategy": "validations are counted in steps: validation.every (0 is once, at the end)",
    "evaluation_strategy": "validations are counted in steps: validation.every (0 is once, at the end)",
    "saves_per_epoch": f"{_PER_EPOCH} checkpoint.every",
    "evals_per_epoch": f"{_PER_EPOCH} validation.every",
    "load_best_model_at_end": "the best and the last checkpoint are always both kept; leave it out",
    "lr_scheduler_kwargs": "write schedule.cycles, schedule.decay or schedule.floor",
    "min_lr": "it is a rate; schedule.floor is a share of the peak",
    "min_lr_rate": "it needs its own scheduler there; write schedule.floor",
    "per_device_eval_batch_size": "validation packs what fits; it changes no result; leave it out",
    "eval_batch_size": "validation packs what fits; it changes no result; leave it out",
    "auto_find_batch_size": "it shrinks the batch; here memory never changes the batch: leave it out",
    "dtype": "it is the type in which the base is loaded; write precision.compute",
    "torch_dtype": "it is the type in which the base is loaded; write precision.compute",
    "tf32": "matrix products are exact in fp32 here; write precision: bf16 for speed",
    "flash_attention": "the attention kernel is chosen by Tenon; leave it out",
    "flash_attn": "the attention kernel is chosen by Tenon; leave it out",
    "attn_implementation": "the attention kernel is chosen by Tenon; leave it out",
    "resume_from_checkpoint": "type: tenon resume RUN",
    "use_wandb": "write trackers: [wandb]",
    "wandb_project": "write trackers: [wandb]; the project is the tracker's own setting (WANDB_PROJECT)",
    "hub_model_id": "nothing is uploaded; leave it out",
    "push_to_hub": "nothing is uploaded; leave it out",
    "group_by_length": "it changes the order of rows; here packing makes it needless: leave it out",
    "overwrite_output_dir": "a run folder is never overwritten; write another run",
    "streaming": "rows are always streamed and cached; leave it out",
    "data_seed": "one seed drives everything: seed",
    "neftune_noise_alpha": "noise on embeddings is not built",
    "label_smoothing_factor": "label smoothing is not built",
}

BY_KEY: Mapping[str, Alias] = {alias.key: alias for alias in ALIASES}
# Keys whose meaning depends on others of their group: the rows of a step, the precision, the base's format.
ROWS_KEYS = ("per_device_train_batch_size", "micro_batch_size", "gradient_accumulation_steps")
HALF_KEYS = ("bf16", "fp16")
# Keys that say more about a quantised base, with the values for which it is our nf4.
NF4_DETAILS: dict[str, tuple[Any, ...]] = {
    "bnb_4bit_quant_type": ("nf4",),
    "bnb_4bit_use_double_quant": (True,),
    "use_bnb_nested_quant": (True,),
    "quantization_method": ("bnb", "bitsandbytes"),
    "quantization_type": ("nf4",),
    "double_quantization": (True,),
}
FORMAT_KEYS = ("load_in_4bit", "load_in_8bit", "quantization_bit", *NF4_DETAILS)
PAIRED = (*ROWS_KEYS, *HALF_KEYS, *FORMAT_KEYS)
PAIRS = (ROWS_KEYS, HALF_KEYS, (*FORMAT_KEYS, "adapter"))
FOREIGN_KEYS = frozenset(BY_KEY) | frozenset(ALWAYS) | frozenset(DIFFERENT) | frozenset(PAIRED)

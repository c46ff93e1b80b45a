"""Defaults that depend on nothing: the value, and the reason that is printed beside it.

What depends on the base, the machine or the data is derived in `plan.decide`; its rule is in DERIVED, for the docs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Default:
    """A value and why it is the default. shown: how it is printed, where the value does not say it."""

    value: Any
    reason: str
    shown: str = ""


DEFAULTS: dict[str, Default] = {
    "data.heldout_by": Default("fraction", "the share is met exactly"),
    "data.on_long": Default("stop", "nothing is cut unless the recipe says so"),
    "data.on_bad": Default("stop", "nothing is dropped unless the recipe says so"),
    "data.on_duplicate": Default("keep", "nothing is dropped unless the recipe says so"),
    "data.supervise": Default("assistant", "what the assistant said is what the adapter learns"),
    "data.system": Default(None, "chats keep the system message that they have"),
    "data.prompt": Default("{text}", "labelled rows ask with their text alone"),
    "data.template": Default(None, "the tokenizer's own chat template"),
    "data.shuffle": Default(True, "a new order each epoch, drawn from the seed"),
    "lora.rank": Default(16, "enough for data sets of usual size; raise it for large ones"),
    "lora.dropout": Default(0.0, "short runs rarely gain from it, and it costs time"),
    "lora.targets": Default(
        "all", "LoRA on every linear layer learns like full fine-tuning; attention alone falls behind"
    ),
    "lora.layers": Default(None, "every layer", "all"),
    "lora.rslora": Default(False, "alpha/rank is the usual scale"),
    "lora.init": Default("kaiming", "A uniform, B zero: the adapter starts as no change"),
    "lora.start_from": Default(None, "a fresh adapter"),
    "optimizer.kind": Default("adamw", "adapters are small: its state costs little"),
    "optimizer.b_ratio": Default(1.0, "A and B learn at the same rate"),
    "optimizer.weight_decay": Default(0.0, "the rank already limits what the adapter can change"),
    "optimizer.beta1": Default(0.9, "the usual value"),
    "optimizer.beta2": Default(0.999, "the usual value"),
    "optimizer.eps": Default(1e-8, "the usual value"),
    "optimizer.momentum": Default(0.0, "plain SGD"),
    "optimizer.clip_norm": Default(1.0, "one bad batch cannot throw the run"),
    "schedule.kind": Default("cosine", "ends low, without another number to choose"),
    "schedule.warmup": Default(0.05, "Adam's second moment needs some steps to settle"),
    "schedule.decay": Default(0.2, "the last fifth of the run"),
    "schedule.cycles": Default(3, "two restarts"),
    "schedule.floor": Default(0.0, "the rate ends at zero"),
    "batch.rows": Default(16, "LoRA loses more than full fine-tuning from large batches"),
    "batch.tokens": Default(None, "the batch is counted in rows"),
    "limits.minutes": Default(None, "no time limit"),
    "validation.metric": Default("loss", "measured without generating"),
    "validation.patience": Default(None, "no early stop"),
    "validation.min_delta": Default(0.0, "any gain counts"),
    "validation.rows": Default(500, "a validation stays short beside the training between two of them"),
    "checkpoint.keep": Default(2, "the one before the newest, in case the newest is damaged"),
    "evaluate.data": Default(None, "the validation rows"),
    "evaluate.rows": Default(0, "no limit", "all"),
    "evaluate.max_new_tokens": Default(256, "longer answers are cut"),
    **{
        f"serve.{name}": Default(None, "left to the server and to the request")
        for name in (
            "temperature",
            "top_p",
            "top_k",
            "min_p",
            "repetition_penalty",
            "frequency_penalty",
            "presence_penalty",
            "max_tokens",
        )
    },
    "serve.stop": Default((), "answers end where the adapter ends them"),
    "serve.stop_tokens": Default((), "those of the chat template and the base"),
    "serve.probes": Default(4, "a server checks by them that the adapter still says what it said"),
    "precision.products": Default("auto", "fp8 on a GPU that has it and computes in bf16, else as precision.compute"),
    "register": Default(True, "registered under the adapter's name"),
    "seed": Default(0, "the same recipe gives the same adapter"),
    "trackers": Default((), "events.jsonl holds everything"),
}

DERIVED: dict[str, str] = {
    "name": "the name of the recipe file",
    "data.validation": "none",
    "data.heldout": "5% of the rows, at most 500, when there are 200 or more and neither `data.validation` nor "
    "`evaluate.data` is given; else 0",
    "data.max_tokens": "2048, or the base's context when that is shorter",
    "data.workers": "the cores that this process may use, at most 16",
    "lora.alpha": "2 x rank",
    "optimizer.lr": "about ten times that of full fine-tuning: 1e-3 below 0.5B parameters, 5e-4 below 3B, 2e-4 above; "
    "for `sgd` a hundred times that",
    "batch.micro_tokens": "the fastest of what fits in memory, at most 2048 on a CPU and 16384 on a GPU, at least the "
    "longest row",
    "limits.epochs": "3 when neither `limits.steps` nor `limits.minutes` is given; else no such limit",
    "limits.steps": "no such limit",
    "validation.every": "a tenth of the run when there are validation rows",
    "checkpoint.every": "about five minutes of training",
    "evaluate.metrics": "chosen by the kind of rows",
    "precision.base": "`same` where it fits; else fp8 on a GPU that has it (int8 on one that has not), else nf4; on a "
    "CPU always `same`; a base whose files are nf4 stays nf4",
    "precision.compute": "fp32 on a CPU; bf16 on a GPU that has it, else fp16",
    "device": "a GPU when there is one that this installation can use",
    "devices": "as many free GPUs of one kind as a step keeps busy, at least as many as hold the base; on a CPU one "
    "process",
    "memory": "nine tenths of what is free",
    "checkpointing": "whatever is the fastest that fits in memory: nothing is computed twice unless it has to be",
    "run": "`runs/NAME-TIME` in the folder where the command is typed",
}

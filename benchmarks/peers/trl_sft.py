"""TRL's SFTTrainer on the same rows, base and hyperparameters, in an environment of its own; one JSON line out.

Runs under the peers' Python (see docs/benchmarks.md), which does not have tenon: this file imports nothing of it.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class StepClock(TrainerCallback):
    """Seconds of every optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._started = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._synchronise()
        self._started = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._synchronise()
        self.seconds.append(time.perf_counter() - self._started)

    @staticmethod
    def _synchronise() -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()


class CountingTrainer(SFTTrainer):
    """Counts the real tokens (no padding) of every batch that is trained on."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tokens: list[int] = []

    def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
        mask = inputs.get("attention_mask")
        self.tokens.append(int(mask.sum()) if mask is not None else int(inputs["input_ids"].numel()))
        return super().training_step(model, inputs, *rest, **named)


def read_rows(path: Path, most: int) -> Dataset:
    """Rows {"user", "assistant"} as TRL's conversational prompt and completion: loss on the completion alone."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return Dataset.from_list(
        [
            {
                "prompt": [{"role": "user", "content": row["user"]}],
                "completion": [{"role": "assistant", "content": row["assistant"]}],
            }
            for row in (rows[:most] if most else rows)
        ]
    )


def make_config(a: argparse.Namespace) -> SFTConfig:
    """TRL's defaults, and whatever the command line changes."""
    config: dict[str, Any] = {"output_dir": a.out, "report_to": "none", "save_strategy": "no", "logging_steps": 10}
    config |= {"max_steps": a.steps} if a.steps else {"num_train_epochs": a.epochs}
    if a.rows:
        config["per_device_train_batch_size"] = a.rows
    if a.lr:
        config |= {"learning_rate": a.lr, "lr_scheduler_type": a.schedule, "warmup_steps": a.warmup}
    config |= json.loads(a.config)
    if not torch.cuda.is_available():
        config["use_cpu"] = True
    return SFTConfig(**config)


def main() -> None:
    """Train, save the adapter, print the figures."""
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("data", type=Path)
    parser.add_argument("out")
    parser.add_argument("--most", type=int, default=0, help="rows of the data, 0 for all")
    parser.add_argument("--steps", type=int, default=0)
    parser.add_argument("--epochs", type=float, default=3)
    parser.add_argument("--rows", type=int, default=0, help="rows a step; 0 leaves TRL's default")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=32)
    parser.add_argument("--lr", type=float, default=0)
    parser.add_argument("--schedule", default="cosine")
    parser.add_argument("--warmup", type=float, default=0)
    parser.add_argument("--dtype", default="", help="of the base; empty leaves it to TRL")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--config", default="{}", help="more fields of SFTConfig, as JSON")
    a = parser.parse_args()
    if a.threads:
        torch.set_num_threads(a.threads)
    started = time.perf_counter()
    clock = StepClock()
    config = make_config(a)
    trainer = CountingTrainer(
        model=AutoModelForCausalLM.from_pretrained(a.base, dtype=a.dtype) if a.dtype else a.base,
        args=config,
        train_dataset=read_rows(a.data, a.most),
        processing_class=AutoTokenizer.from_pretrained(a.base),
        peft_config=LoraConfig(r=a.rank, lora_alpha=a.alpha, target_modules=TARGETS, task_type="CAUSAL_LM"),
        callbacks=[clock],
    )
    trainer.train()
    total = time.perf_counter() - started
    trainer.save_model(a.out)
    per_step = len(trainer.tokens) // max(1, len(clock.seconds))
    tokens = [sum(trainer.tokens[i * per_step : (i + 1) * per_step]) for i in range(len(clock.seconds))]
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    figures = {
        "tokens": tokens,
        "seconds": [round(s, 4) for s in clock.seconds],
        "total_seconds": total,
        "losses": losses,
        "settings": {
            "rows": config.per_device_train_batch_size,
            "gradient_checkpointing": config.gradient_checkpointing,
            "bf16": config.bf16,
            "packing": config.packing,
            "lr": config.learning_rate,
        },
        "versions": {"trl": trl.__version__, "transformers": transformers.__version__, "torch": torch.__version__},
    }
    print("RESULT " + json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()

"""A peer's step inside TRL's SFTTrainer, on rows that are tokenised already: `python lora_trainer.py SPEC`.

Some peers pack rows, or lay them out without padding, only inside their trainer: this is how their users get it. Same
spec and result as lora_step.py, whose models it uses. A step's seconds run from the trainer's step begin to its end;
tokens are those that reach the model without padding.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lora_step import IGNORE, peft_model, prepare_environment, read_rows, unsloth_model


def tokenised(spec: dict[str, Any]) -> Any:
    """As many rows as all steps take, with labels."""
    import numpy as np
    from datasets import Dataset

    rows = read_rows(spec["rows_file"], spec["shape"]["vocab"])
    count = (spec["warm"] + spec["steps"]) * spec["rows"]
    taken = [rows[i % len(rows)] for i in range(count)]
    return Dataset.from_list(
        [{"input_ids": ids.tolist(), "labels": np.where(mask, ids, IGNORE).tolist()} for ids, mask in taken]
    )


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Train for the spec's steps."""
    started = time.perf_counter()
    unsloth = spec["peer"]["mode"].startswith("unsloth")
    model = unsloth_model(spec) if unsloth else peft_model(spec)
    import torch
    from transformers import AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    cuda = spec["device"] == "cuda"
    tokens: list[int] = []
    seconds: list[float] = []
    begun = [0.0, 0.0]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            begun[0] = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun[0])
            begun[1] = begun[1] or time.time()

    class Counting(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *rest: Any, **named: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens.append(int(mask.sum()) if mask is not None else int(inputs["input_ids"].numel()))
            return super().training_step(model, inputs, *rest, **named)

    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder,
            per_device_train_batch_size=spec["rows"],
            max_steps=spec["warm"] + spec["steps"],
            learning_rate=1e-4,
            bf16=cuda,
            use_cpu=not cuda,
            # An unsloth model brings its own checkpointing with it.
            gradient_checkpointing=spec["peer"]["checkpoint"] == "full",
            logging_steps=1_000,
            report_to="none",
            save_strategy="no",
        )
        tokenizer = AutoTokenizer.from_pretrained(Path(spec["rows_file"]).parent / "tokenizer")
        trainer = Counting(
            model=model,
            args=config,
            train_dataset=tokenised(spec),
            processing_class=tokenizer,
            callbacks=[Clock()],
        )
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        load_s = time.perf_counter() - started
        loss = trainer.train().training_loss
    return {
        "seconds": [round(s, 5) for s in seconds[spec["warm"] :]],
        "tokens": tokens[spec["warm"] :],
        "first_s": round(seconds[0], 3),
        "first_at": begun[1],
        "load_s": round(load_s, 2),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if cuda else None,
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 3) if cuda else None,
        "loss": round(loss, 4),
    }


def main() -> None:
    """Measure what the command line says."""
    prepare_environment()
    spec = json.loads(sys.argv[1])
    if spec["peer"]["mode"].startswith("unsloth"):
        import unsloth  # noqa: F401 (before transformers, as it asks)
    print("RESULT " + json.dumps(measure(spec)), flush=True)


if __name__ == "__main__":
    main()

"""One measurement of a peer's LoRA step: `python lora_step.py SPEC`, one line `RESULT {…}` out.

Runs in the peers' environment, without tenon. SPEC is JSON: the fields of `benchmarks.gpu.works.Spec`. The step is a
plain loop (forward, backward, clip, AdamW) around the model that the peer prepares as its own documentation says; so
no trainer's overhead counts against it. mode `make` writes a random base as files for the peers that load one.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORE = -100


def prepare_environment() -> None:
    """No network, no statistics, and an allocator that does not fragment; before anything heavy is imported."""
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "UNSLOTH_DISABLE_STATISTICS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")


def llama_config(shape: dict[str, Any]) -> Any:
    """The shape as transformers' configuration."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=shape["hidden"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape["kv_heads"],
        intermediate_size=shape["feed_forward"],
        vocab_size=shape["vocab"],
        tie_word_embeddings=shape["tied_head"],
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )


def random_model(spec: dict[str, Any]) -> Any:
    """A random model made on the device, in bf16 on a GPU."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    dtype = torch.bfloat16 if spec["device"] == "cuda" else torch.float32
    with torch.device(spec["device"]):
        return AutoModelForCausalLM.from_config(llama_config(spec["shape"]), dtype=dtype, attn_implementation="sdpa")


def make_base(spec: dict[str, Any], folder: Path, tokenizer: Path) -> None:
    """Write a random model as files, beside a real tokenizer's files."""
    random_model(spec).save_pretrained(folder)
    for file in tokenizer.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())


def peft_model(spec: dict[str, Any]) -> Any:
    """transformers and PEFT, with Liger's kernels or bitsandbytes' nf4 base where the mode says so."""
    import torch
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    mode, checkpoint = spec["peer"]["mode"], spec["peer"]["checkpoint"]
    if mode == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    if mode == "peft4":
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        nf4 = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        model = AutoModelForCausalLM.from_pretrained(
            spec["weights"],
            quantization_config=nf4,
            dtype=torch.bfloat16,
            device_map={"": 0},
            attn_implementation="sdpa",
        )
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    else:
        model = random_model(spec)
    (rank,) = spec["ranks"]
    lora = LoraConfig(r=rank, lora_alpha=2 * rank, lora_dropout=0.0, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(model, lora)
    if checkpoint == "full":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    model.config.use_cache = False
    return model


def unsloth_model(spec: dict[str, Any]) -> Any:
    """Unsloth, as its documentation loads a base and adds an adapter."""
    import torch
    from unsloth import FastLanguageModel

    (rank,) = spec["ranks"]
    model, _ = FastLanguageModel.from_pretrained(
        spec["weights"],
        max_seq_length=max(2048, spec["row_tokens"]),
        dtype=torch.bfloat16,
        load_in_4bit=spec["peer"]["mode"] == "unsloth4",
    )
    return FastLanguageModel.get_peft_model(
        model,
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0,
        bias="none",
        target_modules=TARGETS,
        use_gradient_checkpointing={"none": False, "full": True, "own": "unsloth"}[spec["peer"]["checkpoint"]],
    )


def drawn(spec: dict[str, Any], step: int) -> dict[str, np.ndarray]:
    """Rows of one length: ids at random as a function of the step, every token a label."""
    vocab = spec["shape"]["vocab"]
    shape = (spec["rows"], spec["row_tokens"])
    ids = np.random.default_rng(step).integers(min(10, vocab - 1), min(40_000, vocab), shape)
    return {"input_ids": ids, "labels": ids}


def read_rows(path: str, vocab: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, supervised) of the rows in the file that ours reads too."""
    with np.load(path) as arrays:
        ids = arrays["train_ids"].astype(np.int64) % vocab
        cuts = np.cumsum(arrays["train_lengths"])[:-1]
        supervised = np.unpackbits(arrays["train_supervised"], count=len(ids)).astype(bool)
    return list(zip(np.split(ids, cuts), np.split(supervised, cuts), strict=True))


def padded(rows: list[tuple[np.ndarray, np.ndarray]], pad: int = 2) -> dict[str, np.ndarray]:
    """Rows side by side, the shorter ones padded on the right; padding is masked and has no label."""
    shape = (len(rows), max(len(ids) for ids, _ in rows))
    ids_NL, mask_NL, labels_NL = np.full(shape, pad), np.zeros(shape, dtype=np.int64), np.full(shape, IGNORE)
    for i, (ids, supervised) in enumerate(rows):
        ids_NL[i, : len(ids)], mask_NL[i, : len(ids)] = ids, 1
        labels_NL[i, : len(ids)] = np.where(supervised, ids, IGNORE)
    return {"input_ids": ids_NL, "attention_mask": mask_NL, "labels": labels_NL}


def packed(rows: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, np.ndarray]:
    """Rows end to end as one, without padding: positions begin again at each, which transformers masks by."""
    labels = [np.where(supervised & (np.arange(len(ids)) > 0), ids, IGNORE) for ids, supervised in rows]
    return {
        "input_ids": np.concatenate([ids for ids, _ in rows])[None],
        "position_ids": np.concatenate([np.arange(len(ids)) for ids, _ in rows])[None],
        "labels": np.concatenate(labels)[None],
    }


def batches(spec: dict[str, Any]) -> tuple[list[dict[str, np.ndarray]], list[int]]:
    """The inputs of every step, and the real tokens of each."""
    steps, count = spec["warm"] + spec["steps"], spec["rows"]
    if not spec["rows_file"]:
        return [drawn(spec, step) for step in range(steps)], [count * spec["row_tokens"]] * steps
    rows = read_rows(spec["rows_file"], spec["shape"]["vocab"])
    lay = packed if spec["peer"]["layout"] == "packed" else padded
    windows = [[rows[(step * count + i) % len(rows)] for i in range(count)] for step in range(steps)]
    return [lay(window) for window in windows], [sum(len(ids) for ids, _ in window) for window in windows]


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Prepare the peer's model, run all steps; the fields are those of ours."""
    started = time.perf_counter()
    unsloth = spec["peer"]["mode"].startswith("unsloth")
    model = unsloth_model(spec) if unsloth else peft_model(spec)
    import torch  # after the peer: unsloth asks to be imported first

    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)
    inputs, tokens = batches(spec)
    cuda = spec["device"] == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    load_s = time.perf_counter() - started
    seconds, loss, first_at = [], None, 0.0
    for arrays in inputs:
        begun = time.perf_counter()
        batch = {name: torch.from_numpy(array).to(spec["device"]) for name, array in arrays.items()}
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begun)
        first_at = first_at or time.time()
        loss = loss.detach()
    return {
        "seconds": [round(s, 5) for s in seconds[spec["warm"] :]],
        "tokens": tokens[spec["warm"] :],
        "first_s": round(seconds[0], 3),
        "first_at": first_at,
        "load_s": round(load_s, 2),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 3) if cuda else None,
        "reserved_gb": round(torch.cuda.max_memory_reserved() / 1e9, 3) if cuda else None,
        "loss": round(float(loss), 4) if loss is not None else None,
        "trainable": sum(p.numel() for p in trained),
    }


def main() -> None:
    """Make a base (`make SPEC FOLDER TOKENIZER`) or measure (`SPEC`)."""
    prepare_environment()
    if sys.argv[1] == "make":
        make_base(json.loads(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
        result: dict[str, Any] = {"made": sys.argv[3]}
    else:
        spec = json.loads(sys.argv[1])
        if spec["peer"]["mode"].startswith("unsloth"):
            import unsloth  # noqa: F401 (before transformers, as it asks)
        result = measure(spec)
    print("RESULT " + json.dumps(result), flush=True)


if __name__ == "__main__":
    main()

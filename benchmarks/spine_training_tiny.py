"""Fifty steps on a tiny random base against PEFT and a plain torch loop: where rounding is all that can differ.

Run: python -m benchmarks.spine_training_tiny
The same comparison as `spine_training`, whose real base magnifies rounding: see docs/benchmarks.md.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from benchmarks.report import at_most, write
from tenon.adapters.bank import AdapterBank, initialise
from tenon.adapters.peft_files import write_adapter
from tests.parity.our_loop import optimizer_plan, peft_tensors, train_slots
from tests.parity.peft_loop import train_with_peft
from tests.parity.test_training import make_windows, open_base, tiny_config
from tests.tiny import CPU, slot_shape

STEPS = 50


def main() -> None:
    """Measure and write the file."""
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        torch.manual_seed(0)
        LlamaForCausalLM(tiny_config()).save_pretrained(str(root / "base"))
        facts, decoder = open_base(root / "base")
        bank = AdapterBank(facts, dtype=torch.float32, device=CPU)
        bank.add("own", slot_shape(facts, rank=8, scale=2.0), trained=True)
        initialise(bank.slots[0], "kaiming", 3)
        (root / "start").mkdir()
        write_adapter(root / "start", bank.slots[0], base=str(root / "base"))
        windows, plan = make_windows(2, 1) * (STEPS // 2), optimizer_plan(2e-3)
        factors = [1.0 - step / STEPS for step in range(STEPS)]
        theirs = train_with_peft(root / "base", root / "start", windows, plan, factors)
        ours = train_slots(decoder, bank, windows, {0: plan}, factors)[0]
        tensors = peft_tensors(bank, 0, root / "end")
    loss = max(abs(a - b) / b for a, b in zip(ours, theirs.losses, strict=True))
    adapter = max(float((tensors[name] - theirs.tensors[name]).abs().max()) for name in theirs.tensors)
    rows = [
        at_most(f"loss of {STEPS} steps against PEFT and a plain loop", loss, "relative", 1e-5),
        at_most(f"adapter after {STEPS} steps against PEFT's", adapter, "max abs difference", 1e-4),
    ]
    for row in rows:
        print(f"{row.what}: {row.value:.2e} {row.unit}" + (" ok" if row.met else " SHORT"))
    print(write("spine_training_tiny", rows))


if __name__ == "__main__":
    main()

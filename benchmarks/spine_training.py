"""Training against PEFT and a plain torch loop, four slots together against each alone, adapter files both ways. fp32.

Run: python -m benchmarks.spine_training --data FOLDER
The base is SmolLM2-135M, the rows are banking77's; what is compared is what the tests compare on tiny random bases.
"""

from __future__ import annotations

import argparse
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.report import Row, at_most, write
from benchmarks.spine_banking77 import read_csv
from tenon.adapters.bank import AdapterBank, initialise
from tenon.adapters.peft_files import load_adapter, read_adapter, write_adapter
from tenon.bases.facts import ModelFacts
from tenon.bases.locate import locate_base
from tenon.bases.read import folder_facts
from tenon.data.pack import PackOptions, PackRow, bare_row, pack_rows
from tenon.data.render import Renderer
from tenon.data.rows import Chat
from tenon.data.tokenizer import load_tokenizer
from tenon.models.decoder import Decoder
from tenon.models.load import load_decoder
from tenon.models.prepare import prepare_base
from tenon.settings import read_settings
from tests.parity.our_loop import optimizer_plan, peft_tensors, train_slots
from tests.parity.peft_loop import train_with_peft
from tests.tiny import CPU, random_slot, slot_shape

BASE, STEPS, ROWS, SLOT_STEPS = "smollm2-135m", 50, 4, 20


@dataclass(frozen=True, slots=True)
class Bench:
    """The base as files and as a decoder, and rows as tokens."""

    folder: Path
    facts: ModelFacts
    decoder: Decoder
    rows: list[PackRow]

    def bank(self) -> AdapterBank:
        """An empty bank."""
        return AdapterBank(self.facts, dtype=torch.float32, device=CPU)

    def windows(self, steps: int, slots: int = 1) -> list[list[PackRow]]:
        """ROWS rows a slot and step, in a fixed order, every row once."""
        taken = iter(self.rows)
        return [[in_slot(next(taken), slot) for slot in range(slots) for _ in range(ROWS)] for _ in range(steps)]


def in_slot(row: PackRow, slot: int) -> PackRow:
    """The same row for another slot."""
    return PackRow(slot, row.ids, row.supervised, row.index)


def main() -> None:
    """Measure all three and write the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="folder with train.csv")
    a = parser.parse_args()
    bench = open_bench(a.data)
    with tempfile.TemporaryDirectory() as name:
        rows = [*peft_rows(bench, Path(name)), *slot_rows(bench), *file_rows(bench, Path(name))]
    path = write("spine_training", rows)
    for row in rows:
        print(f"{row.what}: {row.value:.2e} {row.unit}" + ("" if row.met is None else " ok" if row.met else " SHORT"))
    print(path)


def open_bench(data: Path) -> Bench:
    """The base and shuffled rows."""
    settings = read_settings()
    folder = prepare_base(locate_base(BASE, settings), settings)
    facts = folder_facts(folder)
    renderer = Renderer(load_tokenizer(folder))
    table = read_csv(data / "train.csv")
    random.Random(0).shuffle(table)
    rows = []
    for index, row in enumerate(table[:1000]):
        messages = ({"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["category"]})
        rendered = renderer.render(Chat(messages, None, f"train.csv:{index}"))
        rows.append(PackRow(0, np.array(rendered.ids), np.array(rendered.supervised), index))
    return Bench(folder, facts, load_decoder(folder, facts, dtype=torch.float32, device=CPU), rows)


def peft_rows(bench: Bench, root: Path) -> list[Row]:
    """Fifty steps of both, from the same start, over the same rows in the same order."""
    bank = bench.bank()
    bank.add("own", slot_shape(bench.facts, rank=16, scale=2.0), trained=True)
    initialise(bank.slots[0], "kaiming", 0)
    start = root / "start"
    start.mkdir()
    write_adapter(start, bank.slots[0], base=str(bench.folder))
    windows, plan = bench.windows(STEPS), optimizer_plan(2e-4)
    factors = [1.0 - step / STEPS for step in range(STEPS)]
    theirs = train_with_peft(bench.folder, start, windows, plan, factors)
    ours = train_slots(bench.decoder, bank, windows, {0: plan}, factors)[0]
    tensors = peft_tensors(bank, 0, root / "end")
    loss = max(abs(a - b) / b for a, b in zip(ours, theirs.losses, strict=True))
    adapter = max(float((tensors[name] - theirs.tensors[name]).abs().max()) for name in theirs.tensors)
    return [
        Row("loss at step 1", ours[0], "nats/token"),
        Row(f"loss at step {STEPS}", ours[-1], "nats/token"),
        at_most(f"loss of {STEPS} steps against PEFT and a plain loop", loss, "relative", 1e-5),
        at_most(f"adapter after {STEPS} steps against PEFT's", adapter, "max abs difference", 1e-4),
    ]


def slot_rows(bench: Bench) -> list[Row]:
    """Four adapters of different rank, targets and learning rate, together and alone."""
    shapes = [
        slot_shape(bench.facts, rank=16, scale=2.0),
        slot_shape(bench.facts, rank=4, scale=4.0, modules=("q_proj", "v_proj")),
        slot_shape(bench.facts, rank=8, scale=2.0, modules=("gate_proj", "up_proj", "down_proj")),
        slot_shape(bench.facts, rank=2, scale=2.0, modules=("q_proj", "k_proj", "v_proj", "o_proj")),
    ]
    plans = [optimizer_plan(lr) for lr in (2e-4, 1e-3, 5e-4, 3e-4)]
    windows = bench.windows(SLOT_STEPS, len(shapes))

    def run(slots: list[int]) -> dict[int, torch.Tensor]:
        bank = bench.bank()
        for slot, shape in enumerate(shapes):
            bank.add(str(slot), shape, trained=True)
            initialise(bank.slots[slot], "kaiming", slot)
        own = [[row for row in window if row.slot in slots] for window in windows]
        train_slots(bench.decoder, bank, own, {s: plans[s] for s in slots}, [1.0] * SLOT_STEPS)
        return {s: bank.slots[s].parameters_P for s in slots}

    together = run(list(range(len(shapes))))
    worst = max(float((together[s] - run([s])[s]).abs().max()) for s in range(len(shapes)))
    return [at_most(f"four slots together against each alone, {SLOT_STEPS} steps", worst, "max abs difference", 1e-5)]


def file_rows(bench: Bench, root: Path) -> list[Row]:
    """Logits of our files in PEFT, and of PEFT's files here, on a whole row; relative to the largest logit."""
    ids = bench.rows[0].ids.tolist()
    bank = bench.bank()
    random_slot(bank, slot_shape(bench.facts, rank=16), 0, trained=False)
    ours = root / "ours"
    ours.mkdir()
    write_adapter(ours, bank.slots[0], base=str(bench.folder))
    torch.manual_seed(0)
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(_model(bench), config).save_pretrained(str(root / "theirs"))
    slot = load_adapter(bank, "theirs", read_adapter(root / "theirs"))
    rows = []
    for what, number, folder in (("our files in PEFT", 0, ours), ("PEFT's files in ours", slot, root / "theirs")):
        (batch,) = pack_rows([bare_row(number, ids)], PackOptions(9999), CPU)
        with torch.no_grad():
            mine = bench.decoder.logits(bench.decoder.forward(batch, bank))
            other = PeftModel.from_pretrained(_model(bench), folder)(torch.tensor([ids])).logits[0]
        worst = float((mine - other).abs().max() / other.abs().max())
        rows.append(at_most(f"adapter files: {what}, logits", worst, "max difference / largest logit", 1e-5))
    return rows


def _model(bench: Bench) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(bench.folder, dtype=torch.float32)


if __name__ == "__main__":
    main()

"""One format of the base in training: `python -m benchmarks.ours.parity SPEC`, one line `RESULT {…}` out.

All slots (learning rates x seeds) train together over one resident base. At the first, the 100th and the last step
every slot's gradient is held against plain fp32 torch at the same adapters and rows, over the original weights and over
the weights as the format rounds them. At the end the adapters are judged on the original base.

Shape legend: T tokens, L labelled tokens, N rows. This module does not know what the figures must reach.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.gpu.rows import Row, read_rows
from benchmarks.gpu.works import BaseFormat
from benchmarks.ours.contact import (
    Stepper,
    compute_dtype,
    folder_decoder,
    make_bank,
    plain_decoder,
    step_options,
)
from tenon.adapters.bank import AdapterBank
from tenon.bases.facts import parse_site
from tenon.batch import IGNORE
from tenon.data.pack import PackOptions, PackRow, pack_rows
from tenon.models.decoder import Decoder

MICRO_TOKENS = 16_384
WARMUP = 0.05
ORIGINAL, OWN = "original weights", "own weights"
# Controls: what is held against plain fp32 over the original weights instead of our step.
PLAIN, WEIGHTS_ALONE = "plain torch in bf16", "plain fp32 over its own weights"


@dataclass(frozen=True, slots=True)
class ParitySpec:
    """folder: the base. rates, seeds: a slot for each pair. rows: of each slot and step. heldout: test rows judged."""

    folder: str
    rows_file: str
    base: BaseFormat
    rates: tuple[float, ...] = (1e-4, 3e-4, 1e-3)
    seeds: tuple[int, ...] = (0, 1, 2)
    rank: int = 16
    steps: int = 400
    rows: int = 16
    heldout: int = 3080
    checks: tuple[int, ...] = (1, 100)
    device: str = "cuda"

    @property
    def slots(self) -> list[tuple[float, int]]:
        """(learning rate, seed) of each slot."""
        return [(lr, seed) for lr in self.rates for seed in self.seeds]


def parse_spec(text: str) -> ParitySpec:
    """Inverse of the JSON that the parent writes."""
    tree: dict[str, Any] = json.loads(text)
    listed: dict[str, Any] = {name: tuple(value) for name, value in tree.items() if isinstance(value, list)}
    return ParitySpec(**{**tree, **listed})


def window(rows: Sequence[Row], spec: ParitySpec, step: int) -> list[PackRow]:
    """The rows of a step (from 0): a slot's order is drawn by its seed alone, a new one for each pass over the rows."""
    taken = []
    for slot, (_, seed) in enumerate(spec.slots):
        places = [divmod(place, len(rows)) for place in range(step * spec.rows, (step + 1) * spec.rows)]
        order = {epoch: np.random.default_rng((seed, epoch)).permutation(len(rows)) for epoch, _ in places}
        for epoch, at in places:
            index = int(order[epoch][at])
            taken.append(PackRow(slot, rows[index].ids, rows[index].supervised, index))
    return taken


def factor(step: int, steps: int) -> float:
    """The learning rate's factor at a step (from 0): up over the first steps, then down to zero in a line."""
    warm = max(1, round(WARMUP * steps))
    return (step + 1) / warm if step < warm else (steps - step) / max(1, steps - warm)


def train(decoder: Decoder, references: dict[str, Decoder], rows: Sequence[Row], spec: ParitySpec) -> dict[str, Any]:
    """All steps: each slot's losses, and the cosines at the steps that are checked."""
    slots = spec.slots
    bank = make_bank(decoder, [spec.rank] * len(slots), [seed for _, seed in slots])
    rates = {number: lr for number, (lr, _) in enumerate(slots)}
    stepper = Stepper(decoder, bank, rates, step_options(MICRO_TOKENS))
    losses: list[list[float]] = [[] for _ in slots]
    cosines: dict[str, Any] = {}
    checked = {check - 1 for check in (*spec.checks, spec.steps) if check <= spec.steps}
    for step in range(spec.steps):
        taken = window(rows, spec, step)
        for number, found in stepper.gradient(taken).items():
            losses[number].append(round(found.loss, 5))
        if step in checked:
            cosines[str(step + 1)] = hold_against(bank, decoder, references, taken, spec)
        stepper.update(factor(step, spec.steps))
    return {"losses": losses, "cosines": cosines, "bank": bank}


def hold_against(
    bank: AdapterBank, decoder: Decoder, references: dict[str, Decoder], rows: Sequence[PackRow], spec: ParitySpec
) -> dict[str, Any]:
    """The bank's gradients against each reference's; and what no kernel could do better: the same in plain torch of
    the same dtype (bf16 alone), and exact arithmetic over the rounded weights.
    """
    wanted = {name: gradients_of(reference, bank, rows, spec) for name, reference in references.items()}
    found = {name: likeness(bank, gradients) for name, gradients in wanted.items()}
    if OWN in wanted:
        found[WEIGHTS_ALONE] = likeness(wanted[OWN], wanted[ORIGINAL])
    elif decoder.fuse:
        found[PLAIN] = likeness(gradients_of(decoder.plain(), bank, rows, spec), wanted[ORIGINAL])
    return found


def gradients_of(reference: Decoder, bank: AdapterBank, rows: Sequence[PackRow], spec: ParitySpec) -> AdapterBank:
    """A bank with the same adapters, and the gradients that a reference gives them."""
    slots = spec.slots
    other = make_bank(reference, [spec.rank] * len(slots), [seed for _, seed in slots])
    for number, slot in other.slots.items():
        slot.parameters_P.copy_(bank.slots[number].parameters_P)
        slot.refresh()
    Stepper(reference, other, dict.fromkeys(other.slots, 0.0), step_options(MICRO_TOKENS)).gradient(rows)
    return other


def likeness(bank: AdapterBank, right: AdapterBank) -> dict[str, Any]:
    """The cosine of every module's gradient (A and B as one vector) with the right one's, the least of all slots.

    least, mean: over all modules; worst: which one has the least; modules: the least over layers, by name.
    """
    found: dict[str, float] = {}
    for number, slot in right.slots.items():
        ours = bank.slots[number].site_gradients()
        for site, wanted in slot.site_gradients().items():
            cosine = functional.cosine_similarity(_flat(ours[site]), _flat(wanted), dim=0)
            found[site] = min(found.get(site, 1.0), float(cosine))
    worst = min(found, key=lambda site: found[site])
    modules: dict[str, float] = {}
    for site, cosine in found.items():
        name = parse_site(site)[1]
        modules[name] = min(modules.get(name, 1.0), round(cosine, 6))
    return {"least": found[worst], "mean": sum(found.values()) / len(found), "worst": worst, "modules": modules}


def _flat(pair: tuple[Tensor, Tensor]) -> Tensor:
    return torch.cat([part.flatten().double() for part in pair])


@torch.no_grad()
def judge(decoder: Decoder, bank: AdapterBank, slot: int, rows: Sequence[Row]) -> dict[str, float]:
    """Loss a supervised token, and the share of rows whose answer would be generated greedily, word for word.

    A greedy answer equals the row's exactly when every one of its tokens is the likeliest after those before it.
    """
    packed = [PackRow(slot, row.ids, row.supervised, index) for index, row in enumerate(rows)]
    loss, tokens, right = 0.0, 0, 0
    packing = PackOptions(
        MICRO_TOKENS, share_prefix=False, packed=decoder.attends_packed, tile_tokens=decoder.tile_tokens
    )
    for batch in pack_rows(packed, packing, decoder.device):
        labelled_L = torch.nonzero(batch.labels_T != IGNORE).squeeze(-1)
        labels_L = batch.labels_T[labelled_L]
        logits_LV = decoder.logits(decoder.forward(batch, bank)[labelled_L]).float()
        loss += float(functional.cross_entropy(logits_LV, labels_L, reduction="sum"))
        tokens += len(labels_L)
        ends_N = torch.tensor(batch.cu_seqlens[1:], device=decoder.device)
        row_L = torch.searchsorted(ends_N, labelled_L, right=True)
        wrong_N = torch.zeros(len(ends_N), device=decoder.device)
        wrong_N.index_add_(0, row_L, (logits_LV.argmax(dim=-1) != labels_L).float())
        right += int((wrong_N == 0).sum())
    return {"loss": loss / max(1, tokens), "accuracy": right / max(1, len(rows))}


def measure(spec: ParitySpec) -> dict[str, Any]:
    """Train, and judge the adapters of all slots on the original base."""
    device, folder = torch.device(spec.device), Path(spec.folder)
    original = folder_decoder(folder, "bf16", compute_dtype(device), device)
    decoder, references = original, {ORIGINAL: plain_decoder(original)}
    if spec.base != "bf16":
        decoder = folder_decoder(folder, spec.base, compute_dtype(device), device)
        references[OWN] = plain_decoder(decoder)
    trained = train(decoder, references, read_rows(Path(spec.rows_file), "train"), spec)
    heldout = read_rows(Path(spec.rows_file), "test")[: spec.heldout]
    bank = trained.pop("bank")
    judged = [judge(original, bank, slot, heldout) for slot in range(len(spec.slots))]
    return {**trained, "heldout": judged, "rates": [lr for lr, _ in spec.slots], "seeds": [s for _, s in spec.slots]}


def main() -> None:
    """Measure what the command line says."""
    print("RESULT " + json.dumps(measure(parse_spec(sys.argv[1]))), flush=True)


if __name__ == "__main__":
    main()

"""The proof of the fast path with real kernels: right ones hold and leave no trace, wrong ones are found and not used.

Wrong ones come from a bank that tells fused kernels other figures than it tells plain torch.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tenon.adapters.bank import AdapterBank
from tenon.batch import Batch
from tenon.data.pack import PackRow
from tenon.errors import StopRequestedError
from tenon.kernels.blocks_triton import MEMBERS_AT
from tenon.kernels.low_rank import LowRank, Routes
from tenon.models.decoder import Decoder
from tenon.train.interrupt import StopSignal
from tenon.train.proof import prove
from tenon.train.step import StepOptions
from tests.tiny import random_slot, slot_shape, tiny_decoder, tiny_facts
from tests.train.world import Asked, Ports, make_slot, make_trainer, some_rows

OPTIONS = StepOptions(micro_tokens=256, share_prefix=False)
# Of a table: A's gradient, and of the first module B's gradient and its scale.
GRADIENT_A, GRADIENT_B, SCALE = 1, MEMBERS_AT + 1, MEMBERS_AT + 4


@dataclass(frozen=True)
class Wrong:
    """What fused kernels are told of one stacked weight: a field of the table, and what becomes of it."""

    stack: str
    field: int
    becomes: Callable[[Tensor], Tensor]


def scaled(by: float) -> Callable[[Tensor], Tensor]:
    """Of a field that holds the bits of a number in fp32."""

    def change(bits: Tensor) -> Tensor:
        values = [struct.unpack("<f", struct.pack("<i", bit))[0] for bit in bits.tolist()]
        return torch.tensor([struct.unpack("<i", struct.pack("<f", by * value))[0] for value in values])

    return change


WRONG = {
    "gate's term is left out": (Wrong("gate_up", SCALE, scaled(0.0)), "gate_proj"),
    "q's term is a tenth too small": (Wrong("qkv", SCALE, scaled(0.9)), "q_proj"),
    "down's B gets no gradient": (Wrong("down", GRADIENT_B, torch.zeros_like), "down_proj B"),
    "o's A gets no gradient": (Wrong("o", GRADIENT_A, torch.zeros_like), "o_proj A"),
}


class Misled(AdapterBank):
    """A bank of which fused kernels are told something wrong."""

    wrong: Wrong | None = None

    def low_rank(self, layer: int, stack: str, batch: Batch, routes: Routes | None) -> LowRank | None:
        low = super().low_rank(layer, stack, batch, routes)
        if low is None or low.table_SF is None or self.wrong is None or stack != self.wrong.stack:
            return low
        table_SF = low.table_SF.clone()
        table_SF[:, self.wrong.field] = self.wrong.becomes(table_SF[:, self.wrong.field].cpu()).to(table_SF.device)
        return replace(low, table_SF=table_SF)


def world(device: torch.device, wrong: Wrong | None = None, *, fuse: bool = True) -> tuple[Decoder, Misled]:
    facts = tiny_facts(layers=2)
    decoder = Decoder(facts, dtype=torch.float32, device=device, fuse=fuse)
    decoder.load_tensors(tiny_decoder(facts).named_tensors().items())
    bank = Misled(facts, dtype=torch.float32, device=device)
    bank.wrong = wrong
    return decoder, bank


def row(slot: int, length: int) -> PackRow:
    return PackRow(slot, np.arange(length) * 7 % 96 + 1, np.arange(length) > length // 3, 0, draw=slot)


@pytest.mark.parametrize("drop", [0.0, 0.2])
def test_p05_right_kernels_hold_and_everything_is_as_it_was(drop: float, device: torch.device) -> None:
    decoder, bank = world(device)
    for seed, rank in ((0, 4), (1, 3)):
        random_slot(bank, slot_shape(decoder.facts, rank=rank, drop=drop), seed)
    before = [slot.parameters_P.clone() for slot in bank.slots.values()]
    generator = torch.get_rng_state()
    found = prove(decoder, bank, [row(0, 30), row(1, 17), row(0, 9)], OPTIONS, stop=StopSignal())
    assert (found.verdict, found.problem, found.tokens) == ("holds", "", 56)
    assert 1 - 1e-6 < found.cosine <= 1 + 1e-6 and found.matrix.startswith("slot") and found.seconds > 0
    assert 0 <= found.loss_difference < 1e-5
    assert all(torch.equal(slot.parameters_P, b) for slot, b in zip(bank.slots.values(), before, strict=True))
    assert all(slot.gradients_P is not None and not slot.gradients_P.any() for slot in bank.slots.values())
    assert torch.equal(torch.get_rng_state(), generator) and decoder.is_fast


@pytest.mark.parametrize("name", WRONG)
def test_p05_wrong_kernels_are_found_though_every_b_is_zero(name: str, device: torch.device) -> None:
    """A fresh slot: without noise, no low-rank term and no gradient of A would show at all."""
    wrong, named = WRONG[name]
    decoder, bank = world(device, wrong)
    slot = bank.slots[random_slot(bank, slot_shape(decoder.facts), 0)]
    for _, b_OR in slot.matrices().values():
        b_OR.zero_()
    slot.refresh()
    found = prove(decoder, bank, [row(0, 20)], OPTIONS, stop=StopSignal())
    assert found.verdict == "fails" and (named in found.problem or "loss" in found.problem), found


def test_p05_a_run_on_wrong_kernels_falls_back_says_so_and_is_the_plain_run(
    tmp_path: Path, device: torch.device
) -> None:
    ends: list[Tensor] = []
    for fuse in (True, False):
        decoder, bank = world(device, WRONG["gate's term is left out"][0], fuse=fuse)
        ports = Ports(tmp_path / str(fuse))
        slot = make_slot(decoder, bank, Asked(steps=2, rows=2), some_rows(8))
        make_trainer(decoder, bank, [slot], ports).run()
        ends.append(slot.slot.parameters_P)
        assert [event["verdict"] for event in ports.of("proof")] == (["fails"] if fuse else [])
        assert [event["code"] for event in ports.of("warning")] == (["train-fast-path"] if fuse else [])
    assert torch.equal(*ends)


def test_p05_a_proof_leaves_no_trace_in_the_training(
    tmp_path: Path, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is resumed elsewhere proves its kernels once more than one that never stopped: the same bits."""
    ends: list[Tensor] = []
    for halves in ((2,), (1, 2)):
        folder = tmp_path / str(len(halves))
        for last in halves:
            monkeypatch.setattr("tenon.train.loop.describe_path", lambda device, last=last: f"{device} {last}")
            decoder, bank = world(device)
            ports = Ports(folder)
            slot = make_slot(decoder, bank, Asked(steps=2, rows=2), some_rows(8))
            trainer = make_trainer(decoder, bank, [slot], ports)
            trainer.resume()

            def stop_at(kind: str, fields: dict[str, object], last: int = last, ports: Ports = ports) -> None:
                if kind == "step" and fields["step"] == last < 2:
                    ports.stop.request()

            ports.on_event = stop_at
            try:
                trainer.run()
            except StopRequestedError:
                assert last == 1
            assert [event["verdict"] for event in ports.of("proof")] == ["holds"]
            if last == 2:
                ends.append(slot.slot.parameters_P)
    assert torch.equal(*ends)

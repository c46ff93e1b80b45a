"""The proof of the fast path: what it samples, what it lets pass, what it leaves behind, what a run does that fails it.

Kernels run in Triton's interpreter elsewhere (tests/kernels/interpreted/test_proof.py). Here none does: the fast path
fails, is stopped, or is never there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tenon.adapters.bank import AdapterBank
from tenon.batch import Batch
from tenon.data.pack import PackRow
from tenon.errors import StopRequestedError
from tenon.kernels.fp8 import Fp8Rows
from tenon.kernels.low_rank import LowRank, Routes
from tenon.models.decoder import Decoder
from tenon.models.frozen_formats import Nf4Linear
from tenon.models.frozen_plain import PlainLinear
from tenon.train.difference import Bounds, bounds_for, difference
from tenon.train.interrupt import StopNow, StopSignal
from tenon.train.proof import LONG_TOKENS, SHORT_TOKENS, prove, sample_rows
from tenon.train.step import StepOptions, supervised_count
from tests.tiny import CPU, random_slot, slot_shape, tiny_decoder, tiny_facts
from tests.train.world import Asked, Ports, make_slot, make_trainer, some_rows

OPTIONS = StepOptions(micro_tokens=4096, share_prefix=True)


class Interrupted(AdapterBank):
    """A bank that does something when fused kernels ask for its slots."""

    def __init__(self, decoder: Decoder, happens: Callable[[], None]) -> None:
        super().__init__(decoder.facts, dtype=torch.float32, device=CPU)
        self._happens = happens

    def low_rank(self, layer: int, stack: str, batch: Batch, routes: Routes | None) -> LowRank | None:
        if routes is not None:
            self._happens()
        return super().low_rank(layer, stack, batch, routes)


def out_of_resources() -> None:
    raise RuntimeError("out of resource: shared memory, Required: 327680, Hardware limit: 232448.\nReduce block sizes.")


def fast_decoder() -> Decoder:
    """One that would run fused kernels."""
    decoder = Decoder(tiny_facts(), dtype=torch.float32, device=CPU, fuse=True)
    decoder.load_tensors(tiny_decoder().named_tensors().items())
    return decoder


def row(slot: int, length: int, labels: range | None = None, index: int = 0) -> PackRow:
    supervised = np.zeros(length, dtype=bool)
    supervised[labels or range(length // 2, length)] = True
    return PackRow(slot, np.arange(length) % 96 + 1, supervised, index)


def state(bank: AdapterBank) -> list[Tensor]:
    return [slot.parameters_P.clone() for slot in bank.slots.values()]


@pytest.fixture(scope="module")
def plainly(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], Tensor]:
    """Losses and last weights of six steps in plain torch."""
    decoder = tiny_decoder()
    bank = AdapterBank(decoder.facts, dtype=torch.float32, device=CPU)
    ports = Ports(tmp_path_factory.mktemp("plain"))
    slot = make_slot(decoder, bank, Asked(steps=6), some_rows(16))
    make_trainer(decoder, bank, [slot], ports).run()
    assert ports.of("proof") == ports.of("warning") == []
    return [event["loss"] for event in ports.of("step")], slot.slot.parameters_P


def test_p05_a_run_whose_kernels_do_not_launch_says_so_and_is_the_plain_run(
    tmp_path: Path, plainly: tuple[list[object], Tensor]
) -> None:
    decoder, ports = fast_decoder(), Ports(tmp_path)
    bank = Interrupted(decoder, out_of_resources)
    slot = make_slot(decoder, bank, Asked(steps=6), some_rows(16))
    make_trainer(decoder, bank, [slot], ports).run()
    (proof,) = ports.of("proof")
    assert proof["verdict"] == "fails" and str(proof["problem"]).startswith(
        "RuntimeError: out of resource: shared memory"
    )
    (warning,) = ports.of("warning")
    assert warning["code"] == "train-fast-path" and str(proof["problem"]) in str(warning["text"])
    assert not decoder.is_fast
    assert [event["loss"] for event in ports.of("step")] == plainly[0]
    assert torch.equal(slot.slot.parameters_P, plainly[1])


@pytest.mark.parametrize("machine", ["the same", "another"])
def test_p05_p21_a_resumed_run_goes_on_as_it_was_proved_and_is_proved_again_elsewhere(
    tmp_path: Path, plainly: tuple[list[object], Tensor], machine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for done in (0, 3):
        if done and machine == "another":
            monkeypatch.setattr("tenon.train.loop.describe_path", lambda device: f"another {device}")
        decoder, ports = fast_decoder(), Ports(tmp_path)
        bank = Interrupted(decoder, out_of_resources)
        slot = make_slot(decoder, bank, Asked(steps=6), some_rows(16))
        trainer = make_trainer(decoder, bank, [slot], ports)
        assert trainer.resume() == done
        if not done:
            ports.on_event = lambda kind, fields, stop=ports.stop: (
                stop.request() if kind == "step" and fields["step"] == 3 else None
            )
        with nullcontext() if done else pytest.raises(StopRequestedError):
            trainer.run()
        proves = not done or machine == "another"
        assert next(event["kind"] for event in ports.events) == ("proof" if proves else "step")
        assert len(ports.of("proof")) == len(ports.of("warning")) == int(proves)
        assert not decoder.is_fast
    assert torch.equal(slot.slot.parameters_P, plainly[1])


def test_p05_what_is_no_failure_of_a_kernel_is_not_taken_for_one(tmp_path: Path) -> None:
    def mistake() -> None:
        raise ValueError("a mistake of our own")

    decoder = fast_decoder()
    bank = Interrupted(decoder, mistake)
    random_slot(bank, slot_shape(decoder.facts), 0)
    with pytest.raises(ValueError, match="of our own"):
        prove(decoder, bank, [row(0, 12)], OPTIONS, stop=StopSignal())


def test_p05_a_stop_in_the_middle_leaves_the_weights_as_they_were() -> None:
    decoder, stop = fast_decoder(), StopSignal()
    bank = Interrupted(decoder, stop.request)
    random_slot(bank, slot_shape(decoder.facts), 0)
    random_slot(bank, slot_shape(decoder.facts, rank=3), 1)
    before = state(bank)
    with pytest.raises(StopNow):
        prove(decoder, bank, [row(0, 12), row(1, 9)], OPTIONS, stop=stop)
    assert all(torch.equal(a, b) for a, b in zip(state(bank), before, strict=True))
    assert all(s.gradients_P is not None and not s.gradients_P.any() for s in bank.slots.values())


class Doubled(Nf4Linear):
    """A map whose kernels are wrong."""

    def apply(self, x_TD: Tensor, quantised: Fp8Rows | None = None) -> Tensor:
        return 2 * super().apply(x_TD, quantised)


def nf4_decoder(*, wrong: bool, fuse: bool) -> Decoder:
    """In nf4; wrong: two of the maps of each layer, the smallest among them."""
    facts = tiny_facts()
    decoder = Decoder(facts, dtype=torch.float32, device=CPU, kind="nf4", fuse=fuse)
    for layer in decoder.layers if wrong else ():
        for stack in ("o", "down"):
            shape = facts.stack_shape(stack)
            layer.stacks[stack] = Doubled(*shape, bias_O=None, dtype=torch.float32, device=CPU)
    decoder.load_tensors(tiny_decoder().named_tensors().items())
    return decoder


def test_p05_a_run_whose_quantised_base_is_multiplied_wrongly_goes_on_in_plain_torch(tmp_path: Path) -> None:
    ends: list[Tensor] = []
    for wrong in (True, False):
        decoder, ports = nf4_decoder(wrong=wrong, fuse=wrong), Ports(tmp_path / str(wrong))
        bank = AdapterBank(decoder.facts, dtype=torch.float32, device=CPU)
        slot = make_slot(decoder, bank, Asked(steps=3), some_rows(16))
        make_trainer(decoder, bank, [slot], ports).run()
        ends.append(slot.slot.parameters_P)
        if wrong:
            (proof,) = ports.of("proof")
            assert (proof["verdict"], proof["base"]) == ("fails", True)
            assert proof["problem"] == "products with the nf4 base are 100% off (at most 0.1%), at o"
            assert len(ports.of("warning")) == 1 and not decoder.is_fast
            assert all(isinstance(x, PlainLinear) for layer in decoder.layers for x in layer.stacks.values())
    torch.testing.assert_close(*ends)


def test_nothing_to_learn_and_no_memory_are_no_verdict() -> None:
    def no_memory() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    decoder = fast_decoder()
    bank = Interrupted(decoder, no_memory)
    random_slot(bank, slot_shape(decoder.facts), 0)
    unlabelled = PackRow(0, np.arange(1, 9), np.zeros(8, dtype=bool))
    found = prove(decoder, bank, [unlabelled], OPTIONS, stop=StopSignal())
    assert found.verdict == "unknown" and "nothing" not in found.problem and "token to learn from" in found.problem
    found = prove(decoder, bank, [row(0, 300)], OPTIONS, stop=StopSignal())
    assert found.verdict == "unknown" and "too little memory" in found.problem
    assert decoder.is_fast


# ---- samples --------------------------------------------------------------------------------------------------------


def test_a_sample_is_the_first_rows_of_every_slot_and_bounded() -> None:
    rows = [row(slot, 700, index=i) for slot in (0, 3) for i in range(9)]
    sample = sample_rows(rows, {0: None, 3: None}, LONG_TOKENS)
    assert [(r.slot, r.index, len(r.ids)) for r in sample] == [
        (0, 0, 700),
        (0, 1, 452),
        (3, 0, 700),
        (3, 1, 452),
    ]
    alone = sample_rows(rows[:9], {0: None}, LONG_TOKENS)
    assert sum(len(r.ids) for r in alone) == LONG_TOKENS > 2048
    assert sum(len(r.ids) for r in sample_rows(rows, {0: None, 3: None}, SHORT_TOKENS)) == SHORT_TOKENS


@pytest.mark.parametrize("labels", [range(1, 3), range(40, 41), range(990, 1000), range(5, 1000)])
def test_a_long_row_is_cut_to_where_its_labels_are(labels: range) -> None:
    (part,) = sample_rows([row(0, 1000, labels)], {0: None}, 64)
    assert len(part.ids) == len(part.supervised) == 64 and supervised_count(part) == min(len(labels), 63)


def test_rows_without_labels_and_slots_that_are_not_trained_are_left_out() -> None:
    silent = PackRow(0, np.arange(1, 9), np.zeros(8, dtype=bool), 0)
    assert [r.index for r in sample_rows([silent, row(0, 8, index=1), row(-1, 8)], {0: None}, 64)] == [1]


# ---- bounds ---------------------------------------------------------------------------------------------------------


def gradient(seed: int, *, layers: int = 12) -> dict[str, tuple[Tensor, Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    sites = [f"layers.{i}.self_attn.{m}" for i in range(layers) for m in ("q_proj", "v_proj")]
    return {s: (torch.randn(4, 32, generator=draw), torch.randn(32, 4, generator=draw)) for s in sites}


def mixed(
    plain: dict[str, tuple[Tensor, Tensor]], noise: float, *, only: str = "", scale: float = 1.0
) -> dict[str, tuple[Tensor, Tensor]]:
    """Noise of the given relative size in every matrix, or those of a name; and a scale."""
    other = gradient(99)
    return {
        site: tuple(scale * p + noise * o for p, o in zip(plain[site], other[site], strict=True))
        if only in site
        else plain[site]
        for site in plain
    }  # pyright: ignore[reportReturnType]


BF16 = bounds_for(torch.bfloat16, layers=30, labels=400, fp8=False)


def test_p05_bounds_let_rounding_pass() -> None:
    plain = gradient(0)
    assert difference(plain, plain, BF16).problem == "" and difference(plain, plain, BF16).cosine == pytest.approx(1.0)
    found = difference(mixed(plain, 0.08), plain, BF16)
    assert found.problem == "" and found.cosine == pytest.approx(1 - 0.08**2 / 2, abs=2e-3) and found.matrix
    # One matrix may be noisier than the rest, and a gradient that is next to nothing may be all noise.
    assert difference(mixed(plain, 0.3, only="layers.3.self_attn.q"), plain, BF16).problem == ""
    tiny = plain | {"layers.0.self_attn.q_proj": (plain["layers.0.self_attn.q_proj"][0] * 1e-3, torch.zeros(32, 4))}
    noisy = tiny | {"layers.0.self_attn.q_proj": (torch.full((4, 32), 1e-3), torch.zeros(32, 4))}
    assert difference(noisy, tiny, BF16).problem == ""


@pytest.mark.parametrize(
    ("noise", "only", "scale", "named"),
    [
        (0.0, "layers.7.self_attn.v_proj", 0.0, "layers.7.self_attn.v_proj A is 100%"),
        (0.0, "", 0.0, "100%"),
        (0.2, "q_proj", 1.0, "q_proj"),
        (0.0, "v_proj", 1.06, "v_proj A are scaled 6%"),
        (float("nan"), "layers.2.self_attn.q", 1.0, "layers.2.self_attn.q_proj A is nan%"),
    ],
)
def test_p05_bounds_find_what_is_missing_wrong_or_not_finite(noise: float, only: str, scale: float, named: str) -> None:
    plain = gradient(0)
    assert named in difference(mixed(plain, noise, only=only, scale=scale), plain, BF16).problem


def test_p05_no_gradient_where_there_should_be_one_and_one_where_there_should_be_none() -> None:
    plain = gradient(0)
    none = {site: (torch.zeros(4, 32), torch.zeros(32, 4)) for site in plain}
    found = difference(none, plain, BF16)
    assert found.problem and found.cosine == 0.0
    assert difference(plain, none, BF16).problem
    assert difference(none, none, BF16) == difference(none, none, Bounds(0, 0, 0, 0))


def test_bounds_grow_with_the_precision_the_depth_and_fewer_labels() -> None:
    def kind(dtype: torch.dtype, layers: int = 30, labels: int = 400, fp8: bool = False) -> float:
        return bounds_for(dtype, layers=layers, labels=labels, fp8=fp8).kind

    assert kind(torch.bfloat16) == pytest.approx(8 * kind(torch.float16))
    assert (
        kind(torch.float32) < 1e-3 < kind(torch.float16) < 0.02 < kind(torch.bfloat16) < 0.15 < kind(torch.bfloat16, 80)
    )
    assert kind(torch.bfloat16) < kind(torch.bfloat16, labels=4) < kind(torch.bfloat16, fp8=True) < 1
    assert kind(torch.bfloat16, layers=2) == kind(torch.bfloat16)

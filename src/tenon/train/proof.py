"""Fast paths prove themselves: before a run's first update they are held against plain torch on its own first rows.

The rows go twice through the same frozen weights, once as the run computes and once in plain torch of the same dtype;
the losses and every slot's gradient must agree within what rounding explains (see `difference`). For the comparison the
B matrices are noise: at the start they are zero, and with them every low-rank term and all gradients of A, so that a
kernel that leaves these out would pass; in a run that goes on they are trained, and gradients little but rounding.
Afterwards all parameters are what they were, to the bit, and gradients zero.

Two samples: one long enough for all that a large batch does otherwise (sums in chunks, a slot in the weights' borders,
products by torch's own kernels), and a short one for what small batches do. Both paths multiply a quantised base by
the same kernels; these are held against plain torch for themselves, where rounding does not add up over layers.

This module does not know what becomes of a run whose fast path is wrong.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from tenon import __version__
from tenon.adapters.bank import AdapterBank, Slot
from tenon.bases.facts import STACKS, site_name
from tenon.data.pack import PackRow
from tenon.errors import TenonError
from tenon.kernels.gpu import triton_version
from tenon.kernels.gpu_errors import explain_gpu_error, first_line, is_out_of_memory
from tenon.models.decoder import Decoder
from tenon.models.frozen import FrozenLinear
from tenon.models.frozen_plain import product_error
from tenon.models.layer import Keep
from tenon.ranks.group import ALONE, Ranks
from tenon.train.difference import Difference, bounds_for, difference
from tenon.train.interrupt import StopSignal
from tenon.train.step import StepOptions, accumulate_window, supervised_count

# A little more than where large batches begin (2,048 tokens: see `models.decoder`, `data.pack`, `kernels.low_rank`).
LONG_TOKENS = 2_304
SHORT_TOKENS = 192
_LEAST_TOKENS = 16
# The noise makes each low-rank term about so large beside the frozen product. Twice as much makes rounding itself grow
# threefold on SmolLM2-135M; at half, terms that are left out drown in it.
_STIR = 0.125
_WEIGHT_ROWS = 64
# Relative error of fp8 products: the tensor cores' own registers keep about 14 bits of their sums.
_FP8_PRODUCT = 0.02
# Failures of a kernel that leave the device usable for others.
_KERNEL_CODES = ("train-kernel-failed", "plan-gpu-unsupported")

_NO_MEMORY = "there is too little memory left to compare"

Verdict = Literal["holds", "fails", "unknown"]


@dataclass(frozen=True, slots=True)
class Proof:
    """What came of it. unknown: there was nothing to compare, the problem says why. base: the base's own products fail.

    tokens: of the samples. cosine: of the matrix whose gradients agree least, and its name. loss_difference: relative,
    the largest of any slot.
    """

    verdict: Verdict
    problem: str = ""
    tokens: int = 0
    cosine: float = 1.0
    matrix: str = ""
    loss_difference: float = 0.0
    seconds: float = 0.0
    base: bool = False

    def fields(self) -> dict[str, str | int | float]:
        """As the fields of an event."""
        return asdict(self)


def prove(
    decoder: Decoder,
    bank: AdapterBank,
    rows: Sequence[PackRow],
    options: StepOptions,
    *,
    stop: StopSignal,
    ranks: Ranks = ALONE,
) -> Proof:
    """Hold the fast path of a decoder against plain torch on the first of these rows.

    Every rank compares the same rows and all give the worst verdict of any. Raises StopNow, and TenonError for a GPU
    that is lost or cannot work at all.
    """
    started = time.monotonic()
    slots = {number: bank.slots[number] for number in sorted({row.slot for row in rows if row.slot >= 0})}
    slots = {number: slot for number, slot in slots.items() if slot.gradients_P is not None}
    with _as_it_was(slots), stop.interruptible():
        base = _look_at_base(decoder)
        proof = base.proof
        _stir(decoder, slots, base.sizes)
        for tokens in (LONG_TOKENS, SHORT_TOKENS):
            if not base.proof.base and not 0 < proof.tokens <= 2 * SHORT_TOKENS:
                proof = _worse(proof, _prove_sample(decoder, bank, slots, rows, options, tokens, fp8=base.fp8))
    failed, unknown, wrong_base = ranks.largest(
        float(proof.verdict == "fails"), float(proof.verdict == "unknown"), float(proof.base)
    )
    verdict: Verdict = "fails" if failed else "unknown" if unknown else "holds"
    problem = proof.problem or ("" if verdict == "holds" else "another rank found it so")
    seconds = time.monotonic() - started
    return replace(proof, verdict=verdict, problem=problem, seconds=seconds, base=bool(wrong_base))


def describe_path(device: torch.device) -> str:
    """What a verdict holds for: the device, and whose kernels run on it."""
    if device.type != "cuda":
        return f"{device.type}, torch {torch.__version__}"
    name = torch.cuda.get_device_name(device)
    return f"{name}, torch {torch.__version__}, {triton_version()}, tenon {__version__}"


# ---- the slots ------------------------------------------------------------------------------------------------------


@contextmanager
def _as_it_was(slots: Mapping[int, Slot]) -> Iterator[None]:
    """Afterwards parameters are what they were before, to the bit, and gradients zero."""
    kept = {number: slot.parameters_P.clone() for number, slot in slots.items()}
    try:
        yield
    finally:
        for number, slot in slots.items():
            slot.parameters_P.copy_(kept[number])
            slot.refresh()
        _forget(slots)


def _forget(slots: Mapping[int, Slot]) -> None:
    for slot in slots.values():
        if slot.gradients_P is not None:
            slot.gradients_P.zero_()


@dataclass(frozen=True, slots=True)
class _Base:
    """What is known of the frozen base. sizes: the root mean square of each site's weight. fp8: whether its products
    are made in fp8. proof: of its own kernels.
    """

    sizes: dict[str, Tensor]
    fp8: bool
    proof: Proof


def _look_at_base(decoder: Decoder) -> _Base:
    """Every layer is gone through once; the products of a quantised base are tried at the smallest matrix of the first:
    its kernels are the same everywhere.
    """
    sizes: dict[str, Tensor] = {}
    fp8, proof = False, Proof("holds")
    for index, layer in enumerate(decoder.walk.up()):
        stacks = layer.stacks
        if index == 0:
            smallest = min(stacks, key=lambda stack: stacks[stack].outputs * stacks[stack].inputs)
            fp8 = stacks[smallest].takes_fp8
            proof = _prove_base(decoder, smallest, stacks[smallest])
        for stack, modules in STACKS.items():
            start = 0
            for module in modules:
                outputs = decoder.facts.linear_shape(module)[0]
                some = stacks[stack].dense(start, start + min(outputs, _WEIGHT_ROWS))
                sizes[site_name(index, module)] = _rms(some)
                start += outputs
    return _Base(sizes, fp8, proof)


def _prove_base(decoder: Decoder, name: str, linear: FrozenLinear) -> Proof:
    bound = _FP8_PRODUCT if linear.takes_fp8 else max(2 * torch.finfo(decoder.dtype).eps, 1e-3)
    try:
        error = product_error(linear, decoder.dtype, decoder.device)
    except Exception as raised:  # Triton's exceptions have no base class of their own
        if is_out_of_memory(raised):
            return Proof("unknown", _NO_MEMORY)
        if not _is_kernel_failure(raised):
            raise
        return Proof("fails", first_line(raised), base=True)
    if error <= bound:
        return Proof("holds")
    off = f"{100 * error:.3g}% off (at most {100 * bound:.3g}%)"
    return Proof("fails", f"products with the {decoder.kind} base are {off}, at {name}", base=True)


def _stir(decoder: Decoder, slots: Mapping[int, Slot], sizes: Mapping[str, Tensor]) -> None:
    """Make every B noise, in proportion to its weight."""
    for number, slot in slots.items():
        generator = torch.Generator(decoder.device).manual_seed(number)
        for site, (a_RD, b_OR) in slot.matrices().items():
            scale = max(abs(slot.shape.sites[site].scale), 1e-6)
            size = _STIR / (scale * math.sqrt(len(a_RD))) * sizes[site] / _rms(a_RD).clamp(min=1e-6)
            signs = torch.randint(0, 2, b_OR.shape, generator=generator, device=decoder.device) * 2 - 1
            b_OR.copy_(signs * size)
        slot.refresh()


def _rms(x: Tensor) -> Tensor:
    return x.float().square().mean().sqrt()


# ---- one sample -----------------------------------------------------------------------------------------------------


def _prove_sample(
    decoder: Decoder,
    bank: AdapterBank,
    slots: Mapping[int, Slot],
    rows: Sequence[PackRow],
    options: StepOptions,
    tokens: int,
    *,
    fp8: bool,
) -> Proof:
    """The comparison on a sample of so many tokens; of half as many while memory does not suffice."""
    while tokens >= _LEAST_TOKENS:
        sample = sample_rows(rows, slots, min(tokens, options.micro_tokens))
        if not sample:
            return Proof("unknown", "no slot has a token to learn from in the first window")
        try:
            return _compare(decoder, bank, slots, sample, options, fp8=fp8)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        tokens //= 2
    return Proof("unknown", _NO_MEMORY)


def sample_rows(rows: Sequence[PackRow], slots: Mapping[int, object], tokens: int) -> list[PackRow]:
    """The first rows of every slot that have a label, the same number of tokens of each; the last is cut to fit."""
    sample: list[PackRow] = []
    for number in slots:
        left = tokens // len(slots)
        for row in rows:
            if row.slot != number or left < 2:
                continue
            part = _cut(row, left)
            if supervised_count(part):
                sample.append(part)
                left -= len(part.ids)
    return sample


def _cut(row: PackRow, tokens: int) -> PackRow:
    """At most so many tokens of a row, up to its last label."""
    if len(row.ids) <= tokens or not supervised_count(row):
        return row
    stop = max(tokens, int(np.flatnonzero(row.supervised)[-1]) + 1)
    part = slice(stop - tokens, stop)
    return replace(row, ids=row.ids[part], supervised=row.supervised[part])


def _compare(
    decoder: Decoder,
    bank: AdapterBank,
    slots: Mapping[int, Slot],
    sample: Sequence[PackRow],
    options: StepOptions,
    *,
    fp8: bool,
) -> Proof:
    tokens = sum(len(row.ids) for row in sample)
    plain = replace(options, share_prefix=False, keep=(Keep.INPUT,) * decoder.facts.layers)
    scale = options.loss_scale
    while True:
        _forget(slots)
        wanted = _losses(decoder.plain(), bank, sample, replace(plain, loss_scale=scale))
        right = {number: _gradient(slot).clone() for number, slot in slots.items()}
        if all(math.isfinite(x) for x in wanted.values()) and all(bool(g.isfinite().all()) for g in right.values()):
            break
        if scale <= 1.0:
            return Proof("unknown", "the first rows have no finite gradient in plain torch either", tokens)
        scale /= 2
    _forget(slots)
    try:
        found = _losses(decoder, bank, sample, replace(options, loss_scale=scale))
        _wait(decoder)
    except Exception as raised:  # see `_prove_base`
        if not _is_kernel_failure(raised):
            raise
        return Proof("fails", first_line(raised), tokens)
    labels = {number: sum(supervised_count(row) for row in sample if row.slot == number) for number in slots}
    proof = Proof("holds", tokens=tokens)
    for number in (n for n in slots if labels[n]):
        slot = slots[number]
        bounds = bounds_for(decoder.dtype, layers=decoder.facts.layers, labels=labels[number], fp8=fp8)
        apart = abs(found[number] - wanted[number]) / max(abs(wanted[number]), 1.0)
        loss = "" if apart <= bounds.loss else f"the loss is {found[number]:.5g}, in plain torch {wanted[number]:.5g}"
        gradients = difference(slot.views(_gradient(slot)), slot.views(right[number]), bounds)
        proof = _worse(proof, _of_slot(slot.name, gradients, loss, apart))
    return proof


def _is_kernel_failure(error: Exception) -> bool:
    """Whether a kernel did not compile or launch, on a device that still works."""
    told = None if isinstance(error, TenonError) else explain_gpu_error(error, resume="tenon resume RUN")
    return told is not None and told.code in _KERNEL_CODES


def _of_slot(name: str, gradients: Difference, loss: str, apart: float) -> Proof:
    problem = loss or gradients.problem
    return Proof(
        "fails" if problem else "holds",
        f"{name}: {problem}" if problem else "",
        cosine=gradients.cosine,
        matrix=f"{name}: {gradients.matrix}" if gradients.matrix else "",
        loss_difference=apart,
    )


def _losses(decoder: Decoder, bank: AdapterBank, rows: Sequence[PackRow], options: StepOptions) -> dict[int, float]:
    return {number: found.loss for number, found in accumulate_window(decoder, bank, rows, options).items()}


def _gradient(slot: Slot) -> Tensor:
    assert slot.gradients_P is not None
    return slot.gradients_P


def _wait(decoder: Decoder) -> None:
    """Wait for the device, so that what failed there is raised here."""
    if decoder.device.type == "cuda":
        torch.cuda.synchronize(decoder.device)


def _worse(one: Proof, other: Proof) -> Proof:
    """Both together: the worse of everything, the tokens of both."""
    order: tuple[Verdict, ...] = ("holds", "unknown", "fails")
    worst = max(one, other, key=lambda proof: order.index(proof.verdict))
    least = one if not other.matrix or (one.matrix and one.cosine <= other.cosine) else other
    return Proof(
        worst.verdict,
        worst.problem,
        one.tokens + other.tokens,
        least.cosine,
        least.matrix,
        max(one.loss_difference, other.loss_difference),
        base=one.base or other.base,
    )

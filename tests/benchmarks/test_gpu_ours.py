"""Our measuring processes on a CPU with a tiny base: the product's own step in every format, and the parity run."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch

from benchmarks.gpu.curves import binned, gaps
from benchmarks.gpu.processes import find_result
from benchmarks.gpu.rows import Row, write_rows
from benchmarks.gpu.works import BaseFormat, Shape, Spec
from benchmarks.gpu_parity import compact, expanded, kept, report_rows
from benchmarks.ours.contact import compute_dtype, folder_decoder, make_bank, plain_decoder
from benchmarks.ours.parity import ORIGINAL, OWN, WEIGHTS_ALONE, ParitySpec, factor, judge, measure, parse_spec, window
from benchmarks.ours.step import measure as measure_step
from benchmarks.report import REPOSITORY
from tests.tiny import CPU
from tests.tiny_bases import VOCAB, save_base

SHAPE = asdict(Shape("tiny", 2, 64, 4, 2, 96, 97, tied_head=True))


@pytest.mark.parametrize("base", get_args(BaseFormat))
def test_a_step_of_several_slots_in_every_format(base: BaseFormat) -> None:
    result = measure_step(Spec(SHAPE, base, 4, 16, (4, 8), steps=2, warm=1, device="cpu"))
    assert result["tokens"] == [64, 64] and all(s > 0 for s in result["seconds"])
    assert result["first_s"] > 0 and result["peak_gb"] is None
    assert abs(result["loss"] - math.log(97)) < 0.5, "a random base knows nothing"


def test_the_process_prints_one_result() -> None:
    spec = json.dumps(asdict(Spec(SHAPE, "bf16", 2, 8, (4,), steps=1, warm=1, device="cpu")))
    command = [sys.executable, "-m", "benchmarks.ours.step", spec]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    result = find_result(done.stdout)
    assert result is not None and result["tokens"] == [16]


@pytest.fixture(scope="module")
def parity_spec(tmp_path_factory: pytest.TempPathFactory) -> ParitySpec:
    """A tiny base as files, and rows that can be learnt: a number, and the same number again."""
    root = tmp_path_factory.mktemp("parity")
    save_base("llama-tied", root / "base")
    rows = [
        Row(np.array([5, 7, word, 9, word, 2]), np.array([False, False, False, False, True, True]))
        for word in range(20, 60)
    ]
    write_rows(root / "rows.npz", {"train": rows, "test": rows[:8]})
    return ParitySpec(
        *(str(root / "base"), str(root / "rows.npz"), "bf16"),
        rates=(2e-2, 5e-2),
        seeds=(0, 1),
        rank=4,
        steps=6,
        rows=4,
        heldout=8,
        checks=(1, 3, 100),
        device="cpu",
    )


def test_parity_of_a_format_with_itself_and_with_fp8(parity_spec: ParitySpec) -> None:
    assert parse_spec(json.dumps(asdict(parity_spec))) == parity_spec
    found: dict[str, Any] = {base: measure(replace(parity_spec, base=base)) for base in ("bf16", "fp8", "nf4")}
    plain, fp8, nf4 = found.values()
    assert set(plain["cosines"]) == {"1", "3", "6"} and set(plain["cosines"]["1"]) == {ORIGINAL}
    assert all(one[ORIGINAL]["least"] > 0.999999 for one in plain["cosines"].values()), "fp32 beside fp32"
    assert all(one[OWN]["least"] > 0.999999 for one in nf4["cosines"].values()), "its own weights, exactly"
    assert all(0.5 < one[OWN]["least"] < 0.9999999 for one in fp8["cosines"].values())
    # Over nf4 weights our step is exact there: what is left is what the weights alone do.
    assert all(
        one[WEIGHTS_ALONE]["least"] == pytest.approx(one[ORIGINAL]["least"], abs=1e-5)
        for one in nf4["cosines"].values()
    )
    assert set(plain["cosines"]["1"][ORIGINAL]["modules"]) >= {"q_proj", "down_proj"}
    assert [len(curve) for curve in plain["losses"]] == [6] * 4 and plain["rates"] == [2e-2, 2e-2, 5e-2, 5e-2]
    assert all(curve[-1] < curve[0] for curve in plain["losses"])
    rows = report_rows(found)
    assert sum("mean gap" in row.what for row in rows) == 4 and sum("cosine" in row.unit for row in rows) == 21
    bounds = {row.what: row.met for row in rows if row.bound is not None}
    assert any("plain fp32" in what for what in bounds) and len(bounds) == 4 + 3 + 3 + 3


def test_equal_curves_have_no_gap(parity_spec: ParitySpec) -> None:
    curves, rates = [[1.0] * 10 + [0.5] * 15, [2.0] * 25], [1e-3, 1e-3]
    assert binned(curves[0]).tolist() == [1.0, 0.5] and binned([3.0, 1.0]).tolist() == [2.0]
    (same,) = gaps(curves, curves, rates)
    assert (same.gap, same.signed) == (0.0, 0.0) and same.deviation == pytest.approx((1 + 1.5) / 2 / 2**0.5)
    shifted = [[value - 0.1 for value in curve] for curve in curves]
    (lower,) = gaps(shifted, curves, rates)
    assert lower.gap == pytest.approx(0.1) and lower.signed == pytest.approx(-0.1)
    two = gaps(curves, curves, [1e-3, 3e-3])
    assert [gap.lr for gap in two] == [1e-3, 3e-3] and two[0].deviation == 0.0


def test_kept_formats_give_the_same_figures(tmp_path: Path, parity_spec: ParitySpec) -> None:
    judged = [{"loss": 1.0 + i, "accuracy": 0.5} for i in range(4)]
    one = {"losses": [[float(i)] * 20 for i in range(4)], "cosines": {}, "heldout": judged, "rates": [1, 1, 2, 2]}
    found = {"bf16": one, "fp8": one}
    assert report_rows(expanded(compact(found))) == report_rows(found)
    made = {"spec": asdict(parity_spec), "code": "x", "machine": "y"}
    path = tmp_path / "gpu_parity.json"
    path.write_text(json.dumps({"made_with": made, "formats": compact(found)}))
    made = json.loads(json.dumps(made))
    assert set(kept(path, {**made, "spec": {**made["spec"], "folder": "elsewhere"}})) == {"bf16", "fp8"}
    assert kept(path, {**made, "code": "z"}) == {} and kept(tmp_path / "none.json", made) == {}


def test_windows_are_the_same_rows_for_one_seed_whatever_the_rate(parity_spec: ParitySpec) -> None:
    rows = [Row(np.array([i]), np.array([False])) for i in range(10)]
    taken = window(rows, parity_spec, 0)
    by_slot = {slot: [row.index for row in taken if row.slot == slot] for slot in range(4)}
    assert by_slot[0] == by_slot[2] and by_slot[1] == by_slot[3] and by_slot[0] != by_slot[1]
    epoch = [row.index for step in range(5) for row in window(rows, parity_spec, step) if row.slot == 0]
    assert sorted(epoch[:10]) == list(range(10)) == sorted(epoch[10:]) and epoch[:10] != epoch[10:]


def test_the_rate_rises_and_falls() -> None:
    factors = [factor(step, 100) for step in range(100)]
    assert factors[4] == 1.0 and factors[0] == 0.2 and factors[-1] == pytest.approx(1 / 95)
    assert factor(0, 1) == 1.0


def test_judging_is_what_greedy_generation_would_say(parity_spec: ParitySpec) -> None:
    decoder = folder_decoder(Path(parity_spec.folder), "bf16", compute_dtype(CPU), CPU)
    bank = make_bank(decoder, [4], [0])
    draw = np.random.default_rng(1)
    prompts = [draw.integers(3, VOCAB, length) for length in (3, 9, 5, 7)]
    rows, losses = [], []
    for number, prompt in enumerate(prompts):
        said = greedy(decoder, prompt, 3)
        answer = said if number % 2 else np.array([*said[:2], (said[2] + 1) % VOCAB])
        ids = np.concatenate([prompt, answer])
        rows.append(Row(ids, np.arange(len(ids)) >= len(prompt)))
        losses += nll(decoder, ids)[-3:]
    found = judge(decoder, bank, 0, rows)
    assert found["accuracy"] == 0.5 and found["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def greedy(decoder: Any, prompt: np.ndarray, count: int) -> np.ndarray:
    """The likeliest tokens, one by one."""
    ids = prompt
    for _ in range(count):
        ids = np.append(ids, int(scores(decoder, ids)[-1].argmax()))
    return ids[len(prompt) :]


def nll(decoder: Any, ids: np.ndarray) -> list[float]:
    """Of every token after the first."""
    logp_TV = torch.log_softmax(scores(decoder, ids).double(), dim=-1)
    return [-float(logp_TV[i, ids[i + 1]]) for i in range(len(ids) - 1)]


def scores(decoder: Any, ids: np.ndarray) -> torch.Tensor:
    """(T, V) of one row on the bare base."""
    from tenon.data.pack import PackOptions, bare_row, pack_rows

    (batch,) = pack_rows([bare_row(-1, ids.tolist())], PackOptions(1000), CPU)
    with torch.no_grad():
        return decoder.logits(decoder.forward(batch))


def test_the_plain_reference_has_the_weights_as_they_are_multiplied(parity_spec: ParitySpec) -> None:
    decoder = folder_decoder(Path(parity_spec.folder), "nf4", compute_dtype(CPU), CPU)
    plain = plain_decoder(decoder)
    assert plain.dtype == torch.float32 and plain.kind == "dense" and not plain.fuse
    for name, tensor in plain.named_tensors().items():
        assert torch.equal(tensor, decoder.named_tensors()[name].float()), name

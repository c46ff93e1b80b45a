"""A neighbour takes the GPU's memory in the middle of a run: the run ends all the same, with the same adapter.

These tests measure what is free on the GPU, so nothing else may run on it meanwhile.
"""

from __future__ import annotations

import gc
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tenon.adapters.bank import AdapterBank
from tenon.models.decoder import Decoder
from tenon.plan.activations import Activations, Pass, adapted
from tenon.plan.keeping import Steps, may_keep
from tenon.plan.values import Frozen, Keeping, MachineFacts
from tenon.train.loop import Trainer
from tenon.train.memory import GpuMemory, Limits, Measured, with_attention_room
from tenon.train.step import StepOptions
from tests.tiny import tiny_facts

from .world import Asked, MemoryRows, Ports, Row, make_slot

pytestmark = [pytest.mark.gpu, pytest.mark.alone]

LAYERS, TOKENS, ROWS = 12, 8192, 8
FACTS = tiny_facts(layers=LAYERS).model_copy(
    update={
        "hidden": 1024,
        "heads": 16,
        "kv_heads": 4,
        "head_dim": 64,
        "feed_forward": 3584,
        "vocab": 8192,
        "context_tokens": 4096,
    }
)
NEIGHBOUR = """
import torch
torch.zeros(1, device="cuda")
print("ready", flush=True)
leave = int(input())
taken = torch.empty(torch.cuda.mem_get_info()[0] - leave, dtype=torch.uint8, device="cuda")
print("taken", flush=True)
input()
"""


@contextmanager
def neighbour() -> Iterator[subprocess.Popen[str]]:
    """Another process on this GPU, which takes all but so many bytes when it is told how many."""
    process = subprocess.Popen(
        [sys.executable, "-c", NEIGHBOUR], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


def take_all_but(process: subprocess.Popen[str], leave_bytes: int) -> None:
    assert process.stdin is not None and process.stdout is not None
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    process.stdin.write(f"{leave_bytes}\n")
    process.stdin.flush()
    assert process.stdout.readline() == "taken\n"


def some_long_rows(count: int) -> MemoryRows:
    draw = np.random.default_rng(0)
    length = TOKENS // ROWS
    ids = [draw.integers(1, FACTS.vocab, length - i % 7).astype(np.int32) for i in range(count)]
    return MemoryRows([Row(own, np.ones(len(own), dtype=bool), f"rows.jsonl:{i}") for i, own in enumerate(ids)])


class World:
    """A run of one slot on the GPU, its memory measured."""

    def __init__(self, folder: Path, *, limit_bytes: int | None = None) -> None:
        device = torch.device("cuda")
        self.decoder = Decoder(FACTS, dtype=torch.bfloat16, device=device)
        generator = torch.Generator(device).manual_seed(0)
        for name, place in self.decoder.places().items():
            drawn = torch.randn(place.shape, device=device, generator=generator) * 0.02
            place.put(1 + drawn if "norm" in name else drawn)
        self.ports = Ports(folder)
        bank = AdapterBank(FACTS, dtype=torch.bfloat16, device=device)
        asked = Asked(steps=5, rows=ROWS, rank=16)
        self.slot = make_slot(self.decoder, bank, asked, some_long_rows(5 * ROWS))
        ranks = {site: at.rank for site, at in self.slot.slot.shape.sites.items()}
        steps = Steps(
            of=Pass(FACTS, adapted([ranks], dropout=False), "cuda", "bf16", Frozen(), longest_tokens=TOKENS // ROWS),
            machine=_machine(),
            longest_tokens=TOKENS // ROWS,
            step_tokens=TOKENS,
            row_tokens=TOKENS / ROWS,
            token_flops=1e9,
            levels=may_keep("auto", "cuda"),
        )
        gpu = GpuMemory(device)
        usable = gpu.held_bytes() + gpu.free_bytes()
        # As the run itself will: what attention takes depends on what it may take.
        self.steps = with_attention_room(steps, usable if limit_bytes is None else min(usable, limit_bytes))
        memory = Measured(
            self.steps,
            gpu,
            [self.slot],
            keeping=Keeping(micro_tokens=TOKENS, all_layers=LAYERS),
            limits=Limits(limit_bytes, 1e10),
            emit=self.ports.emit,
        )
        options = StepOptions(TOKENS, share_prefix=False)
        ports = self.ports.ports(memory)
        self.trainer = Trainer(self.decoder, bank, [self.slot], options=options, checkpoint_every=0, ports=ports)

    def run(self) -> torch.Tensor:
        """The adapter after all steps."""
        self.trainer.run()
        return self.slot.slot.parameters_P.clone()

    def peak(self, *counts: int) -> int:
        """Bytes beside base and adapter. counts: layers that keep all, most, their inputs, nothing."""
        return Activations(self.steps.of, TOKENS).peak_bytes(counts)


def _machine() -> MachineFacts:
    return MachineFacts(
        device="cuda",
        device_name=torch.cuda.get_device_name(),
        device_count=1,
        device_memory_bytes=torch.cuda.mem_get_info()[0],
        host_memory_bytes=10**10,
        cores=1,
        threads=1,
        bf16=True,
        free_disk_bytes=10**10,
        capability=torch.cuda.get_device_capability(),
    )


def memory_warnings(ports: Ports) -> list[dict[str, object]]:
    return [event for event in ports.of("warning") if event["code"] == "train-memory-short"]


def test_a_neighbour_in_the_middle_of_a_run(tmp_path: Path) -> None:
    wanted = World(tmp_path / "alone").run()
    with neighbour() as process:
        world = World(tmp_path / "disturbed")
        leave = world.peak(LAYERS // 3, 0, LAYERS - LAYERS // 3, 0)
        # Far from both: all cannot be kept, and there is room for what needs less.
        assert 1.2 * world.peak(0, 0, LAYERS, 0) < leave < 0.7 * world.peak(LAYERS, 0, 0, 0)

        def disturb(kind: str, fields: dict[str, object]) -> None:
            if kind == "step" and fields["step"] == 2:
                take_all_but(process, leave)

        world.ports.on_event = disturb
        found = world.run()
    assert memory_warnings(world.ports), "memory did run out"
    assert {event["micro_tokens"] for event in world.ports.of("memory")} == {TOKENS}
    assert [event["step"] for event in world.ports.of("step")] == [1, 2, 3, 4, 5]
    # The same rows at once, and every sum in a fixed order: how layers were kept changed no bit.
    assert torch.equal(found, wanted)


def test_a_limit_is_kept_to(tmp_path: Path) -> None:
    before = torch.cuda.memory_allocated()
    # Limits of about this size leave attention the same room, which is part of the peak.
    whole = World(tmp_path / "whole", limit_bytes=2 * 10**9)
    moments = 8 * whole.slot.slot.parameters_P.numel()
    limit = torch.cuda.memory_allocated() + moments + whole.peak(LAYERS // 2, 0, LAYERS // 2, 0)
    assert limit // 10**9 in (1, 2)
    del whole
    gc.collect()
    assert torch.cuda.memory_allocated() - before < 10_000_000
    world = World(tmp_path / "limited", limit_bytes=limit)

    def begin_to_measure(kind: str, fields: dict[str, object]) -> None:
        """After the first step, and whenever steps are made another way."""
        if kind == "memory" or (kind == "step" and fields["step"] == 1):
            torch.cuda.reset_peak_memory_stats()

    world.ports.on_event = begin_to_measure
    try:
        world.run()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert torch.cuda.max_memory_allocated() <= limit
    assert torch.cuda.max_memory_reserved() <= 1.05 * limit
    # What is lost between tensors may make a step run out; it is made again with less, and that is said.
    *earlier, event = world.ports.of("memory")
    assert len(memory_warnings(world.ports)) == len(earlier) and event["micro_tokens"] == TOKENS
    assert 0 < int(str(event["all_layers"])) < LAYERS
    assert torch.cuda.max_memory_allocated() == pytest.approx(float(str(event["used_bytes"])), rel=0.1)

"""How fast one GPU continues sequences, at the 8B shape: `python benchmarks/serve_gpu.py [--only NAME,…] [--profile]`.

Random weights, real engine: continuous batching, paged cache, recorded passes. Each work: decoding with so many rows
(tokens that the engine said, over the seconds of its passes, host work and all), or whole requests (prompts and
answers). The memory floor of decoding is the bytes of all weights over the bandwidth that this card showed when it read
as much. Writes benchmarks/results/serve_gpu.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

if __name__ == "__main__":
    # The repository's root, not this folder, is where the benchmarks are a package.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch

from benchmarks.gpu.machine import OUR_CODE, code_hash, read_machine
from benchmarks.gpu.works import SHAPES
from benchmarks.ours.contact import facts_of, random_decoder
from benchmarks.report import RESULTS, Row, at_least, at_most, current_commit, write_tree
from tenon.adapters.bank import AdapterBank, SiteShape, SlotShape, initialise
from tenon.bases.facts import MODULE_PATHS, site_name
from tenon.batch import NO_SLOT
from tenon.infer.engine import Engine
from tenon.infer.pass_graphs import PassGraphs
from tenon.infer.requests import Request
from tenon.models.cache import KvCache
from tenon.models.decoder import Decoder

PASS_TOKENS = 2048
SLOTS, RANK = 8, 16
FIRST_TOKENS = 30
PROMPTS = (32, 512)


@dataclass(frozen=True)
class Work:
    """rows at a time, tokens in and out of each, slots in use (0: the bare base). requests: in all."""

    name: str
    rows: int
    tokens_in: int
    tokens_out: int
    slots: int = 0
    requests: int = 0


WORKS = (
    Work("decode-1", 1, 512, 128),
    Work("decode-1-adapter", 1, 512, 128, slots=1),
    Work("decode-32", 32, 512, 128),
    Work("decode-32-adapters", 32, 512, 128, slots=SLOTS),
    Work("decode-64", 64, 512, 128),
    Work("requests-64", 64, 512, 256, requests=64),
    Work("requests-64-adapters", 64, 512, 256, slots=SLOTS, requests=64),
)


@dataclass
class Found:
    """step_ms: median of passes that only continue. seconds: of all of them. tokens: said."""

    step_ms: float
    seconds: float
    tokens: int


def read_bandwidth(device: torch.device) -> float:
    """Bytes a second that this card reads from memory: the best of several readings of 4 GB."""
    x = torch.ones(1 << 31, dtype=torch.bfloat16, device=device)
    best = 0.0
    for _ in range(6):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        torch.sum(x)
        end.record()
        torch.cuda.synchronize()
        best = max(best, x.numel() * 2 / begin.elapsed_time(end) * 1e3)
    return best


def fill_bank(decoder: Decoder) -> AdapterBank:
    """Adapters of one rank over every module, none of which is zero."""
    bank = AdapterBank(decoder.facts, dtype=decoder.dtype, device=decoder.device)
    bank.keep_room(SLOTS)
    sites = {site_name(i, m): SiteShape(RANK, 2.0) for i in range(decoder.facts.layers) for m in MODULE_PATHS}
    for number in range(SLOTS):
        slot = bank.slots[bank.add(f"a{number}", SlotShape(sites), trained=False)]
        initialise(slot, "kaiming", number)
        for _, b_OR in slot.matrices().values():
            b_OR.normal_(std=0.01)
        slot.refresh()
    return bank


def requests_of(work: Work, vocab: int) -> list[Request]:
    """Random prompts that share nothing."""
    generator = torch.Generator().manual_seed(work.rows)
    count = work.requests or work.rows
    prompts = torch.randint(10, vocab, (count, work.tokens_in), generator=generator).tolist()
    return [
        Request(ids, slot=i % work.slots if work.slots else NO_SLOT, max_new_tokens=work.tokens_out)
        for i, ids in enumerate(prompts)
    ]


def run_work(work: Work, decoder: Decoder, bank: AdapterBank, cache: KvCache, graphs: PassGraphs | None) -> Found:
    """One run of a work, from the first prompt to the last token."""
    said = 0

    def count(index: int, token: object) -> None:
        nonlocal said
        del index, token
        said += 1

    engine = Engine(decoder, bank, cache=cache, pass_tokens=PASS_TOKENS, on_token=count, graphs=graphs)
    for index, request in enumerate(requests_of(work, decoder.facts.vocab)):
        engine.submit(index, request)
    torch.cuda.synchronize()
    steps: list[float] = []
    begin = time.perf_counter()
    while engine.busy:
        before, start = said, time.perf_counter()
        engine.step()
        if engine.running == work.rows and said - before == work.rows:
            steps.append((time.perf_counter() - start) * 1e3)
    torch.cuda.synchronize()
    # The first passes still read prompts.
    return Found(statistics.median(steps[len(steps) // 4 :] or [0.0]), time.perf_counter() - begin, said)


def first_tokens(
    decoder: Decoder, bank: AdapterBank, cache: KvCache, graphs: PassGraphs | None, tokens_in: int
) -> tuple[float, float]:
    """Milliseconds from request to first token, of the base and of a resident adapter: medians of turns."""
    found: dict[int, list[float]] = {NO_SLOT: [], 0: []}
    generator = torch.Generator().manual_seed(tokens_in)
    for _ in range(FIRST_TOKENS):
        for slot, times in found.items():
            ids = torch.randint(10, decoder.facts.vocab, (tokens_in,), generator=generator).tolist()
            engine = Engine(decoder, bank, cache=cache, pass_tokens=PASS_TOKENS, graphs=graphs)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            engine.submit(0, Request(ids, slot=slot, max_new_tokens=1))
            while engine.busy:
                engine.step()
            times.append((time.perf_counter() - begin) * 1e3)
    return statistics.median(found[NO_SLOT]), statistics.median(found[0])


def profiled(run: Callable[[], object]) -> list[tuple[str, float, int]]:
    """(kernel, ms, calls) of the longest kernels."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    times: dict[str, list[float]] = defaultdict(lambda: [0.0, 0])
    for event in profiler.events() or []:
        times[event.name][0] += event.device_time_total / 1e3
        times[event.name][1] += 1
    return [(name[:90], round(t, 3), int(n)) for name, (t, n) in sorted(times.items(), key=lambda x: -x[1][0])[:22]]


def compare(found: dict[str, Found], floor_ms: float) -> list[Row]:
    """The figures, those with bounds among them."""
    rows = [Row("memory floor of one pass", floor_ms, "ms")]
    for work in WORKS:
        if work.name in found:
            one = found[work.name]
            rows.append(Row(f"{work.name}: a pass", one.step_ms, "ms"))
            rows.append(Row(f"{work.name}: answered, prompts read too", one.tokens / one.seconds, "tokens/s"))
    if "decode-1" in found:
        rows.append(at_least("decode at batch 1, of the memory floor", floor_ms / found["decode-1"].step_ms, "", 0.55))
    if {"decode-32", "decode-32-adapters"} <= found.keys():
        slower = found["decode-32-adapters"].step_ms / found["decode-32"].step_ms - 1.0
        rows.append(at_most("8 adapters of rank 16 in a batch of 32, slower by", 100 * slower, "%", 8.0))
    return rows


@torch.inference_mode()
def main(words: Sequence[str] | None = None) -> int:
    """Measure, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="list the longest kernels of each decoding work")
    parser.add_argument("--eager", action="store_true", help="without recorded passes")
    parser.add_argument("--shelf", type=int, default=SLOTS * RANK, help="ranks whose A lie below the weights")
    parser.add_argument("--vllm", type=Path, default=None, help="what benchmarks/peers/vllm_requests.py wrote here")
    parser.add_argument("--base", default="bf16", choices=["bf16", "fp8", "int8", "nf4"])
    parser.add_argument("--results", type=Path, default=RESULTS / "serve_gpu.json")
    parser.add_argument("--log", type=Path, default=None)
    a = parser.parse_args(words)
    device = torch.device("cuda")
    decoder = random_decoder(facts_of(SHAPES["8b"]), a.base, device, shelf_rank=a.shelf)
    bank = fill_bank(decoder)
    cache = KvCache(
        decoder.facts, places=64, tokens=1024, dtype=decoder.dtype, device=device, budget_bytes=10 * 1024**3
    )
    begin = time.perf_counter()
    graphs = None if a.eager else PassGraphs(decoder, bank, cache, pass_tokens=PASS_TOKENS)
    if graphs is not None:
        graphs.record_all()
    print(f"recorded in {time.perf_counter() - begin:.1f} s, {torch.cuda.memory_allocated() / 2**30:.1f} GiB")
    linear_bytes = sum(linear.size_bytes for layer in decoder.layers for linear in layer.stacks.values())
    weights = decoder.head_VD.numel() * decoder.head_VD.element_size() + linear_bytes
    bandwidth = read_bandwidth(device)
    floor_ms = weights / bandwidth * 1e3
    print(f"{weights / 1e9:.2f} GB at {bandwidth / 1e12:.2f} TB/s: {floor_ms:.2f} ms")
    works = [w for w in WORKS if not a.only or w.name in a.only.split(",")]
    runs: dict[str, list[Found]] = defaultdict(list)
    for _ in range(a.repeat):
        for work in works:
            runs[work.name].append(run_work(work, decoder, bank, cache, graphs))
            print(work.name, runs[work.name][-1], flush=True)
    if a.profile:
        for work in works:
            print(work.name, *profiled(lambda w=work: run_work(w, decoder, bank, cache, graphs)), sep="\n   ")
    found = {
        name: Found(
            statistics.median(f.step_ms for f in all_of), statistics.median(f.seconds for f in all_of), all_of[0].tokens
        )
        for name, all_of in runs.items()
    }
    machine = read_machine("cuda")
    rows = compare(found, floor_ms)
    for tokens_in in PROMPTS:
        base_ms, adapter_ms = first_tokens(decoder, bank, cache, graphs, tokens_in)
        rows.append(Row(f"first token of the base, {tokens_in} tokens in", base_ms, "ms"))
        rows.append(at_most(f"a resident adapter instead, {tokens_in} tokens in", adapter_ms - base_ms, "ms more", 2.0))
    versions = dict(machine.versions)
    if a.vllm is not None and "requests-64" in found:
        peer, ours = json.loads(a.vllm.read_text()), found["requests-64"]
        versions["vllm"] = peer["version"]
        share = ours.tokens / ours.seconds / peer["tokens_a_second"]
        rows.append(Row("requests-64: vLLM", peer["tokens_a_second"], "tokens/s"))
        rows.append(at_least("requests-64, of vLLM's throughput", share, "", 0.7))
    for row in rows:
        print(f"{row.what}: {row.value:.4g} {row.unit}")
    write_tree(
        a.results,
        rows,
        device=machine.title,
        date=datetime.now(UTC).date().isoformat(),
        commit=current_commit(),
        versions=versions,
        more={"driver": machine.driver, "code": code_hash(OUR_CODE), "base": a.base, "repeat": a.repeat},
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The adapters that serving is measured with: random ones of many ranks over a real base, the same ones every time.

    make_adapters(folder, "smollm2-135m")      PEFT folders FOLDER/rank-4 … and versions in the registry (TENON_HOME)

Each changes what a matrix says by about EFFECT of its size, whatever the rank: enough to answer otherwise, too little
to lose the language. One in three adapts attention alone, one in three the feed-forward part alone.
Also run by itself: python -m benchmarks.serving_adapters FOLDER
"""

from __future__ import annotations

import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tenon.adapters.bank import AdapterBank, SiteShape, Slot, SlotShape, initialise
from tenon.adapters.peft_files import load_adapter, read_adapter, write_adapter
from tenon.bases.facts import MODULE_PATHS, ModelFacts, site_name
from tenon.bases.locate import locate_base
from tenon.batch import NO_SLOT
from tenon.data.pack import PackRow
from tenon.data.tokenizer import load_tokenizer
from tenon.infer.score import score
from tenon.models.load import load_decoder
from tenon.models.prepare import prepare_base
from tenon.plan.values import BasePlan
from tenon.registry.entry import Entry, EntryDraft
from tenon.registry.probes import Probe, Probes
from tenon.registry.store import Registry
from tenon.service.bases import describe_base
from tenon.settings import Settings, read_settings

BASE = "smollm2-135m"
RANKS = (4, 8, 12, 16, 24, 32, 48, 64)
EFFECT = 0.1
SCALE = 2.0
# As many probes as training keeps where nothing is said, and so many tokens of each as its answer.
PROBES, PROBE_TOKENS = 4, 16
ATTENTION, FEED_FORWARD = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")
_MODULES = (tuple(MODULE_PATHS), ATTENTION, FEED_FORWARD)


@dataclass(frozen=True, slots=True)
class Made:
    """One adapter: `name` in the registry, and `folder` with its PEFT files and nothing else."""

    name: str
    rank: int
    folder: Path
    entry: Entry


def make_adapters(
    folder: Path,
    base: str = BASE,
    *,
    ranks: Sequence[int] = RANKS,
    seed: int = 0,
    prefix: str = "rank",
    settings: Settings | None = None,
) -> list[Made]:
    """Write an adapter of each rank under folder, and register it where it is not registered yet.

    Of equal ranks each gets a number: rank-4, rank-4-2. settings: where the registry is; the environment's by default.
    """
    settings = settings or read_settings()
    plan = describe_base(base, settings)
    prepared = prepare_base(locate_base(base, settings), settings)
    registry = Registry(settings.registry)
    made, seen = [], list[int]()
    for index, rank in enumerate(ranks):
        seen.append(rank)
        name = f"{prefix}-{rank}" if seen.count(rank) == 1 else f"{prefix}-{rank}-{seen.count(rank)}"
        place = folder / name
        place.mkdir(parents=True, exist_ok=True)
        shape = slot_shape(plan.facts, rank, _MODULES[index % len(_MODULES)])
        write_adapter(place, random_adapter(plan.facts, shape, seed * 1000 + index), base=str(prepared))
        made.append(Made(name, rank, place, _registered(registry, name, place, plan)))
    return made


def slot_shape(facts: ModelFacts, rank: int, modules: Sequence[str]) -> SlotShape:
    """The same rank at the given modules of every layer."""
    return SlotShape({site_name(i, m): SiteShape(rank, SCALE) for i in range(facts.layers) for m in modules})


def random_adapter(facts: ModelFacts, shape: SlotShape, seed: int) -> Slot:
    """An adapter as a function of shape and seed.

    A is uniform in +-1/sqrt(D), so A x has a deviation of |x| / sqrt(3 D) at each of R places; the deviation of B makes
    s B A x a share EFFECT of what a matrix with entries of 1/sqrt(D) would say.
    """
    bank = AdapterBank(facts, dtype=torch.float32, device=torch.device("cpu"))
    slot = bank.slots[bank.add(f"seed {seed}", shape, trained=False)]
    initialise(slot, "kaiming", seed)
    generator = torch.Generator().manual_seed(seed)
    for site, (_, b_OR) in slot.matrices().items():
        deviation = EFFECT / (shape.sites[site].scale * (shape.sites[site].rank / 3) ** 0.5)
        b_OR.copy_(torch.randn(b_OR.shape, generator=generator) * deviation)
    slot.refresh()
    return slot


def record_probes(made: Sequence[Made], texts: Iterator[str], settings: Settings, *, base: str = BASE) -> list[Probes]:
    """What each adapter says of a few texts, in the form in which training records it with an adapter."""
    prepared, plan = prepare_base(locate_base(base, settings), settings), describe_base(base, settings)
    decoder = load_decoder(prepared, plan.facts, dtype=torch.float32, device=torch.device("cpu"))
    tokenizer, found = load_tokenizer(prepared), []
    for one in made:
        bank = AdapterBank(plan.facts, dtype=torch.float32, device=torch.device("cpu"))
        slots = (load_adapter(bank, one.name, read_adapter(one.folder)), NO_SLOT)
        ids = [tokenizer.encode(next(texts)) for _ in range(PROBES)]
        rows = [PackRow(slot, np.array(each), _is_answer(len(each))) for each in ids for slot in slots]
        said = [tuple(map(float, scored.logprobs)) for scored in score(decoder, bank, rows)]
        probes = tuple(
            Probe(
                prompt_ids=tuple(each[:-PROBE_TOKENS]),
                answer_ids=tuple(each[-PROBE_TOKENS:]),
                logprobs=own,
                base_logprobs=bare,
            )
            for each, own, bare in zip(ids, said[::2], said[1::2], strict=True)
        )
        found.append(Probes(precision="fp32", base_format="dense", device="cpu", probes=probes))
    return found


def _is_answer(tokens: int) -> np.ndarray:
    """The last ones of a text are what is scored."""
    return np.arange(tokens) >= tokens - PROBE_TOKENS


def read_prompts(data: Path, count: int) -> list[str]:
    """Texts of 40 words or more (above 40 tokens): customers' questions of banking77, several to a text.

    data: the folder of train.csv.
    """
    texts, words = [], list[str]()
    with (data / "train.csv").open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            words += row["text"].split()
            if len(words) >= 40:
                texts.append(" ".join(words))
                words = []
            if len(texts) == count:
                return texts
    raise SystemExit(f"{data / 'train.csv'} has too few rows for {count} prompts")


def _registered(registry: Registry, name: str, place: Path, plan: BasePlan) -> Entry:
    """The newest version, if it has these files; else a new one."""
    draft = EntryDraft(base_spec=plan.spec, base_hash=plan.base_hash)
    if registry.versions(name):
        newest = registry.get(name)
        kept = registry.folder(newest)
        if all((kept / file).read_bytes() == (place / file).read_bytes() for file in newest.files):
            return newest
    return registry.register(name, place, draft)


if __name__ == "__main__":
    for one in make_adapters(Path(sys.argv[1])):
        sys.stdout.write(f"{one.entry.label} {one.folder}\n")

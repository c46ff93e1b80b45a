"""Eight adapters of different ranks and the bare base in one batch: the same tokens as each alone, and as PEFT.

Run: python -m benchmarks.serve_identity --data FOLDER      (the folder of banking77's train.csv)
Greedy, fp32, SmolLM2-135M, through the engine's thread as it serves: more sequences than places, prompts in pieces,
adapters read from the registry. PEFT generates for itself, one prompt at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import tempfile
import threading
from dataclasses import dataclass, field
from pathlib import Path

import torch

from benchmarks.report import Row, at_least, at_most, write
from benchmarks.serving_adapters import BASE, Made, make_adapters, read_prompts
from tenon.adapters.bank import AdapterBank
from tenon.adapters.peft_files import AdapterFiles, load_adapter, read_adapter
from tenon.bases.facts import ModelFacts
from tenon.bases.locate import locate_base
from tenon.bases.read import folder_facts
from tenon.batch import NO_SLOT
from tenon.data.tokenizer import load_tokenizer
from tenon.infer.generate import generate
from tenon.infer.requests import Completion, Request
from tenon.models.decoder import Decoder
from tenon.models.load import load_decoder
from tenon.models.prepare import prepare_base
from tenon.serve.engine.loop import EngineLoop
from tenon.serve.jobs import AdapterRef, Ended, Event, Failed, Job, Limits, Mailbox
from tenon.settings import read_settings
from tests.parity.peft_answers import Answer, differing_tokens, peft_answers, worst_logprob

CPU = torch.device("cpu")
PROMPTS, TOKENS, THREADS = 2, 40, 2


@dataclass(frozen=True, slots=True)
class Case:
    """One prompt to one adapter (None: the base)."""

    made: Made | None
    prompt: list[int]

    @property
    def name(self) -> str:
        """Who is asked."""
        return "base" if self.made is None else self.made.name

    @property
    def request(self) -> Request:
        """Greedy, always so many tokens."""
        return Request(self.prompt, max_new_tokens=TOKENS)


@dataclass(slots=True)
class _Box:
    """A mailbox that waits for the end."""

    ended: threading.Event = field(default_factory=threading.Event)
    completion: Completion | None = None

    def put(self, event: Event) -> None:
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Ended):
            self.completion = event.completion
            self.ended.set()


def main() -> None:
    """Measure and write the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True, help="folder with banking77's train.csv")
    a = parser.parse_args()
    if not (a.data / "train.csv").is_file():
        raise SystemExit(f"no train.csv in {a.data}: get banking77 (PolyAI, CC BY 4.0) and give its folder")
    torch.set_num_threads(THREADS)
    settings = read_settings()
    prepared = prepare_base(locate_base(BASE, settings), settings)
    facts, tokenizer = folder_facts(prepared), load_tokenizer(prepared)
    decoder = load_decoder(prepared, facts, dtype=torch.float32, device=CPU)
    decoder.pack()  # as servers do
    with tempfile.TemporaryDirectory() as name:
        own = dataclasses.replace(settings, home=Path(name))
        adapters: list[Made | None] = [None, *make_adapters(Path(name) / "made", settings=own)]
        prompts = [tokenizer.encode(text) for text in read_prompts(a.data, PROMPTS * len(adapters))]
        cases = [Case(adapters[i % len(adapters)], prompt) for i, prompt in enumerate(prompts)]
        rows = compare(decoder, facts, prepared, cases)
    path = write("serve_identity", rows)
    for row in rows:
        print(f"{row.what}: {row.value:.3g} {row.unit}" + ("" if row.met is None else " ok" if row.met else " SHORT"))
    print(path)


def compare(decoder: Decoder, facts: ModelFacts, prepared: Path, cases: list[Case]) -> list[Row]:
    """Together, alone, and in PEFT."""
    together = answer_together(decoder, facts, cases)
    alone = [answer_alone(decoder, facts, case) for case in cases]
    bare = [answer_alone(decoder, facts, dataclasses.replace(case, made=None)) for case in cases]
    theirs: dict[int, Answer] = {}
    for name in dict.fromkeys(case.name for case in cases):
        mine = [i for i, case in enumerate(cases) if case.name == name]
        made = cases[mine[0]].made
        asked = [cases[i].prompt for i in mine]
        answers = peft_answers(prepared, None if made is None else made.folder, asked, TOKENS)
        theirs.update(zip(mine, answers, strict=True))
    peft = [theirs[i] for i in range(len(cases))]
    own = [i for i, case in enumerate(cases) if case.made is not None]
    # A guard: what is compared must be something that every adapter has changed, far beyond the bound.
    moved = min(worst_logprob([together[i]], [bare[i]]) for i in own)
    differ = sum(differing_tokens([together[i]], [bare[i]]) for i in own) / (TOKENS * len(own))
    ranks = sorted({case.made.rank for case in cases if case.made is not None})
    what = f"{len(ranks)} adapters of ranks {ranks[0]} to {ranks[-1]} and the base in one batch"
    return [
        Row("sequences", len(cases), "sequences"),
        Row("shortest prompt", min(len(case.prompt) for case in cases), "tokens"),
        Row("tokens compared", sum(len(one.ids) for one in together), "tokens"),
        Row("adapters' tokens that the base would not have said", differ, "of 1"),
        at_least("log probabilities of adapters against the base's, least of an answer", moved, "nats, largest", 0.01),
        at_most(f"{what}, against each alone", differing_tokens(together, alone), "differing tokens", 0),
        at_most(f"{what}, against PEFT", differing_tokens(together, peft), "differing tokens", 0),
        at_most("log probabilities against each alone", worst_logprob(together, alone), "nats, largest", 1e-4),
        at_most("log probabilities against PEFT", worst_logprob(together, peft), "nats, largest", 1e-4),
    ]


def answer_together(decoder: Decoder, facts: ModelFacts, cases: list[Case]) -> list[Completion]:
    """All at once through the engine's thread: half of them wait for a place, prompts come in pieces of 64."""
    folders = {case.made.entry.label: case.made.folder for case in cases if case.made is not None}

    def read(adapter: AdapterRef) -> AdapterFiles:
        return read_adapter(folders[adapter.label])

    bank = AdapterBank(facts, dtype=torch.float32, device=CPU)
    limits = Limits(len(cases) // 2, 512, 1 << 29, pass_tokens=64, slots=len(folders))
    loop = EngineLoop(decoder, bank, limits=limits, read=read, deliver=_deliver)
    boxes = [_Box() for _ in cases]
    for case, box in zip(cases, boxes, strict=True):
        entry = None if case.made is None else case.made.entry
        adapter = None if entry is None else AdapterRef(entry.adapter_hash, entry.label)
        loop.submit(Job(case.request, adapter, box))
    worker = threading.Thread(target=loop.run)
    worker.start()
    for box in boxes:
        box.ended.wait()
    loop.stop()
    worker.join()
    return [box.completion for box in boxes if box.completion is not None]


def answer_alone(decoder: Decoder, facts: ModelFacts, case: Case) -> Completion:
    """The one sequence, with the one adapter in the bank."""
    bank, slot = AdapterBank(facts, dtype=torch.float32, device=CPU), NO_SLOT
    if case.made is not None:
        slot = load_adapter(bank, case.made.name, read_adapter(case.made.folder))
    return generate(decoder, bank, [dataclasses.replace(case.request, slot=slot)])[0]


def _deliver(letters: list[tuple[Mailbox, Event]]) -> None:
    for mailbox, event in letters:
        mailbox.put(event)


if __name__ == "__main__":
    main()

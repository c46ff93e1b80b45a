"""vLLM as an oracle: the same prompts, the same adapters of different ranks and the bare base, greedy in fp32, by both.

Every prompt is asked of the base and of each adapter, from vLLM (16 sequences at a time, all subjects mixed) and from
Tenon's engine in one mixed batch. Then Tenon scores vLLM's answers token by token, so that all of them are compared,
also after a place where the two part. (Prompts are not scored: with adapters that ends a vLLM on a CPU, 0.32.)

vLLM on a CPU answers for the bare base with whatever its last slot holds. So it has one slot more than adapters here;
then one more adapter is loaded, and the base is asked again: as it is, and through an adapter of zeros, which is how
`tenon serve --engine vllm` asks it.

Where they part, the two tokens' distance in log probability says whether that is a tie: each side's numbers are right
to within BOUND, so tokens that are closer than twice that may come in either order.

Run: python -m benchmarks.serve_oracle --data DATA      (DATA: the folder of banking77's train.csv; see serving_vllm)
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from dataclasses import replace as changed
from functools import partial
from pathlib import Path

import httpx
import orjson
import torch

from benchmarks.report import Row, at_least, at_most, write
from benchmarks.serving_adapters import BASE, RANKS, Made, make_adapters, read_prompts
from benchmarks.serving_vllm import Vllm, load, vllm_server, vllm_versions
from tenon.adapters.bank import AdapterBank
from tenon.adapters.peft_files import load_adapter, read_adapter
from tenon.bases.locate import locate_base
from tenon.batch import NO_SLOT
from tenon.data.tokenizer import load_tokenizer
from tenon.infer.generate import generate
from tenon.infer.requests import Completion, Request
from tenon.models.decoder import Decoder
from tenon.models.load import load_decoder
from tenon.models.prepare import prepare_base
from tenon.serve.vllm.adapters import NOTHING, write_nothing
from tenon.serve.vllm.process import BASE_NAME
from tenon.serve.vllm.requests import Reading, completion_body
from tenon.service.bases import describe_base
from tenon.settings import Settings, read_settings

PROMPTS, NEW_TOKENS, THREADS, BOUND = 16, 32, 2, 1e-3


@dataclass(frozen=True, slots=True)
class Asked:
    """A subject's name, and what it is asked."""

    subject: str
    request: Request


@dataclass(frozen=True, slots=True)
class Compared:
    """Two answers to one request. same: tokens up to where they part. gap: what the two tokens there differ by, to the
    side that gave it more; None where they do not part. worst: largest difference of a log probability.
    """

    subject: str
    same: int
    gap: float | None
    worst: float


def main(words: Sequence[str] | None = None) -> None:
    """Ask both, compare, and write benchmarks/results/serve_oracle.json."""
    a = parse(words)
    if not (a.data / "train.csv").is_file():
        raise SystemExit(f"{a.data} has no train.csv of banking77: give its folder with --data")
    with tempfile.TemporaryDirectory() as scratch:
        settings = read_settings({"TENON_HOME": f"{scratch}/home", "TENON_CACHE": str(read_settings().cache)})
        *made, last = make_adapters(Path(scratch) / "adapters", ranks=(*RANKS, RANKS[-1]), settings=settings)
        folder = prepare_base(locate_base(BASE, settings), settings)
        asked = make_requests(folder, made, read_prompts(a.data, PROMPTS), a.tokens)
        nothing = write_nothing(Path(scratch), describe_base(BASE, settings).facts)
        theirs, full = ask_vllm(folder, made, asked, last=last.folder, nothing=nothing, threads=a.threads)
        found = compare(folder, made, asked, theirs, settings)
    rows = [*as_rows(found), *full]
    versions = vllm_versions()
    path = write("serve_oracle", rows, versions=versions)
    for row in rows:
        print(f"{row.what}: {row.value:.3g} {row.unit}{f' ({row.bound})' if row.bound else ''}")
    print(path)


def parse(words: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of banking77's train.csv")
    parser.add_argument("--threads", type=int, default=THREADS, help="of each engine")
    parser.add_argument("--tokens", type=int, default=NEW_TOKENS, help="of each answer")
    return parser.parse_args(words)


def make_requests(folder: Path, made: Sequence[Made], prompts: Sequence[str], tokens: int) -> list[Asked]:
    """Each prompt for each subject; neighbours are of different subjects."""
    tokenizer = load_tokenizer(folder)
    ids = [tokenizer.encode(prompt) for prompt in prompts]
    subjects = [BASE_NAME, *(one.name for one in made)]
    return [Asked(subject, Request(prompt, max_new_tokens=tokens)) for prompt in ids for subject in subjects]


def ask_vllm(
    folder: Path, made: Sequence[Made], asked: Sequence[Asked], *, last: Path, nothing: Path, threads: int
) -> tuple[list[Completion], list[Row]]:
    """vLLM's answers, through what serving asks it with; and what becomes of the base's once its last slot is taken."""
    adapters = {one.name: one.folder for one in made} | {NOTHING: nothing}
    # No figure here is a time: nothing is compiled, threads do not spin, and a pass may take long on a busy machine.
    environment = {"TORCH_COMPILE_DISABLE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    environment["VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS"] = "3600"
    with (
        vllm_server(
            folder, adapters, threads=threads, slots=len(adapters) + 1, pass_tokens=64, environment=environment
        ) as vllm,
        ThreadPoolExecutor(max_workers=16) as pool,
    ):
        answers = list(pool.map(partial(ask_one, vllm), asked))
        load(vllm, "last", last)
        bare = [one for one in asked if one.subject == BASE_NAME]
        before = [answer.ids for one, answer in zip(asked, answers, strict=True) if one.subject == BASE_NAME]
        beside = [one for one in asked if one.subject == made[0].name]
        again = {name: ask_beside(vllm, pool, bare, beside, name) for name in (BASE_NAME, NOTHING)}
    differ = {name: sum(a != b for a, b in zip(before, ids, strict=True)) for name, ids in again.items()}
    return answers, [
        Row("answers of the base that vLLM changes once its last slot is taken", differ[BASE_NAME], "answers"),
        at_most("the same, when the base is asked through an adapter of zeros", differ[NOTHING], "answers", 0),
    ]


def ask_beside(
    vllm: Vllm, pool: ThreadPoolExecutor, bare: Sequence[Asked], beside: Sequence[Asked], name: str
) -> list[Sequence[int]]:
    """What `name` answers to the base's prompts, beside an adapter's: where no sequence of a pass has an adapter, vLLM
    leaves adapters out altogether.
    """
    mixed = [each for own, other in zip(bare, beside, strict=True) for each in (changed(own, subject=name), other)]
    answers = list(pool.map(partial(ask_one, vllm), mixed))
    return [answer.ids for one, answer in zip(mixed, answers, strict=True) if one.subject == name]


def ask_one(vllm: Vllm, one: Asked) -> Completion:
    """One answer of vLLM's."""
    reading, body = Reading(one.request), completion_body(one.request, one.subject, secret="")
    headers = {"Authorization": f"Bearer {vllm.key}"}
    with httpx.stream("POST", f"{vllm.url}/completions", json=body, headers=headers, timeout=None) as answer:
        for line in answer.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                reading.take(orjson.loads(line[6:]))
    assert reading.finish == "length", reading.finish
    return reading.completion(reading.finish)


def compare(
    folder: Path, made: Sequence[Made], asked: Sequence[Asked], theirs: Sequence[Completion], settings: Settings
) -> list[Compared]:
    """Our answers to the same, and our scores of theirs."""
    torch.set_num_threads(THREADS)
    facts = describe_base(BASE, settings).facts
    device, dtype = torch.device("cpu"), torch.float32
    decoder: Decoder = load_decoder(folder, facts, dtype=dtype, device=device)
    bank = AdapterBank(facts, dtype=dtype, device=device)
    slots = {BASE_NAME: NO_SLOT} | {one.name: load_adapter(bank, one.name, read_adapter(one.folder)) for one in made}
    requests = [changed(one.request, slot=slots[one.subject]) for one in asked]
    ours = generate(decoder, bank, requests)
    scored = generate(
        decoder,
        bank,
        [changed(request, draft_ids=answer.ids) for request, answer in zip(requests, theirs, strict=True)],
    )
    return [
        compare_one(one.subject, mine, other, scores.draft_logprobs)
        for one, mine, other, scores in zip(asked, ours, theirs, scored, strict=True)
    ]


def compare_one(subject: str, ours: Completion, theirs: Completion, scores: Sequence[float]) -> Compared:
    """scores: our log probabilities of their tokens."""
    pairs = list(zip(ours.ids, theirs.ids, strict=True))
    same = next((i for i, (mine, other) in enumerate(pairs) if mine != other), len(pairs))
    gap = None if same == len(pairs) else ours.logprobs[same] - scores[same]
    worst = max(abs(mine - other) for mine, other in zip(scores, theirs.logprobs, strict=True))
    return Compared(subject, same, gap, worst)


def as_rows(found: Sequence[Compared]) -> list[Row]:
    """The figures, of all answers and of each subject."""
    parted = [one.gap for one in found if one.gap is not None]
    subjects = list(dict.fromkeys(one.subject for one in found))
    rows = [
        at_least("answers compared, the base's and those of adapters", len(found), "answers", 2 * PROMPTS),
        at_most("answers that part where one token is clearly likelier", _clear(parted), "answers", 0),
        Row("answers that part at a tie", len(parted) - _clear(parted), "answers"),
        Row("widest of those ties", max((gap for gap in parted if gap <= 2 * BOUND), default=0.0), "nats"),
        at_most("largest difference of a log probability in answers", max(o.worst for o in found), "nats", BOUND),
    ]
    return rows + [
        Row(f"the same in answers of {name}", max(one.worst for one in found if one.subject == name), "nats")
        for name in subjects
    ]


def _clear(gaps: Sequence[float]) -> int:
    return sum(gap > 2 * BOUND for gap in gaps)


if __name__ == "__main__":
    main(sys.argv[1:])

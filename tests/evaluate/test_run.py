"""Whole evaluations of a tiny base that speaks in digits: figures, records, shared passes, progress, refusals.

What is expected of a row is what the base, or one of the adapters, says by itself: each is right on some rows.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from tenon.adapters.bank import AdapterBank
from tenon.bases.locate import locate_base
from tenon.bases.read import read_facts
from tenon.batch import NO_SLOT
from tenon.data.dataset import Dataset, open_dataset
from tenon.data.pack import PackRow
from tenon.data.render import Renderer
from tenon.data.tokenizer import load_tokenizer
from tenon.errors import DataError, RecipeError
from tenon.evaluate.cases import answer_limit, make_case, take_cases
from tenon.evaluate.compare import compare
from tenon.evaluate.run import evaluate, evaluate_many
from tenon.evaluate.values import EvaluationOptions, SubjectSlot
from tenon.infer.generate import generate
from tenon.infer.requests import Request
from tenon.infer.score import score
from tenon.models.decoder import Decoder
from tenon.models.load import load_decoder
from tenon.plan.values import DataPlan, SourcePlan
from tenon.runs.results import Result
from tenon.settings import Settings, read_settings
from tests.tiny import CPU, random_slot, slot_shape
from tests.tiny_bases import save_base

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SYSTEM = {"role": "system", "content": "you answer in digits"}


@dataclass(frozen=True)
class House:
    """A base, its tokenizer, and two adapters in slots of different rank."""

    folder: Path
    decoder: Decoder
    bank: AdapterBank
    renderer: Renderer
    subjects: tuple[SubjectSlot, ...]

    def answer(self, question: str, slot: int, most: int = 12) -> str:
        prompt = self.renderer.prompt([SYSTEM, {"role": "user", "content": question}])
        request = Request(prompt, slot=slot, max_new_tokens=most, stop_ids=self.renderer.stop_ids)
        return self.renderer.tokenizer.decode(generate(self.decoder, self.bank, [request])[0].ids)

    def chat(self, question: str, answer: str) -> dict[str, object]:
        turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return {"messages": [SYSTEM, *turns]}

    def run(self, data: Dataset, subjects: tuple[SubjectSlot, ...] | None = None, **changes: object) -> list[Result]:
        options = replace(EvaluationOptions(max_new_tokens=40, max_rows=4, intervals=False), **changes)  # pyright: ignore
        return evaluate_many(
            self.decoder,
            self.bank,
            subjects or self.subjects,
            data.train,
            data.renderer,
            base_hash="b" * 64,
            options=options,
        )


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    folder = tmp_path_factory.mktemp("base")
    save_base("llama", folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    settings = read_settings({"TENON_HOME": str(tmp_path_factory.mktemp("home")), "TENON_OFFLINE": "1"})
    decoder = load_decoder(folder, read_facts(locate_base(str(folder), settings)), dtype=torch.float32, device=CPU)
    tokenizer = load_tokenizer(folder)
    speaks = {tokenizer.encode(digit)[0] for digit in "0123456789"} | {2}
    silent = [i for i in range(decoder.facts.vocab) if i not in speaks]
    decoder.head_VD[silent] = 0.0
    decoder.head_VD[2] *= 4  # answers are to end soon
    bank = AdapterBank(decoder.facts, dtype=torch.float32, device=CPU)
    slots = [random_slot(bank, slot_shape(decoder.facts, rank=rank), rank, trained=False) for rank in (3, 6)]
    labels = ("base", "one@1", "two@1")
    subjects = tuple(SubjectSlot(label, slot) for label, slot in zip(labels, (NO_SLOT, *slots), strict=True))
    return House(folder, decoder, bank, Renderer(tokenizer), subjects)


def _open(house: House, settings: Settings, path: Path) -> Dataset:
    plan = DataPlan(
        train=(SourcePlan(path=str(path)),),
        max_tokens=400,
        on_long="stop",
        on_bad="stop",
        on_duplicate="keep",
        supervise="assistant",
        shuffle=False,
    )
    return open_dataset(plan, base_folder=house.folder, settings=settings)


def _write(path: Path, rows: Sequence[Mapping[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _questions(count: int) -> list[str]:
    return [f"what of {'the lake ' * (i % 4)}{i}?" for i in range(count)]


@pytest.fixture
def chats(house: House, settings: Settings, tmp_path: Path) -> Dataset:
    """Two thirds of the rows expect what the first adapter says, the rest what the base says."""
    rows = []
    for i, question in enumerate(_questions(18)):
        slot = house.subjects[0 if i % 3 == 0 else 1].slot
        rows.append(house.chat(question, house.answer(question, slot) or "7"))
    return _open(house, settings, _write(tmp_path / "rows.jsonl", rows))


def _value(result: Result, name: str) -> float:
    return next(metric.value for metric in result.metrics if metric.name == name)


def test_subjects_are_right_where_they_said_it_themselves(house: House, chats: Dataset) -> None:
    base, one, two = house.run(chats)
    assert [m.name for m in base.metrics] == ["exact", "rouge_l", "bleu", "loss", "perplexity"]
    assert base.task == "text"
    for result, subject in ((base, house.subjects[0]), (one, house.subjects[1]), (two, house.subjects[2])):
        for example in result.examples:
            # Long enough to see that an answer goes on; both are cut, at different lengths.
            alone = house.answer(example.prompt, subject.slot, 40)
            assert example.got is not None
            assert alone.startswith(example.got)
            assert example.scores["exact"] == float(alone == example.expected)
    assert _value(base, "exact") < _value(one, "exact") > _value(two, "exact")
    assert compare(base, one).a == "base"
    assert base.examples[4].source.endswith("rows.jsonl:5")
    assert base.examples[4].prompt == _questions(18)[4]


def test_likelihoods_are_those_of_the_whole_rows(house: House, chats: Dataset) -> None:
    results = house.run(chats)
    for result, subject in zip(results, house.subjects, strict=True):
        rows = [PackRow(subject.slot, r.ids, r.supervised) for r in map(chats.train.row, range(len(chats.train)))]
        for example, plain in zip(result.examples, score(house.decoder, house.bank, rows), strict=True):
            assert example.tokens == plain.tokens
            assert example.scores["nll"] == pytest.approx(plain.nll, rel=1e-4)


def test_together_equals_alone_and_options_change_nothing(house: House, chats: Dataset) -> None:
    together = house.run(chats)
    alone = [house.run(chats, (subject,))[0] for subject in house.subjects]
    small = house.run(chats, max_rows=1, pass_tokens=8)
    for a, b, c in zip(together, alone, small, strict=True):
        assert [e.got for e in a.examples] == [e.got for e in b.examples] == [e.got for e in c.examples]
        assert _value(a, "loss") == pytest.approx(_value(b, "loss"), rel=1e-5)
        assert _value(a, "loss") == pytest.approx(_value(c, "loss"), rel=1e-5)
        assert a.data_hash == b.data_hash == c.data_hash


def test_loss_alone_generates_nothing(house: House, chats: Dataset) -> None:
    (full,), (short,) = house.run(chats, house.subjects[:1]), house.run(chats, house.subjects[:1], metrics=("loss",))
    assert [m.name for m in short.metrics] == ["loss"]
    assert all(e.got is None and set(e.scores) == {"nll"} for e in short.examples)
    assert _value(short, "loss") == pytest.approx(_value(full, "loss"), rel=1e-5)


def test_results_are_values_and_intervals_can_be_left_out(house: House, chats: Dataset) -> None:
    (result,) = house.run(chats, house.subjects[1:2], metrics=("exact",))
    assert Result.from_json(result.to_json()) == result
    assert all(m.low == m.value == m.high for m in result.metrics)
    (full,) = house.run(chats, house.subjects[1:2], metrics=("exact",), intervals=True)
    assert all(m.low < m.value < m.high for m in full.metrics)
    assert [m.value for m in full.metrics] == pytest.approx([m.value for m in result.metrics])


def test_rows_are_spread_evenly_and_hashed(house: House, chats: Dataset) -> None:
    (few,) = house.run(chats, house.subjects[:1], rows=4)
    assert [e.row for e in few.examples] == [0, 4, 9, 13]
    (all_rows,) = house.run(chats, house.subjects[:1], rows=99)
    assert len(all_rows.examples) == 18
    assert few.data_hash != all_rows.data_hash


def test_progress_reaches_its_end(house: House, chats: Dataset) -> None:
    told: list[tuple[int, int]] = []
    evaluate(
        house.decoder,
        house.bank,
        house.subjects[1],
        chats.train,
        chats.renderer,
        base_hash="",
        options=EvaluationOptions(max_rows=3),
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert told == [(i + 1, 18) for i in range(18)]


def test_labelled_rows(house: House, settings: Settings, tmp_path: Path) -> None:
    questions = _questions(12)
    plain = Renderer(load_tokenizer(house.folder))
    prompts = [plain.prompt([{"role": "user", "content": q}]) for q in questions]
    one = house.subjects[1].slot
    asked = [Request(p, slot=one, max_new_tokens=40, stop_ids=plain.stop_ids) for p in prompts]
    says = [plain.tokenizer.decode(c.ids) for c in generate(house.decoder, house.bank, asked)]
    labels = [answer or "7" for answer in says[:9]] + ["7"] * 3
    path = tmp_path / "rows.csv"
    path.write_text("text,label\n" + "".join(f"{q},{a}\n" for q, a in zip(questions, labels, strict=True)))
    data = _open(house, settings, path)
    base, adapter = house.run(data, house.subjects[:2], labels=("7", "never"))
    assert base.task == "labels"
    assert [m.name for m in base.metrics] == ["accuracy", "macro_f1", "loss", "perplexity"]
    right = sum(answer == label for answer, label in zip(says, labels, strict=True))
    assert right >= 6
    assert _value(adapter, "accuracy") == right / 12
    assert _value(adapter, "macro_f1") > _value(base, "macro_f1")
    for result in (base, adapter):
        assert "never" in result.labels
        assert sum(map(sum, result.confusion)) == 12
        right = sum(result.confusion[i][i] for i, name in enumerate(result.labels) if name != "(none)")
        assert right / 12 == _value(result, "accuracy")
        assert len(result.confusion) == len(result.labels)
    assert base.labels[-1] == "(none)"
    assert compare(base, adapter).differences[0].name == "accuracy"


def test_several_supervised_turns_are_scored_whole(house: House, settings: Settings, tmp_path: Path) -> None:
    rows = []
    for i, question in enumerate(_questions(5)):
        chat = house.chat(question, str(i))
        chat["messages"] += [{"role": "user", "content": "and now?"}, {"role": "assistant", "content": f"9{i}"}]  # pyright: ignore
        rows.append(chat)
    data = _open(house, settings, _write(tmp_path / "rows.jsonl", rows))
    (result,) = house.run(data, house.subjects[1:2])
    for i, example in enumerate(result.examples):
        row = data.train.row(i)
        (plain,) = score(house.decoder, house.bank, [PackRow(house.subjects[1].slot, row.ids, row.supervised)])
        assert (example.expected, example.prompt) == (f"9{i}", "and now?")
        assert example.tokens == int(row.supervised.sum()) == plain.tokens
        assert example.scores["nll"] == pytest.approx(plain.nll, rel=1e-4)


def test_completions_json_and_plain_text(house: House, settings: Settings, tmp_path: Path) -> None:
    completions = [{"prompt": f"{q} ", "completion": json.dumps({"n": i})} for i, q in enumerate(_questions(5))]
    data = _open(house, settings, _write(tmp_path / "completions.jsonl", completions))
    (result,) = house.run(data, house.subjects[:1])
    assert result.task == "json"
    assert [m.name for m in result.metrics] == ["exact", "json_valid", "json_fields", "loss", "perplexity"]
    assert result.examples[2].expected == '{"n": 2}'
    assert result.examples[2].prompt == completions[2]["prompt"]
    texts = _open(house, settings, _write(tmp_path / "texts.jsonl", [{"text": q} for q in _questions(5)]))
    (result,) = house.run(texts, house.subjects[:1])
    assert result.task == "likelihood"
    assert [m.name for m in result.metrics] == ["loss", "perplexity"]
    assert all(e.got is None and e.tokens == len(texts.train.row(e.row).ids) - 1 for e in result.examples)


def test_prompts_are_the_renderers_and_answers_follow_them(house: House, chats: Dataset) -> None:
    cases, _ = take_cases(chats.train, chats.renderer)
    assert len(cases) == 18
    for case in cases:
        assert case.scored_by_answer
        assert case.prompt_ids + case.answer_ids == tuple(case.ids[: len(case.prompt_ids) + len(case.answer_ids)])
        assert case.answer_ids[-1] in chats.renderer.stop_ids
    longest = max(len(case.answer_ids) for case in cases)
    assert answer_limit(cases, 500) == longest + 8
    assert answer_limit(cases, 3) == 3
    other = Renderer(load_tokenizer(house.folder), TEMPLATE.replace("assistant\n", "assistant\nso: "))
    apart = make_case(0, chats.train.raw(0), chats.train.row(0), other)
    assert apart.answer_ids == ()
    assert answer_limit([*cases, apart], 500) == 500


def test_unknown_and_inapplicable_metrics_are_refused(house: House, chats: Dataset) -> None:
    with pytest.raises(RecipeError, match="recipe-metric-unknown"):
        house.run(chats, metrics=("rougeL",))
    with pytest.raises(RecipeError, match="recipe-metric-inapplicable"):
        house.run(chats, metrics=("macro_f1",))


def test_no_rows_are_refused(house: House, chats: Dataset) -> None:
    with pytest.raises(DataError, match="data-evaluation-empty"):
        take_cases(chats.validation, chats.renderer)

"""Data sets end to end: sides, policies, reports, hashes, and the data that are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tenon.data.dataset import Dataset, inspect, open_dataset
from tenon.data.order import RowOrder
from tenon.data.report import DataReport
from tenon.data.rows import Chat, row_tree
from tenon.data.tokens import TRAINING_DATE
from tenon.errors import DataError
from tenon.plan.values import DataPlan, SourcePlan
from tenon.settings import Settings
from tests.data.build import chat, chats, data_plan, write_jsonl
from tests.data.chats import CHATML, save_byte_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base's folder as far as data need it: tokenizer and chat template."""
    return save_byte_tokenizer(tmp_path_factory.mktemp("base"), chat_template=CHATML)


def _open(plan: DataPlan, base: Path, settings: Settings) -> Dataset:
    return open_dataset(plan, base_folder=base, settings=settings)


def _refusal(plan: DataPlan, base: Path, settings: Settings) -> DataError:
    with pytest.raises(DataError) as caught:
        _open(plan, base, settings)
    return caught.value


def _questions(dataset: Dataset) -> tuple[list[str], list[str]]:
    found: list[list[str]] = []
    for store in (dataset.train, dataset.validation):
        rows = [store.raw(number) for number in range(len(store))]
        found.append([row.messages[0]["content"] for row in rows if isinstance(row, Chat)])
    return found[0], found[1]


def test_a_held_out_share_is_exact_and_on_one_side(tmp_path: Path, base: Path, settings: Settings) -> None:
    trees = chats(40) + chats(10)
    path = write_jsonl(tmp_path / "rows.jsonl", trees)
    with _open(data_plan(path, heldout=0.25), base, settings) as dataset:
        train, validation = _questions(dataset)
        assert len(set(validation)) == 10
        assert not set(train) & set(validation)
        assert sorted(train + validation) == sorted(tree["messages"][0]["content"] for tree in trees)
        assert (dataset.report.repeated, dataset.report.train_rows) == (10, len(train))
        assert dataset.train.exact
        row = dataset.train.row(0)
        assert row.source.startswith(f"{path}:")
        assert row.supervised.any()
        assert not row.supervised.all()


def test_validation_sources_take_their_rows_out_of_train(tmp_path: Path, base: Path, settings: Settings) -> None:
    train = write_jsonl(tmp_path / "train.jsonl", chats(20))
    held = write_jsonl(tmp_path / "held.json", [])
    held.write_text("[" + ",".join(f'{{"prompt": "p{n}", "completion": "c"}}' for n in range(3)) + "]")
    other = write_jsonl(tmp_path / "other.jsonl", chats(5))
    plan = data_plan(train, validation=(SourcePlan(path=str(held)), SourcePlan(path=str(other))))
    with _open(plan, base, settings) as dataset:
        assert (len(dataset.train), len(dataset.validation)) == (15, 8)
        assert dataset.report.shared == 5
        assert any("5 train rows were taken out" in warning for warning in dataset.report.warnings)
        assert [source.kept for source in dataset.report.sources] == [15, 3, 5]
        assert [source.role for source in dataset.report.sources] == ["train", "validation", "validation"]


def test_mixed_sources_keep_their_weights(tmp_path: Path, base: Path, settings: Settings) -> None:
    one = SourcePlan(path=str(write_jsonl(tmp_path / "one.jsonl", chats(10))), weight=0.5)
    (tmp_path / "two.csv").write_text("text,label\n" + "".join(f"question {n},l{n % 3}\n" for n in range(6)))
    two = SourcePlan(path=str(tmp_path / "two.csv"), weight=2.0)
    with _open(data_plan(one, two), base, settings) as dataset:
        assert (dataset.train.sizes, dataset.weights) == ((10, 6), (0.5, 2.0))
        order = RowOrder(dataset.train.sizes, dataset.weights, seed=0, shuffle=True)
        assert order.epoch_rows == 17
        assert dataset.labels == ("l0", "l1", "l2")
        labels = [dataset.train.label(number) for number in range(16)]
        assert labels == [None] * 10 + ["l0", "l1", "l2"] * 2


def test_p08_nothing_is_dropped_or_shortened_without_a_count(tmp_path: Path, base: Path, settings: Settings) -> None:
    trees: list[Any] = [
        *chats(6),
        chat("short", "z" * 400),
        chat("q" * 400, "z"),
        {"messages": [{"role": "user", "content": "alone"}]},
        *chats(2),
    ]
    path = write_jsonl(tmp_path / "rows.jsonl", trees)
    plan = data_plan(path, max_tokens=128, on_long="truncate", on_bad="drop", on_duplicate="drop")
    with _open(plan, base, settings) as dataset:
        report = dataset.report
        assert report.rows_read == 11
        assert len(dataset.train) == report.train_rows == report.sources[0].kept == 7
        assert report.shortened == 1
        assert {(drop.code, drop.rows, drop.places) for drop in report.drops} == {
            ("data-row-unsupervised", 1, (f"{path}:8",)),
            ("data-no-assistant", 1, (f"{path}:9",)),
        }
        assert (report.repeated, report.repeated_dropped) == (2, True)
        counted = report.train_rows + sum(drop.rows for drop in report.drops) + report.repeated
        assert counted == report.rows_read
        lengths = [len(dataset.train.row(number).ids) for number in range(7)]
        assert max(lengths) == 128
        assert report.train_tokens == sum(lengths)
        shortened = dataset.train.row(6)
        assert shortened.supervised.any()
        assert shortened.source == f"{path}:7"


def test_p08_a_row_that_loses_its_supervised_tokens_stops_the_run(
    tmp_path: Path, base: Path, settings: Settings
) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*chats(3), chat("q" * 400, "z"), chat("r" * 400, "z")])
    error = _refusal(data_plan(path, max_tokens=128, on_long="truncate"), base, settings)
    assert error.code == "data-row-unsupervised"
    assert error.what.startswith(f"{path}:4: ")
    assert "1 further row " in error.what


def test_a_row_longer_than_the_limit_stops_the_run(tmp_path: Path, base: Path, settings: Settings) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [*chats(3), chat("q" * 400, "z")])
    error = _refusal(data_plan(path, max_tokens=128), base, settings)
    assert error.code == "data-row-too-long"
    assert error.what.startswith(f"{path}:4: the row has ")
    with _open(data_plan(path, max_tokens=128, on_long="drop"), base, settings) as dataset:
        assert len(dataset.train) == 3
        assert [drop.code for drop in dataset.report.drops] == ["data-row-too-long"]


def test_p07_data_without_a_supervised_token_are_refused(tmp_path: Path, base: Path, settings: Settings) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [chat("q" * 400, "z"), chat("r" * 400, "z")])
    plan = data_plan(path, max_tokens=64, on_long="truncate", on_bad="drop")
    assert _refusal(plan, base, settings).code == "data-no-supervised"


def test_a_bad_row_stops_the_run_and_says_how_many_more(tmp_path: Path, base: Path, settings: Settings) -> None:
    alone = {"messages": [{"role": "user", "content": "a"}]}
    path = write_jsonl(tmp_path / "rows.jsonl", [*chats(3), alone, *chats(2), alone, alone])
    error = _refusal(data_plan(path), base, settings)
    assert error.code == "data-no-assistant"
    assert error.what == f"{path}:4: the row has no assistant turn (2 further bad rows in this file)"
    assert error.hint == "add an assistant message, or set data.on_bad: drop"


def test_p27_a_broken_line_is_named(tmp_path: Path, base: Path, settings: Settings) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chats(3))
    with path.open("a") as out:
        out.write('{"messages": [\n')
    error = _refusal(data_plan(path), base, settings)
    assert (error.code, error.what.split(": ")[0]) == ("data-json-broken", f"{path}:4")
    with _open(data_plan(path, on_bad="drop"), base, settings) as dataset:
        assert dataset.report.drops[0].places == (f"{path}:4",)


def test_a_label_that_train_never_had_is_refused(tmp_path: Path, base: Path, settings: Settings) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "test.csv").write_text("text,label\nc,x\nd,z\ne,w\n")
    plan = data_plan(tmp_path / "train.csv", validation=(SourcePlan(path=str(tmp_path / "test.csv")),))
    error = _refusal(plan, base, settings)
    assert error.code == "data-unseen-label"
    assert error.what == f"{tmp_path / 'test.csv'}:3: validation has 2 labels that train never had, here z"
    assert error.got == "w, z"


def test_nothing_left_to_train_on_is_refused(tmp_path: Path, base: Path, settings: Settings) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chats(3))
    plan = data_plan(path, validation=(SourcePlan(path=str(path)),))
    assert _refusal(plan, base, settings).code == "data-no-rows"


def test_a_prompt_that_no_source_uses_is_refused(tmp_path: Path, base: Path, settings: Settings) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chats(3))
    assert _refusal(data_plan(path, prompt="say {text}"), base, settings).code == "data-prompt-unused"


def test_a_template_file_that_cannot_be_read_is_refused(tmp_path: Path, base: Path, settings: Settings) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chats(3))
    assert _refusal(data_plan(path, template=str(tmp_path / "no.jinja")), base, settings).code == "data-template-file"


def test_a_row_that_the_template_refuses_follows_the_policy(tmp_path: Path, base: Path, settings: Settings) -> None:
    template = tmp_path / "strict.jinja"
    refuse = "{%- if messages | length > 3 %}{{ raise_exception('too many turns') }}{% endif %}"
    template.write_text(refuse + CHATML)
    long = {"messages": chat("a", "b")["messages"] * 2}
    path = write_jsonl(tmp_path / "rows.jsonl", [*chats(2), long])
    error = _refusal(data_plan(path, template=str(template)), base, settings)
    assert error.code == "data-template-failed"
    assert error.what.startswith(f"{path}:3: ")
    assert "too many turns" in error.what
    with _open(data_plan(path, template=str(template), on_bad="drop"), base, settings) as dataset:
        assert (len(dataset.train), dataset.report.drops[0].code) == (2, "data-template-failed")


def test_what_a_template_leaves_out_is_said(tmp_path: Path, base: Path, settings: Settings) -> None:
    thought = chat("why", "so") | {"tools": [{"name": "look"}]}
    thought["messages"][1]["reasoning_content"] = "hm"
    quoted = chat('"tools": "reasoning_content":', "no")
    path = write_jsonl(tmp_path / "rows.jsonl", [*chats(2), thought, quoted])
    template = tmp_path / "knows.jinja"
    template.write_text(CHATML + "{# writes tools and reasoning_content #}")
    with _open(data_plan(path), base, settings) as dataset:
        assert dataset.report.warnings == (
            "the chat template leaves out tools; rows that offer some: 1",
            "the chat template leaves out reasoning; rows that hold some: 1",
        )
    with _open(data_plan(path, template=str(template)), base, settings) as dataset:
        assert dataset.report.warnings == ()


def test_p18_the_hash_binds_rows_and_sides_and_not_their_packaging(
    tmp_path: Path, base: Path, settings: Settings
) -> None:
    def digest(*train: Path | SourcePlan, **changes: Any) -> str:
        with _open(data_plan(*train, **changes), base, settings) as dataset:
            return dataset.content_hash

    path = write_jsonl(tmp_path / "a.jsonl", chats(30))
    array = tmp_path / "b.json"
    array.write_text("[" + ",".join(path.read_text().splitlines()) + "]")
    changed = write_jsonl(tmp_path / "c.jsonl", [*chats(29), chat("what is 29", "no idea")])
    assert digest(path) == digest(array)
    different = [
        digest(path),
        digest(changed),
        digest(path, heldout=0.1),
        digest(path, heldout=0.1, seed=1),
        digest(path, changed),
        digest(SourcePlan(path=str(path), weight=2.0)),
    ]
    assert len(set(different)) == len(different)


def test_opening_again_reads_the_cache_and_gives_the_same(tmp_path: Path, base: Path, settings: Settings) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chats(50))
    plan = data_plan(path, heldout=0.2)
    with _open(plan, base, settings) as first:
        rows = [(row.ids.tolist(), row.supervised.tolist()) for row in map(first.train.row, range(len(first.train)))]
        report = first.report
    stamps = {file: file.stat().st_mtime_ns for file in settings.cache.rglob("*") if file.is_file()}
    assert stamps
    with _open(plan, base, settings) as second:
        assert rows == [
            (r.ids.tolist(), r.supervised.tolist()) for r in map(second.train.row, range(len(second.train)))
        ]
        assert second.report == report
    assert stamps == {file: file.stat().st_mtime_ns for file in settings.cache.rglob("*") if file.is_file()}


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, base: Path, settings: Settings) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chats(3))
    settings.cache.write_text("in the way")
    error = _refusal(data_plan(path), base, settings)
    assert error.code == "data-io"
    assert error.what.startswith(f"{path}: ")
    assert "TENON_CACHE" in error.hint


def test_progress_is_told(tmp_path: Path, base: Path, settings: Settings) -> None:
    told: list[tuple[str, int, int]] = []
    path = write_jsonl(tmp_path / "rows.jsonl", chats(10))
    open_dataset(
        data_plan(path), base_folder=base, settings=settings, on_progress=lambda *what: told.append(what)
    ).close()
    assert {what for what, _, _ in told} == {f"reading {path}", "tokenising rows"}
    assert all(0 < done <= total for _, done, total in told)


def test_p12_inspecting_shows_which_tokens_are_supervised(tmp_path: Path, base: Path, settings: Settings) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [chat("wie geht’s? 日本", "gut 🎉 日"), *chats(9)])
    report, samples = inspect(data_plan(path), base_folder=base, settings=settings, rows=4)
    assert len(samples) == 4
    assert [sample.source for sample in samples] == [f"{path}:{line}" for line in (1, 4, 7, 10)]
    first = samples[0]
    said = "".join(text for text, supervised in first.pieces if supervised)
    everything = "".join(text for text, _ in first.pieces)
    assert said == "gut 🎉 日<|im_end|>"
    assert "wie geht’s? 日本<|im_end|>" in everything
    assert sum(supervised for _, supervised in first.pieces) <= first.supervised <= first.tokens
    assert report.lengths is not None
    assert sum(report.lengths.counts) == 10
    assert report.complete


def test_inspecting_names_every_problem_and_goes_on(tmp_path: Path, base: Path, settings: Settings) -> None:
    (tmp_path / "train.csv").write_text("text,label\na,x\nb,y\nragged\n" + "q" * 900 + ",x\n")
    (tmp_path / "test.csv").write_text("text,label\nd,z\n")
    plan = data_plan(tmp_path / "train.csv", validation=(SourcePlan(path=str(tmp_path / "test.csv")),))
    report, samples = inspect(plan, base_folder=base, settings=settings)
    assert [problem.code for problem in report.problems] == [
        "data-csv-ragged",
        "data-unseen-label",
        "data-row-too-long",
    ]
    assert (report.train_rows, len(samples)) == (2, 2)
    assert all(problem.hint for problem in report.problems)


def test_the_report_survives_json(tmp_path: Path, base: Path, settings: Settings) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", chats(30))
    report, _ = inspect(data_plan(path, heldout=0.2), base_folder=base, settings=settings)
    assert DataReport.from_json(report.to_json()) == report
    assert report.sources[0].formats == (("messages", "the rows have messages"),)
    assert report.lengths is not None
    assert len(report.lengths.edges) == len(report.lengths.counts) + 1
    assert report.lengths.edges[0] <= min(row.tokens for row in report.lengths.longest) < report.lengths.edges[-1]


def test_templates_that_write_the_date_write_the_same_one_in_every_run(
    tmp_path: Path, base: Path, settings: Settings
) -> None:
    template = tmp_path / "dated.jinja"
    template.write_text("{{- '<|im_start|>system\\n' + strftime_now('%d %b %Y') + '<|im_end|>\\n' }}\n" + CHATML)
    path = write_jsonl(tmp_path / "rows.jsonl", chats(3))
    with _open(data_plan(path, template=str(template)), base, settings) as dataset:
        text = dataset.renderer.tokenizer.decode(dataset.train.row(0).ids.tolist())
    assert TRAINING_DATE.strftime("%d %b %Y") in text


def test_real_labelled_data(shared_data: Path, base: Path, settings: Settings) -> None:
    folder = shared_data / "banking77"
    plan = data_plan(
        folder / "train.csv", validation=(SourcePlan(path=str(folder / "test.csv")),), workers=2, max_tokens=1024
    )
    with _open(plan, base, settings) as dataset:
        report = dataset.report
        assert (report.rows_read, len(dataset.validation), len(dataset.labels)) == (13_083, 3_080, 77)
        assert len(dataset.train) + report.shared == 10_003
        assert report.complete
        assert report.problems == ()
        row = dataset.train.raw(0)
        assert row_tree(row)["label"] == "card_arrival"

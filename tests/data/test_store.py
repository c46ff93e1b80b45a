"""Rows as tokens: from the cache, from workers or made on the spot, always the same; policies; background errors."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from tenon.data.render import Renderer
from tenon.data.shards import SHARD_ROWS, Fault, make_words
from tenon.data.store import FAULTY, KEPT, LONG, SHORTENED, UNSUPERVISED, Feeder, Policy, RowStore, Selection
from tenon.data.tokens import Rendering, ShardTask, TokenFile, shard_path, token_spec
from tenon.errors import DataError
from tenon.settings import Settings
from tests.data.build import chat, chats, index, write_jsonl
from tests.data.chats import CHATML

ROWS = SHARD_ROWS + 300


@pytest.fixture(scope="module")
def rendering(byte_folder: Path) -> Rendering:
    return Rendering(byte_folder, CHATML, "assistant", None, 256)


@pytest.fixture(scope="module")
def renderer(rendering: Rendering) -> Renderer:
    return rendering.renderer()


@pytest.fixture
def big_file(tmp_path: Path, settings: Settings, rendering: Rendering, renderer: Renderer) -> TokenFile:
    """A file of a shard and a bit, nothing tokenised yet."""
    path = write_jsonl(tmp_path / "rows.jsonl", chats(ROWS))
    return _open(index(path, settings), rendering, renderer, settings)


def _open(indexed, rendering: Rendering, renderer: Renderer, settings: Settings) -> TokenFile:
    from tenon.data.index import load_table

    spec = token_spec(indexed, rendering, renderer, settings.cache)
    return TokenFile(spec, renderer, np.ones(len(load_table(indexed)), dtype=bool))


def _store(file: TokenFile, policy: Policy, feeder: Feeder) -> RowStore:
    size = len(file)
    selection = Selection(np.zeros(size, dtype=np.int32), np.arange(size), (size,))
    return RowStore([file], selection, policy, feeder, exact=False)


STRICT = Policy(256, "stop", "stop")


def _words(store: RowStore, rows: list[int]) -> list[tuple[list[int], list[bool], str]]:
    return [(row.ids.tolist(), row.supervised.tolist(), row.source) for row in map(store.row, rows)]


def test_p30_tokens_are_the_same_cached_on_demand_or_from_workers(big_file: TokenFile) -> None:
    rows = [0, 1, 7, SHARD_ROWS - 1, SHARD_ROWS, ROWS - 1]
    feeder = Feeder([big_file], STRICT, workers=2)
    store = _store(big_file, STRICT, feeder)
    on_demand = _words(store, rows)
    assert len(list(big_file.spec.folder.iterdir())) == 0
    feeder.start()
    end = time.monotonic() + 60
    while len(big_file.missing()) and time.monotonic() < end:
        time.sleep(0.01)
    feeder.close()
    assert not big_file.missing()
    from_workers = _words(store, rows)
    here = TokenFile(big_file.spec, big_file._renderer, big_file.selected)
    cached = _words(_store(here, STRICT, Feeder([here], STRICT, workers=1)), rows)
    assert on_demand == from_workers == cached
    assert all(any(flags) for _, flags, _ in cached)


@hypothesis_settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_p30_any_interleaving_of_reading_and_tokenising_gives_the_same(
    data: st.DataObject, tmp_path: Path, settings: Settings, rendering: Rendering, renderer: Renderer
) -> None:
    texts = data.draw(st.lists(st.text(min_size=1, max_size=12).filter(str.strip), min_size=1, max_size=6))
    path = write_jsonl(tmp_path / "some.jsonl", [chat(text, text + "!") for text in texts])
    file = _open(index(path, settings), rendering, renderer, settings)
    expected = [renderer.render(file.reader.row(number)) for number in range(len(texts))]
    store = _store(file, STRICT, Feeder([file], STRICT, workers=1))
    when = data.draw(st.integers(0, len(texts)))
    for number in range(len(texts)):
        if number == when and (missing := file.missing()):
            missing[0].run({})
            file.mark_ready(0)
        row = store.row(number)
        assert (row.ids.tolist(), row.supervised.tolist()) == (expected[number].ids, expected[number].supervised)
    file.close()


def test_a_damaged_shard_is_made_again(big_file: TokenFile) -> None:
    feeder = Feeder([big_file], STRICT, workers=1)
    feeder.complete(None)
    path = shard_path(big_file.spec.folder, 1)
    whole = path.read_bytes()
    path.write_bytes(whole[:-40])
    again = TokenFile(big_file.spec, big_file._renderer, big_file.selected)
    store = _store(again, STRICT, Feeder([again], STRICT, workers=1))
    assert store.row(ROWS - 1).ids.tolist() == _store(big_file, STRICT, feeder).row(ROWS - 1).ids.tolist()
    path.write_bytes(whole[:-40])
    third = TokenFile(big_file.spec, big_file._renderer, big_file.selected)
    Feeder([third], STRICT, workers=1).complete(None)
    assert path.read_bytes() == whole


def test_shards_without_a_selected_row_are_not_made(big_file: TokenFile) -> None:
    big_file.selected[:SHARD_ROWS] = False
    assert big_file.missing() == [ShardTask(big_file.spec, 1)]


def test_what_tokens_depend_on_names_their_folder(
    big_file: TokenFile, renderer: Renderer, byte_folder: Path, metaspace_folder: Path, settings: Settings
) -> None:
    indexed = big_file.spec.indexed
    variants = [
        Rendering(byte_folder, CHATML, "assistant", None, 256),
        Rendering(byte_folder, CHATML, "last", None, 256),
        Rendering(byte_folder, CHATML, "assistant", "be brief", 256),
        Rendering(byte_folder, CHATML, "assistant", None, 255),
        Rendering(byte_folder, CHATML.replace("helpful", "kind"), "assistant", None, 256),
        Rendering(metaspace_folder, CHATML, "assistant", None, 256),
    ]
    folders = {token_spec(indexed, each, each.renderer(), settings.cache).folder for each in variants}
    assert len(folders) == len(variants)
    assert token_spec(indexed, variants[0], renderer, settings.cache).folder == big_file.spec.folder


@pytest.mark.parametrize(
    ("on_long", "on_bad", "codes", "stopping"),
    [
        ("stop", "stop", [KEPT, LONG, UNSUPERVISED, FAULTY, LONG], [LONG, UNSUPERVISED, FAULTY]),
        ("truncate", "stop", [KEPT, SHORTENED, UNSUPERVISED, FAULTY, UNSUPERVISED], [UNSUPERVISED, FAULTY]),
        ("truncate", "drop", [KEPT, SHORTENED, UNSUPERVISED, FAULTY, UNSUPERVISED], []),
        ("drop", "drop", [KEPT, LONG, UNSUPERVISED, FAULTY, LONG], []),
        ("drop", "stop", [KEPT, LONG, UNSUPERVISED, FAULTY, LONG], [UNSUPERVISED, FAULTY]),
    ],
)
def test_policies(on_long: str, on_bad: str, codes: list[int], stopping: list[int]) -> None:
    policy = Policy(10, on_long, on_bad)
    full, supervised = np.array([10, 11, 5, 0, 12]), np.array([4, 1, 0, 0, 0])
    faulty = np.array([False, False, False, True, False])
    assert policy.classify(full, supervised, faulty).tolist() == codes
    assert policy.stopping_codes() == stopping


def test_errors_of_rows_say_lengths_and_how_many_more() -> None:
    error = STRICT.error(LONG, "a.jsonl:7", 300, None, further=2)
    assert (error.code, error.what) == (
        "data-row-too-long",
        "a.jsonl:7: the row has 300 tokens, the limit is 256 (2 further rows cannot be used)",
    )
    error = Policy(256, "truncate", "stop").error(UNSUPERVISED, "a.jsonl:7", 300, None)
    assert error.code == "data-row-unsupervised"
    assert "once it is cut to 256 tokens" in error.what
    error = STRICT.error(FAULTY, "a.jsonl:7", 0, Fault("data-template-failed", "no", "roles user", "change it"))
    assert (error.code, error.what, error.got) == ("data-template-failed", "a.jsonl:7: no", "roles user")


def test_cutting_keeps_the_mask() -> None:
    row = make_words([1, 2, 3, 4], [False, True, False, True], 3)
    assert (row.full_tokens, row.supervised_tokens, len(row.words)) == (4, 1, 3)


def test_a_row_found_bad_in_the_background_stops_the_next_access(
    tmp_path: Path, settings: Settings, rendering: Rendering, renderer: Renderer
) -> None:
    trees = chats(40)
    trees[25] = chat("x" * 900, "y")
    file = _open(index(write_jsonl(tmp_path / "rows.jsonl", trees), settings), rendering, renderer, settings)
    feeder = Feeder([file], STRICT, workers=1)
    store = _store(file, STRICT, feeder)
    assert len(store.row(3).ids)
    feeder.start()
    end = time.monotonic() + 30
    with pytest.raises(DataError) as caught:
        while time.monotonic() < end:
            store.check()
            time.sleep(0.01)
    assert caught.value.code == "data-row-too-long"
    assert caught.value.what.startswith(f"{tmp_path / 'rows.jsonl'}:26: ")
    with pytest.raises(DataError):
        store.row(3)
    feeder.close()
    assert not any(psutil.pid_exists(pid) for pid in feeder.pids)


def test_a_cache_that_fails_in_the_background_does_not_end_the_run(
    tmp_path: Path, settings: Settings, rendering: Rendering, renderer: Renderer, caplog: pytest.LogCaptureFixture
) -> None:
    file = _open(index(write_jsonl(tmp_path / "rows.jsonl", chats(9)), settings), rendering, renderer, settings)
    feeder = Feeder([file], STRICT, workers=1)
    store = _store(file, STRICT, feeder)
    file.spec.folder.rmdir()
    feeder.start()
    end = time.monotonic() + 30
    while not caplog.records and time.monotonic() < end:
        assert len(store.row(3).ids)
        time.sleep(0.01)
    assert "no longer cached" in caplog.text
    assert len(store.row(8).ids)
    feeder.close()


def test_selections_keep_their_sources_apart() -> None:
    selection = Selection(np.zeros(5, dtype=np.int32), np.arange(5), (2, 0, 3))
    kept = selection.keep(np.array([True, False, False, True, True]))
    assert (kept.sizes, kept.row_of.tolist()) == ((1, 0, 2), [0, 3, 4])

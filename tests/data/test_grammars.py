"""Grammars over real vocabularies: what comes out is valid, and what costs too much is refused in time."""

from __future__ import annotations

import json
import random
import threading
import time
from typing import Any

import numpy as np
import pytest

from tenon.data.grammars import Grammars, Progress
from tenon.data.schemas import LONGEST_SCHEMA, check_schema, schema_grammar, schema_rule
from tenon.data.tokenizer import ChatTokenizer
from tenon.errors import UsageError

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b", "ü"]}, "maxItems": 3},
        "home": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/place"}]},
    },
    "required": ["name", "age", "home"],
    "additionalProperties": False,
    "$defs": {"place": {"type": "object", "properties": {"zip": {"type": "string", "pattern": "^[0-9]{5}$"}}}},
}


def allowed(grammars: Grammars, progress: Progress) -> list[int]:
    bits = np.unpackbits(grammars.masks([progress]).view(np.uint8), bitorder="little")
    return np.flatnonzero(bits).tolist()


def walk(grammars: Grammars, grammar: str, stop_ids: frozenset[int], seed: int, *, most: int = 150) -> list[int] | None:
    """Tokens drawn at random among the allowed ones, of the first dozen more often than not: they are short and hold no
    space; None where they have not come to an end.
    """
    progress, drawn, ids = grammars.start(grammar, stop_ids), random.Random(seed), []
    for _ in range(most):
        if progress.complete:
            return ids
        choices = allowed(grammars, progress)
        assert choices and progress.error is None
        token = drawn.choice(choices if drawn.random() < 0.3 else choices[:12])
        if token in stop_ids:
            return ids
        ids.append(token)
        progress.push(token)
    return None


@pytest.fixture(params=["byte", "metaspace", "smollm"])
def tokenizer(request: pytest.FixtureRequest) -> ChatTokenizer:
    return request.getfixturevalue(f"{request.param}_tokenizer")


def stops(tokenizer: ChatTokenizer) -> frozenset[int]:
    assert tokenizer.eos_id is not None
    return frozenset({tokenizer.eos_id})


def test_whatever_is_drawn_is_what_the_schema_allows(tokenizer: ChatTokenizer) -> None:
    grammars = Grammars(tokenizer, vocabulary=tokenizer.vocabulary + 70)
    grammar, ended = schema_grammar(PERSON), 0
    for seed in range(8):
        ids = walk(grammars, grammar, stops(tokenizer), seed)
        if ids is None:
            continue
        ended += 1
        found = json.loads(tokenizer.decode(ids, keep_special=True))
        assert set(found) <= {"name", "age", "tags", "home"} and {"name", "age", "home"} <= set(found)
        assert 1 <= len(found["name"]) <= 12 and 0 <= found["age"] <= 150
        assert not any(token in tokenizer.special_ids for token in ids)
    assert ended >= 3


def test_an_answer_may_end_only_where_the_grammar_may_and_by_any_stop_token(smollm_tokenizer: ChatTokenizer) -> None:
    grammars = Grammars(smollm_tokenizer, vocabulary=smollm_tokenizer.vocabulary)
    ends = frozenset({0, 2, 5})
    progress = grammars.start(schema_grammar({"type": "integer"}), ends)
    assert not ends & set(allowed(grammars, progress))
    progress.push(smollm_tokenizer.encode("7")[0])
    assert ends <= set(allowed(grammars, progress)) and not progress.complete
    done = grammars.start(schema_grammar({"const": 1}), ends)
    done.push(smollm_tokenizer.encode("1")[0])
    assert done.complete


def test_masks_of_several_rows_are_those_of_each(smollm_tokenizer: ChatTokenizer) -> None:
    grammars = Grammars(smollm_tokenizer, vocabulary=smollm_tokenizer.vocabulary)
    schemas = [PERSON, {"type": "integer"}, {"enum": ["x"]}, {}]
    made = [grammars.start(schema_grammar(schema), frozenset({2})) for schema in schemas]
    together = grammars.masks(made)
    assert all(np.array_equal(grammars.masks([one])[0], row) for one, row in zip(made, together, strict=True))
    assert grammars.masks([]).shape == (0, (smollm_tokenizer.vocabulary + 31) // 32)


def nested(depth: int) -> dict[str, Any]:
    found: dict[str, Any] = {"type": "string"}
    for _ in range(depth):
        found = {"type": "array", "items": found}
    return found


UNFIT: list[tuple[dict[str, Any], str]] = [
    ({"minLenght": 3}, "minLenght"),
    ({"type": "object", "properties": {"a": {"not": {}}}}, r"'not' at \$\.properties\.a"),
    ({"$defs": {"x": {"if": {}, "then": {}}}}, "'if'"),
    ({"x-guidance": {"lenient": True}}, "x-guidance"),
    ({"anyOf": [{"uniqueItems": True}]}, "uniqueItems"),
    ({"items": [{}]}, "neither an object"),
    ({"anyOf": {}}, "not a list"),
    ({"properties": []}, "not an object"),
    ({"properties": {"a": 3}}, "neither an object"),
    (nested(100), "deep"),
    ({"anyOf": [{}] * 2000}, "parts"),
    ({"enum": ["x" * LONGEST_SCHEMA]}, "characters"),
]


@pytest.mark.parametrize(("schema", "named"), UNFIT)
def test_what_would_not_be_kept_is_refused_by_name(schema: dict[str, Any], named: str) -> None:
    for write in (check_schema, schema_grammar, schema_rule):
        with pytest.raises(UsageError, match=named) as caught:
            write(schema)
        assert caught.value.code == "usage-grammar"


BAD: list[dict[str, Any]] = [
    {"type": "wat"},
    {"$ref": "#/$defs/nobody"},
    {"$ref": "http://127.0.0.1/schema.json"},
    {"$ref": "file:///etc/passwd"},
    {"type": "string", "format": "nothing-known"},
    {"type": "string", "pattern": "(?=a)b"},
    {"type": "string", "pattern": "("},
    {"type": "integer", "minimum": 5, "maximum": 3},
    {"enum": []},
    {"oneOf": [{"type": "string"}, {"type": "string"}]},
    {"type": "string", "maxLength": "x"},
]


@pytest.mark.parametrize("schema", BAD)
def test_schemas_that_cannot_be_compiled_are_refused(schema: dict[str, Any], smollm_grammars: Grammars) -> None:
    with pytest.raises(UsageError, match="usage-grammar"):
        smollm_grammars.check(schema_grammar(schema))


@pytest.fixture(scope="module")
def smollm_grammars(smollm_tokenizer: ChatTokenizer) -> Grammars:
    grammars = Grammars(smollm_tokenizer, vocabulary=smollm_tokenizer.vocabulary)
    grammars.check(schema_grammar({}))
    return grammars


def doubling(link: str, levels: int = 30) -> dict[str, Any]:
    """Each level has the one below it twice: two to the power of `levels` in all."""
    below: dict[str, dict[str, Any]] = {"l0": {"type": "string"}}
    for i in range(1, levels):
        ref = {"$ref": f"#/$defs/l{i - 1}"}
        pair = (
            {"properties": {"x": ref, "y": ref}, "required": ["x", "y"]} if link == "properties" else {link: [ref, ref]}
        )
        below[f"l{i}"] = pair
    return {"$defs": below, "$ref": f"#/$defs/l{levels - 1}"}


HOSTILE: dict[str, dict[str, Any]] = {
    "all of all": doubling("allOf"),
    "any of any": doubling("anyOf"),
    "objects of objects": doubling("properties"),
    "many optional properties": {"properties": {f"p{i}": {"type": "string"} for i in range(900)}},
    "many choices": {"anyOf": [{"properties": {f"p{i}": {"type": "string"}}} for i in range(450)]},
    "many words": {"enum": [f"w{i}" for i in range(7000)]},
    "itself": {"$ref": "#"},
    "itself inside": {"anyOf": [{"$ref": "#"}, {"$ref": "#"}]},
    "long": {"type": "string", "minLength": 10**9},
    "large": {"type": "array", "minItems": 10**6},
    "multiples": {"type": "integer", "multipleOf": 982451653},
    **{
        f"pattern {pattern}": {"type": "string", "pattern": pattern}
        for pattern in ("(a+)+$", "(x+x+)+y", "((a{1,100}){1,100}){1,100}", "(.*a.{200})", "(a?){500}a{500}",
                        "(?:(?:.{0,100}x){50}y){20}", "^(([a-z])+.)+[A-Z]([a-z])+$", "((.{0,1000}){0,1000}){0,1000}b")
    },
}  # fmt: skip


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_schemas_are_refused_or_cheap_and_other_threads_go_on(kind: str, smollm_grammars: Grammars) -> None:
    """On a busy machine too: all bounds are ten times what it takes alone."""
    gaps, done = [], threading.Event()

    def beat() -> None:
        last = time.monotonic()
        while not done.wait(0.002):
            gaps.append(time.monotonic() - last)
            last = time.monotonic()

    other = threading.Thread(target=beat)
    other.start()
    started = time.thread_time()
    slowest = 0.0
    try:
        progress = smollm_grammars.start(schema_grammar(HOSTILE[kind]), frozenset({2}))
        compiled = time.thread_time() - started
        drawn = random.Random(3)
        for _ in range(25):
            before = time.thread_time()
            choices = allowed(smollm_grammars, progress)
            slowest = max(slowest, time.thread_time() - before)
            if progress.error is not None or progress.complete or not set(choices) - {2}:
                break
            progress.push(drawn.choice(sorted(set(choices) - {2})))
    except UsageError as error:
        assert error.code == "usage-grammar"
        compiled = time.thread_time() - started
    done.set()
    other.join()
    assert compiled < 5 and slowest < 0.4, (compiled, slowest)
    assert not gaps or max(gaps) < 2

"""How much data a recipe names, before anything is tokenised: rows are counted, tokens guessed from their text.

The guess needs no tokenizer, so that a plan is there at once; training counts for itself. This module does not know
plans.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tenon.plan.size import DataSize
from tenon.recipe.load import Loaded
from tenon.recipe.schema import Source
from tenon.settings import Settings

SAMPLED_ROWS = 400
_CHUNK_BYTES = 8 << 20
# Tokens of a row beside its text: the marks around each turn, and a system message where the template brings its own.
_TURN_TOKENS = 5
_ROW_TOKENS = 12
_CHARACTERS_PER_TOKEN = 4.2
_TOKENS_PER_WIDE_CHARACTER = 0.9


def measure_data(loaded: Loaded, settings: Settings) -> DataSize:
    """Rows and a guess of tokens of a recipe's data. Raises DataError when a source cannot be read."""
    data = loaded.recipe.data
    rows, mean_tokens = _measure(loaded, data.train, settings)
    validation_rows, _ = _measure(loaded, data.validation or (), settings)
    return DataSize(rows=round(rows), mean_tokens=mean_tokens, validation_rows=round(validation_rows))


def guess_tokens(tree: Any) -> float:
    """Roughly how many tokens a row's text has: about four letters a token, one for a character of wide scripts."""
    if isinstance(tree, str):
        wide = sum(1 for letter in tree if ord(letter) > 0x2E7F)
        return (len(tree) - wide) / _CHARACTERS_PER_TOKEN + wide * _TOKENS_PER_WIDE_CHARACTER + _TURN_TOKENS
    if isinstance(tree, dict):
        return sum(guess_tokens(value) for value in tree.values())
    if isinstance(tree, list):
        return sum(guess_tokens(value) for value in tree)
    return 0.0


def _measure(loaded: Loaded, sources: Sequence[Source], settings: Settings) -> tuple[float, float]:
    """(rows of one epoch, mean tokens of a row)."""
    rows = tokens = 0.0
    for source in sources:
        source_rows, mean_tokens = _measure_source(loaded.resolve_source(source.path), settings)
        rows += source.weight * source_rows
        tokens += source.weight * source_rows * mean_tokens
    return rows, tokens / rows if rows else 0.0


def _measure_source(path: str, settings: Settings) -> tuple[int, float]:
    # The readers need packages of the train extra, which a plain installation may lack: asked for when needed.
    from tenon.data.sources import find_files
    from tenon.data.spool import open_rows

    rows, guesses = 0, []
    for file in find_files(path, settings):
        spool = open_rows(file, settings)
        lines = _count_lines(spool.path)
        rows += lines
        guesses += _sample(spool.path, lines)
    return rows, sum(guesses) / len(guesses) if guesses else 0.0


def _count_lines(path: Path) -> int:
    """Lines of a file; one that does not end is a line too."""
    lines, last = 0, b"\n"
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            lines += chunk.count(b"\n")
            last = chunk[-1:]
    return lines + (last != b"\n")


def _sample(path: Path, lines: int) -> list[float]:
    """Guesses for rows spread over the file by place; rows that cannot be read are left to training to name."""
    import orjson

    size_bytes = path.stat().st_size
    guesses: list[float] = []
    with path.open("rb") as file:
        for index in range(min(lines, SAMPLED_ROWS)):
            if lines > SAMPLED_ROWS:
                file.seek(index * size_bytes // SAMPLED_ROWS)
                if index:
                    file.readline()
            line = file.readline()
            if not line.strip():
                continue
            try:
                guesses.append(guess_tokens(orjson.loads(line)) + _ROW_TOKENS)
            except orjson.JSONDecodeError:
                continue
    return guesses

"""The tokens of one indexed file: from a shard where it is ready, else made on the spot; the same tokens either way.

This module does not know splits, or what becomes of rows that are too long.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import numpy as np

from tenon.data.index import IndexedFile, RowReader
from tenon.data.render import Renderer
from tenon.data.rows import Row
from tenon.data.shards import (
    NOTHING,
    SHARD_ROWS,
    Fault,
    Shard,
    ShardDamagedError,
    Tokenised,
    make_words,
    open_shard,
    write_shard,
)
from tenon.data.tokenizer import load_tokenizer
from tenon.errors import DataError
from tenon.values import canonical_json, hash_text

TOKENS_VERSION = 1
# The system allows some 65,000 mappings to a process.
OPEN_SHARDS = 4096
# What "today" is to templates that write the date: always the same, or a run resumed tomorrow would see other tokens.
TRAINING_DATE = datetime(2026, 1, 1)


@dataclass(frozen=True, slots=True)
class Rendering:
    """All that the tokens of a row depend on beside the row itself. template: Jinja source, None for the base's own."""

    base_folder: Path
    template: str | None
    supervise: Literal["assistant", "last", "all"]
    system: str | None
    max_tokens: int

    def renderer(self) -> Renderer:
        """Load the tokenizer and prepare the template."""
        tokenizer = load_tokenizer(self.base_folder)
        return Renderer(tokenizer, self.template, self.supervise, self.system, now=TRAINING_DATE)


@dataclass(frozen=True, slots=True)
class TokenSpec:
    """What a worker needs to tokenise rows of one file. folder: where the shards go."""

    indexed: IndexedFile
    rendering: Rendering
    folder: Path


def token_spec(indexed: IndexedFile, rendering: Rendering, renderer: Renderer, cache: Path) -> TokenSpec:
    """The specification, its folder named by everything that the tokens depend on."""
    tree = {
        "version": TOKENS_VERSION,
        "rows": indexed.key,
        "tokenizer": renderer.tokenizer.content_hash,
        "template": renderer.template_hash,
        "supervise": rendering.supervise,
        "system": rendering.system,
        "max_tokens": rendering.max_tokens,
    }
    folder = cache / "data" / "tokens" / hash_text(canonical_json(tree))[:40]
    return TokenSpec(indexed, rendering, folder)


def tokenise(row: Row, renderer: Renderer, max_tokens: int) -> Tokenised:
    """One row's tokens; what the template refuses becomes a fault."""
    try:
        rendered = renderer.render(row)
    except DataError as error:
        reason = error.what.removeprefix(f"{row.source}: ")
        return Tokenised(NOTHING, 0, 0, Fault(error.code, reason, error.got, error.hint))
    return make_words(rendered.ids, rendered.supervised, max_tokens)


@dataclass(frozen=True, slots=True)
class ShardTask:
    """Tokenise one shard of a file, in a worker."""

    spec: TokenSpec
    number: int

    def run(self, memo: dict[Any, Any]) -> None:
        """Write the shard, unless it is there."""
        path = shard_path(self.spec.folder, self.number)
        if path.exists():
            return
        if self.spec.rendering not in memo:
            memo[self.spec.rendering] = self.spec.rendering.renderer()
        if self.spec.folder not in memo:
            memo[self.spec.folder] = RowReader(self.spec.indexed)
        renderer, reader = memo[self.spec.rendering], memo[self.spec.folder]
        start = self.number * SHARD_ROWS
        rows = range(start, min(start + SHARD_ROWS, len(reader)))
        limit = self.spec.rendering.max_tokens
        write_shard(path, [tokenise(reader.row(index), renderer, limit) for index in rows])


def shard_path(folder: Path, number: int) -> Path:
    """Where shard `number` lies."""
    return folder / f"{number:07d}.tokens"


class TokenFile:
    """Rows of one file as tokens. selected: bool mask of the rows that a data set uses."""

    def __init__(self, spec: TokenSpec, renderer: Renderer, selected: np.ndarray) -> None:
        self.spec = spec
        self.selected = selected
        self.reader = RowReader(spec.indexed)
        self._renderer = renderer
        self._shards: dict[int, Shard] = {}
        spec.folder.mkdir(parents=True, exist_ok=True)
        self.shard_count = -(-len(self.reader) // SHARD_ROWS)
        self._ready = {number for number in range(self.shard_count) if shard_path(spec.folder, number).exists()}

    def __len__(self) -> int:
        return len(self.reader)

    def missing(self) -> list[ShardTask]:
        """What is left to tokenise; shards without a selected row are left out."""
        starts = np.arange(0, len(self), SHARD_ROWS)
        wanted = np.logical_or.reduceat(self.selected, starts) if len(self) else np.zeros(0, dtype=bool)
        return [ShardTask(self.spec, int(n)) for n in np.flatnonzero(wanted) if int(n) not in self._ready]

    def verify(self) -> None:
        """Open every shard that is there, so that damaged ones are made again."""
        for number in sorted(self._ready):
            self.shard(number)

    def lend(self, memo: dict[Any, Any]) -> None:
        """Let tasks that run in this process use what is loaded already."""
        memo[self.spec.rendering] = self._renderer
        memo[self.spec.folder] = self.reader

    def mark_ready(self, number: int) -> None:
        """Shard `number` was written."""
        self._ready.add(number)

    def row(self, index: int) -> Tokenised:
        """The tokens of row `index`: from its shard, or made now."""
        number, place = divmod(index, SHARD_ROWS)
        shard = self.shard(number)
        if shard is not None:
            return shard.row(place)
        return tokenise(self.reader.row(index), self._renderer, self.spec.rendering.max_tokens)

    def shard(self, number: int) -> Shard | None:
        """Shard `number` if it is ready; a damaged one is removed and counts as not ready."""
        if number not in self._ready:
            return None
        if number not in self._shards:
            path = shard_path(self.spec.folder, number)
            if len(self._shards) >= OPEN_SHARDS:
                self._shards.clear()
            try:
                self._shards[number] = open_shard(path)
            except (ShardDamagedError, FileNotFoundError):
                path.unlink(missing_ok=True)
                self._ready.discard(number)
                return None
        return self._shards[number]

    def shards(self) -> Iterator[tuple[int, Shard]]:
        """(first row, shard) of all that are ready."""
        for number in sorted(self._ready):
            shard = self.shard(number)
            if shard is not None:
                yield number * SHARD_ROWS, shard

    def close(self) -> None:
        """Give the files back."""
        self.reader.close()
        self._shards.clear()

"""The nearest valid name for a key or a word that does not exist. Knows the schema and the aliases, no files."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from tenon.recipe.aliases import BY_KEY
from tenon.recipe.fields import leaf_fields


def nearest_keys(key: str) -> tuple[str, ...]:
    """Our keys that were most likely meant, best first; empty when nothing is near.

    The last part decides first (`rank` -> lora.rank), then another tool's name for it, then the spelling.
    """
    leaves = [leaf.key for leaf in leaf_fields()]
    last = key.rpartition(".")[2]
    same_name = [leaf for leaf in leaves if leaf.rpartition(".")[2] == last]
    if same_name:
        return tuple(same_name)
    if last in BY_KEY:
        return (BY_KEY[last].canonical,)
    near = difflib.get_close_matches(key, [*leaves, *BY_KEY], n=1, cutoff=0.7)
    if not near and len(last) > 3:
        near = difflib.get_close_matches(last, [leaf.rpartition(".")[2] for leaf in leaves], n=1, cutoff=0.7)
    if not near:
        return ()
    if near[0] in BY_KEY:
        return (BY_KEY[near[0]].canonical,)
    return tuple(leaf for leaf in leaves if leaf == near[0] or leaf.rpartition(".")[2] == near[0])


def nearest_word(word: str, words: Iterable[str]) -> str | None:
    """The word of `words` that is spelt most like `word`, or None."""
    near = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return near[0] if near else None


def did_you_mean(names: Iterable[str], otherwise: str) -> str:
    """`did you mean a or b?`, or `otherwise` when there is no name."""
    shown = [f"`{name}`" for name in names]
    return f"did you mean {' or '.join(shown)}?" if shown else otherwise

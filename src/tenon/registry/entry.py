"""The Entry: one version of one adapter, with the content hashes of all that it was made of.

This module does not know where entries are stored, nor tensors.
"""

from __future__ import annotations

from pydantic import Field

from tenon.errors import AdapterError
from tenon.plan.values import BaseFormat, Generation
from tenon.runs.checkpoints import FileFacts
from tenon.runs.results import Metric
from tenon.values import Value, canonical_json, hash_text


class EntryDraft(Value):
    """What whoever registers an adapter knows about it; the rest is read from its files.

    run: name of the run that made it. base_spec: the base as it was asked for; base_hash: of its contents. The hashes
    of data, template and recipe are None for an adapter that was made elsewhere. parent: the NAME@VERSION, or the
    folder, that its training started from. system: the system message that rows without one were given in training.
    base_format: what the base was kept in while it trained; None for an adapter that was made elsewhere.
    generation: how it is asked where a request does not say it.
    """

    base_spec: str
    base_hash: str
    run: str | None = None
    data_hash: str | None = None
    template_hash: str | None = None
    recipe_hash: str | None = None
    metrics: tuple[Metric, ...] = ()
    parent: str | None = None
    system: str | None = None
    base_format: BaseFormat | None = None
    generation: Generation = Generation()


class Entry(Value):
    """One registered version. Never changes; a better one is another version.

    created: unix seconds. rank, alpha, scale: of most of its matrices (`scale` multiplies B A x); targets: the modules
    that it adapts, in forward order; matrices: how many; parameters: of all A and B.
    files: the PEFT files by name. system: see EntryDraft; turns that bring no system message get it again.
    base_format: see EntryDraft; the adapter may stand on the base in any format. beside: what else is kept with it, by
    name (`registry.store.BESIDE`). Fields that came later are left out of the JSON where they say nothing, so that the
    content hash of an older entry stays. generation: see EntryDraft.
    """

    name: str
    version: int
    created: float
    base_spec: str
    base_hash: str
    run: str | None
    data_hash: str | None
    template_hash: str | None
    recipe_hash: str | None
    metrics: tuple[Metric, ...]
    parent: str | None
    rank: int
    alpha: float
    scale: float
    targets: tuple[str, ...]
    matrices: int
    parameters: int
    files: dict[str, FileFacts]
    system: str | None = None
    base_format: BaseFormat | None = None
    beside: dict[str, FileFacts] = Field(default={}, exclude_if=lambda beside: not beside)
    generation: Generation = Field(default=Generation(), exclude_if=lambda generation: not generation.said)

    @property
    def label(self) -> str:
        """`name@3`."""
        return f"{self.name}@{self.version}"

    @property
    def adapter_hash(self) -> str:
        """One hash of its PEFT files: equal for equal adapters, whatever their name and whatever lies beside them."""
        return hash_text(canonical_json({name: facts.sha256 for name, facts in self.files.items()}))

    @property
    def size_bytes(self) -> int:
        """Bytes of its files."""
        return sum(facts.size_bytes for facts in self.files.values())


def check_base(entry: Entry, base_hash: str) -> None:
    """Refuse a base that the adapter was not trained on. Raises AdapterError adapter-other-base."""
    if entry.base_hash != base_hash:
        raise AdapterError(
            "adapter-other-base",
            f"{entry.label} belongs to the base {entry.base_spec} ({entry.base_hash[:12]}), not to this one",
            got=base_hash[:12],
            hint=f"use its own base: --base {entry.base_spec}",
        )

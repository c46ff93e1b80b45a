"""From the `model` of a request to who answers, looked up in the registry at that moment. Names are never paths.

This module does not know the bank.
"""

from __future__ import annotations

import random
from contextlib import suppress
from dataclasses import dataclass

from tenon.adapters.asking import Renderers, asked_as_trained, stop_ids_of
from tenon.data.render import Renderer
from tenon.errors import AdapterError
from tenon.plan.values import Generation
from tenon.registry.entry import Entry, check_base
from tenon.registry.store import Registry
from tenon.serve.jobs import AdapterRef

BASE = "base"


@dataclass(frozen=True, slots=True)
class Target:
    """Who answers. label: the base's name, or `name@3`. renderer: how it is asked. adapter: None for the bare base.

    stop_ids: tokens that end its answers. generation: what is meant where a request does not say it.
    """

    label: str
    renderer: Renderer
    adapter: AdapterRef | None
    stop_ids: frozenset[int]
    generation: Generation


@dataclass(frozen=True, slots=True)
class Listed:
    """A name that can be asked for. entry: None for the base; label: what the name means now."""

    name: str
    label: str
    entry: Entry | None


class Names:
    """The base and the registered adapters that stand on it."""

    def __init__(self, registry: Registry, renderer: Renderer, *, base: str, base_hash: str) -> None:
        """base: its public name; it wins over an adapter of the same name, which `name@version` still reaches."""
        self.base, self.root = base, registry.root
        self._registry, self._renderers, self._base_hash = registry, Renderers(renderer), base_hash

    def find(self, name: str) -> Target:
        """Who a name means now.

        Raises AdapterError adapter-bad-name, adapter-unknown, adapter-damaged, adapter-other-base, adapter-template,
        adapter-stop-token.
        """
        entry = self.describe(name).entry
        if entry is None:
            common = self._renderers.common
            return Target(self.base, common, None, common.stop_ids, Generation())
        renderer = self._renderers.of(
            entry.label, template_hash=entry.template_hash or "", template=self._registry.template(entry)
        )
        return Target(
            entry.label,
            asked_as_trained(renderer, entry.system),
            AdapterRef(entry.adapter_hash, entry.label),
            stop_ids_of(entry.label, entry.generation.stop_tokens, renderer),
            entry.generation,
        )

    def describe(self, name: str) -> Listed:
        """What a name means now. Raises as `find`, but for adapter-template."""
        if name in (self.base, BASE):
            return Listed(name, self.base, None)
        entry = self._registry.get(self._version(name))
        check_base(entry, self._base_hash)
        return Listed(name, entry.label, entry)

    def _version(self, name: str) -> str:
        """The name itself, or of an alias of several versions the one that this request is dealt."""
        target = self._registry.target(name)
        if len(target.shares) == 1:
            return name
        return f"{name.partition('@')[0]}@{target.pick(random.random())}"

    def labels(self) -> frozenset[str]:
        """Everybody who can answer now: the base's name, and `name@3` of all versions."""
        return frozenset({self.base, *self._registry.labels()})

    def list(self) -> list[Listed]:
        """The base, then each name with its newest version, then aliases, then every version; what is damaged is left
        out. An alias of several versions is listed with the main one.
        """
        entries = [
            entry for entry in self._registry.list(on_damaged=lambda _error: None) if entry.base_hash == self._base_hash
        ]
        newest = {entry.name: entry for entry in entries}  # they come in the order of their versions
        names = [Listed(name, entry.label, entry) for name, entry in newest.items() if name not in (self.base, BASE)]
        aliases = [listed for name in newest for listed in self._aliases(name)]
        return [Listed(self.base, self.base, None), *names, *aliases, *(Listed(e.label, e.label, e) for e in entries)]

    def _aliases(self, name: str) -> list[Listed]:
        found = []
        with suppress(AdapterError):
            for alias in sorted(self._registry.aliases(name)):
                entry = self._registry.get(f"{name}@{alias}")
                found.append(Listed(f"{name}@{alias}", entry.label, entry))
        return found

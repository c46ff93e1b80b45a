"""From the `model` of a request to who answers, looked up in the registry at that moment. Names are never paths.

This module does not know the bank.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

from tenon.adapters.asking import Renderers, asked_as_trained, stop_ids_of
from tenon.data.render import Renderer
from tenon.errors import AdapterError
from tenon.plan.values import Generation
from tenon.registry.aliases import Alias, draw_of, is_alias
from tenon.registry.entry import Entry, check_base
from tenon.registry.store import Registry
from tenon.serve.jobs import AdapterRef

BASE = "base"


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks: an account, and the user that the request names, if it does."""

    tenant: str = ""
    user: str | None = None


@dataclass(frozen=True, slots=True)
class Dealt:
    """The version of an alias that one request is dealt. spec: `name@prod`; alias: as it stood then."""

    spec: str
    alias: Alias
    version: int

    @property
    def label(self) -> str:
        """`name@3`."""
        return f"{self.spec.partition('@')[0]}@{self.version}"


NOBODY = Asker()


@dataclass(frozen=True, slots=True)
class Target:
    """Who answers. label: the base's name, or `name@3`. renderer: how it is asked. adapter: None for the bare base.

    stop_ids: tokens that end its answers. generation: what is meant where a request does not say it. dealt: how it came
    to answer, where it was asked by an alias.
    """

    label: str
    renderer: Renderer
    adapter: AdapterRef | None
    stop_ids: frozenset[int]
    generation: Generation
    dealt: Dealt | None = None


@dataclass(frozen=True, slots=True)
class Listed:
    """A name that can be asked for. entry: None for the base; label: what the name means now."""

    name: str
    label: str
    entry: Entry | None


class Names:
    """The base and the registered adapters that stand on it."""

    def __init__(
        self,
        registry: Registry,
        renderer: Renderer,
        *,
        base: str,
        base_hash: str,
        draw: Callable[[], float] = random.random,
    ) -> None:
        """base: its public name; it wins over an adapter of the same name, which `name@version` still reaches.

        draw: in [0, 1), for requests that are dealt anew each time.
        """
        self.base, self.registry, self.root = base, registry, registry.root
        self._renderers, self._base_hash, self._draw = Renderers(renderer), base_hash, draw

    def deal(self, name: str, asker: Asker = NOBODY) -> Dealt | None:
        """Which version an alias means for somebody now; None where the name is no alias.

        Whoever names a user is dealt by it, and where the alias is sticky by the account: the same version every time,
        as long as the shares stay. Everybody else is dealt anew with each request.
        Raises AdapterError adapter-bad-name, adapter-damaged.
        """
        adapter, _, after = name.partition("@")
        if name in (self.base, BASE) or not is_alias(after):
            return None
        alias = self.registry.aliases(adapter).get(after)
        if alias is None:
            return None
        if asker.user is not None:
            draw = draw_of(name, asker.tenant, asker.user)
        elif alias.target.sticky and asker.tenant:
            draw = draw_of(name, asker.tenant)
        else:
            draw = self._draw()
        return Dealt(name, alias, alias.target.pick(draw))

    def find(self, name: str, dealt: Dealt | None = None) -> Target:
        """Who a name means now. dealt: what `deal` said of it.

        Raises AdapterError adapter-bad-name, adapter-unknown, adapter-damaged, adapter-other-base, adapter-template,
        adapter-stop-token.
        """
        entry = self.describe(name if dealt is None else dealt.label).entry
        if entry is None:
            common = self._renderers.common
            return Target(self.base, common, None, common.stop_ids, Generation())
        renderer = self._renderers.of(
            entry.label, template_hash=entry.template_hash or "", template=self.registry.template(entry)
        )
        return Target(
            entry.label,
            asked_as_trained(renderer, entry.system),
            AdapterRef(entry.adapter_hash, entry.label, entry.size_bytes),
            stop_ids_of(entry.label, entry.generation.stop_tokens, renderer),
            entry.generation,
            dealt,
        )

    def describe(self, name: str) -> Listed:
        """What a name means now; an alias of several versions, the main one. Raises as `find`, but for
        adapter-template and adapter-stop-token.
        """
        if name in (self.base, BASE):
            return Listed(name, self.base, None)
        entry = self.registry.get(name)
        check_base(entry, self._base_hash)
        return Listed(name, entry.label, entry)

    def labels(self) -> frozenset[str]:
        """Everybody who can answer now: the base's name, and `name@3` of all versions."""
        return frozenset({self.base, *self.registry.labels()})

    def list(self) -> list[Listed]:
        """The base, then each name with its newest version, then aliases, then every version; what is damaged is left
        out. An alias of several versions is listed with the main one.
        """
        entries = [
            entry for entry in self.registry.list(on_damaged=lambda _error: None) if entry.base_hash == self._base_hash
        ]
        newest = {entry.name: entry for entry in entries}  # they come in the order of their versions
        names = [Listed(name, entry.label, entry) for name, entry in newest.items() if name not in (self.base, BASE)]
        aliases = [listed for name in newest for listed in self._aliases(name)]
        return [Listed(self.base, self.base, None), *names, *aliases, *(Listed(e.label, e.label, e) for e in entries)]

    def _aliases(self, name: str) -> list[Listed]:
        found = []
        with suppress(AdapterError):
            for alias in sorted(self.registry.aliases(name)):
                entry = self.registry.get(f"{name}@{alias}")
                found.append(Listed(f"{name}@{alias}", entry.label, entry))
        return found

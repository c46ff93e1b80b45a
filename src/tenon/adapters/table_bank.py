"""The adapter bank as recorded passes see it: whatever slots there are, the kernels find them in tables.

Shape legend as in `bank`. This module does not know how passes are recorded.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from tenon.adapters.bank import AdapterBank
from tenon.adapters.shelf import Shelf
from tenon.adapters.site_tables import SiteTables
from tenon.bases.facts import STACKS
from tenon.batch import NO_SLOT, Batch
from tenon.kernels.low_rank import LowRank, Routes
from tenon.kernels.low_rank_classes import class_size
from tenon.models.decoder import Decoder, Rider


@dataclass(frozen=True, slots=True)
class TableKind:
    """What a recorded pass is good for.

    rank: no module of a slot is wider; 0: of any. shelved: ranks of the decoder's shelf that it multiplies, the A of
    slots among them; 0: A is multiplied apart. moves: of the tables that it reads.
    """

    rank: int = 0
    shelved: int = 0
    moves: int = 0


BARE = TableKind()


class BankTables:
    """The tables of one bank over one decoder, with the decoder's shelf where it has one."""

    def __init__(self, bank: AdapterBank, decoder: Decoder) -> None:
        self.bank, self._shelved_ranks = bank, decoder.shelf_rank
        self._shelf = Shelf(decoder) if decoder.shelf_rank else None
        self._shelved, self._filled = SiteTables(bank.facts, bank.device), -1

    def kind(self, slots: Collection[int], *, few: bool) -> TableKind:
        """What the next pass with these slots needs; its tables and the shelf are up to date then.

        few: tokens are taken one by one.
        """
        self._fill()
        if all(slot == NO_SLOT for slot in slots):
            return BARE
        if self._shelf is not None and all(slot == NO_SLOT or self._shelf.holds(slot) for slot in slots):
            return self._on_shelf(few=few)
        return self._apart()

    def usual(self, *, few: bool) -> TableKind:
        """What most passes with adapters will need."""
        self._fill()
        return self._apart() if self._shelf is None else self._on_shelf(few=few)

    def _fill(self) -> None:
        self.bank.fill_tables()
        if self._shelf is not None and self._filled != self.bank.tables.fills:
            self._filled = self.bank.tables.fills
            self._shelf.update(self.bank.slots)
            self._shelved.fill(self.bank.slots, self.bank.table_slots, self._shelf.shift)

    def _on_shelf(self, *, few: bool) -> TableKind:
        """What takes tokens one by one takes ranks as they come."""
        return TableKind(0 if few else self._rank(), self._shelved_ranks, self._shelved.moves)

    def _apart(self) -> TableKind:
        return TableKind(self._rank(), moves=self.bank.tables.moves)

    def _rank(self) -> int:
        return class_size(max((slot.most_rank for slot in self.bank.slots.values()), default=0))

    def of(self, kind: TableKind) -> TableBank:
        """The bank for passes of a kind."""
        return TableBank(self.bank, self._shelved if kind.shelved else self.bank.tables, kind)


@dataclass(frozen=True, slots=True)
class TableBank:
    """A `Bank` whose answers hold for any slots of a kind, those of today and of later."""

    bank: AdapterBank
    tables: SiteTables
    kind: TableKind

    def low_rank(self, layer: int, stack: str, batch: Batch, routes: Routes | None) -> LowRank | None:
        """See `models.decoder.Bank.low_rank`; of every layer and stack. Raises ValueError without routes."""
        del batch
        if routes is None:
            raise ValueError("tables are read by fused kernels alone")
        modules, kind = len(STACKS[stack]), self.kind
        bounds, table_SF = self.bank.bounds(stack), self.tables.at(layer, stack)
        return LowRank((), bounds, modules * kind.rank, kind.rank, routes, table_SF, shelved=modules * kind.shelved)

    def rider(self, batch: Batch) -> Rider | None:
        """See `models.decoder.Bank.rider`: none, another pass has another slot."""
        del batch
        return None

    def lowest_layer(self, batch: Batch) -> int:
        """See `models.decoder.Bank.lowest_layer`: nothing is trained."""
        del batch
        return self.bank.facts.layers

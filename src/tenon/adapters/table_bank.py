"""The adapter bank as a recorded pass sees it: whatever slots there are, the kernels find them in the bank's tables.

Shape legend as in `bank`. This module does not know how passes are recorded.
"""

from __future__ import annotations

from dataclasses import dataclass

from tenon.adapters.bank import AdapterBank
from tenon.bases.facts import STACKS
from tenon.batch import Batch
from tenon.kernels.low_rank import LowRank, Routes
from tenon.models.decoder import Rider


@dataclass(frozen=True, slots=True)
class TableBank:
    """A `Bank` whose answers hold for any slots of the bank up to a rank, those of today and of later.

    rank: no module of a slot is wider. The tables must be filled (`AdapterBank.fill_tables`) before every pass.
    """

    bank: AdapterBank
    rank: int

    def low_rank(self, layer: int, stack: str, batch: Batch, routes: Routes | None) -> LowRank | None:
        """See `models.decoder.Bank.low_rank`; of every layer and stack. Raises ValueError without routes."""
        del batch
        if routes is None:
            raise ValueError("tables are read by fused kernels alone")
        width = len(STACKS[stack]) * self.rank
        return LowRank((), self.bank.bounds(stack), width, self.rank, routes, self.bank.table(layer, stack))

    def rider(self, batch: Batch) -> Rider | None:
        """See `models.decoder.Bank.rider`: none, another pass has another slot."""
        del batch
        return None

    def lowest_layer(self, batch: Batch) -> int:
        """See `models.decoder.Bank.lowest_layer`: nothing is trained."""
        del batch
        return self.bank.facts.layers

"""What an answer may still say: a guide for each row that is held to a grammar, and their masks for a whole pass.

A grammar is a plain text here; who compiles it and knows the tokens' texts stands behind `Guides` (data/grammars.py).
Shape legend: S scored positions, G of them guided, V vocabulary, W = V / 32 words of a mask. This module knows no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from tenon.data.pack import upload
from tenon.errors import TenonError


class Guide(Protocol):
    """How far one answer has come in its grammar. Belongs to the engine's thread."""

    @property
    def complete(self) -> bool:
        """Whether nothing may follow any more."""
        ...

    @property
    def error(self) -> TenonError | None:
        """Why the answer cannot be held to its grammar any longer."""
        ...

    def push(self, token_id: int) -> None:
        """The answer has one more token; not its stop token."""
        ...


GuideT = TypeVar("GuideT", bound=Guide)


class Guides(Protocol[GuideT]):
    """Makes guides from grammars, and tells what they allow."""

    def check(self, grammar: str) -> None:
        """Compile a grammar and keep it for `start`. Any thread; may take a while. Raises as `start`."""
        ...

    def start(self, grammar: str, stop_ids: frozenset[int]) -> GuideT:
        """A guide at the beginning of an answer, which one of stop_ids may end. May take a while the first time.

        Raises UsageError usage-grammar, BaseModelError base-tokenizer-kind.
        """
        ...

    def masks(self, guides: Sequence[GuideT]) -> np.ndarray:
        """(G, W) int32: bit i of word w is whether token 32 w + i may come next. Not for guides that have an error;
        a guide may have one after it.
        """
        ...


def masked(logits_SV: Tensor, rows: Sequence[int], masks_GW: np.ndarray) -> Tensor:
    """The scores with minus infinity for what the guides of these rows do not allow; a copy."""
    words = masks_GW.shape[1]
    padded = np.zeros((len(rows), words + words % 2), dtype=np.int32)
    padded[:, :words] = masks_GW
    rows_G, bits_N = upload([np.array(rows), padded.view(np.int64).reshape(-1)], logits_SV.device)
    words_GW1 = bits_N.view(torch.int32).reshape(len(rows), -1, 1)
    allowed_GV = (words_GW1 >> torch.arange(32, device=logits_SV.device, dtype=torch.int32)) & 1
    refused_GV = allowed_GV.reshape(len(rows), -1)[:, : logits_SV.shape[1]] == 0
    return logits_SV.index_copy(0, rows_G, logits_SV[rows_G].masked_fill(refused_GV, float("-inf")))

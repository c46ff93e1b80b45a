"""What came of holding a run's fast path against plain torch, in one line, from its newest `proof` event.

This module does not know how that is done.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tenon.units import format_count, format_seconds

ProofEvent = Mapping[str, Any]


def proof_text(event: ProofEvent | None) -> str:
    """`fused kernels hold against plain torch on 2,496 tokens: …`; "" when there is nothing to tell."""
    if event is None:
        return ""
    if event.get("verdict") == "fails":
        return f"fused kernels are not used: {event.get('problem')}"
    if event.get("verdict") != "holds":
        return f"fused kernels were not held against plain torch: {event.get('problem')}"
    return (
        f"fused kernels hold against plain torch on {format_count(int(event.get('tokens') or 0))} tokens: "
        f"gradients agree to a cosine of {float(event.get('cosine') or 0.0):.5f} or better ({event.get('matrix')}), "
        f"losses to {100 * float(event.get('loss_difference') or 0.0):.2g}%, "
        f"in {format_seconds(float(event.get('seconds') or 0.0))}"
    )


def proof_words(event: ProofEvent) -> str:
    """The same in a few words, for a table."""
    words = {"holds": "fused kernels, proven", "fails": "plain torch"}
    return words.get(str(event.get("verdict")), "fused kernels, not proven")

"""The guard of an alias at the flip: a new version is let in by a figure that both were judged by.

This module does not know where aliases are kept, nor what is counted once the new version answers.
"""

from __future__ import annotations

from tenon.errors import AdapterError
from tenon.registry.aliases import Guard
from tenon.registry.entry import Entry
from tenon.runs.metric_table import METRICS


def require_as_good(label: str, guard: Guard, new: Entry, old: Entry) -> None:
    """Refuse a version whose guarded metric is worse than the other's by more than the guard allows.

    label: of the alias. Raises AdapterError adapter-guard, also where one of the two was never judged by the metric.
    """
    if guard.metric is None or new.version == old.version:
        return
    found = {entry.label: _figure(entry, guard.metric) for entry in (new, old)}
    missing = [name for name, figure in found.items() if figure is None]
    if missing:
        raise AdapterError(
            "adapter-guard",
            f"{label} is guarded by {guard.metric}, and {missing[0]} was never judged by it",
            hint=f"train with evaluate.metrics: [{guard.metric}], or move it all the same: --force",
        )
    mine, theirs = (figure for figure in found.values() if figure is not None)
    worse = theirs - mine if METRICS[guard.metric].higher_is_better else mine - theirs
    if worse > guard.drop:
        raise AdapterError(
            "adapter-guard",
            f"{label} is guarded by {guard.metric}: {new.label} has {mine:.4g}, {old.label} {theirs:.4g}",
            got=f"worse by {worse:.4g}, and {guard.drop:g} is allowed",
            hint="take a better version, or move it all the same: --force",
        )


def _figure(entry: Entry, metric: str) -> float | None:
    return next((each.value for each in entry.metrics if each.name == metric), None)

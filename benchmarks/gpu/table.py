"""The table of `gpu_step`: each work with ours and the peers, its bounds, and whether they are met.

This module reads records and runs nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.gpu.records import Key, Records
from benchmarks.gpu.works import WORKS, Peer, Work
from benchmarks.report import Row, at_least, at_most, write_tree

OUR_SETTINGS = "memory: auto"


def our_key(work: Work) -> Key:
    """Ours at a work."""
    return work.name, work.system, OUR_SETTINGS


def peer_key(work: Work, peer: Peer) -> Key:
    """A peer at a work."""
    return work.name, peer.system, peer.settings


def keys_of(work: Work) -> list[Key]:
    """Ours, then the peers."""
    return [our_key(work), *(peer_key(work, peer) for peer in work.peers)]


def least_rate(records: Records, work: Work, works: Sequence[Work] = WORKS) -> float | None:
    """Tokens a second that ours must reach; None without a bound, or while what it is a multiple of is not measured."""
    if work.of_best_peer is not None:
        rates = [rate for peer in work.peers if (rate := records.figure(peer_key(work, peer), "tokens_s")) is not None]
        return work.of_best_peer * max(rates) if rates else None
    if work.of_work is not None:
        name, share = work.of_work
        other = records.figure(our_key(next(one for one in works if one.name == name)), "tokens_s")
        return None if other is None else share * other
    return work.at_least


def report_rows(records: Records, works: Sequence[Work] = WORKS) -> list[Row]:
    """All figures as a result file lists them."""
    rows: list[Row] = []
    for work in works:
        for key in keys_of(work):
            rate, peak = records.figure(key, "tokens_s"), records.figure(key, "peak_gb")
            if rate is None:
                continue
            ours = key == our_key(work)
            what = f"{work.title} | {key[1]}" if ours else f"{work.title} | {key[1]}, {key[2]}"
            bound = least_rate(records, work, works) if ours else None
            rows.append(Row(what, rate, "tokens/s") if bound is None else at_least(what, rate, "tokens/s", bound))
            if peak is not None:
                cap = work.at_most_gb if ours else None
                rows.append(Row(what, peak, "GB") if cap is None else at_most(what, peak, "GB", cap))
    return rows


def save(path: Path, records: Records, works: Sequence[Work] = WORKS) -> None:
    """Write the result file: figures, and every repetition that they are medians of."""
    newest = records.repetitions[-1]
    machine = records.machines[newest.machine]
    write_tree(
        path,
        report_rows(records, works),
        device=machine.title,
        date=newest.date[:10],
        commit=newest.commit,
        versions=machine.versions,
        more=records.tree(),
    )


def make_table(records: Records, works: Sequence[Work] = WORKS) -> Table:
    """One row for each measurement that was made, ours first in each work."""
    table = Table(title="one LoRA step on one GPU, medians", title_justify="left")
    for name in ("work", "system", "settings"):
        table.add_column(name)
    for name in ("tokens/s", "peak GB", "first step s", "n"):
        table.add_column(name, justify="right")
    for name in ("bound", "met"):
        table.add_column(name)
    for work in works:
        shown = work.title
        for key in keys_of(work):
            standing = records.standing(key)
            if not standing:
                continue
            table.add_row(shown, *_cells(records, work, key, works))
            shown = ""
        if not shown:
            table.add_section()
    return table


def _cells(records: Records, work: Work, key: Key, works: Sequence[Work]) -> list[str]:
    failure = records.failure(key)
    if failure:
        return [key[1], key[2], "-", "-", "-", "0", "", f"failed: {failure}"]
    rate, peak, first = (records.figure(key, name) for name in ("tokens_s", "peak_gb", "first_s"))
    bound, met = _bound(records, work, works) if key == our_key(work) else ("", "")
    shown = [f"{rate or 0:,.0f}", "-" if peak is None else f"{peak:.2f}", f"{first or 0:.1f}"]
    return [key[1], key[2], *shown, str(len(records.standing(key))), bound, met]


def _bound(records: Records, work: Work, works: Sequence[Work]) -> tuple[str, str]:
    """Both bounds in words, and whether ours meets both."""
    least, rate, peak = least_rate(records, work, works), *_ours(records, work)
    said, kept = [], []
    if least is not None and rate is not None:
        said.append(f">= {least:,.0f}")
        kept.append(rate >= least)
    if work.at_most_gb is not None and peak is not None:
        said.append(f"<= {work.at_most_gb:g} GB")
        kept.append(peak <= work.at_most_gb)
    return ", ".join(said), "" if not kept else "yes" if all(kept) else "NO"


def _ours(records: Records, work: Work) -> tuple[float | None, float | None]:
    key = our_key(work)
    return records.figure(key, "tokens_s"), records.figure(key, "peak_gb")


def apart(records: Records, works: Sequence[Work] = WORKS) -> list[str]:
    """Works where a peer was not measured in the same calls as ours, so not in turn with it."""
    found = []
    for work in works:
        calls = [
            {(one.call, one.machine) for one in records.standing(key)}
            for key in keys_of(work)
            if records.standing(key) and not records.failure(key)
        ]
        if any(one != calls[0] for one in calls):
            found.append(work.name)
    return found


def show(console: Console, records: Records, works: Sequence[Work] = WORKS) -> None:
    """Print the table, the machine, and which comparisons were not interleaved."""
    console.print(make_table(records, works))
    for key in sorted({one.machine for one in records.repetitions}):
        machine = records.machines[key]
        console.print(f"{machine.title}: {machine.versions}", style="dim")
    for name in apart(records, works):
        console.print(f"{name}: ours and the peers were not measured in the same calls", style="yellow")

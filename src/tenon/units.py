"""Bytes, seconds, counts, rates and money, written for people and read back from what people type.

Bytes are decimal (1 GB = 10**9 bytes), as disks and `ls` count them; GiB and its kin are understood when typed.
Parsing raises ValueError with a sentence: the caller knows the key or option at fault and gives the error its code.
This module does not know what the numbers mean.
"""

from __future__ import annotations

import math
import re

_BYTE_STEPS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_SHORT_STEPS = ("", "K", "M", "B", "T")
_BYTE_UNITS = {
    "": 1,
    "b": 1,
    **{f"{letter}{tail}": 1000**power for power, letter in enumerate("kmgtpe", 1) for tail in ("", "b")},
    **{f"{letter}{tail}": 1024**power for power, letter in enumerate("kmgtpe", 1) for tail in ("i", "ib")},
}
_SECOND_UNITS = {
    "": 1.0,
    "ms": 0.001,
    **dict.fromkeys(("s", "sec", "secs", "second", "seconds"), 1.0),
    **dict.fromkeys(("m", "min", "mins", "minute", "minutes"), 60.0),
    **dict.fromkeys(("h", "hr", "hrs", "hour", "hours"), 3600.0),
    **dict.fromkeys(("d", "day", "days"), 86400.0),
}
_COUNT_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_PART = re.compile(r"(\d[\d_,]*(?:\.\d+)?|\.\d+)\s*([a-z]*)\s*")


def format_bytes(count_bytes: float) -> str:
    """`1.2 GB`: three digits at most before the unit, one after the point from kB on."""
    return _scaled(count_bytes, _BYTE_STEPS, gap=" ")


def format_short(count: float) -> str:
    """`4.9M`, `1.2B`: a count where its size matters more than its digits."""
    return _scaled(count, _SHORT_STEPS, gap="")


def format_count(count: int) -> str:
    """`12,345`."""
    return f"{count:,}"


def format_tokens(count_tokens: int) -> str:
    """`12,345 tokens`, `1 token`."""
    return f"{count_tokens:,} token{'' if count_tokens == 1 else 's'}"


def format_rate(per_second: float, noun: str) -> str:
    """`12,345 tokens/s`; below 10, with two digits that matter: `1.4 steps/s`."""
    if not math.isfinite(per_second):
        return f"- {noun}/s"
    if per_second and abs(per_second) < 9.95:
        return f"{per_second:.2g} {noun}/s"
    return f"{per_second:,.0f} {noun}/s"


def format_usd(amount_usd: float) -> str:
    """`$1,234.50`; below ten cents with four decimals, because an hour of a small machine costs that much."""
    sign, size = ("-" if amount_usd < 0 else ""), abs(amount_usd)
    return f"{sign}${size:.4f}" if 0 < size < 0.1 else f"{sign}${size:,.2f}"


def format_share(share: float) -> str:
    """`1.2%` of a share in [0, 1]; small ones keep two digits that matter: `0.036%`."""
    percent = 100 * share
    return f"{percent:.2g}%" if 0 < abs(percent) < 0.95 else f"{percent:.1f}%"


def format_seconds(seconds: float) -> str:
    """`250 ms`, `12.3 s`, `3 min 20 s`, `2 h 5 min`, `3 d 4 h`: the two largest units, never more."""
    if not math.isfinite(seconds):
        return "-"
    if seconds < 0:
        return "-" + format_seconds(-seconds)
    if seconds == 0:
        return "0 s"
    if seconds < 0.9995:
        return f"{seconds * 1000:.0f} ms" if seconds >= 0.0095 else f"{seconds * 1000:.2g} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return _two(whole, "min", 60, "s", 1)
    if whole < 86400 - 30:
        return _two(round(whole / 60) * 60, "h", 3600, "min", 60)
    return _two(round(whole / 3600) * 3600, "d", 86400, "h", 3600)


def parse_bytes(text: str) -> int:
    """Bytes of `1.2 GB`, `500MB`, `2GiB`, `4096`. Raises ValueError."""
    return _parse_one(text, _BYTE_UNITS, "a size such as 500 MB, 1.2 GB or 2 GiB")


def parse_count(text: str) -> int:
    """The count that `12,345`, `4.9M` or `20k` says. Raises ValueError."""
    return _parse_one(text, _COUNT_UNITS, "a count such as 2000, 20k or 4.9M")


def parse_seconds(text: str) -> float:
    """Seconds of `3 min 20 s`, `1h30m`, `90`, `2 days`. Raises ValueError."""
    wanted = "a duration such as 90 s, 3 min 20 s or 1h30m"
    parts = _parts(text, _SECOND_UNITS, wanted)
    if len(parts) > 1 and "" in [unit for _, unit in parts]:
        raise ValueError(f"{text!r} is not {wanted}")
    return math.fsum(number * _SECOND_UNITS[unit] for number, unit in parts)


def _parse_one(text: str, units: dict[str, int], wanted: str) -> int:
    parts = _parts(text, units, wanted)
    if len(parts) != 1:
        raise ValueError(f"{text!r} is not {wanted}")
    number, unit = parts[0]
    return round(number * units[unit])


def _parts(text: str, units: dict[str, int] | dict[str, float], wanted: str) -> list[tuple[float, str]]:
    """The (number, unit) pairs that make up all of `text`."""
    rest, parts = text.strip().lower(), []
    while rest:
        found = _PART.match(rest)
        if found is None or found[2] not in units:
            raise ValueError(f"{text!r} is not {wanted}")
        parts.append((float(found[1].replace(",", "").replace("_", "")), found[2]))
        rest = rest[found.end() :]
    if not parts:
        raise ValueError(f"{text!r} is not {wanted}")
    return parts


def _scaled(count: float, steps: tuple[str, ...], *, gap: str) -> str:
    if not math.isfinite(count):
        return "-"
    sign, size = ("-" if count < 0 else ""), abs(float(count))
    step = 0
    # 999.95 would be printed as 1000.0: it belongs to the next unit.
    while step + 1 < len(steps) and size >= (999.5 if step == 0 else 999.95):
        size, step = size / 1000, step + 1
    return f"{sign}{size:.0f}{gap}{steps[step]}" if step == 0 else f"{sign}{size:.1f}{gap}{steps[step]}"


def _two(whole: int, large: str, large_seconds: int, small: str, small_seconds: int) -> str:
    """`3 min 20 s` of whole seconds; the small unit is left out when it is zero."""
    count, rest = divmod(whole, large_seconds)
    rest //= small_seconds
    return f"{count} {large} {rest} {small}" if rest else f"{count} {large}"

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Sizes, rates and times as people write and read them. Pure.

Sizes are binary everywhere: `50M` is 50 MiB, as in qemu-img and dd.
"""

from __future__ import annotations

import re
from typing import Final

_SUFFIXES: Final = "KMGTPE"
_SIZE: Final = re.compile(r"(\d+)(?:\.(\d+))?\s*(?:([KMGTPE])(?:iB|B)?|B)?", re.IGNORECASE)

#: The largest size that QMP's signed 64-bit integers carry, in bytes.
MAX_SIZE: Final = 2**63 - 1

MINUTE: Final = 60
HOUR: Final = 3600


def parse_size(text: str) -> int:
    """Read a number of bytes: `1048576`, `64K`, `1.5G`, `10MiB`.

    Returns:
        Bytes, 0 to `MAX_SIZE`; a fraction of a byte is cut off.

    Raises:
        ValueError: Not a size; the message names what was expected.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"'{text}' is not a size: expected a number such as 1048576, 50M or 1.5G")
    whole, fraction, suffix = match.groups()
    unit = 1024 ** (_SUFFIXES.index(suffix.upper()) + 1) if suffix else 1
    size = int(whole) * unit
    if fraction:
        size += int(fraction) * unit // 10 ** len(fraction)
    if size > MAX_SIZE:
        raise ValueError(f"'{text}' is too large: expected at most {MAX_SIZE} bytes")
    return size


def format_size(size: float) -> str:
    """Write a number of bytes with three digits or so: `512 B`, `1.5 MiB`, `97 GiB`."""
    amount = float(size)
    unit = "B"
    for suffix in _SUFFIXES:
        # Decided on the rounded number, so that nothing is ever "1024 KiB".
        if round(amount) < 1024:
            break
        amount /= 1024
        unit = f"{suffix}iB"
    digits = 1 if unit != "B" and amount < 9.95 else 0
    return f"{amount:.{digits}f} {unit}"


def format_rate(rate: float) -> str:
    """Write bytes per second: `97 MiB/s`."""
    return f"{format_size(rate)}/s"


def format_seconds(seconds: float) -> str:
    """Write a duration: `40 ms`, `0.4 s`, `12 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 0.0995:
        return f"{round(seconds * 1000)} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < MINUTE:
        return f"{whole} s"
    if whole < HOUR:
        minutes, rest = divmod(whole, MINUTE)
        return f"{minutes} min {rest:02d} s"
    hours, rest = divmod(round(whole / MINUTE), MINUTE)
    return f"{hours} h {rest:02d} min"


def format_latency(nanoseconds: float) -> str:
    """Write how long a request took with two or three digits: `85 µs`, `1.2 ms`, `340 ms`, `2.1 s`.

    Below a microsecond it is in nanoseconds.
    """
    amount, unit = nanoseconds, "ns"
    for larger in ("µs", "ms", "s"):
        # Decided on the rounded number, so that nothing is ever "1000 µs".
        if round(amount) < 1000:
            break
        amount, unit = amount / 1000, larger
    digits = 1 if unit != "ns" and amount < 9.95 else 0
    return f"{amount:.{digits}f} {unit}"


def format_range(low: float, high: float | None) -> str:
    """Write a remaining time as a range in the unit of its larger end: `12-18 s`, `3-5 min`.

    Args:
        low: Seconds at least.
        high: Seconds at most, not below `low`; None when nothing bounds it.
    """
    largest = low if high is None else high
    divisor, unit = _unit(largest)
    first = _rounded(low / divisor)
    if high is None:
        return f"over {first} {unit}"
    last = _rounded(high / divisor)
    if last == 0:
        return f"under 1 {unit}"
    if first == last:
        return f"about {last} {unit}"
    return f"{first}-{last} {unit}"


def _unit(seconds: float) -> tuple[int, str]:
    if seconds < 2 * MINUTE:
        return 1, "s"
    if seconds < 2 * HOUR:
        return MINUTE, "min"
    return HOUR, "h"


def _rounded(amount: float) -> int:
    """Two digits: a third would promise what an estimate cannot keep."""
    whole = round(amount)
    return whole if whole < 100 else round(whole, -(len(str(whole)) - 2))


def plural(count: int, noun: str) -> str:
    """Write a number with its noun: `1 client write`, `2,048 client writes`."""
    return f"{count:,} {noun}" + ("" if count == 1 else "s")

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What qemu-io says about requests: sizes, rates, dumps. Pure.

Scripts read these lines, so they are qemu-io's to the letter.

Source: output of qemu-io 7.2.
"""

from __future__ import annotations

import os
from typing import Final

from nbdjobs.errors import NodeError

_UNITS: Final = ("EiB", "PiB", "TiB", "GiB", "MiB", "KiB")
_ROW: Final = 16


def size_text(value: float) -> str:
    """Bytes in the largest unit of which there is at least one: `64 KiB`, `1.500 KiB`."""
    for power, unit in zip(range(len(_UNITS), 0, -1), _UNITS, strict=True):
        if value >= 1 << 10 * power:
            return f"{_trimmed(f'{value / (1 << 10 * power):.3f}')} {unit}"
    return f"{_trimmed(f'{value:f}')} bytes"


def _trimmed(number: str) -> str:
    return number.split(".000")[0] if ".000" in number else number


def _per_second(amount: int, duration_s: float) -> float:
    if duration_s > 0:
        return amount / duration_s
    return float("inf") if amount else float("nan")


def transfer_text(
    verb: str, offset: int, length: int, duration_s: float, *, is_terse: bool = False
) -> str:
    """The lines about one request that has succeeded.

    Args:
        verb: "read", "wrote" or "discard".
        offset: Where it began, in bytes.
        length: Bytes.
        duration_s: Seconds it took.
        is_terse: For programs: bytes, requests, time and the two rates between commas.
    """
    minutes, seconds = divmod(duration_s, 60)
    clock = f"{int(minutes // 60)}:{int(minutes % 60):02}:{seconds:05.2f}"
    rate, pace = _per_second(length, duration_s), _per_second(1, duration_s)
    if is_terse:
        return f"{length},1,{clock},{rate:.3f},{pace:.3f}\n"
    time = clock if duration_s >= 1 else f"{seconds:05.2f} sec"
    return (
        f"{verb} {length}/{length} bytes at offset {offset}\n"
        f"{size_text(length)}, 1 ops; {time} ({size_text(rate)}/sec and {pace:.4f} ops/sec)\n"
    )


def failure_text(what: str, error: NodeError) -> str:
    """The line about a request that has failed."""
    return f"{what}: {os.strerror(error.errno)}\n"


def dump_text(content: memoryview, offset: int) -> str:
    """Bytes in rows of sixteen, as numbers and as what letters and digits there are."""
    rows = []
    for begin in range(0, len(content), _ROW):
        row = bytes(content[begin : begin + _ROW])
        numbers = "".join(f"{byte:02x} " for byte in row)
        letters = "".join(chr(byte) if chr(byte).isalnum() and byte < 128 else "." for byte in row)
        rows.append(f"{offset + begin:08x}:  {numbers} {letters}\n")
    return "".join(rows)

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Reads numbers, sizes and booleans as users write them on a command line.

Each function answers None for what is no such thing; the caller names the option.

Source: behaviour of qemu-storage-daemon 7.2 and QEMU's manual (sizes and their suffixes).
"""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Final

from nbdjobs.qapi.types import UINT64_MAX

_BOOLS: Final = {
    "on": True,
    "yes": True,
    "true": True,
    "y": True,
    "off": False,
    "no": False,
    "false": False,
    "n": False,
}

# C's strtol with base 0: a leading 0 means octal.
_INTEGER: Final = re.compile(
    r"[ \t\n\v\f\r]*([+-]?)(?:0[xX]([0-9a-fA-F]+)|(0[0-7]*)|([1-9][0-9]*))", re.ASCII
)
_SIZE: Final = re.compile(r"[ \t\n\v\f\r]*\+?([0-9]+)(\.[0-9]*)?([bBkKmMgGtTpPeE]?)", re.ASCII)
_HEX_SIZE: Final = re.compile(r"[ \t\n\v\f\r]*\+?0[xX]([0-9a-fA-F]+)([kKmMgGtTpP]?)", re.ASCII)
_NUMBER: Final = re.compile(
    r"[ \t\n\v\f\r]*[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?", re.ASCII
)
_SUFFIXES: Final = "bkmgtpe"

# Longer texts are out of any range, and Python refuses to convert very long ones.
_LONGEST: Final = 400


def parse_bool(text: str) -> bool | None:
    """A boolean: `on`, `yes`, `true`, `y` or their opposites, in lower case."""
    return _BOOLS.get(text)


def parse_integer(text: str) -> int | None:
    """An integer of any size: decimal, octal with a leading 0, hexadecimal with 0x."""
    match = _INTEGER.fullmatch(text)
    if match is None or len(text) > _LONGEST:
        return None
    sign, hexadecimal, octal, decimal = match.groups()
    if hexadecimal is not None:
        number = int(hexadecimal, 16)
    elif octal is not None:
        number = int(octal, 8)
    else:
        number = int(decimal)
    return -number if sign == "-" else number


def parse_size(text: str) -> int | None:
    """A size in bytes below 2^64: `512`, `64k`, `1.5G`, `0x1000`; units are powers of 1024."""
    if len(text) > _LONGEST:
        return None
    match = _HEX_SIZE.fullmatch(text)
    if match is not None:
        size = int(match[1], 16) * _unit(match[2])
        return size if size <= UINT64_MAX else None
    match = _SIZE.fullmatch(text)
    if match is None:
        return None
    whole, fraction, suffix = match.groups()
    unit = _unit(suffix)
    size = int(whole) * unit
    if fraction is not None and fraction.strip(".0"):
        if unit == 1:
            return None
        size += math.floor(Fraction(f"0{fraction}") * unit + Fraction(1, 2))
    return size if size <= UINT64_MAX else None


def parse_number(text: str) -> float | None:
    """A finite floating point number."""
    if _NUMBER.fullmatch(text) is None:
        return None
    number = float(text)
    return number if math.isfinite(number) else None


def _unit(suffix: str) -> int:
    return 1 << (10 * _SUFFIXES.index(suffix.lower())) if suffix else 1

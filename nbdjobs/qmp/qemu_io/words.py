# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The words of a qemu-io command: options, sizes, patterns. Pure.

Source: behaviour of qemu-io 7.2, whose complaints these are.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from nbdjobs.nodes.config import SECTOR
from nbdjobs.qapi.numbers import parse_integer, parse_size
from nbdjobs.qapi.types import INT64_MAX

MAX_REQUEST: Final = (2**31 - 1) // SECTOR * SECTOR
"""Longest request that QEMU takes, in bytes."""

MAX_BUFFER: Final = 128 * 1024 * 1024
"""Longest request that needs memory; qemu-io may use more, as it is nobody's server."""

_DIGITS: Final = re.compile(r"\+?[0-9]+([bkmgtpe]|\.[0-9]*[kmgtpe])?", re.ASCII | re.IGNORECASE)


class RefusedError(Exception):
    """A command is not done; its text, in whole lines, is what the user is told."""


@dataclass(frozen=True, slots=True)
class Words:
    """What follows the name of a command.

    Attributes:
        options: Values of the options by letter; "" for one that takes none.
        operands: The rest, in order.
    """

    options: dict[str, str] = field(default_factory=dict)
    operands: list[str] = field(default_factory=list)

    def __contains__(self, letter: str) -> bool:
        """Whether the option was given."""
        return letter in self.options


def split_options(name: str, words: Sequence[str], letters: str, usage: str) -> Words:
    """Tell options from operands, as C's getopt does: options may come anywhere before "--".

    Args:
        name: The command.
        words: What follows it.
        letters: The options; a colon behind one says that it takes a value.
        usage: The line that shows how to use the command.

    Raises:
        RefusedError: An option is unknown or lacks its value.
    """
    found = Words()
    pending = list(words)
    while pending:
        word = pending.pop(0)
        if word == "--":
            found.operands.extend(pending)
            break
        if word == "-" or not word.startswith("-"):
            found.operands.append(word)
            continue
        rest = word[1:]
        while rest:
            letter, rest = rest[0], rest[1:]
            place = letters.find(letter)
            if place < 0 or letter == ":":
                raise RefusedError(f"{name}: invalid option -- '{letter}'\n{usage}")
            if letters[place + 1 : place + 2] != ":":
                found.options[letter] = ""
                continue
            if not rest and not pending:
                raise RefusedError(f"{name}: option requires an argument -- '{letter}'\n{usage}")
            found.options[letter] = rest or pending.pop(0)
            break
    return found


def parse_bytes(text: str) -> int:
    """A number of bytes, such as `512`, `64k` or `0x200`.

    Raises:
        RefusedError: It is no such number, or has more than 63 bits.
    """
    size = parse_size(text)
    if size is None and _DIGITS.fullmatch(text) is None:
        raise RefusedError(
            f"Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}\n"
        )
    if size is None or size > INT64_MAX:
        raise RefusedError(f"Parsing error: argument too large -- {text}\n")
    return size


def parse_pattern(text: str) -> int:
    """A byte: decimal, octal or hexadecimal."""
    pattern = parse_integer(text)
    if pattern is None or not 0 <= pattern <= 255:
        raise RefusedError(f"{text} is not a valid pattern byte\n")
    return pattern


def parse_lengths(texts: Sequence[str]) -> int:
    """The length of a request made of several parts.

    Raises:
        RefusedError: A part is no size, or it is too long.
    """
    total = 0
    for text in texts:
        length = parse_bytes(text)
        if length > MAX_BUFFER:
            raise RefusedError(f"Argument '{text}' exceeds maximum size {MAX_BUFFER}\n")
        total += length
    if total > MAX_BUFFER:
        raise RefusedError(f"The total number of bytes exceed the maximum size {MAX_BUFFER}\n")
    return total


def check_length(length: int, text: str, maximum: int, unless: str = "") -> None:
    """Refuse a length above a maximum, in the words in which it was given."""
    if length > maximum:
        raise RefusedError(f"length cannot exceed {maximum}{unless}, given {text}\n")


def check_sector_aligned(name: str, value: int) -> None:
    """Refuse what is not in whole sectors."""
    if value % SECTOR:
        raise RefusedError(f"{value} is not a sector-aligned value for '{name}'\n")

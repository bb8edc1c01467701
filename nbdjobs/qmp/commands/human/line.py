# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Takes a line of the human monitor apart. Pure.

Source: behaviour of QEMU 7.2's monitor, whose complaints these are.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

_ESCAPES: Final[Mapping[str, str]] = {"n": "\n", "r": "\r", "\\": "\\", "'": "'", '"': '"'}


class LineError(Exception):
    """A line is not understood; its text, in whole lines, is what the user is told."""


@dataclass(frozen=True, slots=True)
class Flag:
    """An option of one letter; options stand before other words, in the order of the command."""

    letter: str


@dataclass(frozen=True, slots=True)
class Word:
    """A word, or a quoted text.

    Attributes:
        name: What the command calls it.
        missing: What a complaint says when it is not there; None where it need not be.
    """

    name: str
    missing: str | None = None


Argument = Flag | Word


def parse_arguments(text: str, expected: Sequence[Argument]) -> dict[str, str]:
    """Tell the arguments of a command apart.

    Args:
        text: What follows the command's name.
        expected: Its arguments, in order.

    Returns:
        Words by name, and flags that were given by letter.

    Raises:
        LineError: The text is something else, without the command's name in the complaint.
    """
    found: dict[str, str] = {}
    rest = text.lstrip()
    for place, argument in enumerate(expected):
        if isinstance(argument, Flag):
            later = [each.letter for each in expected[place:] if isinstance(each, Flag)]
            if not rest.startswith("-"):
                continue
            letter = rest[1:2]
            if letter not in later:
                raise LineError(f"unsupported option -{letter}\n")
            if letter == argument.letter:
                found[letter] = ""
                rest = rest[2:].lstrip()
            continue
        word, rest = _take_word(rest, argument)
        if word is not None:
            found[argument.name] = word
    if rest:
        raise LineError("extraneous characters at the end of line\n")
    return found


def _take_word(text: str, argument: Word) -> tuple[str | None, str]:
    """The first word of a text, if there is one, and what follows."""
    if not text:
        if argument.missing is not None:
            raise LineError(f"{argument.missing} expected\n")
        return None, text
    if text.startswith('"'):
        return _take_quoted(text, argument)
    word, *rest = text.split(maxsplit=1)
    return word, rest[0] if rest else ""


def _take_quoted(text: str, argument: Word) -> tuple[str, str]:
    complaint = f"{argument.missing or argument.name} expected\n"
    taken: list[str] = []
    characters = iter(enumerate(text[1:], 2))
    for behind, character in characters:
        if character == '"':
            return "".join(taken), text[behind:].lstrip()
        if character == "\\":
            behind, escaped = next(characters, (behind, ""))
            if escaped not in _ESCAPES:
                raise LineError(f"unsupported escape code: '\\{escaped}'\n" + complaint)
            character = _ESCAPES[escaped]
        taken.append(character)
    raise LineError("unterminated string\n" + complaint)

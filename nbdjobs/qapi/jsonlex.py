# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
r"""Cuts QEMU's dialect of JSON into tokens, however the bytes arrive.

The dialect differs from JSON in ways that clients meet: strings may stand in single quotes,
`\'` is an escape, and after a byte that fits nowhere the rest is skipped up to the next
structural character, so that a session recovers. Error texts quote the token read so far.
No JSON library offers any of that, hence this small table-driven automaton: one state per
byte, with runs that change nothing skipped over by a regular expression.

Source: behaviour of qemu-storage-daemon 7.2 on its QMP socket (tests/interop/test_qmp_texts.py).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, IntEnum
from typing import Final


class Kind(Enum):
    """What a token is."""

    PUNCTUATION = "punctuation"
    STRING = "string"
    INTEGER = "integer"
    FLOAT = "float"
    KEYWORD = "keyword"
    STRAY = "stray"
    TOO_LONG = "too long"


@dataclass(frozen=True, slots=True)
class Token:
    """A token, or (`STRAY`, `TOO_LONG`) the bytes that do not make one.

    Attributes:
        kind: What it is.
        text: Its bytes as sent; a string has its quotes.
    """

    kind: Kind
    text: bytes


class _State(IntEnum):
    """What has been read of the token so far; the last four are verdicts on a byte."""

    START = 0
    RECOVERY = 1
    DOUBLE_QUOTED = 2
    DOUBLE_ESCAPE = 3
    SINGLE_QUOTED = 4
    SINGLE_ESCAPE = 5
    MINUS = 6
    ZERO = 7
    DIGITS = 8
    POINT = 9
    FRACTION = 10
    EXPONENT = 11
    EXPONENT_SIGN = 12
    EXPONENT_DIGITS = 13
    KEYWORD = 14
    SKIP = 15  # the byte belongs to no token
    LAST = 16  # the byte completes the token
    BEFORE = 17  # the token was complete before the byte, which starts anew
    BAD = 18  # the byte fits nowhere


_S = _State
_DIGITS: Final = b"0123456789"
_LOWER: Final = bytes(range(ord("a"), ord("z") + 1))
_PUNCTUATION: Final = b"{}[]:,"
_CONTROL: Final = bytes(range(0x20))
_NEVER_IN_UTF8: Final = b"\xfe\xff"


def _row(default: _State, *moves: tuple[bytes, _State]) -> tuple[_State, ...]:
    row = [default] * 256
    for characters, state in moves:
        for byte in characters:
            row[byte] = state
    return tuple(row)


def _quoted(quote: bytes, inside: _State, escape: _State) -> tuple[_State, ...]:
    bad = _CONTROL + _NEVER_IN_UTF8
    return _row(inside, (bad, _S.BAD), (quote, _S.LAST), (b"\\", escape))


def _escaped(inside: _State) -> tuple[_State, ...]:
    return _row(inside, (_CONTROL + _NEVER_IN_UTF8, _S.BAD))


_NEXT: Final[dict[_State, tuple[_State, ...]]] = {
    _S.START: _row(
        _S.BAD,
        (b" \t\r\n", _S.SKIP),
        (_PUNCTUATION, _S.LAST),
        (b'"', _S.DOUBLE_QUOTED),
        (b"'", _S.SINGLE_QUOTED),
        (b"-", _S.MINUS),
        (b"0", _S.ZERO),
        (b"123456789", _S.DIGITS),
        (_LOWER, _S.KEYWORD),
    ),
    # A newline ends recovery too: a client that sends one message per line loses one.
    _S.RECOVERY: _row(
        _S.SKIP, (_CONTROL + _PUNCTUATION + _NEVER_IN_UTF8, _S.BEFORE), (b"\t", _S.SKIP)
    ),
    _S.DOUBLE_QUOTED: _quoted(b'"', _S.DOUBLE_QUOTED, _S.DOUBLE_ESCAPE),
    _S.DOUBLE_ESCAPE: _escaped(_S.DOUBLE_QUOTED),
    _S.SINGLE_QUOTED: _quoted(b"'", _S.SINGLE_QUOTED, _S.SINGLE_ESCAPE),
    _S.SINGLE_ESCAPE: _escaped(_S.SINGLE_QUOTED),
    _S.MINUS: _row(_S.BAD, (b"0", _S.ZERO), (b"123456789", _S.DIGITS)),
    _S.ZERO: _row(_S.BEFORE, (_DIGITS, _S.BAD), (b".", _S.POINT), (b"eE", _S.EXPONENT)),
    _S.DIGITS: _row(_S.BEFORE, (_DIGITS, _S.DIGITS), (b".", _S.POINT), (b"eE", _S.EXPONENT)),
    _S.POINT: _row(_S.BAD, (_DIGITS, _S.FRACTION)),
    _S.FRACTION: _row(_S.BEFORE, (_DIGITS, _S.FRACTION), (b"eE", _S.EXPONENT)),
    _S.EXPONENT: _row(_S.BAD, (b"+-", _S.EXPONENT_SIGN), (_DIGITS, _S.EXPONENT_DIGITS)),
    _S.EXPONENT_SIGN: _row(_S.BAD, (_DIGITS, _S.EXPONENT_DIGITS)),
    _S.EXPONENT_DIGITS: _row(_S.BEFORE, (_DIGITS, _S.EXPONENT_DIGITS)),
    _S.KEYWORD: _row(_S.BEFORE, (_LOWER, _S.KEYWORD)),
}

_KINDS: Final = {
    _S.START: Kind.PUNCTUATION,
    _S.DOUBLE_QUOTED: Kind.STRING,
    _S.SINGLE_QUOTED: Kind.STRING,
    _S.ZERO: Kind.INTEGER,
    _S.DIGITS: Kind.INTEGER,
    _S.FRACTION: Kind.FLOAT,
    _S.EXPONENT_DIGITS: Kind.FLOAT,
    _S.KEYWORD: Kind.KEYWORD,
}

_PUNCTUATION_TOKENS: Final = {byte: Token(Kind.PUNCTUATION, bytes([byte])) for byte in _PUNCTUATION}

_STRING_RUN: Final = re.compile(rb"[^\x00-\x1f\"'\\\xfe\xff]+")
_DIGIT_RUN: Final = re.compile(rb"[0-9]+")

# Bytes that leave the state as it is, taken in one step: a byte by itself costs a microsecond.
_RUNS: Final = {
    _S.START: re.compile(rb"[ \t\r\n]+"),
    _S.RECOVERY: re.compile(rb"[^\x00-\x08\x0a-\x1f{}\[\]:,\xfe\xff]+"),
    _S.DOUBLE_QUOTED: _STRING_RUN,
    _S.SINGLE_QUOTED: _STRING_RUN,
    _S.DIGITS: _DIGIT_RUN,
    _S.FRACTION: _DIGIT_RUN,
    _S.EXPONENT_DIGITS: _DIGIT_RUN,
    _S.KEYWORD: re.compile(rb"[a-z]+"),
}
_UNKEPT: Final = frozenset({_S.START, _S.RECOVERY})


class Lexer:
    """Turns bytes into tokens; what it holds of an unfinished one is bounded.

    Args:
        token_limit: Largest token, in bytes. A longer one is reported as `TOO_LONG` as soon
            as the limit is passed, and skipped like a stray byte.
    """

    def __init__(self, token_limit: int) -> None:
        self._token_limit = token_limit
        self._state = _S.START
        self._text = bytearray()

    def feed(self, data: bytes) -> Iterator[Token]:
        """Yield each token that is complete with `data`."""
        position = 0
        while position < len(data):
            position += self._take_run(data, position)
            if len(self._text) > self._token_limit:
                yield self._give_up(Kind.TOO_LONG)
            if position == len(data):
                return
            byte = data[position]
            verdict = _NEXT[self._state][byte]
            if verdict is _S.BEFORE:
                if self._state is not _S.RECOVERY:
                    yield self._finish()
                self._state = _S.START
                continue
            position += 1
            if verdict is _S.LAST and self._state is _S.START:
                yield _PUNCTUATION_TOKENS[byte]
            elif verdict is _S.LAST:
                self._text.append(byte)
                yield self._finish()
            elif verdict is _S.BAD:
                self._text.append(byte)
                yield self._give_up(Kind.STRAY)
            elif verdict is not _S.SKIP:
                self._text.append(byte)
                self._state = verdict

    def end(self) -> Token | None:
        """Say that nothing follows: what the token that was still open has become, if any."""
        if self._state in (_S.START, _S.RECOVERY):
            return None
        if _NEXT[self._state][ord("\n")] is _S.BEFORE:
            return self._finish()
        return self._give_up(Kind.STRAY)

    def _take_run(self, data: bytes, position: int) -> int:
        """Take the bytes at `position` that leave the state as it is; how many they were."""
        pattern = _RUNS.get(self._state)
        if pattern is None:
            return 0
        # One byte past the limit shows that it is passed, whatever the pieces were.
        room = self._token_limit - len(self._text) + 1
        run = pattern.match(data, position, position + room)
        if run is None:
            return 0
        if self._state not in _UNKEPT:
            self._text += run.group()
        return run.end() - position

    def _finish(self) -> Token:
        token = Token(_KINDS[self._state], bytes(self._text))
        self._text.clear()
        self._state = _S.START
        return token

    def _give_up(self, kind: Kind) -> Token:
        token = Token(kind, bytes(self._text))
        self._text.clear()
        self._state = _S.RECOVERY
        return token

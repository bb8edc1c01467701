# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Reads values of QEMU's JSON dialect from a stream of bytes, with its error texts.

Tokens are gathered until their brackets balance, then parsed in one go. A message that
cannot be parsed yields an error in its place, and the stream goes on with the next.

Source: behaviour of qemu-storage-daemon 7.2 on its QMP socket (tests/interop/test_qmp_texts.py).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, TypeAlias

from nbdjobs.errors import CommandError
from nbdjobs.qapi.jsonlex import Kind, Lexer, Token
from nbdjobs.qapi.types import INT64_MIN, UINT64_MAX

JsonValue: TypeAlias = "bool | int | float | str | list[JsonValue] | dict[str, JsonValue] | None"


class JsonError(CommandError):
    """The bytes are no JSON, or more of it than allowed; the next message may be fine."""


@dataclass(frozen=True, slots=True)
class JsonLimits:
    """How much one message may hold.

    Attributes:
        depth: Nested objects and arrays. QEMU allows 1024; ours leaves room on Python's
            stack for whoever walks the value, and no QAPI type needs a tenth of it.
        tokens: Tokens. QEMU allows 2 Mi, which would be hundreds of megabytes here, and
            parsing them in one go would hold up the event loop.
        size: Bytes, white space apart. QEMU allows 64 MiB.
    """

    depth: int = 128
    tokens: int = 64 * 1024
    size: int = 8 * 1024 * 1024


DEFAULT_LIMITS: Final = JsonLimits()


@dataclass(frozen=True, slots=True)
class Parsed:
    """One value of a stream."""

    value: JsonValue


class JsonStream:
    """Splits and parses a stream of values.

    Args:
        limits: Bounds of one message.
    """

    def __init__(self, limits: JsonLimits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._lexer = Lexer(limits.size)
        self._drop()

    def feed(self, data: bytes) -> Iterator[Parsed | JsonError]:
        """Yield what is complete with `data`, each value or error in its place."""
        for token in self._lexer.feed(data):
            outcome = self._take(token)
            if outcome is not None:
                yield outcome

    def end(self) -> Iterator[Parsed | JsonError]:
        """Yield what the end of the input completes or breaks off."""
        token = self._lexer.end()
        outcome = self._take(token) if token is not None else None
        if outcome is not None:
            yield outcome
        if self._tokens:
            yield self._parse()

    def _drop(self) -> None:
        self._tokens: list[Token] = []
        self._size = 0
        self._braces = 0
        self._brackets = 0

    def _take(self, token: Token) -> Parsed | JsonError | None:
        if token.kind is Kind.STRAY:
            self._drop()
            return _syntax_error(f"stray '{_shown(token.text)}'")
        error = self._limit_error(token)
        if error is not None:
            self._drop()
            return error
        self._tokens.append(token)
        self._size += len(token.text)
        if token.kind is Kind.PUNCTUATION:
            self._braces += _BRACES.get(token.text, 0)
            self._brackets += _BRACKETS.get(token.text, 0)
        is_open = self._braces > 0 or self._brackets > 0
        is_broken = self._braces < 0 or self._brackets < 0
        if is_open and not is_broken:
            return None
        return self._parse()

    def _limit_error(self, token: Token) -> JsonError | None:
        if token.kind is Kind.TOO_LONG or self._size + len(token.text) > self._limits.size:
            return JsonError("JSON token size limit exceeded")
        if len(self._tokens) >= self._limits.tokens:
            return JsonError("JSON token count limit exceeded")
        opens = token.text in (b"{", b"[")
        if opens and self._braces + self._brackets >= self._limits.depth:
            return JsonError("JSON nesting depth limit exceeded")
        return None

    def _parse(self) -> Parsed | JsonError:
        tokens = self._tokens
        self._drop()
        try:
            return Parsed(_Parser(tokens).value())
        except JsonError as error:
            return error


def parse_json(text: str) -> JsonValue:
    """Read a text that holds one value, such as a command line option.

    Raises:
        JsonError: The text is not one value.
    """
    stream = JsonStream()
    outcomes = [*stream.feed(text.encode(errors="surrogateescape")), *stream.end()]
    if not outcomes:
        raise JsonError("Expecting a JSON value")
    first = outcomes[0]
    if isinstance(first, JsonError):
        raise first
    if len(outcomes) > 1:
        raise JsonError("Expecting at most one JSON value")
    return first.value


_BRACES: Final = {b"{": 1, b"}": -1}
_BRACKETS: Final = {b"[": 1, b"]": -1}
_KEYWORDS: Final[dict[bytes, JsonValue]] = {b"true": True, b"false": False, b"null": None}


def _syntax_error(what: str) -> JsonError:
    return JsonError(f"JSON parse error, {what}")


def _shown(text: bytes) -> str:
    """Bytes of a token as an error quotes them: up to a NUL, and readable."""
    return text.partition(b"\0")[0].decode(errors="replace")


class _Parser:
    """Recursive descent over the tokens of one message, whose depth is bounded."""

    def __init__(self, tokens: list[Token]) -> None:
        self._tokens = iter(tokens)

    def value(self) -> JsonValue:
        return self._value_from(self._next())

    def _next(self) -> Token:
        token = next(self._tokens, None)
        if token is None:
            raise _syntax_error("premature EOI")
        return token

    def _value_from(self, token: Token) -> JsonValue:
        match token.kind:
            case Kind.STRING:
                return _string(token.text)
            case Kind.INTEGER | Kind.FLOAT:
                return _number(token)
            case Kind.KEYWORD:
                if token.text not in _KEYWORDS:
                    raise _syntax_error(f"invalid keyword '{_shown(token.text)}'")
                return _KEYWORDS[token.text]
        if token.text == b"{":
            return self._object()
        if token.text == b"[":
            return self._array()
        raise _syntax_error("expecting value")

    def _object(self) -> JsonValue:
        members: dict[str, JsonValue] = {}
        token = self._next()
        if token.text == b"}":
            return members
        while True:
            key = self._value_from(token)
            if not isinstance(key, str):
                raise _syntax_error("key is not a string in object")
            if self._next().text != b":":
                raise _syntax_error("missing : in object pair")
            value = self.value()
            if key in members:
                raise _syntax_error("duplicate key")
            members[key] = value
            if self._closes(b"}", "expected separator in dict"):
                return members
            token = self._next()

    def _array(self) -> JsonValue:
        elements: list[JsonValue] = []
        token = self._next()
        if token.text == b"]":
            return elements
        while True:
            elements.append(self._value_from(token))
            if self._closes(b"]", "expected separator in list"):
                return elements
            token = self._next()

    def _closes(self, closing: bytes, complaint: str) -> bool:
        """Whether the element just read was the last one."""
        separator = self._next().text
        if separator == closing:
            return True
        if separator != b",":
            raise _syntax_error(complaint)
        return False


# An int64 or uint64 has at most this many characters.
_LONGEST_INTEGER: Final = 20


def _number(token: Token) -> int | float:
    """Integers of 64 bits stay exact; all others become floating point, as in QEMU."""
    if token.kind is Kind.INTEGER and len(token.text) <= _LONGEST_INTEGER:
        value = int(token.text)
        if INT64_MIN <= value <= UINT64_MAX:
            return value
    number = float(token.text)
    if math.isinf(number):
        # QEMU reads infinity and would echo it as `inf`, which no client can parse.
        raise _syntax_error("number out of range")
    return number


_ESCAPES: Final = {
    b"b": "\b",
    b"f": "\f",
    b"n": "\n",
    b"r": "\r",
    b"t": "\t",
    b"/": "/",
    b"\\": "\\",
    b"'": "'",
    b'"': '"',
}
_UNICODE_ESCAPE: Final = re.compile(rb"\\u([0-9a-fA-F]{4})")
_NONCHARACTER: Final = re.compile(
    "[\ufdd0-\ufdef" + "".join(chr(p << 16 | e) for p in range(17) for e in (0xFFFE, 0xFFFF)) + "]"
)


def _string(token: bytes) -> str:
    """Content of a string token, its quotes included in `token`."""
    parts: list[str] = []
    position = 1
    end = len(token) - 1
    while True:
        escape = token.find(b"\\", position, end)
        if escape < 0:
            parts.append(_utf8(token[position:end]))
            return "".join(parts)
        parts.append(_utf8(token[position:escape]))
        character, length = _escape(token, escape)
        parts.append(character)
        position = escape + length


def _utf8(raw: bytes) -> str:
    try:
        # C0 80 is how a NUL is written where it would end a C string; QEMU takes it.
        text = raw.replace(b"\xc0\x80", b"\0").decode()
    except UnicodeDecodeError:
        text = "\ufffe"
    if not text.isascii() and _NONCHARACTER.search(text):
        raise _syntax_error("invalid UTF-8 sequence in string")
    return text


def _escape(token: bytes, position: int) -> tuple[str, int]:
    """The character that the escape at `position` means, and the escape's length."""
    letter = token[position + 1 : position + 2]
    if letter in _ESCAPES:
        return _ESCAPES[letter], 2
    if letter != b"u":
        raise _syntax_error("invalid escape sequence in string")
    code, length = _code_point(token, position)
    character = chr(code)
    if 0xD800 <= code <= 0xDFFF or _NONCHARACTER.match(character):
        raise _invalid_character(token, position, length)
    return character, length


def _code_point(token: bytes, position: int) -> tuple[int, int]:
    """The code point at `position`, which two escapes may spell as a surrogate pair."""
    first = _UNICODE_ESCAPE.match(token, position)
    if first is None:
        raise _invalid_character(token, position, 6)
    high = int(first[1], 16)
    second = _UNICODE_ESCAPE.match(token, position + 6)
    if 0xD800 <= high <= 0xDBFF and second is not None:
        low = int(second[1], 16)
        if 0xDC00 <= low <= 0xDFFF:
            return 0x10000 + ((high - 0xD800) << 10) + (low - 0xDC00), 12
    return high, 6


def _invalid_character(token: bytes, position: int, length: int) -> JsonError:
    shown = _shown(token[position : position + length])
    return _syntax_error(f"{shown} is not a valid Unicode character")

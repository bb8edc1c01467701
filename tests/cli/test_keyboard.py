# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Keys as terminals send them."""

from __future__ import annotations

import asyncio
import io
import os
import pty
import termios
from collections.abc import Iterator

import pytest

from nbdjobs.cli.keyboard import Key, keys_in, reading_keys


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("q", [Key.QUIT]),
        ("p", [Key.PAUSE]),
        ("jk", [Key.DOWN, Key.UP]),
        ("\x1b[A\x1b[B", [Key.UP, Key.DOWN]),
        ("\x1bOA\x1bOB", [Key.UP, Key.DOWN]),
        ("xyz\x1b[C\x1b[15~\x1b[1;5q", []),
        ("\x1bq", [Key.QUIT]),
        ("\x1b[Aq", [Key.UP, Key.QUIT]),
        ("", []),
        ("\x1b", []),
    ],
)
def test_keys_are_read_out_of_what_a_terminal_sends(text: str, keys: list[Key]) -> None:
    assert list(keys_in(text)) == keys


@pytest.fixture
def terminal() -> Iterator[tuple[int, io.TextIOWrapper]]:
    """Our end and the program's end of a terminal."""
    ours, theirs = pty.openpty()
    with os.fdopen(theirs) as end:
        yield ours, end
    os.close(ours)


def test_keys_come_without_a_newline_and_the_terminal_is_put_back(
    terminal: tuple[int, io.TextIOWrapper],
) -> None:
    ours, end = terminal
    before = termios.tcgetattr(end)

    async def press() -> list[Key]:
        found: list[Key] = []
        is_there = asyncio.Event()

        def pressed(key: Key) -> None:
            found.append(key)
            if key is Key.QUIT:
                is_there.set()

        with reading_keys(end, pressed) as has_keys:
            assert has_keys
            assert not termios.tcgetattr(end)[3] & (termios.ECHO | termios.ICANON)
            os.write(ours, b"\x1b[Apq")
            await is_there.wait()
        return found

    assert asyncio.run(press()) == [Key.UP, Key.PAUSE, Key.QUIT]
    assert termios.tcgetattr(end) == before


def test_what_is_no_terminal_has_no_keys() -> None:
    async def look() -> None:
        with reading_keys(io.StringIO("q"), lambda key: pytest.fail("a key")) as has_keys:
            assert not has_keys

    asyncio.run(look())

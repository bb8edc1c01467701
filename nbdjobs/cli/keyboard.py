# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Single keys from a terminal, as they are pressed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import termios
import tty
from collections.abc import Callable, Iterator
from enum import StrEnum
from typing import IO, Final

#: What a terminal sends for one key: a sequence for a key without a letter, else a character.
_KEY: Final = re.compile(r"\x1b[\[O][0-9;]*[A-Za-z~]|.", re.DOTALL)

#: Bytes read at once: more than anyone types between two rounds of the event loop.
_READ_MAX: Final = 256


class Key(StrEnum):
    """Keys that mean something; of arrows, both forms that terminals send."""

    DOWN = "down"
    PAUSE = "p"
    QUIT = "q"
    UP = "up"


_KEYS: Final = {
    "\x1b[A": Key.UP,
    "\x1bOA": Key.UP,
    "k": Key.UP,
    "\x1b[B": Key.DOWN,
    "\x1bOB": Key.DOWN,
    "j": Key.DOWN,
    "p": Key.PAUSE,
    "q": Key.QUIT,
}


def keys_in(text: str) -> Iterator[Key]:
    """Read the keys out of what a terminal has sent; those without a meaning are left out."""
    for sequence in _KEY.findall(text):
        if sequence in _KEYS:
            yield _KEYS[sequence]


@contextlib.contextmanager
def reading_keys(source: IO[str], pressed: Callable[[Key], None]) -> Iterator[bool]:
    """Call `pressed` from the event loop for every key, until the context ends.

    The terminal shows nothing of what is typed meanwhile, and Ctrl-C works as ever.

    Yields:
        Whether keys can be read: `source` is a terminal.
    """
    if not source.isatty():
        yield False
        return
    loop = asyncio.get_running_loop()
    descriptor = source.fileno()

    def readable() -> None:
        data = b""
        with contextlib.suppress(OSError):  # the terminal is gone
            data = os.read(descriptor, _READ_MAX)
        if not data:
            loop.remove_reader(descriptor)
        for key in keys_in(data.decode(errors="replace")):
            pressed(key)

    before = termios.tcgetattr(descriptor)
    tty.setcbreak(descriptor)
    loop.add_reader(descriptor, readable)
    try:
        yield True
    finally:
        loop.remove_reader(descriptor)
        with contextlib.suppress(termios.error):  # the terminal is gone
            termios.tcsetattr(descriptor, termios.TCSADRAIN, before)

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A terminal with a program on it."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import struct
import subprocess
import sys
import termios
from collections.abc import Mapping
from typing import Any, Self

#: Seconds until a program that says nothing is given up.
PATIENCE_S = 60.0


class Terminal:
    """`nbdjobs` on a terminal of its own; a context manager that ends it.

    Attributes:
        process: The program.
    """

    def __init__(self, *words: str, environment: Mapping[str, str] | None = None):
        self._ours, self._theirs = pty.openpty()
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 120, 0, 0))
        self._before = self.modes()
        self._text = ""
        self.process = subprocess.Popen(
            [sys.executable, "-m", "nbdjobs", *words],
            stdin=self._theirs,
            stdout=self._theirs,
            stderr=self._theirs,
            env={**os.environ, "TERM": "xterm", **(environment or {})},
            start_new_session=True,
        )
        self._end = os.pidfd_open(self.process.pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        for descriptor in (self._ours, self._theirs, self._end):
            os.close(descriptor)

    def modes(self) -> list[Any]:
        """How the terminal is set."""
        return termios.tcgetattr(self._theirs)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._ours, text.encode())

    def wait_for(self, text: str) -> None:
        """Read until this is on the screen; what was before it is forgotten."""
        while text not in self._text:
            assert self._read(), f"the program has ended behind {self._text!r}"
        self._text = self._text.partition(text)[2]

    def rest(self) -> str:
        """Everything to the program's end, after which the terminal must be as it was."""
        while self._read():
            pass
        assert self.modes() == self._before
        return self._text

    def _read(self) -> bool:
        """Read what is there or comes; False when nothing is left and the program has ended."""
        readable, _, _ = select.select([self._ours, self._end], [], [], PATIENCE_S)
        assert readable, f"nothing more behind {self._text!r}"
        if self._ours in readable:
            self._text += os.read(self._ours, 4096).decode(errors="replace")
            return True
        self.process.wait()
        return False

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The real qemu-storage-daemon, asked what it answers.

    with Oracle(tmp_path) as oracle:
        reply = oracle.execute("blockdev-add", {"driver": "null-co"})

`program` makes another daemon with the same command line an oracle, to ask both the same.

It calls back on a socket that listens before it starts, so nothing has to wait or try again.
Where it is not installed the test is skipped by its name, or fails under
``NBDJOBS_REQUIRE_INTEROP=1`` (see ``tools.require``).
"""

from __future__ import annotations

import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self

from tests.interop.tools import require, run_for_result

PROGRAM: Final = "qemu-storage-daemon"

#: Of this checkout: nbdjobs is to be found wherever it is started.
ROOT: Final = Path(__file__).parent.parent.parent

#: Seconds until an answer is given up; only a broken oracle needs them.
PATIENCE_S: Final = 60.0

#: A byte that ends whatever was begun, then a request to recognise the end of the replies by.
END_ID: Final = "end of exchange"
END: Final = b'\xff\n{"execute": "query-version", "id": "' + END_ID.encode() + b'"}\n'

#: Bytes of `struct ucred`: process, user and group id.
_CREDENTIALS: Final = 12

Reply = dict[str, Any]


class Oracle:
    """A running qemu-storage-daemon with one QMP session.

    Args:
        directory: For its socket; it runs there, so that paths may be relative.
        options: More command line options.
        capabilities: To enable when negotiating; None leaves negotiation to the test.
        program: What to start.

    Attributes:
        events: Those received and not yet taken by `events_until`, oldest first.
    """

    def __init__(
        self,
        directory: Path,
        *options: str,
        capabilities: list[str] | None = None,
        program: Sequence[str] = (PROGRAM,),
    ) -> None:
        self._directory = directory
        self._path = directory / "oracle.sock"
        self._options = options
        self._capabilities = capabilities
        self._program = program
        self.events: list[Reply] = []

    def __enter__(self) -> Self:
        program = [require(self._program[0]), *self._program[1:]]
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(self._path))
            listener.listen(1)
            listener.settimeout(PATIENCE_S)
            chardev = f"socket,id=oracle,path={self._path},server=off"
            command = [*program, "--chardev", chardev, "--monitor", "oracle", *self._options]
            self._process = subprocess.Popen(
                command,
                cwd=self._directory,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
            )
            self._socket, _ = listener.accept()
        self._socket.settimeout(PATIENCE_S)
        self._lines = self._socket.makefile("rb")
        self.greeting = self._read()
        if self._capabilities is not None:
            self.execute("qmp_capabilities", {"enable": self._capabilities})
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._lines.close()
        self._socket.close()
        self._process.terminate()
        self._process.wait(PATIENCE_S)

    def execute(self, command: str, arguments: object = None) -> Reply:
        """Execute a command and return the reply as it is; events go to ``events``."""
        request: Reply = {"execute": command}
        if arguments is not None:
            request["arguments"] = arguments
        self._socket.sendall(json.dumps(request).encode())
        while "event" in (message := self._read()):
            self.events.append(message)
        return message

    def quit(self) -> None:
        """Tell it to quit and wait until it has ended, in the background or not."""
        credentials = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS)
        ended = os.pidfd_open(int.from_bytes(credentials[:4], sys.byteorder))
        try:
            assert self.execute("quit") == {"return": {}}
            assert select.select([ended], [], [], PATIENCE_S)[0]
        finally:
            os.close(ended)

    def events_until(self, is_last: Callable[[Reply], bool]) -> list[Reply]:
        """Wait for an event; return it and all before it that were not yet taken."""
        taken: list[Reply] = []
        while True:
            taken.append(self.events.pop(0) if self.events else self._read())
            if is_last(taken[-1]):
                return taken

    def exchange(self, data: bytes) -> list[Reply]:
        """Send any bytes, then ``END``; return all replies but the last."""
        self._socket.sendall(data + END)
        replies = []
        while (reply := self._read()).get("id") != END_ID:
            replies.append(reply)
        return replies

    def _read(self) -> Reply:
        message: Reply = json.loads(self._lines.readline())
        return message


def refusal(reply: Reply) -> str | None:
    """The text of an error reply; None for success."""
    error = reply.get("error")
    return error["desc"] if error is not None else None


def command_line_refusal(option: str, text: str) -> str | None:
    """What qemu-storage-daemon says of one option, without naming itself and the option.

    Args:
        option: With its dashes, such as ``--blockdev``.
        text: The option's value.

    Returns:
        The sentence, or None when the option is taken: then the daemon stops at the next one.
    """
    stop = "--blockdev"
    result = run_for_result(PROGRAM, option, text, stop, "stop-here")
    line = result.stderr.rstrip("\n").partition(f"{PROGRAM}: ")[2]
    if line.startswith(f"{stop} stop-here: ") and text != "stop-here":
        return None
    return line.removeprefix(f"{option} {text}: ")

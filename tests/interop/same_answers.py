# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Puts the same commands to a daemon inside the test and to the real program.

Unlike a whole session over a socket, this shows which command is answered differently, and costs
no second process. "@/" in arguments stands for a directory, which each of them has its own of.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.errors import CommandError
from nbdjobs.qapi.visitor import to_qapi
from nbdjobs.qmp.commands import REGISTRY
from tests.interop.oracle import Oracle, Reply

Ask = tuple[str, dict[str, Any]]


def ours(session: Sequence[Ask], directory: Path) -> list[Reply]:
    """What a new daemon answers."""

    async def go() -> list[Reply]:
        daemon = Daemon()
        try:
            return [await _answer(daemon, *ask) for ask in _placed(session, directory)]
        finally:
            await daemon.shutdown()

    return _comparable(asyncio.run(go()), directory)


def theirs(session: Sequence[Ask], directory: Path, oracle: Oracle) -> list[Reply]:
    """What the real program answers."""
    return _comparable([oracle.execute(*ask) for ask in _placed(session, directory)], directory)


async def _answer(daemon: Daemon, command: str, arguments: dict[str, Any]) -> Reply:
    try:
        returned = await REGISTRY.find(command).execute(daemon, arguments)
    except CommandError as error:
        return {"error": {"class": error.error_class.value, "desc": error.description}}
    return {"return": {} if returned is None else to_qapi(returned)}


def _placed(session: Sequence[Ask], directory: Path) -> list[Ask]:
    return [
        (command, json.loads(json.dumps(arguments).replace("@/", f"{directory}/")))
        for command, arguments in session
    ]


def _comparable(replies: list[Reply], directory: Path) -> list[Reply]:
    """The same without what must differ: the directory, made-up names, and what QEMU 10 added."""
    text = json.dumps(replies).replace(f"{directory}/", "@/").replace(', "active": true', "")
    comparable: list[Reply] = json.loads(re.sub(r"#block\d+", "#block", text))
    return comparable

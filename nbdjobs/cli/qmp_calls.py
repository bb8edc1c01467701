# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Running QMP commands that people typed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Final

from nbdjobs.cli.qmp_schema import Schema
from nbdjobs.cli.qmp_words import read_arguments
from nbdjobs.cli.session import Session

#: Enough for a command without arguments.
NO_SCHEMA: Final = Schema(())


async def fetch_schema(session: Session) -> Schema:
    """Ask a server for its commands and their arguments."""
    return Schema(await session.execute("query-qmp-schema"))


async def call(session: Session, schema: Schema, words: Sequence[str]) -> Any:
    """Run a command and return its answer.

    Args:
        session: To the server.
        schema: Of the server.
        words: The command's name and its arguments.

    Raises:
        CliError: The arguments cannot be read, or the server refuses them.
    """
    command, *rest = words
    arguments = read_arguments(schema, command, rest) if rest else None
    return await session.execute(command, arguments)


def pretty(value: object) -> str:
    """Write an answer for people, and still as JSON."""
    return json.dumps(value, indent=2, ensure_ascii=False)

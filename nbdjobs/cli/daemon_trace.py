# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`--trace` of the daemon: accepted, so that command lines with it work, and without effect.

Trace events are named after functions of QEMU's code, and here there are none. A name is told to
be unknown, as qemu-storage-daemon does; a pattern matches what there is: nothing.

Source: QEMU docs/devel/tracing.rst; texts of qemu-storage-daemon 7.2.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from nbdjobs.errors import CommandError
from nbdjobs.qapi.keyval import parse_keyval
from nbdjobs.qapi.visitor import visit

_MAX_LENGTH: Final = 1024 * 1024
"""Bytes that are read of a file with names; they are written by hand."""

_HELP: Final = frozenset({"help", "?"})


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceOptions:
    """The value of `--trace`.

    Attributes:
        enable: Name of an event or a pattern, with "-" in front to switch it off.
        events: Path of a file with such names, one per line.
        file: Path of the file that what is traced goes to.
    """

    enable: str | None = None
    events: str | None = None
    file: str | None = None


def wants_list(text: str) -> bool:
    """Whether the value of `--trace` asks for the list of events, which is empty."""
    return text in _HELP or text in {f"enable={word}" for word in _HELP}


def check_trace(text: str, typed: str) -> list[str]:
    """Check the value of `--trace`.

    Args:
        text: The value.
        typed: The whole option as the user wrote it.

    Returns:
        Warnings for the user.

    Raises:
        CommandError: An option is unknown, or a file could not be opened.
    """
    options = _read(text)
    warnings: list[str] = []
    if options.enable is not None:
        warnings += _unknown(options.enable, typed)
    if options.events is not None:
        for number, line in enumerate(_lines(options.events), start=1):
            if line and not line.startswith("#"):
                warnings += _unknown(line, f"{options.events}:{number}")
    if options.file is not None:
        _check_file(options.file)
    return warnings


def _read(text: str) -> TraceOptions:
    value = parse_keyval(text, implied_key="enable")
    known = {"enable", "events", "file"}
    if isinstance(value, dict):
        for name in value:
            if name not in known:
                raise CommandError(f"Invalid parameter '{name}'")
    return visit(TraceOptions, value, keyval=True)


def _unknown(name: str, place: str) -> Iterator[str]:
    name = name.removeprefix("-")
    if not set("*?") & set(name):
        yield f"{place}: warning: trace event '{name}' does not exist"


def _lines(path: str) -> list[str]:
    try:
        with Path(path).open("rb") as file:
            text = file.read(_MAX_LENGTH).decode(errors="replace")
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror}") from error
    return [line.strip() for line in text.splitlines()]


def _check_file(path: str) -> None:
    """Refuse a file that could not be made; as nothing is traced, none is."""
    folder = os.path.dirname(path) or os.curdir
    reason = 0
    if not os.path.isdir(folder):
        reason = errno.ENOENT
    elif os.path.isdir(path):
        reason = errno.EISDIR
    elif not os.access(path if os.path.exists(path) else folder, os.W_OK):
        reason = errno.EACCES
    if reason:
        raise CommandError(f"Error opening logfile {path}: {os.strerror(reason)}")

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What a server logs, and in which form: lines for people, or one JSON object per record.

Records go to standard error. Below the chosen level nothing is made, so a quiet server pays
nothing for them. A record may carry `extra={"fields": {...}}`: members that the JSON form has
beside the sentence, for programs that would otherwise have to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Final, TextIO, TypeVar

from nbdjobs.cli.exits import CliError
from nbdjobs.qmp.events import event_message

logger = logging.getLogger(__name__)

FORMAT_VARIABLE: Final = "NBDJOBS_LOG_FORMAT"
LEVEL_VARIABLE: Final = "NBDJOBS_LOG_LEVEL"

Choice = TypeVar("Choice", bound=StrEnum)


class LogFormat(StrEnum):
    """The form of a record."""

    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    """How much is logged: a level and all that are more severe."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class LogOptions:
    """What the user chose.

    Attributes:
        form: Lines or JSON.
        level: The least severe that is logged.
    """

    form: LogFormat = LogFormat.TEXT
    level: LogLevel = LogLevel.WARNING


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the options of a subcommand that logs."""
    parser.add_argument(
        "--log-format",
        choices=[form.value for form in LogFormat],
        help=f"form of the log on standard error (default: ${FORMAT_VARIABLE}, or text)",
    )
    parser.add_argument(
        "--log-level",
        choices=[level.value for level in LogLevel],
        help=f"the least that is logged (default: ${LEVEL_VARIABLE}, or warning)",
    )


def log_options(
    environment: Mapping[str, str], *, form: str | None = None, level: str | None = None
) -> LogOptions:
    """Find out what holds: the command line, else the environment, else the defaults.

    Args:
        environment: The process's; a variable that is empty counts as not set.
        form: The word given on the command line, checked already.
        level: Likewise.

    Raises:
        CliError: A variable holds an unknown word.
    """
    defaults = LogOptions()
    return LogOptions(
        form=_choose(form, environment, FORMAT_VARIABLE, defaults.form),
        level=_choose(level, environment, LEVEL_VARIABLE, defaults.level),
    )


def _choose(
    word: str | None, environment: Mapping[str, str], variable: str, default: Choice
) -> Choice:
    kind = type(default)
    found = word or environment.get(variable) or default.value
    try:
        return kind(found)
    except ValueError as error:
        expected = ", ".join(choice.value for choice in kind)
        raise CliError(f"{variable} is '{found}': expected one of {expected}") from error


@contextlib.contextmanager
def logging_to(options: LogOptions, stream: TextIO | None = None) -> Iterator[None]:
    """Log as chosen while the context is open, libraries' records included.

    Args:
        options: Form and level.
        stream: Where to; standard error when None.
    """
    handler = logging.StreamHandler(sys.stderr if stream is None else stream)
    is_json = options.form is LogFormat.JSON
    handler.setFormatter(JsonFormatter() if is_json else TextFormatter())
    root = logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(options.level.upper())
    try:
        yield
    finally:
        root.setLevel(level)
        root.removeHandler(handler)


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.000Z warning nbdjobs.qmp.server: what happened`.

    A record is one line, whatever a peer managed to get into it; only a traceback has more.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        line = f"{_time(record)} {_level(record)} {record.name}: {_printable(record.getMessage())}"
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """A JSON object on one line: `time`, `level`, `logger`, `message`, and the record's fields.

    A traceback is the member `exception`.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        entry: dict[str, object] = {
            "time": _time(record),
            "level": _level(record),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str)


def _time(record: logging.LogRecord) -> str:
    """RFC 3339, in UTC: logs of several machines are read side by side."""
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _level(record: logging.LogRecord) -> str:
    return record.levelname.lower()


def _printable(text: str) -> str:
    if text.isprintable():
        return text
    return "".join(
        each if each.isprintable() else each.encode("unicode_escape").decode() for each in text
    )


def log_event(event: object) -> None:
    """Log what QMP clients are told, at level info.

    Args:
        event: An instance of a dataclass declared with `@event`.
    """
    if logger.isEnabledFor(logging.INFO):
        message = event_message(event, 0)
        fields = {"event": message["event"], "data": message.get("data", {})}
        logger.info("%s %s", fields["event"], json.dumps(fields["data"]), extra={"fields": fields})

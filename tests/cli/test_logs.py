# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Logs: what is chosen where, the two forms, and that a record is always one line."""

from __future__ import annotations

import argparse
import io
import json
import logging
from collections.abc import Mapping

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.cli.exits import CliError
from nbdjobs.cli.logs import (
    JsonFormatter,
    LogFormat,
    LogLevel,
    LogOptions,
    TextFormatter,
    add_arguments,
    log_event,
    log_options,
    logging_to,
)
from nbdjobs.daemon.exports import BlockExportDeleted

LOGGER = logging.getLogger("nbdjobs.tests")
JSON = LogOptions(LogFormat.JSON, LogLevel.INFO)
TEXT = LogOptions(LogFormat.TEXT, LogLevel.INFO)


def a_record(message: str, *args: object, **attributes: object) -> logging.LogRecord:
    record = logging.LogRecord("nbdjobs.x", logging.WARNING, "x.py", 1, message, args, None)
    record.created = 1_769_860_800.0625
    for name, value in attributes.items():
        setattr(record, name, value)
    return record


def a_failure() -> logging.LogRecord:
    record = a_record("it broke")
    try:
        raise ValueError("of this")
    except ValueError as error:
        record.exc_info = (type(error), error, error.__traceback__)
    return record


@pytest.mark.parametrize(
    ("environment", "form", "level", "expected"),
    [
        ({}, None, None, LogOptions(LogFormat.TEXT, LogLevel.WARNING)),
        ({"NBDJOBS_LOG_FORMAT": "json"}, None, "info", JSON),
        ({"NBDJOBS_LOG_FORMAT": "json", "NBDJOBS_LOG_LEVEL": "debug"}, "text", "info", TEXT),
        ({"NBDJOBS_LOG_FORMAT": "", "NBDJOBS_LOG_LEVEL": ""}, None, None, LogOptions()),
        ({"NBDJOBS_LOG_LEVEL": "loud"}, None, "error", LogOptions(level=LogLevel.ERROR)),
    ],
)
def test_the_command_line_counts_more_than_the_environment(
    environment: Mapping[str, str], form: str | None, level: str | None, expected: LogOptions
) -> None:
    assert log_options(environment, form=form, level=level) == expected


@pytest.mark.parametrize(
    ("environment", "sentence"),
    [
        ({"NBDJOBS_LOG_FORMAT": "xml"}, "NBDJOBS_LOG_FORMAT is 'xml': expected one of text, json"),
        (
            {"NBDJOBS_LOG_LEVEL": "loud"},
            "NBDJOBS_LOG_LEVEL is 'loud': expected one of debug, info, warning, error",
        ),
    ],
)
def test_an_unknown_word_in_the_environment_is_named(
    environment: Mapping[str, str], sentence: str
) -> None:
    with pytest.raises(CliError) as refused:
        log_options(environment)
    assert str(refused.value) == sentence


def test_the_options_take_the_words_there_are() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for form in LogFormat:
        for level in LogLevel:
            found = parser.parse_args(["--log-format", form.value, "--log-level", level.value])
            chosen = log_options({}, form=found.log_format, level=found.log_level)
            assert chosen == LogOptions(form, level)


def test_a_line_of_text() -> None:
    line = TextFormatter().format(a_record("client %d refused", 7))
    assert line == "2026-01-31T12:00:00.062Z warning nbdjobs.x: client 7 refused"


def test_a_json_object_with_its_fields() -> None:
    line = JsonFormatter().format(a_record("client %d refused", 7, fields={"client": 7}))
    assert json.loads(line) == {
        "time": "2026-01-31T12:00:00.062Z",
        "level": "warning",
        "logger": "nbdjobs.x",
        "message": "client 7 refused",
        "client": 7,
    }


def test_a_traceback_follows_the_line_of_text() -> None:
    first, second, *_, last = TextFormatter().format(a_failure()).splitlines()
    assert first.endswith("nbdjobs.x: it broke")
    assert second == "Traceback (most recent call last):"
    assert last == "ValueError: of this"


def test_a_traceback_is_a_member_of_the_json_object() -> None:
    line = JsonFormatter().format(a_failure())
    assert "\n" not in line
    assert json.loads(line)["exception"].endswith("ValueError: of this")


@given(st.text(alphabet=st.characters()))
def test_a_record_is_one_line_whatever_a_peer_sends(message: str) -> None:
    text = TextFormatter().format(a_record("%s", message))
    structured = JsonFormatter().format(a_record("%s", message))
    assert len(text.splitlines()) == len(structured.splitlines()) == 1
    assert text.isprintable()
    assert json.loads(structured)["message"] == message


def test_what_is_less_severe_is_not_logged() -> None:
    stream = io.StringIO()
    with logging_to(LogOptions(level=LogLevel.ERROR), stream):
        LOGGER.warning("no")
        LOGGER.error("yes")
    assert [line.split(": ")[1] for line in stream.getvalue().splitlines()] == ["yes"]


def test_libraries_records_have_the_same_form() -> None:
    stream = io.StringIO()
    with logging_to(JSON, stream):
        logging.getLogger("asyncio").warning("slow")
    assert json.loads(stream.getvalue())["logger"] == "asyncio"


def test_logging_ends_with_its_context() -> None:
    root = logging.getLogger()
    before = (root.level, list(root.handlers))
    stream = io.StringIO()
    with logging_to(JSON, stream):
        assert root.level == logging.INFO
    LOGGER.error("afterwards")
    assert (root.level, root.handlers) == before
    assert stream.getvalue() == ""


def test_events_are_logged_as_qmp_clients_get_them() -> None:
    stream = io.StringIO()
    with logging_to(JSON, stream):
        log_event(BlockExportDeleted(id="disk"))
    entry = json.loads(stream.getvalue())
    assert (entry["event"], entry["data"]) == ("BLOCK_EXPORT_DELETED", {"id": "disk"})
    assert entry["message"] == 'BLOCK_EXPORT_DELETED {"id": "disk"}'


def test_events_are_not_looked_at_when_nobody_wants_them() -> None:
    stream = io.StringIO()
    with logging_to(LogOptions(), stream):
        log_event(object())  # no event: to describe it would fail
    assert stream.getvalue() == ""

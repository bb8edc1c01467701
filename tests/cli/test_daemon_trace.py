# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`--trace` is taken as qemu-storage-daemon takes it, and short options in every form."""

from __future__ import annotations

from pathlib import Path

import pytest

from nbdjobs.cli.daemon import daemon_main
from nbdjobs.cli.daemon_options import Step, UsageError, parse_command_line
from nbdjobs.cli.daemon_trace import check_trace
from nbdjobs.errors import CommandError
from tests.interop.tools import require, run_for_result

STOP = ["--blockdev", "stop-here"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("foo", ["foo"]),
        ("enable=foo", ["foo"]),
        ("-foo", ["foo"]),
        ("enable=", [""]),
        ("bdrv_*", []),
        ("?oo", []),
        ("", []),
    ],
)
def test_names_are_unknown_and_patterns_match_nothing(text: str, names: list[str]) -> None:
    expected = [f"-T x: warning: trace event '{name}' does not exist" for name in names]
    assert check_trace(text, "-T x") == expected


def test_a_file_of_names_is_looked_through(tmp_path: Path) -> None:
    path = tmp_path / "events"
    path.write_text("one\n# comment\n\n-two\nth*\n")
    assert check_trace(f"events={path}", "--trace x") == [
        f"{path}:1: warning: trace event 'one' does not exist",
        f"{path}:4: warning: trace event 'two' does not exist",
    ]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("bogus=1", "Invalid parameter 'bogus'"),
        ("events={folder}/none", "{folder}/none: No such file or directory"),
        (
            "file={folder}/none/x",
            "Error opening logfile {folder}/none/x: No such file or directory",
        ),
        ("file={folder}", "Error opening logfile {folder}: Is a directory"),
    ],
)
def test_what_is_wrong_is_told(text: str, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(CommandError) as caught:
        check_trace(text.format(folder=tmp_path), "--trace x")
    assert caught.value.description == sentence.format(folder=tmp_path)


def test_no_file_is_made_for_nothing(tmp_path: Path) -> None:
    assert check_trace(f"file={tmp_path}/log", "--trace x") == []
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize("words", [["-T", "help"], ["-T?"], ["--trace", "enable=help"]])
def test_the_list_of_events_is_empty(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert daemon_main([*words, *STOP]) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("words", "typed"),
    [
        (["--trace", "a=b"], "--trace a=b"),
        (["--trace=a"], "--trace=a"),
        (["--tr", "a"], "--tr a"),
        (["-T", "a"], "-T a"),
        (["-Ta"], "-Ta"),
        (["-hVT", "a"], "-T a"),
        (["-hTV"], "-TV"),
    ],
)
def test_options_are_shown_as_typed(words: list[str], typed: str) -> None:
    line = parse_command_line([*words, "--blockdev", "x", "-h", "--object=y"])
    assert [step.option for step in line.steps] == ["trace", "blockdev", "object"]
    assert [step.typed for step in line.steps] == [typed, "--blockdev x", "--object=y"]


def test_a_value_is_needed() -> None:
    with pytest.raises(UsageError) as caught:
        parse_command_line(["-T"])
    assert str(caught.value) == "option requires an argument -- 'T'"
    assert parse_command_line(["-hV"]).wants_version


@pytest.mark.parametrize(
    "words", [["-T", "foo"], ["-Tfoo"], ["--trace", "enable=foo"], ["--trace=zz*"]]
)
def test_the_real_program_says_the_same(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    program = require("qemu-storage-daemon")
    theirs = run_for_result(program, *words, *STOP)
    assert daemon_main([*words, *STOP]) == theirs.returncode == 1
    ours = capsys.readouterr().err
    assert ours.splitlines() == [
        "nbdjobs: " + line.partition(": ")[2] for line in theirs.stderr.splitlines()
    ]


def test_a_step_complains_with_what_was_typed() -> None:
    step = Step("trace", "bogus=1", "-Tbogus=1")
    assert step.complain(CommandError("no")) == "-Tbogus=1: no"

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs qmp`: single commands, commands from a pipe, and the shell on a real terminal."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from qemu.qmp import Message

from nbdjobs.cli.exits import CliError, ExitCode
from nbdjobs.cli.qmp_shell import describe_event, history_file, split_line
from tests.cli.conftest import Operated
from tests.cli.terminal import PATIENCE_S, Terminal


def test_a_command_is_answered(operated: Operated, capsys: pytest.CaptureFixture[str]) -> None:
    assert operated.run("qmp", "query-block-exports") == ExitCode.DONE
    text = capsys.readouterr().out
    [export] = json.loads(text)
    assert export["node-name"] == "disk0"
    assert '\n    "node-name": "disk0"' in text


def test_a_command_takes_arguments(operated: Operated, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("driver=null-co", "node-name=n", "size=1048576", "read-zeroes=on")
    assert operated.run("qmp", "blockdev-add", *words) == ExitCode.DONE
    assert capsys.readouterr().out == "{}\n"
    nodes = operated.execute("query-named-block-nodes", {"flat": True})
    assert {node["node-name"]: node["image"]["virtual-size"] for node in nodes}["n"] == 1 << 20
    assert operated.run("qmp", "blockdev-del", '{"node-name": "n"}') == ExitCode.DONE


def test_a_refusal_is_a_sentence(operated: Operated, capsys: pytest.CaptureFixture[str]) -> None:
    assert operated.run("qmp", "blockdev-del", "node-name=x") == ExitCode.FAILED
    assert capsys.readouterr() == (
        "",
        "nbdjobs: the server refused blockdev-del: Failed to find node with node-name='x'\n",
    )


@pytest.mark.parametrize("words", [("bogus",), ("bogus", "a=1")])
def test_an_unknown_command_is_refused_by_the_server(
    operated: Operated, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert operated.run("qmp", *words) == ExitCode.FAILED
    assert "The command bogus has not been found" in capsys.readouterr().err


def test_commands_come_from_a_pipe(
    operated: Operated, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = 'query-jobs\n\nblockdev-del {"node-name": "x"}\njob-pause "id\nquery-jobs\n'
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert operated.run("qmp") == ExitCode.FAILED
    output = capsys.readouterr()
    assert output.out == "[]\n[]\n"
    refusal, unreadable = output.err.splitlines()
    assert "Failed to find node" in refusal
    assert unreadable == "nbdjobs: the line cannot be read: No closing quotation"


def test_quit_ends_the_server_and_the_shell(
    operated: Operated, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("quit\nquery-jobs\n"))
    assert operated.run("qmp") == ExitCode.DONE
    assert operated.daemon.process.wait(PATIENCE_S) == 0


def test_a_shell_without_a_server_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert qmp_shell_main(tmp_path / "none.sock") == ExitCode.FAILED
    assert "there is no QMP socket" in capsys.readouterr().err


def qmp_shell_main(path: Path) -> int:
    from nbdjobs.cli.main import main

    return main(["qmp", "--qmp", str(path)])


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("query-jobs", ["query-jobs"]),
        ("", []),
        ("  \n", []),
        ("a b='c d' e", ["a", "b=c d", "e"]),
        ('a {"b": "c d"} ', ["a", '{"b": "c d"}']),
    ],
)
def test_lines_are_taken_apart_like_in_a_shell(line: str, words: list[str]) -> None:
    assert split_line(line) == words


def test_an_open_quote_is_refused() -> None:
    with pytest.raises(CliError, match="No closing quotation"):
        split_line("a 'b")


def test_events_are_one_line() -> None:
    event = Message({"event": "E", "data": {"id": "j"}, "timestamp": {"seconds": 5}})
    line = describe_event(event)
    assert line.endswith('] E {"id": "j"}')


@pytest.mark.parametrize("configured", ["", "relative"])
def test_history_has_its_place(
    configured: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", configured)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert history_file() == tmp_path / ".local" / "state" / "nbdjobs" / "qmp_history"
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    assert history_file() == Path("/state/nbdjobs/qmp_history")


def test_the_shell_completes_shows_events_and_remembers(operated: Operated, tmp_path: Path) -> None:
    words = ("qmp", "--qmp", str(operated.socket))
    with Terminal(*words, environment={"XDG_STATE_HOME": str(tmp_path)}) as terminal:
        terminal.wait_for("qmp> ")
        terminal.type("query-block-ex\t\n")
        terminal.wait_for('"node-name": "disk0"')
        terminal.wait_for("qmp> ")
        terminal.type("job-")
        terminal.wait_for("job-")
        operated.start_job()
        terminal.wait_for("] JOB_STATUS_CHANGE {")
        terminal.wait_for("qmp> job-")
        terminal.type("pau\tid=j\n")
        terminal.wait_for('"status": "paused"')
        terminal.wait_for("qmp> ")
        terminal.type("query-version\n")
        terminal.wait_for('"package"')
        terminal.wait_for("qmp> ")
        terminal.type("\x04")
        assert terminal.process.wait(PATIENCE_S) == 0
    history = (tmp_path / "nbdjobs" / "qmp_history").read_text()
    assert history.splitlines() == ["query-block-exports ", "job-pause id=j", "query-version"]

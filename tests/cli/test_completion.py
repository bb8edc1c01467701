# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Completion scripts: bash, zsh and fish read them, and bash completes with them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from nbdjobs.cli import completion
from nbdjobs.cli.completion_scripts import SCRIPTS, Argument, Command, Option
from nbdjobs.cli.exits import ExitCode
from nbdjobs.cli.main import DAEMON, SUBCOMMANDS, main, whole_parser
from tests.interop.tools import require

ODD = [
    Command(
        name="odd",
        summary='it\'s a [test]: of \\ $quotes `and` "more"',
        options=(
            Option(("-x", "--ex"), "it's [a]: \\ $HOME", Argument("PATH", is_path=True)),
            Option(("--on",), "on"),
        ),
        arguments=(Argument("KIND", choices=("one", "two")), Argument("FILE", is_path=True)),
    )
]


def script(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["completion", shell]) == ExitCode.DONE
    return capsys.readouterr().out


@pytest.fixture
def bash(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """The script for bash, beside a file and a folder to complete."""
    require("bash")
    path = tmp_path / "script"
    path.write_text(script("bash", capsys))
    (tmp_path / "disk one.img").touch()
    (tmp_path / "data").mkdir()
    return path


def completed(bash: Path, *words: str) -> list[str]:
    """What bash offers for the last word."""
    code = f"""
        source ./{bash.name}
        COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _nbdjobs
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    command = ["bash", "--norc", "-c", code, "bash", "nbdjobs", *words]
    ended = subprocess.run(command, cwd=bash.parent, capture_output=True, text=True, check=True)
    assert ended.stderr == ""
    return sorted(filter(None, ended.stdout.split("\n")))


def test_subcommands_are_offered(bash: Path) -> None:
    assert completed(bash, "ba") == ["backup"]
    assert set(completed(bash, "")) == {*SUBCOMMANDS, DAEMON, "--help", "--version"}


def test_options_are_offered(bash: Path) -> None:
    assert completed(bash, "jobs", "--") == ["--help", "--json", "--once", "--qmp"]
    assert completed(bash, "cancel", "j", "--f") == ["--force"]
    assert completed(bash, "daemon", "--ch") == ["--chardev", "--check"]


def test_values_of_options_are_offered(bash: Path) -> None:
    assert completed(bash, "backup", "d", "t", "--sync", "") == ["full", "none"]
    assert completed(bash, "completion", "") == ["bash", "fish", "zsh"]
    assert completed(bash, "backup", "--speed", "") == []


def test_paths_are_offered_where_paths_are_meant(bash: Path) -> None:
    assert completed(bash, "serve", "d") == ["data", "disk one.img"]
    assert completed(bash, "jobs", "--qmp", "d") == ["data", "disk one.img"]
    assert completed(bash, "serve", "--config", "d") == ["data", "disk one.img"]
    assert completed(bash, "pause", "d") == []


def test_the_scripts_know_every_option_of_every_subcommand() -> None:
    found = {command.name: command for command in completion.commands(whole_parser())}
    assert set(found) == {*SUBCOMMANDS, DAEMON}
    options = {name for option in found["backup"].options for name in option.names}
    assert {"--dry-run", "--qmp", "-h", "--help"} <= options
    [pidfile] = [o for o in found[DAEMON].options if "--pidfile" in o.names]
    assert pidfile.value is not None
    assert pidfile.value.is_path
    [daemonize] = [o for o in found[DAEMON].options if "--daemonize" in o.names]
    assert daemonize.value is None
    for command in found.values():
        for text in (SCRIPTS[shell]([command]) for shell in ("bash", "zsh")):
            assert all(name in text for option in command.options for name in option.names)


@pytest.mark.parametrize("shell", SCRIPTS)
def test_shells_read_the_scripts(
    shell: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    require(shell)
    for text in (script(shell, capsys), SCRIPTS[shell](ODD)):
        path = tmp_path / "script"
        path.write_text(text)
        ended = subprocess.run([shell, "-n", path], capture_output=True, text=True, check=False)
        assert (ended.returncode, ended.stderr) == (0, "")


def test_fish_completes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require("fish")
    (tmp_path / "script").write_text(script("fish", capsys))
    (tmp_path / "disk one.img").touch()
    expected = {
        "nbdjobs ba": ["backup"],
        "nbdjobs backup --sync ": ["full", "none"],
        "nbdjobs cancel j --f": ["--force"],
        "nbdjobs daemon --ch": ["--chardev", "--check"],
        "nbdjobs serve di": ["disk one.img"],
        "nbdjobs pause di": [],
    }
    asked = "".join(f"echo '{line}:'; complete -C '{line}';" for line in expected)
    ended = subprocess.run(
        ["fish", "--no-config", "-c", f"source ./script; {asked}"],
        cwd=tmp_path,
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    offered = [line.partition("\t")[0].replace("\\", "") for line in ended.stdout.splitlines()]
    assert offered == [word for line, words in expected.items() for word in (f"{line}:", *words)]


def test_zsh_gets_descriptions_values_and_places() -> None:
    text = SCRIPTS["zsh"](ODD)
    assert r"""'*--ex[it'"'"'s \[a\]\: \\ $HOME]:PATH:_files'""" in text
    assert "'*--on[on]'" in text
    assert "'1:KIND:(one two)'" in text
    assert "2:FILE:_files" in text
    assert text.startswith("#compdef nbdjobs\n")
    unknown = Command("c", "", (Option(("--id",), "name", Argument("ID")),), ())
    assert """'*--id[name]:ID:_guard "^-*" ID'""" in SCRIPTS["zsh"]([unknown])


def test_fish_gets_descriptions_values_and_places() -> None:
    lines = SCRIPTS["fish"](ODD).splitlines()
    seen = "complete -c nbdjobs -n '__fish_seen_subcommand_from odd'"
    assert rf"{seen} -s x -l ex -r -F -d 'it\'s [a]: \\ $HOME'" in lines
    assert f"{seen} -l on -d 'on'" in lines
    assert f"{seen} -a 'one two'" in lines
    assert f"{seen} -F" in lines

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Manual pages: complete, the same each time, and as man(1) and mandoc want them."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import nbdjobs
from nbdjobs.cli.completion import commands
from nbdjobs.cli.exits import ExitCode
from nbdjobs.cli.main import DAEMON, SUBCOMMANDS, whole_parser
from nbdjobs.cli.man_pages import EXIT_STATUS, pages
from tests.interop.tools import require

ROOT = Path(nbdjobs.__file__).parent.parent
NAMES = ["nbdjobs", *(f"nbdjobs-{name}" for name in (DAEMON, *SUBCOMMANDS))]


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return pages(whole_parser())


@pytest.fixture(scope="module")
def folder(made: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the pages are as files."""
    path = tmp_path_factory.mktemp("man")
    for name, content in made.items():
        (path / name).write_text(content)
    return path


def shown(path: Path) -> str:
    """A page as man(1) shows it to a wide terminal."""
    ended = subprocess.run(
        [require("man"), "--warnings", "-l", path],
        env={**os.environ, "MANWIDTH": "200", "LC_ALL": "C.UTF-8", "MAN_KEEP_FORMATTING": ""},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stderr == ""
    return re.sub(r" +", " ", ended.stdout)


def test_every_subcommand_has_a_page_and_the_program_has_one(made: dict[str, str]) -> None:
    assert set(made) == {f"{name}.1" for name in NAMES}


def test_every_exit_code_is_explained() -> None:
    assert set(EXIT_STATUS) == set(ExitCode)


def test_the_pages_name_every_option(made: dict[str, str]) -> None:
    for command in commands(whole_parser()):
        content = made[f"nbdjobs-{command.name}.1"].replace(r"\-", "-")
        for option in command.options:
            assert all(name in content for name in option.names), (command.name, option)


def test_dashes_and_backslashes_are_literal_and_no_line_is_taken_for_a_request() -> None:
    parser = whole_parser()
    parser.description = "'quoted' \\n --dash .B " + "x" * 76 + " .B é"
    content = pages(parser)["nbdjobs.1"]
    assert "\n\\&'quoted' \\en \\-\\-dash .B\n" in content
    assert "\n\\&.B \\[u00E9]\n" in content


def test_the_script_writes_the_same_pages_each_time(made: dict[str, str], tmp_path: Path) -> None:
    for seed in ("1", "2"):
        target = tmp_path / seed
        subprocess.run(
            [sys.executable, ROOT / "scripts" / "make-man", target],
            env={
                **os.environ,
                "PYTHONHASHSEED": seed,
                "PYTHONPATH": str(ROOT),
                "COLUMNS": seed * 2,
            },
            check=True,
        )
        assert {path.name: path.read_text() for path in target.iterdir()} == made


@pytest.mark.interop
def test_the_daemons_options_have_their_help(folder: Path) -> None:
    text = shown(folder / "nbdjobs-daemon.1")
    assert "\n -h, --help\n show this help and exit\n" in text
    assert re.search(
        r" --nbd-server addr\.type=inet,\S+\n --nbd-server addr\.type=unix,\S+\n"
        r" --nbd-server addr\.type=fd,\S+\n start the NBD server\n",
        text,
    )


@pytest.mark.interop
@pytest.mark.parametrize("name", NAMES)
def test_man_has_no_warnings(folder: Path, name: str) -> None:
    text = shown(folder / f"{name}.1")
    assert text.startswith(f"{name.upper()}(1)")
    assert "\nSYNOPSIS\n" in text


@pytest.mark.interop
@pytest.mark.parametrize("name", NAMES)
def test_mandoc_finds_nothing_but_the_missing_date(folder: Path, name: str) -> None:
    ended = subprocess.run(
        [require("mandoc"), "-T", "lint", folder / f"{name}.1"],
        capture_output=True,
        text=True,
        check=False,
    )
    [complaint] = ended.stdout.splitlines() or [ended.stderr]
    assert 'missing date, using ""' in complaint

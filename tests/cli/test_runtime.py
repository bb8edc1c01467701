# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Sockets of running servers: where they are, whether they are safe, how they are found."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from nbdjobs.cli import runtime
from nbdjobs.cli.exits import CliError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "nbdjobs"
    path.mkdir(mode=0o700)
    return path


class Listeners:
    """Sockets that are listened at until the test ends."""

    def __init__(self, stack: ExitStack):
        self._stack = stack

    def listen(self, path: Path) -> Path:
        """Listen at a path."""
        listener = self._stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen()
        return path


@pytest.fixture
def listeners() -> Iterator[Listeners]:
    with ExitStack() as stack:
        yield Listeners(stack)


def stale(path: Path) -> Path:
    """Leave a socket behind as a killed server does."""
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    return path


def test_the_folder_is_below_xdg_runtime_dir(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime.runtime_dir() == tmp_path / "nbdjobs"


@pytest.mark.parametrize("value", [None, "", "relative", "/no/such/folder"])
def test_there_is_a_folder_without_xdg_runtime_dir(
    value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_RUNTIME_DIR", raising=False)
    if value is not None:
        monkeypatch.setenv("XDG_RUNTIME_DIR", value)
    found = runtime.runtime_dir()
    assert found.is_absolute()
    assert found.name.startswith("nbdjobs")
    assert found.parent.is_dir()


def test_a_private_folder_is_made_and_found_again(tmp_path: Path) -> None:
    path = tmp_path / "nbdjobs"
    assert runtime.private_dir(path) == path
    assert path.stat().st_mode & 0o777 == 0o700
    assert runtime.private_dir(path) == path


def test_a_folder_open_to_others_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "nbdjobs"
    path.mkdir()
    path.chmod(0o750)
    with pytest.raises(CliError, match="open to other users"):
        runtime.private_dir(path)


def test_a_link_in_place_of_the_folder_is_refused(tmp_path: Path, folder: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(folder)
    with pytest.raises(CliError, match="not a folder of this user"):
        runtime.private_dir(link)


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    with pytest.raises(CliError, match=re.escape(str(tmp_path / "a" / "b"))):
        runtime.private_dir(tmp_path / "a" / "b")


def test_a_new_socket_path_is_fine(folder: Path) -> None:
    runtime.check_socket_path(folder / "disk.nbd.sock")


def test_a_socket_left_by_a_killed_server_is_fine(folder: Path) -> None:
    runtime.check_socket_path(stale(folder / "disk.nbd.sock"))


def test_a_socket_in_use_is_refused(folder: Path, listeners: Listeners) -> None:
    path = listeners.listen(folder / "disk.nbd.sock")
    with pytest.raises(CliError, match="another server listens"):
        runtime.check_socket_path(path)


def test_a_file_in_place_of_a_socket_is_refused(folder: Path) -> None:
    (folder / "file").touch()
    with pytest.raises(CliError, match="not a socket"):
        runtime.check_socket_path(folder / "file")


def test_a_socket_without_its_folder_is_refused(folder: Path) -> None:
    with pytest.raises(CliError, match="does not exist"):
        runtime.check_socket_path(folder / "missing" / "disk.nbd.sock")


def test_a_socket_path_too_long_for_the_system_is_refused(folder: Path) -> None:
    with pytest.raises(CliError, match="at most 107 bytes"):
        runtime.check_socket_path(folder / ("x" * 100))


def test_the_one_running_server_is_found(folder: Path, listeners: Listeners) -> None:
    stale(folder / "old.qmp.sock")
    listeners.listen(folder / "disk.nbd.sock")
    path = listeners.listen(folder / "disk.qmp.sock")
    assert runtime.find_server(folder) == path


def test_without_a_server_the_user_hears_how_to_start_one(folder: Path) -> None:
    stale(folder / "old.qmp.sock")
    for place in (folder, folder / "missing"):
        with pytest.raises(CliError, match=f"'{place}'.*nbdjobs serve IMAGE"):
            runtime.find_server(place)


def test_of_several_servers_all_are_listed(folder: Path, listeners: Listeners) -> None:
    first = listeners.listen(folder / "a.qmp.sock")
    second = listeners.listen(folder / "b.qmp.sock")
    with pytest.raises(CliError, match=f"--qmp: {first}, {second}"):
        runtime.find_server(folder)

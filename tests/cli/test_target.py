# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Targets: nothing is lost that the user did not agree to lose, nothing half-made is left."""

from __future__ import annotations

import fcntl
import os
import resource
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest

from nbdjobs.cli.exits import CliError
from nbdjobs.cli.locks import FLOCK
from nbdjobs.cli.target import FileTarget, NodeTarget, Target, prepare

SIZE = 1 << 20


def prepared(path: Path, *, is_forced: bool = False, in_use: Collection[str] = ()) -> Target:
    return prepare(str(path), size=SIZE, is_forced=is_forced, in_use=in_use)


def refusal(path: Path, *, is_forced: bool = False, in_use: Collection[str] = ()) -> str:
    """Why a target is refused; nothing in its folder may have changed."""
    folder = path.parent
    before = {entry: entry.stat().st_mtime_ns for entry in folder.iterdir()}
    with pytest.raises(CliError) as refused:
        prepared(path, is_forced=is_forced, in_use=in_use)
    assert {entry: entry.stat().st_mtime_ns for entry in folder.iterdir()} == before
    return str(refused.value)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "backup.img"


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    return tmp_path / "backup.img.partial"


@pytest.fixture
def old(path: Path) -> Path:
    path.write_bytes(b"old backup")
    return path


def test_a_new_file_is_sparse_private_and_named_partial(path: Path, partial: Path) -> None:
    target = prepared(path)
    made = partial.stat()
    assert (made.st_size, made.st_blocks, made.st_mode & 0o777) == (SIZE, 0, 0o600)
    assert not path.exists()
    assert target.label == str(path)
    assert target.node_options("n") == {
        "driver": "file",
        "node-name": "n",
        "filename": str(partial),
        "discard": "unmap",
    }


def test_a_complete_backup_gets_its_name(path: Path, partial: Path) -> None:
    target = prepared(path)
    partial.write_bytes(b"backup")
    target.publish()
    assert path.read_bytes() == b"backup"
    assert not partial.exists()


def test_a_failed_backup_leaves_nothing(path: Path, partial: Path) -> None:
    prepared(path).discard()
    assert not path.exists()
    assert not partial.exists()


def test_a_relative_path_is_made_absolute(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    target = prepare(path.name, size=SIZE, is_forced=False, in_use=())
    assert isinstance(target, FileTarget)
    assert target.path == path


def test_an_existing_file_is_refused(old: Path) -> None:
    assert "exists" in refusal(old)
    assert "--force" in refusal(old)


def test_a_forced_backup_replaces_the_old_one_at_its_end(old: Path, partial: Path) -> None:
    target = prepared(old, is_forced=True)
    assert old.read_bytes() == b"old backup"
    partial.write_bytes(b"new backup")
    target.publish()
    assert old.read_bytes() == b"new backup"
    assert not partial.exists()


def test_a_forced_backup_that_fails_leaves_the_old_one(old: Path, partial: Path) -> None:
    prepared(old, is_forced=True).discard()
    assert old.read_bytes() == b"old backup"
    assert not partial.exists()


def test_a_link_is_followed_when_its_file_is_replaced(old: Path, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(old)
    prepared(link, is_forced=True).publish()
    assert link.is_symlink()
    assert old.stat().st_size == SIZE


def test_a_file_that_the_server_has_open_is_refused_even_by_force(
    old: Path, tmp_path: Path
) -> None:
    link = tmp_path / "link"
    os.link(old, link)
    assert "in use by the server" in refusal(old, is_forced=True, in_use=[str(link)])


def test_names_of_nodes_that_are_no_files_are_no_obstacle(path: Path) -> None:
    in_use = ["json:{}", "nbd://localhost", "", "a\0b", "/no/such/file"]
    prepared(path, in_use=in_use).discard()
    path.touch()
    prepared(path, is_forced=True, in_use=in_use).discard()


def test_a_file_that_another_program_uses_as_an_image_is_refused(old: Path) -> None:
    with old.open("r+b") as file:
        # What QEMU does: a shared lock of the open file description on a byte from 100 on.
        lock = FLOCK.pack(fcntl.F_RDLCK, os.SEEK_SET, 101, 1, 0)
        fcntl.fcntl(file, fcntl.F_OFD_SETLK, lock)
        assert "in use by another program" in refusal(old, is_forced=True)
    prepared(old, is_forced=True).discard()


def test_a_second_backup_to_the_same_file_is_refused(path: Path) -> None:
    prepared(path)
    assert ".partial' exists" in refusal(path)


def test_a_name_taken_meanwhile_is_not_overwritten(path: Path, partial: Path) -> None:
    target = prepared(path)
    partial.write_bytes(b"backup")
    path.write_bytes(b"somebody else's")
    with pytest.raises(CliError, match=r"it is in '.*partial'"):
        target.publish()
    assert path.read_bytes() == b"somebody else's"
    assert partial.read_bytes() == b"backup"


def test_a_folder_a_pipe_and_a_missing_folder_are_refused(tmp_path: Path) -> None:
    folder, pipe = tmp_path / "folder", tmp_path / "pipe"
    folder.mkdir()
    os.mkfifo(pipe)
    for path in (folder, pipe):
        assert "must be a new file" in refusal(path, is_forced=True)
    with pytest.raises(CliError, match="No such file or directory"):
        prepared(tmp_path / "missing" / "backup.img")


@pytest.fixture
def size_limit() -> Iterator[int]:
    """The largest file that this process may make, smaller than the target."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    limit = SIZE // 2
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    yield limit
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.usefixtures("size_limit")
def test_a_file_that_cannot_be_made_large_enough_leaves_nothing(path: Path) -> None:
    with pytest.raises(CliError, match=r"cannot be made 1\.0 MiB large: File too large"):
        prepared(path)
    assert list(path.parent.iterdir()) == []


def test_a_node_is_left_to_its_owner(tmp_path: Path) -> None:
    target = prepare("node:tgt", size=SIZE, is_forced=False, in_use=())
    assert target == NodeTarget("tgt")
    assert target.node_options("n") is None
    assert target.label == "node:tgt"
    target.publish()
    target.discard()

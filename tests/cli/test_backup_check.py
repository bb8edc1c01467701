# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs backup --dry-run`: it says what the backup then does, or why it then fails."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdjobs.cli import backup_check
from nbdjobs.cli.exits import ExitCode
from nbdjobs.cli.images import is_identifier
from tests.cli.conftest import SIZE, Operated

Rehearse = Callable[..., dict[str, Any]]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "backups"
    folder.mkdir()
    return folder / "backup.img"


@pytest.fixture
def rehearse(operated: Operated, capsys: pytest.CaptureFixture[str]) -> Rehearse:
    """Make a dry run as programs do; it must have had no effect."""

    def run(target: Path | str, *words: str, source: str = "disk0") -> dict[str, Any]:
        before = state(operated)
        code = operated.run("backup", source, str(target), "--dry-run", "--json", *words)
        assert state(operated) == before
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        assert (found["type"], found["exit-code"]) == ("dry-run", code)
        assert found["would-start"] == (code == ExitCode.DONE) == (not found["problems"])
        return found

    return run


def state(operated: Operated) -> object:
    """What a dry run may not change: jobs, nodes, files."""
    nodes = operated.execute("query-named-block-nodes", {"flat": True})
    folder = operated.disk.path.parent
    return (
        sorted(job["id"] for job in operated.execute("query-jobs")),
        sorted(node["node-name"] for node in nodes),
        sorted(str(path) for path in folder.rglob("*")),
    )


def test_a_person_reads_what_would_happen(
    operated: Operated, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("disk0", str(target), "--dry-run", "--speed", "1M")
    assert operated.run("backup", *words) == ExitCode.DONE
    output = capsys.readouterr()
    assert output.err == ""
    job, made, named, free = output.out.splitlines()
    assert job.startswith("job 'backup-disk0' would copy 'disk0' (4.0 MiB, ")
    assert job.endswith(" allocated), at most 1.0 MiB/s")
    assert made == f"'{target}.partial' would be made, 4.0 MiB large"
    assert named == f"once complete, it would become '{target}'"
    assert free.endswith(f" are free in '{target.parent}'")
    assert not target.exists()


def test_a_person_reads_why_it_would_fail(
    operated: Operated, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target.touch()
    words = ("disk0", str(target), "--dry-run", "--job-id", "not an id")
    assert operated.run("backup", *words) == ExitCode.FAILED
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("nbdjobs: would fail: 'not an id' cannot be the name of a job")
    assert second.startswith(f"nbdjobs: would fail: the target '{target}' exists")


def test_what_is_rehearsed_well_then_works(
    operated: Operated, rehearse: Rehearse, target: Path
) -> None:
    assert rehearse(target)["problems"] == []
    assert operated.run("backup", "disk0", str(target), "--no-progress") == ExitCode.DONE
    assert target.read_bytes() == operated.disk.content()


def test_an_old_backup_would_be_replaced_by_force_only(rehearse: Rehearse, target: Path) -> None:
    target.write_bytes(b"old")
    [problem] = rehearse(target)["problems"]
    assert "exists: choose a new file, or replace it with --force" in problem
    assert "in place of the file there" in " ".join(rehearse(target, "--force")["plan"])
    assert target.read_bytes() == b"old"


def test_an_unknown_source_ends_it(rehearse: Rehearse, target: Path) -> None:
    [problem] = rehearse(target, source="disc")["problems"]
    assert "no disk 'disc': it has 'disk0'" in problem


def test_a_folder_that_is_not_there_is_told(rehearse: Rehearse, target: Path) -> None:
    [problem] = rehearse(target.parent / "missing" / "b.img")["problems"]
    assert problem.endswith("cannot be made: No such file or directory")


def test_a_backup_under_way_is_told(rehearse: Rehearse, target: Path) -> None:
    target.with_name("backup.img.partial").touch()
    [problem] = rehearse(target)["problems"]
    assert "is running or was cut off" in problem


def test_a_taken_job_name_is_told(operated: Operated, rehearse: Rehearse, target: Path) -> None:
    operated.start_job()
    [problem] = rehearse(target, "--job-id", "j")["problems"]
    assert problem == "the server has a job 'j' already: choose another --job-id"


def add(operated: Operated, **options: object) -> None:
    operated.execute("blockdev-add", {"driver": "null-co", "node-name": "t", **options})


def test_a_node_as_target_is_looked_at(operated: Operated, rehearse: Rehearse) -> None:
    add(operated, size=SIZE)
    found = rehearse("node:t")
    assert found["problems"] == []
    assert found["plan"][1] == "node:t would be overwritten"


def test_all_that_is_wrong_with_a_node_is_told_at_once(
    operated: Operated, rehearse: Rehearse
) -> None:
    add(operated, size=SIZE // 2, **{"read-only": True})
    assert rehearse("node:t")["problems"] == [
        "the target node 't' is read-only",
        f"the target node 't' has {SIZE // 2} bytes: expected {SIZE}",
    ]


def test_a_node_that_is_not_there_or_is_the_source_is_told(rehearse: Rehearse) -> None:
    [problem] = rehearse("node:x")["problems"]
    assert problem == "the server has no node 'x': it has 'disk0', 'disk0-file'"
    assert rehearse("node:disk0")["problems"] == ["'disk0' cannot be source and target"]


def test_a_server_that_does_not_know_an_option_is_told(
    operated: Operated, rehearse: Rehearse, target: Path
) -> None:
    problems = rehearse(target, "--on-cbw-error", "break-snapshot")["problems"]
    expected = [] if operated.is_ours else ["the server does not know --on-cbw-error"]
    assert problems == expected


def test_a_full_file_system_is_told(
    rehearse: Rehearse, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup_check, "_free_space", lambda folder: 1 << 20)
    [problem] = rehearse(target)["problems"]
    assert problem.endswith(", more than the 1.0 MiB that are free for the target")


def test_little_space_is_a_warning_while_the_source_is_sparse(
    rehearse: Rehearse, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backup_check, "_free_space", lambda folder: 3 << 20)
    found = rehearse(target)
    assert found["problems"] == []
    [warning] = found["warnings"]
    assert warning.startswith("the target may grow to 4.0 MiB, more than the 3.0 MiB")


@pytest.mark.parametrize(
    ("text", "expected"), [("a", True), ("A-b.c_1", True), ("1a", False), ("a b", False)]
)
def test_identifiers(text: str, expected: bool) -> None:
    assert is_identifier(text) == expected

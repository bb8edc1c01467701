# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs backup` against our daemon and the real qemu-storage-daemon: whatever happens, the
target is either a complete backup or not there, and the server is as it was before."""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from nbdjobs.cli import backup
from nbdjobs.cli.backup import BackupPlan, back_up
from nbdjobs.cli.backup_job import Outcome, Progress, Request, Result, Sync
from nbdjobs.cli.exits import CliError, ExitCode
from nbdjobs.cli.main import main
from nbdjobs.cli.session import ServerGoneError
from tests.interop.daemon import Daemon, Disk
from tests.interop.tools import require

MIB = 1 << 20
SIZE = 4 * MIB

PROGRAMS = [
    "nbdjobs",
    pytest.param("qemu-storage-daemon", marks=pytest.mark.interop),
]

#: So slow that a job never ends by itself.
CRAWL = 1


class Recorder:
    """A reporter that remembers, and may act when the job is first seen running."""

    interval = 0.01

    def __init__(self, on_progress: Callable[[], None] = lambda: None):
        self.seen: list[Progress] = []
        self.notices: list[str] = []
        self.is_started = False
        self.is_closed = False
        self.on_notice: Callable[[], None] = lambda: None
        self._on_progress = on_progress

    def started(self, *, job_id: str, source: str, target: str, size: int) -> None:
        self.is_started = True

    def progress(self, progress: Progress) -> None:
        self.seen.append(progress)
        if len(self.seen) == 1:
            self._on_progress()

    def notice(self, message: str) -> None:
        self.notices.append(message)
        self.on_notice()

    def close(self) -> None:
        self.is_closed = True


class Server:
    """A daemon with one disk, and the socket that the command line uses.

    qemu-storage-daemon talks to one client per socket, and the test itself has the first one.
    """

    def __init__(self, daemon: Daemon, disk: Disk, qmp: Path):
        self.daemon = daemon
        self.disk = disk
        self.qmp = qmp
        self._before = self._state()

    def assert_as_before(self) -> None:
        """No job, node or filter is left."""
        assert self._state() == self._before

    def _state(self) -> Any:
        qmp = self.daemon.qmp
        nodes = qmp.execute("query-named-block-nodes", {"flat": True})
        return sorted(node["node-name"] for node in nodes), qmp.execute("query-jobs")


@pytest.fixture(params=PROGRAMS)
def server(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Server]:
    if request.param != "nbdjobs":
        monkeypatch.setenv("NBDJOBS_PROGRAM", require(request.param))
    disk = Disk(tmp_path / "disk.img")
    with disk.path.open("wb") as file:
        file.truncate(SIZE)
        file.write(random.Random(1).randbytes(SIZE // 2))
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    options = (
        *disk.blockdev(),
        *("--chardev", f"socket,id=cli,path={sockets / 'cli.sock'},server=on,wait=off"),
        *("--monitor", "chardev=cli"),
    )
    with Daemon(sockets, *options) as daemon:
        yield Server(daemon, disk, sockets / "cli.sock")


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "backups"
    folder.mkdir()
    return folder / "backup.img"


def left(target: Path) -> list[str]:
    """What is in the target's folder."""
    return sorted(path.name for path in target.parent.iterdir())


def make(
    server: Server, target: Path | str, recorder: Recorder, *, is_forced: bool = False, **job: Any
) -> Result:
    """Make a backup with a reporter of our own."""
    request = Request(source=server.disk.name, **job)
    plan = BackupPlan(request=request, target=str(target), qmp=server.qmp, is_forced=is_forced)
    return asyncio.run(back_up(plan, recorder))


def ctrl_c() -> None:
    os.kill(os.getpid(), signal.SIGINT)


def command(server: Server, target: Path | str, *words: str) -> int:
    """Run the command line."""
    return main(["backup", server.disk.name, str(target), "--qmp", str(server.qmp), *words])


def test_a_backup_equals_the_disk(server: Server, target: Path) -> None:
    recorder = Recorder()
    result = make(server, target, recorder)
    assert (result.outcome, result.error, result.size) == (Outcome.COMPLETED, None, SIZE)
    assert target.read_bytes() == server.disk.content()
    assert left(target) == [target.name]
    assert recorder.seen[-1].status == "concluded"
    assert recorder.is_started
    assert recorder.is_closed
    assert recorder.notices == []
    server.assert_as_before()


def test_the_command_line_prints_one_line(
    server: Server, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(server, target, "--no-progress") == ExitCode.DONE
    output = capsys.readouterr()
    assert output.err == ""
    assert output.out.startswith(f"backed up 'disk0' (4.0 MiB) to {target} in ")
    assert len(output.out.splitlines()) == 1


def test_programs_read_json(
    server: Server, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(server, target, "--json", "--job-id", "mine", "--speed", "1G") == ExitCode.DONE
    output = capsys.readouterr()
    assert output.err == ""
    lines = [json.loads(line) for line in output.out.splitlines()]
    assert lines[0]["type"] == "started"
    assert {line["type"] for line in lines[1:-1]} == {"progress"}
    assert lines[-1]["type"] == "result"
    assert (lines[-1]["outcome"], lines[-1]["job-id"]) == ("completed", "mine")


def test_a_refused_start_leaves_nothing(
    server: Server, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(server, target, "--job-id", "not an id") == ExitCode.FAILED
    sentence = capsys.readouterr().err
    assert "the server refused blockdev-backup" in sentence
    assert "not an id" in sentence
    assert left(target) == []
    server.assert_as_before()


def test_an_unknown_disk_is_answered_with_those_there(
    server: Server, target: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["backup", "disc", str(target), "--qmp", str(server.qmp), "--json"]
    assert main(words) == ExitCode.FAILED
    output = capsys.readouterr()
    assert "no disk 'disc': it has 'disk0', 'disk0-file'" in output.err
    assert json.loads(output.out)["outcome"] == "failed"
    assert left(target) == []


def test_an_existing_file_is_not_touched(server: Server, target: Path) -> None:
    target.write_bytes(b"precious")
    assert command(server, target) == ExitCode.FAILED
    assert target.read_bytes() == b"precious"
    assert left(target) == [target.name]


def test_force_replaces_an_old_backup(server: Server, target: Path) -> None:
    target.write_bytes(b"old")
    assert command(server, target, "--force") == ExitCode.DONE
    assert target.read_bytes() == server.disk.content()


def test_force_does_not_replace_the_disk_itself(server: Server) -> None:
    before = server.disk.content()
    assert command(server, server.disk.path, "--force") == ExitCode.FAILED
    assert server.disk.content() == before


def test_ctrl_c_cancels_and_leaves_nothing(server: Server, target: Path) -> None:
    recorder = Recorder(ctrl_c)
    result = make(server, target, recorder, speed=CRAWL)
    assert (result.outcome, result.error) == (Outcome.CANCELLED, None)
    assert left(target) == []
    server.assert_as_before()


def test_ctrl_c_leaves_the_backup_that_was_to_be_replaced(server: Server, target: Path) -> None:
    target.write_bytes(b"old")
    make(server, target, Recorder(ctrl_c), speed=CRAWL, is_forced=True)
    assert target.read_bytes() == b"old"
    assert left(target) == [target.name]


def test_a_job_cancelled_by_somebody_else_is_cancelled(server: Server, target: Path) -> None:
    def cancel() -> None:
        server.daemon.qmp.execute("job-cancel", {"id": "backup-disk0"})

    result = make(server, target, Recorder(cancel), speed=CRAWL)
    assert result.outcome is Outcome.CANCELLED
    assert left(target) == []
    server.assert_as_before()


def test_ctrl_c_twice_leaves_the_job_to_the_server(server: Server, target: Path) -> None:
    recorder = Recorder(ctrl_c)
    recorder.on_notice = ctrl_c
    qmp = server.daemon.qmp
    add_slow_target(server)
    with pytest.raises(CliError, match=r"'backup-disk0'.*stay on the server") as left_behind:
        make(server, "node:slow", recorder)
    assert left_behind.value.code is ExitCode.CANCELLED
    [job] = qmp.execute("query-jobs")
    assert job["id"] == "backup-disk0"
    qmp.wait_job_status("backup-disk0", "concluded")
    qmp.execute("job-dismiss", {"id": "backup-disk0"})
    remove_slow_target(server)
    server.assert_as_before()


def add_slow_target(server: Server) -> None:
    """Add a target that takes a second for each request: cancelling has to wait for it."""
    options = {"driver": "null-co", "node-name": "slow", "size": SIZE, "latency-ns": 10**9}
    server.daemon.qmp.execute("blockdev-add", options)


def remove_slow_target(server: Server) -> None:
    server.daemon.qmp.execute("blockdev-del", {"node-name": "slow"})


def test_a_job_that_only_saves_ends_with_ctrl_c_and_is_kept(server: Server, target: Path) -> None:
    result = make(server, target, Recorder(ctrl_c), sync=Sync.NONE)
    assert (result.outcome, result.error) == (Outcome.COMPLETED, None)
    assert left(target) == [target.name]
    assert target.stat().st_size == SIZE
    server.assert_as_before()


def add_failing_target(server: Server) -> None:
    """Add a node `bad` whose writes fail for want of space."""
    inject = {"event": "none", "iotype": "write", "errno": 28}
    image = {"driver": "null-co", "size": SIZE}
    options = {"driver": "blkdebug", "node-name": "bad", "image": image, "inject-error": [inject]}
    server.daemon.qmp.execute("blockdev-add", options)


def test_a_failing_target_is_told_with_its_reason(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    add_failing_target(server)
    assert command(server, "node:bad", "--no-progress") == ExitCode.FAILED
    assert capsys.readouterr().err == (
        "nbdjobs: backup of 'disk0' to node:bad failed: No space left on device"
        " (while writing the target)\n"
    )
    assert server.daemon.qmp.execute("query-jobs") == []


def test_a_job_paused_by_an_error_says_so_and_can_be_cancelled(server: Server) -> None:
    add_failing_target(server)
    recorder = Recorder()
    recorder.on_notice = lambda: ctrl_c() if len(recorder.notices) == 1 else None
    result = make(server, "node:bad", recorder, options={"on-target-error": "stop"})
    assert result.outcome is Outcome.CANCELLED
    assert recorder.notices[0].startswith("paused by an error while writing the target")
    assert server.daemon.qmp.execute("query-jobs") == []


def test_a_server_that_ends_leaves_no_half_backup(server: Server, target: Path) -> None:
    def quit_server() -> None:
        server.daemon.qmp.ask("quit")
        server.daemon.process.wait()

    with pytest.raises(ServerGoneError, match="closed the session"):
        make(server, target, Recorder(quit_server), speed=CRAWL)
    assert left(target) == []


def test_a_node_as_target_stays(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "node.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    options = {"driver": "file", "node-name": "tgt", "filename": str(path)}
    server.daemon.qmp.execute("blockdev-add", options)
    result = make(server, "node:tgt", Recorder())
    assert (result.outcome, result.target) == (Outcome.COMPLETED, "node:tgt")
    server.daemon.qmp.execute("blockdev-del", {"node-name": "tgt"})
    assert path.read_bytes() == server.disk.content()


def test_the_start_is_told_at_once(server: Server, target: Path) -> None:
    jobs = []
    plan = BackupPlan(
        request=Request(source=server.disk.name),
        target=str(target),
        qmp=server.qmp,
        on_started=lambda: jobs.extend(server.daemon.qmp.execute("query-jobs")),
    )
    asyncio.run(back_up(plan, Recorder()))
    assert [job["id"] for job in jobs] == ["backup-disk0"]


def test_job_names_of_running_backups_are_not_used_again(server: Server, target: Path) -> None:
    qmp = server.daemon.qmp
    add_slow_target(server)
    arguments = {"job-id": "backup-disk0", "device": "disk0", "target": "slow", "sync": "none"}
    qmp.execute("blockdev-backup", {**arguments, "auto-dismiss": False})
    qmp.execute("job-cancel", {"id": "backup-disk0"})
    qmp.wait_job_status("backup-disk0", "concluded")
    assert make(server, target, Recorder()).job_id == "backup-disk0-2"
    qmp.execute("job-dismiss", {"id": "backup-disk0"})


@pytest.mark.parametrize("name", ["on-source-error", "on-target-error"])
def test_error_policies_reach_the_server(server: Server, target: Path, name: str) -> None:
    assert command(server, target, f"--{name}", "enospc") == ExitCode.DONE


def test_signal_handlers_are_put_back(server: Server, target: Path) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    make(server, target, Recorder())
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_the_manual_names_every_exit_code() -> None:
    assert all(f" {code} " in backup.EPILOG for code in (0, 1, 2, 3))

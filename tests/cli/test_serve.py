# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs serve`: what is checked before it starts, and the running program."""

from __future__ import annotations

import argparse
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from nbdjobs.cli import serve
from nbdjobs.cli.exits import CliError
from nbdjobs.cli.main import main
from nbdjobs.cli.runtime import is_listening
from nbdjobs.cli.serve_options import Serving, TcpListen, UnixListen, daemon_options
from tests.interop.qmp_client import QmpClient
from tests.interop.tools import run

MIB = 1 << 20
PATIENCE_S = 60


@pytest.fixture(autouse=True)
def runtime(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of sockets, with a path short enough for them."""
    folder = tmp_path_factory.mktemp("run")
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(folder))
    return folder / "nbdjobs"


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(MIB))
    return path


def plan(*words: str | Path) -> Serving:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    return serve.plan(parser.parse_args([str(word) for word in words]))


def test_sockets_are_named_after_the_disk(image: Path, runtime: Path) -> None:
    serving = plan(image)
    assert serving.listen == UnixListen(runtime / "disk.nbd.sock")
    assert serving.qmp == runtime / "disk.qmp.sock"
    assert serving.is_found
    assert runtime.stat().st_mode & 0o777 == 0o700


def test_a_snapshot_is_served_read_only(image: Path) -> None:
    with pytest.raises(CliError, match="expected --format qcow2"):
        plan("--snapshot", "a", image)
    disk = image.with_suffix(".qcow2")
    assert main(["create", "-f", "qcow2", str(disk), "1M"]) == 0
    serving = plan("--snapshot", "a,b", "--format", "qcow2", disk)
    assert serving.read_only
    [option] = [word for word in daemon_options(serving) if word.startswith("driver=qcow2")]
    assert option.endswith(",read-only=on,snapshot=a,,b")


def test_names_that_are_no_file_names_have_sockets_too(image: Path, runtime: Path) -> None:
    serving = plan(image, "--name", "../etc/passwd")
    assert serving.qmp.parent == runtime


def test_chosen_places_are_used(image: Path, tmp_path: Path, runtime: Path) -> None:
    serving = plan(image, "--tcp", "[::1]:10809", "--qmp", tmp_path / "qmp.sock")
    assert serving.listen == TcpListen("::1", 10809)
    assert serving.qmp == tmp_path / "qmp.sock"
    assert not serving.is_found
    assert not runtime.exists()


def test_several_disks_have_their_names(image: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(512))
    disks = plan("--name", "root", "--read-only", "--direct", image, other).disks
    assert [(disk.name, disk.image.path, disk.image.size) for disk in disks] == [
        ("root", image, MIB),
        ("other", other, 512),
    ]


def test_every_image_is_checked_before_anything_starts(image: Path, tmp_path: Path) -> None:
    with pytest.raises(CliError, match=r"missing\.img"):
        plan(image, tmp_path / "missing.img")


class Running:
    """A running `nbdjobs serve`.

    Attributes:
        process: The program.
        lines: What it printed when it was ready.
    """

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        assert process.stdout is not None
        self.lines: list[str] = []
        while not self.lines or not self.lines[-1].startswith("stop:"):
            line = process.stdout.readline()
            assert line, process.communicate()
            self.lines.append(line.rstrip("\n"))

    @property
    def uris(self) -> list[str]:
        return [line.strip() for line in self.lines if "://" in line]

    def end(self, number: signal.Signals) -> None:
        """Stop it by a signal: it ends with 0 and says nothing more."""
        self.process.send_signal(number)
        assert self.process.communicate(timeout=PATIENCE_S) == ("", "")
        assert self.process.returncode == 0


@contextmanager
def running(*words: str | Path) -> Iterator[Running]:
    command = [sys.executable, "-m", "nbdjobs", "serve", *map(str, words)]
    with ExitStack() as stack:
        process = stack.enter_context(
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
        stack.callback(process.kill)
        yield Running(process)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_clean(image: Path, runtime: Path, number: signal.Signals) -> None:
    with running(image) as server:
        assert sorted(path.name for path in runtime.iterdir()) == ["disk.nbd.sock", "disk.qmp.sock"]
        server.end(number)
    assert list(runtime.iterdir()) == []


def test_its_qmp_socket_answers(image: Path, runtime: Path) -> None:
    with running(image) as server:
        with QmpClient.connect(runtime / "disk.qmp.sock") as qmp:
            assert {export["id"] for export in qmp.execute("query-block-exports")} == {
                "disk",
                "disk.default",
            }
            qmp.execute("quit")
        assert server.process.wait(PATIENCE_S) == 0


def test_a_backup_finds_it(image: Path, tmp_path: Path) -> None:
    target = tmp_path / "backup.img"
    with running(image) as server:
        assert main(["backup", "disk", str(target), "--no-progress"]) == 0
        server.end(signal.SIGTERM)
    assert target.read_bytes() == image.read_bytes()


def test_the_printed_backup_line_works_for_an_odd_name(image: Path, tmp_path: Path) -> None:
    with running(image, "--name", "my disk") as server:
        assert main(["backup", "my disk", str(tmp_path / "b.img"), "--no-progress"]) == 0
        server.end(signal.SIGTERM)


def test_a_second_server_of_the_same_name_is_refused(
    image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.img"
    other.write_bytes(bytes(512))
    with running(image) as server:
        assert main(["serve", str(other), "--name", "disk"]) == 1
        assert "another server listens at" in capsys.readouterr().err
        server.end(signal.SIGTERM)


def test_a_second_server_of_the_same_disk_is_refused(
    image: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with running(image) as server:
        for words in (["--name", "two"], ["--name", "two", "--read-only"]):
            assert main(["serve", str(image), *words]) == 1
            assert f"'{image}' is in use by another program" in capsys.readouterr().err
        server.end(signal.SIGTERM)


def test_quiet_prints_nothing(image: Path, tmp_path: Path) -> None:
    qmp = tmp_path / "qmp.sock"
    command = [sys.executable, "-m", "nbdjobs", "serve", "-q", str(image), "--qmp", str(qmp)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        ended = os.pidfd_open(process.pid)
        wait_for_socket(qmp, ended)
        with QmpClient.connect(qmp) as session:
            session.execute("quit")
        assert process.stdout.read() == b""
        assert process.wait(PATIENCE_S) == 0
        os.close(ended)


def wait_for_socket(path: Path, ended: int) -> None:
    """Wait until somebody listens, looking every hundredth second whether the process lives."""
    while not is_listening(path):
        assert not select.select([ended], [], [], 0.01)[0], "the server ended"


@pytest.mark.interop
def test_its_uris_work_with_nbdinfo(image: Path, tmp_path: Path, runtime: Path) -> None:
    other = tmp_path / "other disk.img"
    other.write_bytes(bytes(MIB))
    with running(image, other) as server:
        for uri in server.uris:
            assert run("nbdinfo", "--size", uri) == f"{MIB}\n"
        server.end(signal.SIGTERM)
    with running(image) as server:
        uri = f"nbd+unix:///?socket={runtime / 'disk.nbd.sock'}"
        assert run("nbdinfo", "--size", uri) == f"{MIB}\n"
        server.end(signal.SIGTERM)


@pytest.mark.interop
def test_a_qcow2_image_is_served_and_backed_up(tmp_path: Path) -> None:
    image, backup = tmp_path / "disk.qcow2", tmp_path / "backup.img"
    run("qemu-img", "create", "-f", "qcow2", image, str(MIB))
    with running(image, "--format", "qcow2") as server:
        assert server.lines[0] == f"serving {image} (1.0 MiB, read-write)"
        run("qemu-io", "-f", "raw", "-c", "write -P 7 64k 64k", server.uris[0])
        assert main(["backup", "disk", str(backup), "--no-progress"]) == 0
        server.end(signal.SIGTERM)
    assert backup.read_bytes() == bytes(64 << 10) + b"\7" * (64 << 10) + bytes(MIB - (128 << 10))
    run("qemu-img", "compare", "-f", "qcow2", "-F", "raw", image, backup)

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs health`: what a daemon answers, and every way in which it may not."""

from __future__ import annotations

import json
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from nbdjobs import __version__
from nbdjobs.cli.exits import ExitCode
from nbdjobs.cli.main import main
from tests.interop.daemon import Daemon, Disk, unix_server

VERSION = {"qemu": {"major": 7, "minor": 2, "micro": 0}, "package": "Debian 7.2"}
UNNAMED = {**VERSION, "package": ""}
GREETING = {"QMP": {"version": VERSION, "capabilities": []}}
NEGOTIATED: dict[str, object] = {"return": {}}
REFUSED: dict[str, object] = {"error": {"class": "GenericError", "desc": "not now"}}


@pytest.fixture(autouse=True)
def our_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    """The running daemons below are nbdjobs, whatever the interop tests are made to drive."""
    monkeypatch.delenv("NBDJOBS_PROGRAM", raising=False)


@contextmanager
def server(path: Path, *answers: dict[str, object], greeting: object = GREETING) -> Iterator[None]:
    """Greets one client, gives these answers to its commands, and is silent from then on."""

    def talk() -> None:
        connection, _ = listener.accept()
        with connection:
            if greeting is not None:
                say(connection, greeting)
            for answer in answers:
                # The client has one command under way at a time, and ends none with a newline.
                asked = json.loads(connection.recv(65536))
                say(connection, {**answer, **{key: asked[key] for key in asked if key == "id"}})
            while connection.recv(65536):  # until the client leaves
                pass

    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor() as pool:
        listener.bind(str(path))
        listener.listen()
        talking = pool.submit(talk)
        yield
        talking.result()


def say(connection: socket.socket, message: object) -> None:
    connection.sendall(json.dumps(message).encode() + b"\n")


def ask(path: Path, *words: str) -> int:
    return main(["health", "--qmp", str(path), *words])


@pytest.mark.parametrize(
    ("version", "exports", "sentence"),
    [
        (VERSION, [{"id": "a"}], "healthy: Debian 7.2, 1 export\n"),
        (UNNAMED, [], "healthy: QEMU 7.2.0, 0 exports\n"),
        (VERSION, [{"id": "a"}, {"id": "b"}], "healthy: Debian 7.2, 2 exports\n"),
    ],
)
def test_a_server_that_answers_is_healthy(
    version: object,
    exports: object,
    sentence: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "qmp.sock"
    with server(path, NEGOTIATED, {"return": version}, {"return": exports}):
        assert ask(path) == ExitCode.DONE
    assert capsys.readouterr() == (sentence, "")


@pytest.mark.parametrize(
    "answers",
    [(), (NEGOTIATED,), (NEGOTIATED, {"return": VERSION})],
    ids=["negotiation", "version", "exports"],
)
def test_a_server_that_falls_silent_is_not_healthy(
    answers: tuple[dict[str, object], ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "qmp.sock"
    with server(path, *answers):
        assert ask(path, "--timeout", "0.05") == ExitCode.FAILED
    expected = f"nbdjobs: the server at '{path}' did not answer within 0.05 s\n"
    assert capsys.readouterr() == ("", expected)


def test_a_server_that_never_greets_is_not_healthy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "qmp.sock"
    with server(path, greeting=None):
        assert ask(path, "--timeout", "0.05") == ExitCode.FAILED
    assert "did not answer within 0.05 s" in capsys.readouterr().err


def test_a_server_that_refuses_is_not_healthy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "qmp.sock"
    with server(path, NEGOTIATED, {"return": VERSION}, REFUSED):
        assert ask(path) == ExitCode.FAILED
    expected = "nbdjobs: the server refused query-block-exports: not now\n"
    assert capsys.readouterr() == ("", expected)


def test_a_server_that_is_not_there_is_not_healthy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ask(tmp_path / "qmp.sock") == ExitCode.FAILED
    assert "there is no QMP socket" in capsys.readouterr().err
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert main(["health"]) == ExitCode.FAILED
    assert "no running server was found" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["0", "-1", "soon", "inf", "nan", ""])
def test_a_time_is_expected(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["health", f"--timeout={text}"])
    assert ended.value.code == ExitCode.USAGE
    assert f"'{text}' is not a time: expected seconds above 0" in capsys.readouterr().err


def test_a_running_daemon_is_healthy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(512))
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    disk = Disk(image)
    with Daemon(sockets, *disk.blockdev(), *unix_server(), *disk.export()) as daemon:
        assert ask(daemon.qmp_socket) == ExitCode.DONE
        assert capsys.readouterr().out == f"healthy: nbdjobs {__version__}, 1 export\n"


def test_a_daemon_that_hangs_is_not_healthy(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Daemon(tmp_path) as daemon:
        daemon.process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, daemon.process.pid, os.WSTOPPED)
        assert ask(daemon.qmp_socket, "--timeout", "0.05") == ExitCode.FAILED
        assert "did not answer within 0.05 s" in capsys.readouterr().err
        daemon.process.send_signal(signal.SIGCONT)
        assert ask(daemon.qmp_socket) == ExitCode.DONE

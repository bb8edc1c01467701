# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Service managers: they are told of start and stop, and may pass a listening socket.

The tests play the manager: they make sockets, set the environment, and start the program.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from nbdjobs.cli import systemd
from nbdjobs.cli.demo_writer import negotiate
from nbdjobs.cli.exits import CliError

PATIENCE_S = 60
MIB = 1 << 20

#: Runs the words behind it as systemd would: with socket number 3, addressed to itself.
LAUNCHER = """
import os, sys
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS="1")
os.dup2(int(sys.argv[1]), 3)
os.set_inheritable(3, True)
os.execv(sys.executable, [sys.executable, "-m", "nbdjobs", *sys.argv[2:]])
"""


@contextmanager
def manager(address: str | bytes) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(address)
        receiver.settimeout(PATIENCE_S)
        yield receiver


@dataclass
class Passed:
    """A socket on its way to a program, and the environment that announces it."""

    sock: socket.socket
    environment: dict[str, str]


@pytest.fixture
def passed(monkeypatch: pytest.MonkeyPatch) -> Iterator[Passed]:
    """A TCP socket, which `take_socket` finds where it looks."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        monkeypatch.setattr(systemd, "FIRST_DESCRIPTOR", sock.fileno())
        variables = {"LISTEN_PID": "42", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "nbd", "HOME": "/"}
        yield Passed(sock, variables)


def refusal(environment: dict[str, str]) -> str:
    with pytest.raises(CliError) as refused:
        systemd.take_socket(environment, 42)
    return str(refused.value)


def test_without_a_manager_nobody_is_told(caplog: pytest.LogCaptureFixture) -> None:
    systemd.notify(systemd.READY, {})
    assert caplog.records == []


def test_a_manager_with_a_path_is_told(tmp_path: Path) -> None:
    path = str(tmp_path / "n")
    with manager(path) as receiver:
        systemd.notify(systemd.READY, {"NOTIFY_SOCKET": path})
        assert receiver.recv(100) == b"READY=1"


def test_a_manager_with_an_abstract_socket_is_told() -> None:
    name = f"nbdjobs-test-{uuid.uuid4()}"
    with manager(f"\0{name}") as receiver:
        systemd.notify(systemd.STOPPING, {"NOTIFY_SOCKET": f"@{name}"})
        assert receiver.recv(100) == b"STOPPING=1"


@pytest.mark.parametrize("address", ["/nonexistent/socket", "x" * 200, "vsock:2:1"])
def test_a_manager_that_is_not_there_is_a_warning(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        systemd.notify(systemd.READY, {"NOTIFY_SOCKET": address})
    [record] = caplog.records
    assert record.getMessage().startswith("the service manager could not be told READY=1: ")


def test_without_variables_there_is_no_socket() -> None:
    assert systemd.take_socket({}, 42) is None


def test_a_socket_for_another_process_is_not_taken() -> None:
    environment = {"LISTEN_PID": "41", "LISTEN_FDS": "1"}
    assert systemd.take_socket(environment, 42) is None
    assert environment == {}


def test_a_socket_is_taken_and_kept_from_children(passed: Passed) -> None:
    passed.sock.set_inheritable(True)
    found = systemd.take_socket(passed.environment, 42)
    assert found == systemd.PassedSocket(passed.sock.fileno(), passed.sock.getsockname())
    assert not passed.sock.get_inheritable()
    assert passed.environment == {"HOME": "/"}


def test_a_socket_at_a_path_is_taken(
    passed: Passed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(path)
        sock.listen()
        monkeypatch.setattr(systemd, "FIRST_DESCRIPTOR", sock.fileno())
        found = systemd.take_socket(passed.environment, 42)
    assert found is not None
    assert found.address == path


@pytest.mark.parametrize("count", ["0", "2", "many"])
def test_exactly_one_socket_is_expected(passed: Passed, count: str) -> None:
    passed.environment["LISTEN_FDS"] = count
    sentence = refusal(passed.environment)
    assert sentence == f"the service manager passed {count} sockets: expected one, for NBD clients"


def abstract() -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(f"\0nbdjobs-test-{uuid.uuid4()}")
    sock.listen()
    return sock


@pytest.mark.parametrize(
    "make",
    [
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
        lambda: socket.socket(socket.AF_INET),
        lambda: socket.socket(socket.AF_UNIX),
        abstract,
    ],
    ids=["datagrams", "not listening", "no address", "abstract"],
)
def test_a_socket_that_nbd_clients_cannot_reach_is_refused(
    make: type[socket.socket], passed: Passed, monkeypatch: pytest.MonkeyPatch
) -> None:
    with make() as sock:
        monkeypatch.setattr(systemd, "FIRST_DESCRIPTOR", sock.fileno())
        assert "expected one that listens on TCP or at a path" in refusal(passed.environment)


def test_what_is_no_socket_is_refused(passed: Passed, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(os.devnull) as null:
        monkeypatch.setattr(systemd, "FIRST_DESCRIPTOR", null.fileno())
        assert refusal(passed.environment).endswith("Socket operation on non-socket")
    assert refusal({"LISTEN_PID": "42", "LISTEN_FDS": "1"}).endswith("Bad file descriptor")


class Service:
    """A program started as systemd starts it: with a socket, and somebody to tell."""

    def __init__(self, stack: ExitStack, sock: socket.socket, folder: Path, *words: str):
        self._manager = stack.enter_context(manager(str(folder / "notify")))
        command = [sys.executable, "-c", LAUNCHER, str(sock.fileno()), *words]
        self.process = stack.enter_context(
            subprocess.Popen(
                command,
                pass_fds=[sock.fileno()],
                env={**os.environ, "NOTIFY_SOCKET": str(folder / "notify")},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        stack.callback(self.process.kill)

    def told(self) -> str:
        return self._manager.recv(100).decode()

    def end(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        assert self.told() == "STOPPING=1"
        assert self.process.communicate(timeout=PATIENCE_S)[1] == ""
        assert self.process.returncode == 0


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


def test_a_passed_unix_socket_serves_and_outlives_the_server(image: Path, tmp_path: Path) -> None:
    path = str(tmp_path / "nbd")
    with ExitStack() as stack:
        listener = stack.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(path)
        listener.listen()
        for _ in range(2):  # the second server gets the same socket, as after a restart
            with ExitStack() as run:
                client = run.enter_context(socket.socket(socket.AF_UNIX))
                client.connect(path)  # before there is a server: it waits
                service = Service(run, listener, tmp_path, "serve", str(image))
                assert service.told() == "READY=1"
                assert negotiate(client, "disk") == MIB
                service.end()
            (tmp_path / "notify").unlink()
            assert Path(path).is_socket()


def test_a_passed_tcp_socket_serves_the_daemon_too(image: Path, tmp_path: Path) -> None:
    node = f"driver=file,node-name=disk,filename={image}"
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        service = Service(
            stack,
            listener,
            tmp_path,
            *("daemon", "--blockdev", node, "--nbd-server", "addr.type=fd,addr.str=3"),
            *("--export", "type=nbd,id=disk,node-name=disk"),
        )
        assert service.told() == "READY=1"
        with socket.create_connection(listener.getsockname(), PATIENCE_S) as client:
            assert negotiate(client, "disk") == MIB
        service.end()


def test_a_passed_socket_and_an_address_are_too_much(image: Path, tmp_path: Path) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        service = Service(stack, listener, tmp_path, "serve", str(image), "--tcp", "10809")
        _, said = service.process.communicate(timeout=PATIENCE_S)
    assert service.process.returncode == 1
    assert "expected neither --tcp nor --socket beside it" in said


def config(image: Path, *lines: str) -> str:
    """The path of a configuration file for the image."""
    path = image.parent / "disks.toml"
    node = f'nodes.disk = {{ driver = "file", filename = "{image.name}" }}'
    path.write_text("\n".join((*lines, node, 'exports.disk = { node-name = "disk" }')))
    return str(path)


def test_a_configuration_file_without_an_address_takes_the_passed_socket(
    image: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        service = Service(stack, listener, tmp_path, "serve", "--config", config(image))
        assert service.told() == "READY=1"
        with socket.create_connection(listener.getsockname(), PATIENCE_S) as client:
            assert negotiate(client, "disk") == MIB
        service.end()


def test_a_passed_socket_and_an_address_in_the_file_are_too_much(
    image: Path, tmp_path: Path
) -> None:
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        words = ("serve", "--config", config(image, "nbd.tcp = 10809"))
        service = Service(stack, listener, tmp_path, *words)
        _, said = service.process.communicate(timeout=PATIENCE_S)
    assert service.process.returncode == 1
    assert "nbd: the service manager passed a socket: expected neither tcp nor socket" in said


def test_the_environment_asks_for_a_pid_as_decimal() -> None:
    # What systemd writes is compared as text: " 42" or "0x2a" are not ours.
    for pid in (" 42", "0x2a", "042"):
        assert systemd.take_socket({"LISTEN_PID": pid, "LISTEN_FDS": "1"}, 42) is None

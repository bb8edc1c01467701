# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The program as a whole: subcommands, usage errors, exit codes, one sentence per error."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nbdjobs import __version__
from nbdjobs.cli import demo, session
from nbdjobs.cli.main import SUBCOMMANDS, main


def usage_error(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What is said about a wrong command line."""
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 2
    output = capsys.readouterr()
    assert output.out == ""
    return output.err.splitlines()[-1]


def failure(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """The one sentence of a command that cannot be done."""
    assert main(words) == 1
    output = capsys.readouterr()
    assert output.out == ""
    [sentence] = output.err.splitlines()
    assert sentence.startswith("nbdjobs: ")
    return sentence


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"nbdjobs {__version__}\n"


def test_the_help_names_every_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in ("daemon", *SUBCOMMANDS))


@pytest.mark.parametrize("name", SUBCOMMANDS)
def test_every_subcommand_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    assert f"usage: nbdjobs {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([], "required: SUBCOMMAND"),
        (["sevre"], "invalid choice: 'sevre'"),
        (["--", "demo"], "error: "),
        (["--", "daemon"], "error: "),
        (["--bogus", "serve", "a.img"], "unrecognized arguments"),
        (["serve"], "one of the arguments IMAGE --config is required"),
        (["serve", "a.img", "--tcp", "x"], "'x' is not an address: expected PORT"),
        (["serve", "a.img", "--tcp", "1", "--socket", "s"], "not allowed with"),
        (["serve", "a.img", "--max-connections", "0"], "expected 1 or more"),
        (["serve", "a.img", "--format", "vmdk"], "invalid choice: 'vmdk'"),
        (["backup", "disk"], "required: TARGET"),
        (["backup", "disk", "b", "--speed", "fast"], "'fast' is not a size"),
        (["backup", "disk", "b", "--sync", "top"], "invalid choice: 'top'"),
        (["backup", "disk", "b", "--cbw-timeout", "-1"], "expected"),
        (["backup", "disk", "b", "--cbw-timeout", "4294967296"], "expected whole seconds"),
        (["demo", "now"], "unrecognized arguments: now"),
    ],
)
def test_wrong_usage_is_named(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert expected in usage_error(capsys, *words)


def test_a_missing_image_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    image = tmp_path / "missing.img"
    sentence = failure(capsys, "serve", str(image))
    assert sentence == f"nbdjobs: '{image}' cannot be opened: No such file or directory"


def test_a_missing_server_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "qmp.sock"
    sentence = failure(capsys, "backup", "disk", str(tmp_path / "b"), "--qmp", str(path))
    assert str(path) in sentence
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [(b"", "does not answer"), (b"NBDMAGIC\n", "is not a QMP socket"), (b"{}\n", "is not a QMP")],
)
def test_a_socket_that_is_no_qmp_server_is_one_sentence(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    greeting: bytes,
    reason: str,
) -> None:
    if not greeting:
        monkeypatch.setattr(session, "GREETING_PATIENCE_S", 0.01)
    path = tmp_path / "qmp.sock"
    with socket.socket(socket.AF_UNIX) as listener, ThreadPoolExecutor() as pool:
        listener.bind(str(path))
        listener.listen()
        if greeting:
            pool.submit(greet, listener, greeting)
        sentence = failure(capsys, "backup", "disk", str(tmp_path / "b"), "--qmp", str(path))
    assert reason in sentence


def greet(listener: socket.socket, greeting: bytes) -> None:
    """Say something to one client and wait until it leaves."""
    connection, _ = listener.accept()
    with connection:
        connection.sendall(greeting)
        connection.recv(1)


def test_no_server_at_all_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert "no running server was found" in failure(capsys, "backup", "disk", "b")


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (KeyboardInterrupt(), 130, ""),
        (OSError(5, "Input/output error", "disk.img"), 1, "'disk.img': Input/output error"),
        (OSError("odd"), 1, "nbdjobs: odd"),
    ],
)
def test_what_interrupts_a_subcommand_is_an_exit_code(
    error: BaseException,
    code: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(_: object) -> int:
        raise error

    monkeypatch.setattr(demo, "run", fail)
    assert main(["demo"]) == code
    assert said in capsys.readouterr().err


def test_the_daemon_does_not_load_what_only_clients_need() -> None:
    code = "import sys; from nbdjobs.cli.main import main; main(['daemon', '--version']);"
    code += " print(sorted({'rich', 'qemu'} & set(sys.modules)))"
    words = [sys.executable, "-c", code]
    output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert output.splitlines()[-1] == "[]"


def test_the_package_runs_as_a_module() -> None:
    words = [sys.executable, "-m", "nbdjobs", "--version"]
    output = subprocess.run(words, capture_output=True, text=True, check=True).stdout
    assert output == f"nbdjobs {__version__}\n"


def test_a_reader_who_leaves_early_is_no_traceback() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        words = [sys.executable, "-m", "nbdjobs", "backup", "disk", "b", "--qmp", "/no", "--json"]
        ended = subprocess.run(
            words, stdout=writing, stderr=subprocess.PIPE, text=True, check=False
        )
    finally:
        os.close(writing)
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr

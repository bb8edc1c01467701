# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs serve --config`: checked before it starts, and the manual's example for real."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import nbdjobs
from nbdjobs.cli.exits import ExitCode
from nbdjobs.cli.main import main
from tests.cli.test_serve import PATIENCE_S, running
from tests.interop.qmp_client import QmpClient
from tests.interop.tools import run

MIB = 1 << 20
MANUAL = Path(nbdjobs.__file__).parent.parent / "docs" / "serve.md"

SOUND = """
nbd.socket = "nbd.sock"
qmp.socket = "qmp.sock"
[nodes.disk]
driver = "file"
filename = "disk.img"
[exports.disk]
node-name = "disk"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the file and its image are; sockets have a place of their own."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    path = tmp_path / "config"
    path.mkdir()
    (path / "disk.img").write_bytes(bytes(MIB))
    return path


def write(folder: Path, text: str) -> Path:
    path = folder / "disks.toml"
    path.write_text(text)
    return path


def complaints(capsys: pytest.CaptureFixture[str], path: Path, *words: str) -> list[str]:
    """What is said about a file that is not right."""
    assert main(["serve", "--config", str(path), *words]) == ExitCode.FAILED
    output = capsys.readouterr()
    assert output.out == ""
    start = f"nbdjobs: {path}: "
    lines = output.err.splitlines()
    assert all(line.startswith(start) for line in lines), lines
    return [line.removeprefix(start) for line in lines]


def example() -> str:
    """The file that the manual shows."""
    [text] = re.findall(r"```toml\n(.*?)```", MANUAL.read_text(), re.DOTALL)
    assert isinstance(text, str)
    return text


def test_a_right_file_is_said_to_be_right_and_nothing_starts(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(folder, SOUND)
    assert main(["serve", "--config", str(path), "--check"]) == ExitCode.DONE
    assert capsys.readouterr() == (f"{path} is right: 1 node, 1 export, 1 monitor\n", "")
    assert sorted(each.name for each in folder.iterdir()) == ["disk.img", "disks.toml"]


@pytest.mark.parametrize("words", [(), ("--check",)])
def test_everything_wrong_is_told_before_anything_starts(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    path = write(
        folder,
        """
        nbd.socket = "/missing/nbd.sock"
        qmp.socket = "disk.img"
        [secrets.key]
        file = "missing.key"
        [throttle-groups.slow]
        iops-total = 5
        iops-read = 5
        [nodes.disk]
        driver = "file"
        filname = "disk.img"
        [nodes.gone]
        driver = "file"
        filename = "gone.img"
        [nodes.top]
        driver = "raw"
        file = "gone"
        [nodes.small]
        driver = "raw"
        size = "2M"
        file = { driver = "file", filename = "disk.img" }
        [exports.disk]
        node-name = "disk"
        [exports.top]
        node-name = "top"
        """,
    )
    assert complaints(capsys, path, *words) == [
        "nodes.disk.filname: unknown key, did you mean 'filename'?",
        "nodes.disk: the key 'filename' is missing: expected a string",
        f"qmp.socket: '{folder / 'disk.img'}' exists and is not a socket: expected a new path",
        "nbd: '/missing', the folder of the socket 'nbd.sock', does not exist",
        "secrets.key: Unable to read missing.key: Failed to open file “missing.key”: No such file"
        " or directory",
        "throttle-groups.slow: bps/iops/max total values and read/write values cannot be used at"
        " the same time",
        "nodes.gone: Could not open 'gone.img': No such file or directory",
        "nodes.small: The sum of offset (0) and size (2097152) has to be smaller or equal to the "
        " actual size of the containing file (1048576)",
    ]
    assert not (folder / "nbd.sock").exists()


def test_the_content_of_secrets_is_never_told(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "key").write_text("hunter2 is no base64")
    path = write(folder, SOUND + '[secrets.key]\nfile = "key"\nformat = "base64"\n')
    [found] = complaints(capsys, path, "--check")
    assert found.startswith("secrets.key: ")
    assert "hunter2" not in found


def test_a_server_that_runs_is_in_the_way(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(folder, SOUND)
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(folder / "qmp.sock"))
        other.listen()
        [found] = complaints(capsys, path)
    assert found.startswith("qmp.socket: another server listens at")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, "cannot be read: No such file or directory"),
        (b"\xff", "is not TOML: it is not UTF-8 at byte 0"),
        (b" " * ((4 << 20) + 1), "is too long for a configuration: expected at most 4194304 bytes"),
    ],
)
def test_a_file_that_cannot_be_read_is_one_sentence(
    folder: Path, capsys: pytest.CaptureFixture[str], content: bytes | None, sentence: str
) -> None:
    path = folder / "disks.toml"
    if content is not None:
        path.write_bytes(content)
    assert main(["serve", "--config", str(path)]) == ExitCode.FAILED
    assert capsys.readouterr() == ("", f"nbdjobs: '{path}' {sentence}\n")


@pytest.mark.parametrize(
    "words",
    [("--tcp", "1"), ("--qmp", "q"), ("--name", "n"), ("--read-only",), ("--max-connections", "1")],
)
def test_what_the_file_says_is_not_said_again(
    folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    path = write(folder, SOUND)
    assert main(["serve", "--config", str(path), *words]) == ExitCode.USAGE
    assert f"{words[0]} was given beside --config" in capsys.readouterr().err


def test_a_file_and_images_exclude_each_other(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "a.img", "--config", "b.toml"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_images_can_be_checked_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(folder / "disk.img"), "--check"]) == ExitCode.DONE
    out, _ = capsys.readouterr()
    assert out == "the command line is right: 1 node, 2 exports, 1 monitor\n"
    assert main(["serve", str(folder / "none.img"), "--check"]) == ExitCode.FAILED


def test_the_log_is_as_the_file_says_but_for_what_options_say(folder: Path) -> None:
    path = write(folder, SOUND + '[log]\nformat = "json"\nlevel = "error"\n')
    words = [sys.executable, "-m", "nbdjobs", "serve", "--config", str(path), "--log-level", "info"]
    with subprocess.Popen(words, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        record = json.loads(process.stderr.readline())
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=PATIENCE_S)
    assert (record["export"], record["node"], record["qmp"]) == (
        "disk",
        "disk",
        str(folder / "qmp.sock"),
    )


def test_sockets_are_called_after_the_file_where_it_does_not_place_them(folder: Path) -> None:
    path = write(folder, "")
    with running("--config", path) as server:
        places = Path(os.environ["XDG_RUNTIME_DIR"]) / "nbdjobs"
        assert server.lines[0] == f"QMP socket: {places / 'disks.qmp.sock'}"
        server.end(signal.SIGTERM)


@pytest.mark.interop
def test_the_example_of_the_manual_works(folder: Path) -> None:
    (folder / "root.img").write_bytes(os.urandom(2 * MIB))
    (folder / "data.img").write_bytes(bytes(MIB))
    path = write(folder, example())
    with running("--config", path) as server:
        uris = server.uris
        assert [run("nbdinfo", "--size", uri) for uri in uris] == [f"{2 * MIB}\n", f"{MIB}\n"]
        assert "is_read_only: true" in run("nbdinfo", uris[1])
        run("qemu-io", "-f", "raw", "-c", "write -P 7 0 64k", uris[0])
        assert (folder / "root.img").read_bytes()[: 64 << 10] == b"\7" * (64 << 10)
        with QmpClient.connect(folder / "qmp.sock") as monitor:
            limits = {"path": "/objects/slow", "property": "limits"}
            assert monitor.execute("qom-get", limits)["bps-total"] == 50 * MIB
        server.end(signal.SIGTERM)
    assert not (folder / "nbd.sock").exists()

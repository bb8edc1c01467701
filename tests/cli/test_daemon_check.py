# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs daemon --check`: what it says is what the daemon would say, and it does nothing."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from nbdjobs.cli.daemon import daemon_main
from nbdjobs.cli.daemon_options import parse_command_line, without_check
from tests.interop.tools import require, run, run_for_result

MIB = 1 << 20

FILE = "driver=file,node-name=f,filename={disk}"
UNIX = "addr.type=unix,addr.path={folder}/nbd.sock"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(MIB))
    return path


def words(disk: Path, text: str) -> list[str]:
    """A command line in which `{disk}` and `{folder}` stand for paths."""
    return text.format(disk=disk, folder=disk.parent).split()


def errors(disk: Path, text: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """What is wrong with a command line; nothing in the folder may change."""
    before = {path: path.stat().st_mtime_ns for path in disk.parent.iterdir()}
    code = daemon_main(["--check", *words(disk, text)])
    assert {path: path.stat().st_mtime_ns for path in disk.parent.iterdir()} == before
    output = capsys.readouterr()
    found = output.err.removeprefix("nbdjobs: ").removesuffix("\n").split("\nnbdjobs: ")
    found = [error for error in found if error]
    assert code == (1 if found else 0)
    assert bool(output.out) == (not found)
    return found


def test_a_right_command_line_is_counted(disk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (
        f"--check --blockdev {FILE} --blockdev raw,node-name=d,file=f --nbd-server {UNIX}"
        " --export nbd,id=e,node-name=d,writable=on --object secret,id=s,data=x"
        " --chardev socket,id=q,path={folder}/q,server=on --monitor q --pidfile {folder}/pid"
    )
    assert daemon_main(words(disk, text)) == 0
    assert capsys.readouterr() == (
        "the command line is right: 2 nodes, 1 export, 1 monitor\n",
        "",
    )
    assert list(disk.parent.iterdir()) == [disk]


WRONG = [
    "--bogus",
    "stray",
    "--blockdev",
    "--blockdev driver=file,node-name=f",
    "--blockdev driver=file,node-name=f,filename={folder}/missing",
    "--blockdev driver=file,node-name=f,filename={folder}",
    "--blockdev driver=host_device,node-name=f,filename={disk}",
    "--blockdev driver=bogus,node-name=f",
    "--blockdev driver=file,filename={disk}",
    "--blockdev driver=file,node-name=1,filename={disk}",
    f"--blockdev {FILE},aio=native",
    f"--blockdev {FILE},detect-zeroes=unmap",
    f"--blockdev {FILE} --blockdev {FILE}",
    f"--blockdev {FILE} --blockdev raw,node-name=d,file=f,offset=2M",
    "--blockdev raw,node-name=d,file=x",
    "--blockdev raw,node-name=d,file.driver=file,file.filename={folder}/missing",
    f"--blockdev {FILE} --export nbd,id=e,node-name=f",
    f"--nbd-server {UNIX} --export nbd,id=e,node-name=f",
    f"--nbd-server {UNIX} --nbd-server {UNIX}",
    f"--blockdev {FILE},read-only=on --nbd-server {UNIX} --export nbd,id=e,node-name=f,writable=on",
    f"--blockdev {FILE} --nbd-server {UNIX} --export nbd,id=1,node-name=f",
    f"--blockdev {FILE} --nbd-server {UNIX} --export nbd,id=e,node-name=f"
    " --export nbd,id=e,node-name=f,name=other",
    f"--blockdev {FILE} --nbd-server {UNIX} --export nbd,id=a,node-name=f"
    " --export nbd,id=b,node-name=f",
    "--nbd-server addr.type=unix,addr.path={folder}/missing/nbd.sock",
    "--nbd-server addr.type=inet,addr.host=127.0.0.1,addr.port={port}",
    "--chardev socket,id=q,path={folder}/q,server=on,wait=off --monitor x",
    "--chardev socket,id=q,path={folder}/missing/q,server=on,wait=off --monitor q",
    "--chardev socket,id=q,path={folder}/q --monitor q",
    "--nbd-server addr.type=unix,addr.path={folder}/" + 120 * "x",
    "--chardev socket,id=q,path={folder}/" + 120 * "x" + ",server=on,wait=off --monitor q",
    "--object secret,id=s",
    "--object secret,id=s,data=a --object secret,id=s,data=b",
    "--pidfile {folder}/missing/pid",
]


OUR_WRONG = [
    "--object throttle-group,id=t --blockdev throttle,node-name=d,throttle-group=x,file.driver="
    "null-co",
    "--nbd-server addr.type=fd,addr.str=999",
    "--nbd-server addr.type=fd,addr.str=x",
    "--chardev socket,id=q,server=on",
    "--chardev socket,id=q,path={disk},server=on,wait=off --monitor q",
    "--nbd-server addr.type=unix,addr.path={disk}",
]
"""What qemu-storage-daemon 7.2 does not refuse, or not at once: it even removes the file in a
socket's place."""


@pytest.mark.parametrize("text", [*WRONG, *OUR_WRONG])
def test_it_says_what_the_daemon_says(
    text: str, disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        text = text.replace("{port}", str(taken.getsockname()[1]))
        found = errors(disk, text, capsys)
        assert daemon_main(words(disk, text)) == 1
    said = capsys.readouterr().err.removeprefix("nbdjobs: ").removesuffix("\n")
    assert found == [said]


@pytest.mark.interop
@pytest.mark.parametrize("text", [line for line in WRONG if "--pidfile" not in line])
def test_what_is_wrong_here_is_wrong_for_the_real_program(text: str, disk: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        text = text.replace("{port}", str(taken.getsockname()[1]))
        program = require("qemu-storage-daemon")
        assert run_for_result(program, *words(disk, text)).returncode != 0


def test_all_independent_errors_are_told_at_once(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (
        "--bogus --blockdev driver=file,node-name=a,filename=/missing"
        " --blockdev raw,node-name=b,file=a"
        f" --blockdev {FILE}"
        " --nbd-server addr.type=unix,addr.path=/missing/sock"
        " --export nbd,id=e1,node-name=b --export nbd,id=1,node-name=f"
        " --chardev socket,id=q,path=/missing/q,server=on,wait=off --monitor q"
        " --monitor other --pidfile /missing/pid"
    )
    assert [line.rpartition(": ")[0] for line in errors(disk, text, capsys)] == [
        "",
        "--blockdev driver=file,node-name=a,filename=/missing: Could not open '/missing'",
        "--nbd-server addr.type=unix,addr.path=/missing/sock: Failed to bind socket to"
        " /missing/sock",
        "--export nbd,id=1,node-name=f",
        "--chardev socket,id=q,path=/missing/q,server=on,wait=off: Failed to bind socket to"
        " /missing/q",
        "--monitor other",
        "cannot create PID file: Could not create '/missing/pid'",
    ]


def test_an_option_without_its_value_leaves_those_before_it(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"--blockdev {FILE} -x stray --blockdev raw,node-name=d,file=f --blockdev"
    assert errors(disk, text, capsys) == [
        "invalid option -- 'x'",
        "stray: Unexpected argument",
        "option '--blockdev' requires an argument",
    ]


def test_without_its_server_exports_are_not_complained_about_again(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = f"--blockdev {FILE} --nbd-server addr.type=bogus --export nbd,id=e,node-name=f"
    [line] = errors(disk, text, capsys)
    assert line.startswith("--nbd-server")


def test_a_file_is_not_opened_for_writing(
    disk: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.chmod(0o400)
    monkeypatch.setattr("os.access", lambda path, mode: False)
    [line] = errors(disk, f"--blockdev {FILE}", capsys)
    assert line.endswith("Permission denied")
    assert errors(disk, f"--blockdev {FILE},read-only=on", capsys) == []
    assert errors(disk, f"--blockdev {FILE},auto-read-only=on", capsys) == []
    inline = "--blockdev raw,node-name=d,read-only=on,file.driver=file,file.filename={disk}"
    assert errors(disk, inline, capsys) == []


@pytest.mark.parametrize(
    ("arguments", "rest"),
    [
        (["--check"], []),
        (["--pidfile", "p", "--check"], ["--pidfile", "p"]),
        (["--pidfile", "--check"], None),
        (["--pidfile=p", "--check", "-V"], ["--pidfile=p", "-V"]),
        (["--ch", "x"], None),
        ([], None),
    ],
)
def test_check_is_found_among_the_options(arguments: list[str], rest: list[str] | None) -> None:
    assert without_check(arguments) == rest


def test_abbreviations_stay_what_they_were() -> None:
    [step] = parse_command_line(["--c", "socket,id=q"]).steps
    assert step.option == "chardev"


QCOW2 = (
    "--blockdev driver=qcow2,node-name=q,file.driver=file,file.filename={folder}/top.qcow2"
    " --nbd-server " + UNIX + " --export nbd,id=e,node-name=q,writable=on"
)


@pytest.mark.interop
def test_images_are_read_with_all_below_them_and_never_written(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = disk.parent
    run("qemu-img", "create", "-f", "qcow2", folder / "below.qcow2", "1M")
    below = ("-b", "below.qcow2", "-F", "qcow2")
    lazy = ("-o", "lazy_refcounts=on")
    run("qemu-img", "create", "-f", "qcow2", *lazy, *below, folder / "top.qcow2")
    # An image that counts references later is repaired when it is opened after a crash.
    run_for_result("qemu-io", "-c", "write 0 64k", "-c", "abort", folder / "top.qcow2")
    content = (folder / "top.qcow2").read_bytes()
    assert content[72:80] == b"\0\0\0\0\0\0\0\1", "its references are not counted"
    assert errors(disk, QCOW2, capsys) == []
    assert (folder / "top.qcow2").read_bytes() == content
    (folder / "below.qcow2").unlink()
    [error] = errors(disk, QCOW2, capsys)
    assert "below.qcow2" in error


def test_what_is_no_image_of_its_format_is_found(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (disk.parent / "top.qcow2").write_bytes(bytes(MIB))
    [error] = errors(disk, QCOW2, capsys)
    assert error.endswith("Image is not in qcow2 format")

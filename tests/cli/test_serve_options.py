# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs serve` in qemu-storage-daemon's options, and what it tells the user."""

from __future__ import annotations

import shlex
import socket
from itertools import pairwise
from pathlib import Path

import pytest

from nbdjobs.cli.images import Format, Image, node_name
from nbdjobs.cli.serve_options import (
    Served,
    Serving,
    TcpListen,
    UnixListen,
    banner,
    daemon_options,
    parse_tcp,
)
from tests.interop.daemon import Daemon
from tests.interop.tools import require, run

MIB = 1 << 20


def image(path: str = "/images/disk.img", *, is_device: bool = False) -> Image:
    return Image(path=Path(path), size=MIB, is_device=is_device)


def serving(*disks: Served, **options: object) -> Serving:
    fields: dict[str, object] = {
        "disks": disks or (Served(image(), "disk"),),
        "listen": UnixListen(Path("/run/nbd.sock")),
        "qmp": Path("/run/qmp.sock"),
        **options,
    }
    return Serving(**fields)  # type: ignore[arg-type]  # tests vary single fields


def values(options: list[str], name: str) -> list[str]:
    """The values of an option that may be repeated."""
    return [value for word, value in pairwise(options) if word == name]


def test_one_disk_is_reached_by_its_name_and_without_one() -> None:
    options = daemon_options(serving())
    assert values(options, "--blockdev") == [
        "driver=file,node-name=disk,filename=/images/disk.img,discard=unmap"
    ]
    assert values(options, "--nbd-server") == ["addr.type=unix,addr.path=/run/nbd.sock"]
    assert values(options, "--export") == [
        "type=nbd,id=disk,node-name=disk,name=disk,writable=on",
        "type=nbd,id=disk.default,node-name=disk,name=,writable=on",
    ]


def test_several_disks_are_reached_by_their_names_only() -> None:
    options = daemon_options(serving(Served(image(), "root"), Served(image("/b.img"), "data")))
    exports = values(options, "--export")
    assert [export.split(",")[3] for export in exports] == ["name=root", "name=data"]


def test_an_empty_name_is_exported_once() -> None:
    assert len(values(daemon_options(serving(Served(image(), ""))), "--export")) == 1


def test_read_only_holds_for_node_and_exports() -> None:
    options = daemon_options(serving(read_only=True))
    assert "read-only=on" in values(options, "--blockdev")[0]
    assert "discard" not in values(options, "--blockdev")[0]
    assert all("writable=off" in export for export in values(options, "--export"))


def test_the_other_switches_are_translated() -> None:
    options = daemon_options(serving(is_direct=True, max_connections=7))
    assert "cache.direct=on" in values(options, "--blockdev")[0]
    assert values(options, "--nbd-server")[0].endswith(",max-connections=7")


def test_a_block_device_has_its_own_driver() -> None:
    options = daemon_options(serving(Served(image("/dev/sdb", is_device=True), "sdb")))
    assert values(options, "--blockdev")[0].startswith("driver=host_device,")


def test_an_image_in_a_format_has_its_file_below_it() -> None:
    disk = Served(Image(Path("/a,b.qcow2"), MIB, False, Format.QCOW2), "disk")
    assert values(daemon_options(serving(disk)), "--blockdev") == [
        "driver=qcow2,node-name=disk,file.driver=file,file.filename=/a,,b.qcow2,discard=unmap"
    ]


def test_commas_in_paths_and_names_are_doubled() -> None:
    disk = Served(image("/a,b.img"), "c,d")
    options = daemon_options(serving(disk, listen=UnixListen(Path("/e,f")), qmp=Path("/g,h")))
    assert "filename=/a,,b.img," in values(options, "--blockdev")[0]
    assert "name=c,,d," in values(options, "--export")[0]
    assert "addr.path=/e,,f" in values(options, "--nbd-server")[0]
    assert "path=/g,,h," in values(options, "--chardev")[0]


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("10809", "localhost", 10809),
        ("example.org:1", "example.org", 1),
        ("0.0.0.0:65535", "0.0.0.0", 65535),
        ("[::1]:10809", "::1", 10809),
        ("[::]:10809", "::", 10809),
        (":10809", "0.0.0.0", 10809),
    ],
)
def test_tcp_addresses(text: str, host: str, port: int) -> None:
    assert parse_tcp(text) == TcpListen(host, port)


@pytest.mark.parametrize(
    "text", ["", "host", "host:", "0", "65536", "-1", "::1:10809", "[::1]", "a:b:1", "1.5", "²"]
)
def test_what_is_no_tcp_address_is_named(text: str) -> None:
    with pytest.raises(ValueError, match="expected PORT, HOST:PORT or") as refused:
        parse_tcp(text)
    assert f"'{text}'" in str(refused.value)


@pytest.mark.parametrize(
    ("listen", "name", "uri"),
    [
        (UnixListen(Path("/run/a.sock")), "disk", "nbd+unix:///disk?socket=/run/a.sock"),
        (UnixListen(Path("/a b&c")), "", "nbd+unix:///?socket=/a%20b%26c"),
        (UnixListen(Path("/s")), "a/b?c", "nbd+unix:///a%2Fb%3Fc?socket=/s"),
        (TcpListen("::1", 10809), "disk", "nbd://[::1]:10809/disk"),
        (TcpListen("localhost", 1), "dísk", "nbd://localhost:1/d%C3%ADsk"),
        (TcpListen("0.0.0.0", 5), "d", f"nbd://{socket.gethostname()}:5/d"),
    ],
)
def test_uris_are_ready_to_paste(listen: UnixListen | TcpListen, name: str, uri: str) -> None:
    assert listen.uri(name) == uri


def test_the_banner_says_what_where_and_what_next() -> None:
    assert banner(serving()) == [
        "serving /images/disk.img (1.0 MiB, read-write)",
        "  nbd+unix:///disk?socket=/run/nbd.sock",
        "QMP socket: /run/qmp.sock",
        "backup:     nbdjobs backup disk disk-backup.img",
    ]


def test_the_backup_line_names_the_socket_when_it_would_not_be_found() -> None:
    line = banner(serving(is_found=False))[-1]
    assert line.endswith("nbdjobs backup disk disk-backup.img --qmp /run/qmp.sock")


@pytest.mark.parametrize("name", ["my disk", "", "a'b", "1"])
def test_the_backup_line_works_for_any_name(name: str) -> None:
    words = shlex.split(banner(serving(Served(image(), name)))[-1].removeprefix("backup:"))
    assert words[:2] == ["nbdjobs", "backup"]
    assert node_name(words[2]) == node_name(name)


@pytest.mark.interop
@pytest.mark.parametrize("program", ["nbdjobs", "qemu-storage-daemon"])
def test_daemons_take_the_options(
    program: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if program != "nbdjobs":
        monkeypatch.setenv("NBDJOBS_PROGRAM", require(program))
    sockets = tmp_path / "sockets"
    sockets.mkdir()
    disks = []
    for file, name in (("a,b.img", "my disk"), ("c d.img", "data")):
        path = tmp_path / file
        path.write_bytes(bytes(MIB))
        disks.append(Served(image(str(path)), name))
    qcow2 = tmp_path / "e.qcow2"
    run("qemu-img", "create", "-f", "qcow2", qcow2, str(MIB))
    disks.append(Served(Image(qcow2, MIB, False, Format.QCOW2), "e"))
    listen = UnixListen(sockets / "nbd.sock")
    options = daemon_options(
        serving(*disks, listen=listen, qmp=sockets / "control.sock", max_connections=10)
    )
    with Daemon(sockets, *options):
        for disk in disks:
            assert run("nbdinfo", "--size", listen.uri(disk.name)) == f"{MIB}\n"

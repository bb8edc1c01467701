# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Command lines that people use with qemu-storage-daemon do the same with nbdjobs.

Good ones are compared by what NBD clients and monitors see, wrong ones by exit code and message.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import stat
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from tests.interop.daemon import program
from tests.interop.oracle import PATIENCE_S, PROGRAM, ROOT, Oracle
from tests.interop.qmp_client import QmpClient
from tests.interop.side_by_side import MadeUpNames, prepare
from tests.interop.test_transports import free_port
from tests.interop.tools import require, run

QUERIES: Final = (
    "query-block",
    "query-block-exports",
    "query-jobs",
    "query-named-block-nodes",
)

#: What exports say of themselves that QEMU 7.2 does not know of.
ONLY_OURS: Final = frozenset({"is_rotational"})

UNIX: Final = "nbd+unix:///?socket={directory}/nbd.sock"
TCP: Final = "nbd://127.0.0.1:{port}"


@dataclass(frozen=True)
class Line:
    """A command line with its whereabouts: `{port}` is a free one.

    Attributes:
        options: As one types them in a shell.
        uri: Where the NBD server is; None if there is none.
        monitor: Unix socket of a monitor to ask, beside the one that the test adds.
        pidfile: Has to hold the process id.
    """

    options: str
    uri: str | None = UNIX
    monitor: str | None = None
    pidfile: str | None = None


SERVED: Final = """
    --blockdev driver=file,node-name=disk,filename=disk.img
    --nbd-server addr.type=unix,addr.path=nbd.sock"""

GOOD: Final[Mapping[str, Line]] = {
    "nothing": Line("", uri=None),
    "the manual's first": Line(f"{SERVED} --export type=nbd,id=export,node-name=disk,writable=on"),
    "the manual's monitor": Line(
        """
        --blockdev driver=file,node-name=disk,filename=disk.img
        --chardev socket,path=qmp.sock,server=on,wait=off,id=char1
        --monitor chardev=char1""",
        uri=None,
        monitor="qmp.sock",
    ),
    "JSON": Line(
        """
        --blockdev '{"driver": "file", "node-name": "disk", "filename": "disk.img"}'
        --nbd-server '{"addr": {"type": "unix", "path": "nbd.sock"}}'
        --export '{"type": "nbd", "id": "e", "node-name": "disk", "name": "disk0"}'"""
    ),
    "as libvirt writes block devices": Line(
        """
        --chardev socket,id=monitor,path=qmp.sock,server=on,wait=off
        --monitor chardev=monitor,mode=control
        --blockdev '{"driver":"file","filename":"disk.img","node-name":"libvirt-1-storage",
            "auto-read-only":true,"discard":"unmap","cache":{"direct":false,"no-flush":false}}'
        --blockdev '{"node-name":"libvirt-1-format","read-only":false,"discard":"unmap",
            "cache":{"direct":false,"no-flush":false},"driver":"raw","file":"libvirt-1-storage"}'
        --nbd-server addr.type=unix,addr.path=nbd.sock
        --export type=nbd,id=libvirt-nbd,node-name=libvirt-1-format,name=vda,writable=on""",
        monitor="qmp.sock",
    ),
    "a disk that others may write": Line(
        """
        --blockdev driver=file,node-name=disk,filename=disk.img,read-only=on,force-share=on
        --nbd-server addr.type=unix,addr.path=nbd.sock,max-connections=4
        --export type=nbd,id=export,node-name=disk,name=backup,description="last night's" """
    ),
    "in the background as Proxmox does": Line(
        f"""
        --daemonize --pidfile daemon.pid
        --chardev socket,id=qmp,path=qmp.sock,server=on,wait=off
        --monitor chardev=qmp,mode=control
        {SERVED} --export type=nbd,id=export,node-name=disk,writable=on""",
        monitor="qmp.sock",
        pidfile="daemon.pid",
    ),
    "the older way to say server and nowait": Line(
        """
        --chardev socket,id=qmp,path=qmp.sock,server,nowait
        --monitor qmp""",
        uri=None,
        monitor="qmp.sock",
    ),
    "TCP": Line(
        """
        --blockdev driver=file,node-name=disk,filename=disk.img
        --nbd-server addr.type=inet,addr.host=127.0.0.1,addr.port={port}
        --export type=nbd,id=export,node-name=disk,name=disk""",
        uri=TCP,
    ),
    "TCP by JSON": Line(
        """
        --blockdev file,node-name=disk,filename=disk.img,read-only=on
        --nbd-server '{"addr": {"type": "inet", "host": "127.0.0.1", "port": "{port}",
            "ipv4": true, "numeric": true}, "max-connections": 0}'
        --export nbd,id=export,node-name=disk""",
        uri=TCP,
    ),
    "several disks and exports": Line(
        f"""
        {SERVED}
        --blockdev file,node-name=second,filename=target.img,read-only=on
        --blockdev null-co,node-name=third,size=1048576,read-zeroes=on
        --export nbd,id=a,node-name=disk,name=first,writable=on
        --export nbd,id=b,node-name=second,writethrough=on
        --export nbd,id=c,node-name=third,name=,allocation-depth=on
        --export nbd,id=d,node-name=disk,name=again,writable=off"""
    ),
    "a format over a file in one option": Line(
        """
        --blockdev raw,node-name=disk,file.driver=file,file.filename=disk.img,offset=4096,size=8192
        --nbd-server addr.type=unix,addr.path=nbd.sock
        --export nbd,id=e,node-name=disk,writable=on"""
    ),
    "objects": Line(
        f"""
        --object iothread,id=iothread0
        --object secret,id=sec0,data=letmein
        --object secret,id=sec1,file=password
        --object '{{"qom-type": "secret", "id": "sec2", "data": "bGV0bWVpbg==",
            "format": "base64"}}'
        {SERVED} --export nbd,id=e,node-name=disk,iothread=iothread0,writable=on"""
    ),
    "options with equals signs and shortened": Line(
        """
        --blockdev=driver=file,node-name=disk,filename=disk.img
        --nbd=addr.type=unix,addr.path=nbd.sock
        --exp=type=nbd,id=export,node-name=disk"""
    ),
    "a comma in a name": Line(
        """
        --blockdev driver=file,node-name=disk,filename=folder/../disk.img,cache.direct=off
        --nbd-server addr.type=unix,addr.path=nbd.sock
        --export type=nbd,id=export,node-name=disk,name=a,,b"""
    ),
    "a file of a size that is no multiple of a sector": Line(
        """
        --blockdev driver=file,node-name=disk,filename=odd.img,locking=off,aio=threads
        --nbd-server addr.type=unix,addr.path=nbd.sock
        --export type=nbd,id=export,node-name=disk"""
    ),
    "drivers of tests": Line(
        """
        --blockdev driver=null-aio,node-name=n,size=4096,latency-ns=0
        --blockdev driver=blkdebug,node-name=b,image=n,inject-error.0.event=l2_load
        --nbd-server addr.type=unix,addr.path=nbd.sock
        --export type=nbd,id=export,node-name=b,writable=on"""
    ),
    "a monitor on TCP": Line(
        f"""
        --chardev socket,id=tcp,host=127.0.0.1,port={{port}},server=on,wait=off
        --monitor tcp
        {SERVED} --export nbd,id=e,node-name=disk"""
    ),
}

NODE: Final = "--blockdev null-co,node-name=n"
SERVER: Final = "--nbd-server addr.type=unix,addr.path=nbd.sock"
SOCKET: Final = "--chardev socket,id=c,path=qmp.sock,server=on,wait=off"

WRONG: Final = [
    "--nonsense",
    "-x",
    "--blockdev",
    "--daemonize=yes",
    "--object= --nonsense",
    "word",
    "--daemonize word",
    "--blockdev=",
    "--blockdev nonsense",
    "--blockdev null-co",
    "--blockdev file,node-name=f,filename=missing.img",
    "--blockdev file,node-name=f,filename=folder",
    "--blockdev file,node-name=f",
    "--blockdev raw,node-name=r,file=missing",
    "--blockdev raw,node-name=r,file.driver=file,file.filename=missing.img",
    "--blockdev null-co,node-name=n,read-only=maybe",
    "--blockdev null-co,node-name=n,size=1k",
    "--blockdev null-co,node-name=n,nonsense=1",
    '--blockdev \'{"driver": "null-co"\'',
    '--blockdev \'{"driver": "null-co", "node-name": "n", "size": "1"}\'',
    f"{NODE} {NODE}",
    "--chardev socket",
    "--chardev id=c",
    "--chardev nonsense,id=c",
    "--chardev socket,id=1,path=x",
    "--chardev socket,id=c,host=127.0.0.1",
    "--chardev socket,id=c,path=x,server=perhaps",
    "--chardev socket,id=c,path=x,nonsense=1",
    "--chardev socket,id=c,path=missing.sock,wait=off",
    "--monitor",
    "--monitor missing",
    "--monitor mode=control",
    f"{SOCKET} --monitor c,mode=readline",
    f"{SOCKET} --monitor c,mode=nonsense",
    f"{SOCKET} --monitor c,nonsense=on",
    f"{SOCKET} --monitor c --monitor c",
    "--nbd-server addr.type=unix",
    "--nbd-server addr.path=nbd.sock",
    "--nbd-server addr=nbd.sock",
    "--nbd-server nbd.sock",
    "--nbd-server addr.type=nonsense,addr.path=x",
    "--nbd-server addr.type=unix,addr.path=missing/nbd.sock",
    "--nbd-server addr.type=inet,addr.host=127.0.0.1",
    "--nbd-server addr.type=inet,addr.host=127.0.0.1,addr.port=nonsense",
    "--nbd-server addr.type=inet,addr.host=192.0.2.1,addr.port=10809",
    f"{SERVER},max-connections=many",
    f"{SERVER},tls-creds=tls0",
    f"{SERVER} {SERVER}",
    f"{NODE} --export nbd,id=e,node-name=n",
    f"{SERVER} --export nbd,id=e,node-name=n",
    f"{SERVER} {NODE} --export nbd,node-name=n",
    f"{SERVER} {NODE} --export id=e,node-name=n",
    f"{SERVER} {NODE} --export nonsense,id=e,node-name=n",
    f"{SERVER} {NODE} --export nbd,id=e,node-name=n,nonsense=on",
    f"{SERVER} {NODE} --export nbd,id=e,node-name=n,iothread=missing",
    f"{SERVER} {NODE} --export nbd,id=e,node-name=n,bitmaps.0=b",
    f"{SERVER} {NODE},read-only=on --export nbd,id=e,node-name=n,writable=on",
    f"{SERVER} {NODE} --export nbd,id=e,node-name=n --export nbd,id=e,node-name=n,name=x",
    f"{SERVER} {NODE} --export nbd,id=e,node-name=n --export nbd,id=f,node-name=n",
    "--object nonsense,id=o",
    "--object iothread",
    "--object iothread,id=1",
    "--object iothread,id=o,poll-max-ns=x",
    "--object iothread,id=o,nonsense=1",
    "--object iothread,id=o --object iothread,id=o",
    "--object secret,id=o",
    "--object secret,id=o,file=missing",
    "--object secret,id=o,file=password,data=x",
    "--object secret,id=o,data=%%%,format=base64",
    "--object secret,id=o,data=x,format=nonsense",
    "--pidfile",
    "--pidfile missing/daemon.pid",
    "--pidfile folder",
    "--daemonize --pidfile missing/daemon.pid",
    "--daemonize --blockdev nonsense",
]


#: Where the real program's words help nobody, nbdjobs has others.
CLEARER: Final[Mapping[str, str]] = {
    "--chardev socket,id=c": "chardev: socket: neither path nor host given",
    f"{SOCKET} {SOCKET}": "Chardev with id 'c' already exists",
}


@pytest.mark.parametrize("name", GOOD)
def test_clients_and_monitors_see_the_same(tmp_path: Path, name: str) -> None:
    line = GOOD[name]
    theirs = seen(line, tmp_path / "theirs", [PROGRAM])
    ours = seen(line, tmp_path / "ours", program())
    assert ours == theirs


@pytest.mark.parametrize("options", WRONG)
def test_wrong_ones_end_with_the_same_words(tmp_path: Path, options: str) -> None:
    with (
        started(tmp_path / "theirs", [PROGRAM], options) as theirs,
        started(tmp_path / "ours", program(), options) as ours,
    ):
        assert complaint(ours) == complaint(theirs)
    assert ours.returncode != 0


@pytest.mark.parametrize("options", CLEARER)
def test_some_wrong_ones_end_with_clearer_words(tmp_path: Path, options: str) -> None:
    with (
        started(tmp_path / "theirs", [PROGRAM], options) as theirs,
        started(tmp_path / "ours", program(), options) as ours,
    ):
        code, printed, said = complaint(ours)
        assert complaint(theirs) not in ((code, printed, said), (0, "", ""))
    assert (code, printed) == (1, "")
    assert said.endswith(f": {CLEARER[options]}\n")


def seen(line: Line, directory: Path, command: Sequence[str]) -> dict[str, Any]:
    """Start a daemon with the line and look at it from everywhere; end it with `quit`."""
    prepare(directory)
    port = str(free_port("127.0.0.1"))
    options = [option.replace("{port}", port) for option in shlex.split(line.options)]
    found: dict[str, Any] = {}
    with Oracle(directory, *options, capabilities=[], program=command) as daemon:
        names = MadeUpNames()
        for query in QUERIES:
            found[query] = names.comparable(daemon.execute(query))
        if line.monitor is not None:
            found["monitor"] = asked(directory / line.monitor)
        if line.uri is not None:
            found["exports"] = exports(line.uri.format(directory=directory, port=port))
        if line.pidfile is not None:
            found["pidfile"] = described(directory / line.pidfile)
        daemon.quit()
    # The real program forgets the NBD server's socket.
    (directory / "nbd.sock").unlink(missing_ok=True)
    found["left behind"] = sorted(path.name for path in directory.iterdir())
    return found


def asked(path: Path) -> Any:
    """What the monitor at a unix socket answers."""
    with QmpClient.connect(path) as monitor:
        greeting = monitor.greeting["QMP"]["capabilities"]
        return greeting, MadeUpNames().comparable(monitor.execute("query-block-exports"))


def exports(uri: str) -> Any:
    """What nbdinfo finds, without where it was found."""
    report = json.loads(run("nbdinfo", "--json", "--list", uri))
    for each in report["exports"]:
        for name in ("uri", *ONLY_OURS):
            each.pop(name, None)
    return report


def described(pidfile: Path) -> tuple[bool, str]:
    """Whether it names a living process; its mode."""
    pid = int(pidfile.read_text())
    return Path(f"/proc/{pid}").exists(), stat.filemode(pidfile.stat().st_mode)


@contextlib.contextmanager
def started(
    directory: Path, command: Sequence[str], options: str
) -> Iterator[subprocess.Popen[str]]:
    """A daemon that will end by itself; it is ended if it does not."""
    prepare(directory)
    process = subprocess.Popen(
        [require(command[0]), *command[1:], *shlex.split(options)],
        cwd=directory,
        env={**os.environ, "PYTHONPATH": str(ROOT), "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


def complaint(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Exit code and output, the program's name taken away."""
    printed, said = process.communicate(timeout=PATIENCE_S)
    said = re.sub(rf"^\S*({PROGRAM}|nbdjobs): ", "", said, flags=re.MULTILINE)
    return process.returncode, printed, said

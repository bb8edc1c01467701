# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The same qemu-io commands print the same and do the same, here and in the real program.

Each has an image of its own with the same content. What depends on the clock is taken away.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.nodes.blkdebug import BlkdebugOptions
from nbdjobs.nodes.file import FileOptions
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import Discard
from nbdjobs.nodes.raw import RawOptions
from nbdjobs.qmp.qemu_io.shell import run_line
from tests.interop.tools import run_for_result

KIB: Final = 1024
CONTENT: Final = b"\x11" * 64 * KIB + b"qemu-io, Zeile 2\n\x7f\x80\xff" + bytes(960 * KIB - 20)

CASES: Final[dict[str, Sequence[str]]] = {
    "reads": (
        "read 0 512",
        "r 0 512",
        "read 1 3",
        "read 0 0",
        "read 1M 1",
        "read 1M 0",
        "read 1023k 1025",
        "read -q 0 512",
        "read -C 0 512",
        "read -p 0 512",
        "read -v 65530 40",
        "read -vC 64k 16",
        "read 0 1.5k",
        "read 0 0x200",
        "read 0 1B",
        "read 0 1 -q",
        "read -- 0 512",
        " read  0   512 ",
    ),
    "reads with a pattern": (
        "read -P 0x11 0 64k",
        "read -P 17 0 64k",
        "read -P021 0 64k",
        "read -P 0x11 1k 64k",
        "read -qP 1 0 1",
        "read -P 0x11 -s 512 0 64k",
        "read -P 0x11 -l 64k 0 65k",
        "read -P 0x11 -s 63k -l 2k 0 66k",
        "read -P 0x11 -s 1k 0 66k",
        "readv -P 0x11 0 512 1k 1",
        "readv -P 0x11 -q 63k 512 1k 1",
        "readv -v 0 16 16",
        "readv -C 0 0",
        "readv 2M 512",
        "aio_read -P 0x11 0 512",
        "aio_read -P 1 0 512 512",
        "aio_read -v 64k 20",
        "aio_read -C 0 512",
        "aio_read -q 0 512",
        "aio_read 2M 512",
        "aio_read -i 0 512",
        "aio_flush",
    ),
    "writes": (
        "write 0 512",
        "w -P 1 512 512",
        "write -P 255 3 5",
        "write -f -P 2 1k 1k",
        "write -q -P 3 2k 1k",
        "write -C 3k 1k",
        "write -p 4k 1k",
        "write 1023k 2k",
        "write 2M 0",
        "write 0 0",
        "write -z 8k 8k",
        "write -z -u 64k 64k",
        "write -zuf 128k 64k",
        "write -z -f 100 200",
        "write -z 2M 1",
        "write -z -n 256k 64k",
        "write -s pattern 20k 100",
        "write -s empty 20k 100",
        "write -s missing 20k 100",
        "writev -P 5 32k 512 1k",
        "writev -f 40k 512",
        "writev -q 41k 512",
        "writev 2M 512",
        "aio_write -P 6 48k 512 512",
        "aio_write -z 50k 1k",
        "aio_write -z -u 52k 4k",
        "aio_write -f 57k 512",
        "aio_write -C 58k 512",
        "aio_write -q 59k 512",
        "aio_write -z -P 1 60k 1",
        "aio_write 2M 512",
        "aio_write -i 0 512",
        "discard 0 64k",
        "d -C 64k 64k",
        "discard -q 128k 64k",
        "discard 1 1",
        "discard 2M 512",
    ),
    "the image": (
        "length",
        "l",
        "map",
        "alloc 0",
        "alloc 1",
        "a 0 64k",
        "alloc 0 2M",
        "alloc 2M",
        "flush",
        "f",
        "truncate 1.5M",
        "length",
        "t 512k",
        "length",
        "map",
        "truncate -m off 1M",
        "length",
    ),
    "sizes that are none": (
        "read 0 abc",
        "read x 512",
        "read 0 1x",
        "read 0 1kb",
        "read 0 1KiB",
        "read 0 1e3",
        "read 0 1.1",
        "read 0 .5k",
        "read 0 9E",
        "read 0 8E",
        "read 9E 1",
        "read 0 99999999999999999999",
        "read -s x -P 0 0 1",
        "read -l -1 -P 0 0 1",
        "write 0 x",
        "readv 0 512 x",
        "readv x 512",
        "writev 0 x",
        "writev x 1",
        "aio_read 0 x",
        "aio_read x 1",
        "aio_write 0 x",
        "aio_write x 1",
        "discard 0 x",
        "discard x 1",
        "truncate x",
        "alloc x",
        "alloc 0 x",
        "write -z 0 3G",
        "discard 0 3G",
    ),
    "patterns that are none": (
        "read -P 256 0 1",
        "read -P -1 0 1",
        "read -P 1x 0 1",
        "read -Pq 0 1",
        "write -P 256 0 1",
        "aio_write -P x 0 1",
        "readv -P x 0 1",
    ),
    "bad usage": (
        "",
        "bla",
        "read",
        "read 0",
        "readv 0",
        "write",
        "writev 0",
        "aio_read 0",
        "aio_write",
        "discard",
        "flush x",
        "aio_flush x",
        "length x",
        "map x",
        "alloc",
        "alloc 0 1 2",
        "truncate",
        "truncate 1 2 3 4",
        "truncate -m",
        "truncate -x 1",
        "truncate -m foo 1M",
        "read -x 0 1",
        "read -a 0 1",
        "read --foo 0 1",
        "read 0 -1",
        "read -q -q",
        "read 0 1 2",
        "read -l 2 0 10",
        "read -s 2 0 10",
        "read -s 20 -P 0 0 10",
        "read -l 20 -P 0 0 10",
        "read -b 1 512",
        "read -b 0 1",
        "read -b 0 512",
        "readv -x 0 1",
        "write -x 0 1",
        "write 0 1 2",
        "write -n 0 1",
        "write -u 0 1",
        "write -z -P 1 0 1",
        "write -z -s pattern 0 1",
        "write -P 1 -s pattern 0 1",
        "write -b -z 0 512",
        "write -f -b 0 512",
        "write -f -c 0 512",
        "write -c 0 1",
        "write -b 1 512",
        "write -c 0 64k",
        "write -b 0 512",
        "writev -x 0 1",
        "aio_read -x 0 1",
        "aio_read -q 0",
        "aio_write -n 0 1",
        "aio_write -u 0 1",
        "aio_write -z 0 1 2",
        "aio_write -q 0",
        "discard -x 0 1",
        "discard 0 1 2",
        "help nope",
        "help read x",
        "break",
        "break A",
        "break a b c",
        "wait_break",
        "resume",
        "remove_break a b",
        "break pwritev A",
        "resume A",
        "remove_break A",
    ),
}

#: Sessions on an image below blkdebug.
HELD: Final[dict[str, Sequence[str]]] = {
    "a write": (
        "break write_aio A",
        "aio_write -P 9 0 512",
        "wait_break A",
        "read -P 9 0 512",
        "resume A",
        "aio_flush",
        "read -P 9 0 512",
    ),
    "zeroes": (
        "break pwritev_zero A",
        "aio_write -z 0 512",
        "wait_break A",
        "resume A",
        "aio_flush",
    ),
    "a read that meets two": (
        "break read_aio A",
        "break read_aio B",
        "aio_read 0 512",
        "wait_break A",
        "wait_break B",
        "resume A",
        "resume B",
        "aio_flush",
    ),
    "two writes under one tag": (
        "break pwritev A",
        "aio_write 0 512",
        "wait_break A",
        "break pwritev A",
        "aio_write 512 1k",
        "resume A",
        "resume A",
        "resume A",
        "aio_flush",
    ),
    "a break point that is removed": (
        "break pwritev A",
        "remove_break A",
        "aio_write 0 512",
        "aio_flush",
        "remove_break A",
    ),
    "a held request whose break point is removed": (
        "break pwritev_done A",
        "aio_write 0 512",
        "wait_break A",
        "remove_break A",
        "aio_flush",
    ),
    "nothing": ("break nope A", "resume A", "remove_break A"),
}

_PROMPTLESS: Final = (
    (r"\b0?0?\d+\.\d+ sec \(|\b\d+:\d\d:\d\d\.\d+ \(", "TIME ("),
    (r"\((?:\S+ \S+|inf \S+)/sec and \S+ ops/sec\)", "(RATES)"),
    (r"(?m)^(\d+,1),\d+:\d\d:\d\d\.\d\d,\S+$", r"\1,TIME,RATES"),
    (r"(?m)^qemu-io: ", ""),
    (r"(?m)^blkdebug: \w+ request .*\n", ""),
)


def comparable(text: str) -> str:
    for pattern, replacement in _PROMPTLESS:
        text = re.sub(pattern, replacement, text)
    return text


def prepare(directory: Path) -> Path:
    """A directory with an image and the files that commands name."""
    directory.mkdir()
    (directory / "pattern").write_bytes(b"0123456789")
    (directory / "empty").touch()
    image = directory / "image"
    image.write_bytes(CONTENT)
    return image


def theirs(image: Path, options: Sequence[str], lines: Sequence[str]) -> str:
    """What the real program prints; its output and its complaints in one."""
    words = [word for line in lines for word in ("-c", line)]
    result = run_for_result("qemu-io", *options, *words)
    return comparable(result.stderr + result.stdout)


async def ours(image: Path, lines: Sequence[str], *, is_debugged: bool = False) -> list[str]:
    """What each line is answered here."""
    daemon = Daemon()
    file: FileOptions | BlkdebugOptions = FileOptions(
        driver="file", filename=str(image), discard=Discard.UNMAP
    )
    if is_debugged:
        file = BlkdebugOptions(driver="blkdebug", image=file)
    options = RawOptions(driver="raw", node_name="disk", file=file, discard=Discard.UNMAP)
    try:
        await open_node(daemon.graph, options)
        return [comparable(await _told(daemon, line, is_at_once=is_debugged)) for line in lines]
    finally:
        await daemon.shutdown()


async def _told(daemon: Daemon, line: str, *, is_at_once: bool) -> str:
    """The answer to a line; unless at once, with what its request has to tell later."""
    told = await run_line(daemon, "disk", line)
    # The real program waits for what it has begun before it ends.
    return told if is_at_once else told + await run_line(daemon, "disk", "aio_flush")


@pytest.mark.parametrize("case", CASES)
def test_the_same_is_printed_and_done(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = CASES[case]
    images = [prepare(tmp_path / name) for name in ("ours", "theirs")]
    monkeypatch.chdir(tmp_path / "ours")
    printed_here = asyncio.run(ours(images[0], lines))
    monkeypatch.chdir(tmp_path / "theirs")
    printed_there = [theirs(images[1], ["-f", "raw", str(images[1])], [line]) for line in lines]
    different = [
        {"line": line, "ours": mine, "theirs": other}
        for line, mine, other in zip(lines, printed_here, printed_there, strict=True)
        if mine != other
    ]
    assert different == []
    assert images[0].read_bytes() == images[1].read_bytes()


@pytest.mark.parametrize("case", HELD)
def test_break_points_hold_the_same(case: str, tmp_path: Path) -> None:
    images = [prepare(tmp_path / name) for name in ("ours", "theirs")]
    options = (
        f"driver=raw,file.driver=blkdebug,file.image.driver=file,file.image.filename={images[1]}"
    )
    printed_here = asyncio.run(ours(images[0], HELD[case], is_debugged=True))
    printed_there = theirs(images[1], ["--image-opts", options], HELD[case])
    # Complaints and reports come through two pipes there, so only each line counts.
    assert sorted("".join(printed_here).splitlines()) == sorted(printed_there.splitlines())
    assert images[0].read_bytes() == images[1].read_bytes()

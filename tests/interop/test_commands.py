# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Every command and command flag, with libnbd as the client and the file as the witness."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.interop.conftest import DISK_SIZE, MIB, PART, Connect, StartDaemon
from tests.interop.daemon import Daemon, Disk, is_ours, unix_server
from tests.interop.tools import run

ALLOCATION = "base:allocation"

#: A command flag that no version of the protocol gives a meaning.
UNKNOWN_FLAG = 1 << 14

Chunk = tuple[bytes, int, int]


def with_allocation(handle: Any) -> None:
    handle.add_meta_context(ALLOCATION)


def anything_goes(handle: Any) -> None:
    """Let a handle send what libnbd itself would refuse, to see what the server says."""
    handle.set_strict_mode(0)


def read_chunks(handle: Any, length: int, offset: int, flags: int = 0) -> list[Chunk]:
    """Read and return the chunks of the reply as (content, offset, kind), by offset."""
    chunks: list[Chunk] = []

    def keep(content: bytes, at: int, kind: int, _error: object) -> int:
        chunks.append((bytes(content), at, kind))
        return 0

    handle.pread_structured(length, offset, keep, flags)
    return sorted(chunks, key=lambda chunk: chunk[1])


def extents(handle: Any, length: int, offset: int, flags: int = 0) -> list[tuple[int, int]]:
    """Return block status as (length, flags)."""
    found: list[tuple[int, int]] = []

    def keep(context: str, _offset: int, entries: list[int], _error: object) -> int:
        assert context == ALLOCATION
        found.extend(zip(entries[::2], entries[1::2], strict=True))
        return 0

    handle.block_status(length, offset, keep, flags)
    return found


def test_read(daemon: Daemon, disk: Disk, connect: Connect) -> None:
    handle = connect(daemon)
    for offset, length in [(0, 1), (511, 2), (PART - 3, 7), (DISK_SIZE - 1, 1), (0, DISK_SIZE)]:
        assert bytes(handle.pread(length, offset)) == disk.content(offset, length)


def test_read_tells_holes(daemon: Daemon, disk: Disk, connect: Connect, nbd: Any) -> None:
    chunks = read_chunks(connect(daemon), DISK_SIZE, 0)
    kinds = {kind for _, _, kind in chunks}
    assert kinds == {nbd.READ_DATA, nbd.READ_HOLE}
    # A hole arrives as zeroes in the buffer.
    assert b"".join(content for content, _, _ in chunks) == disk.content()
    assert next(at for _, at, kind in chunks if kind == nbd.READ_HOLE) == PART


def test_read_in_one_piece_when_asked(
    daemon: Daemon, disk: Disk, connect: Connect, nbd: Any
) -> None:
    chunks = read_chunks(connect(daemon), 65536, PART - 32768, nbd.CMD_FLAG_DF)
    assert chunks == [(disk.content(PART - 32768, 65536), PART - 32768, nbd.READ_DATA)]


def test_write(daemon: Daemon, disk: Disk, connect: Connect) -> None:
    handle = connect(daemon)
    before = bytearray(disk.content())
    for offset, data in [(0, b"a"), (511, b"bc"), (PART - 3, b"d" * 7), (DISK_SIZE - 1, b"e")]:
        handle.pwrite(data, offset)
        before[offset : offset + len(data)] = data
    handle.flush()
    assert disk.content() == before


def test_write_as_large_as_may_be(daemon: Daemon, disk: Disk, connect: Connect) -> None:
    data = bytes(range(256)) * (DISK_SIZE // 256)
    connect(daemon).pwrite(data, 0)
    assert disk.content() == data


def test_write_with_fua(daemon: Daemon, disk: Disk, connect: Connect, nbd: Any) -> None:
    connect(daemon).pwrite(b"f" * 4096, 100, nbd.CMD_FLAG_FUA)
    assert disk.content(100, 4096) == b"f" * 4096


def test_flush(daemon: Daemon, connect: Connect) -> None:
    handle = connect(daemon)
    assert handle.can_flush()
    handle.flush()


def test_cache(daemon: Daemon, disk: Disk, connect: Connect) -> None:
    before = disk.content()
    connect(daemon).cache(DISK_SIZE, 0)
    assert disk.content() == before


def test_trim_gives_the_space_back(daemon: Daemon, disk: Disk, connect: Connect) -> None:
    before = disk.path.stat().st_blocks
    connect(daemon).trim(MIB, 0)
    assert disk.content(0, MIB) == bytes(MIB)
    assert disk.path.stat().st_blocks <= before - MIB // 1024


def test_trim_with_fua(daemon: Daemon, disk: Disk, connect: Connect, nbd: Any) -> None:
    connect(daemon).trim(MIB, 0, nbd.CMD_FLAG_FUA)
    assert disk.content(0, MIB) == bytes(MIB)


def test_zero(daemon: Daemon, disk: Disk, connect: Connect) -> None:
    """Unaligned at both ends: neighbours keep their bytes."""
    before = disk.content()
    connect(daemon).zero(MIB, 4097)
    assert disk.content() == before[:4097] + bytes(MIB) + before[4097 + MIB :]


def test_zero_may_make_a_hole(daemon: Daemon, disk: Disk, connect: Connect) -> None:
    before = disk.path.stat().st_blocks
    connect(daemon).zero(MIB, 0)
    assert disk.content(0, MIB) == bytes(MIB)
    assert disk.path.stat().st_blocks <= before - MIB // 1024


def test_zero_without_a_hole_keeps_the_space(
    daemon: Daemon, disk: Disk, connect: Connect, nbd: Any
) -> None:
    before = disk.path.stat().st_blocks
    connect(daemon).zero(MIB, 0, nbd.CMD_FLAG_NO_HOLE)
    assert disk.content(0, MIB) == bytes(MIB)
    assert disk.path.stat().st_blocks >= before


def test_zero_with_fua(daemon: Daemon, disk: Disk, connect: Connect, nbd: Any) -> None:
    connect(daemon).zero(4096, 0, nbd.CMD_FLAG_FUA)
    assert disk.content(0, 4096) == bytes(4096)


def test_fast_zero_is_done_or_refused_at_once(
    daemon: Daemon, disk: Disk, connect: Connect, nbd: Any
) -> None:
    """The file system decides; a refusal must leave the content as it was."""
    handle = connect(daemon)
    before = disk.content(0, MIB)
    refusal = error_of(nbd, lambda: handle.zero(MIB, 0, nbd.CMD_FLAG_FAST_ZERO))
    assert refusal in (None, "ENOTSUP")
    assert disk.content(0, MIB) == (bytes(MIB) if refusal is None else before)


def test_block_status_tells_data_and_holes(daemon: Daemon, connect: Connect, nbd: Any) -> None:
    handle = connect(daemon, prepare=with_allocation)
    hole = nbd.STATE_HOLE | nbd.STATE_ZERO
    found = extents(handle, DISK_SIZE, 0)
    assert found == [(PART, 0), (PART, hole), (PART, 0), (PART, hole)]
    assert extents(handle, 512, PART - 256) == [(256, 0), (256, hole)]


def test_block_status_of_one_extent(daemon: Daemon, connect: Connect, nbd: Any) -> None:
    handle = connect(daemon, prepare=with_allocation)
    assert extents(handle, DISK_SIZE - 512, 512, nbd.CMD_FLAG_REQ_ONE) == [(PART - 512, 0)]


def test_block_status_needs_a_context(daemon: Daemon, connect: Connect, nbd: Any) -> None:
    handle = connect(daemon, prepare=anything_goes)
    with pytest.raises(nbd.Error) as refusal:
        handle.block_status(512, 0, lambda *_: 0)
    assert refusal.value.errno == "EINVAL"
    assert_alive(handle)


def test_many_commands_in_flight(daemon: Daemon, disk: Disk, connect: Connect, nbd: Any) -> None:
    """Replies come in any order and each finds its request."""
    handle = connect(daemon)
    step = 4096
    offsets = range(0, DISK_SIZE, 8 * step)
    buffers = {offset: nbd.Buffer(step) for offset in offsets}
    cookies = [handle.aio_pread(buffer, offset) for offset, buffer in buffers.items()]
    while handle.aio_in_flight():
        handle.poll(-1)
    assert all(handle.aio_command_completed(cookie) for cookie in cookies)
    for offset, buffer in buffers.items():
        assert bytes(buffer.to_bytearray()) == disk.content(offset, step)


def test_disconnect_leaves_the_server_serving(daemon: Daemon, connect: Connect) -> None:
    handle = connect(daemon)
    handle.shutdown()
    assert handle.aio_is_closed()
    assert_alive(connect(daemon))


def test_a_write_is_seen_by_another_connection(daemon: Daemon, connect: Connect) -> None:
    """What CAN_MULTI_CONN promises after a flush."""
    writer, reader = connect(daemon), connect(daemon)
    writer.pwrite(b"w" * 512, 0)
    writer.flush()
    assert bytes(reader.pread(512, 0)) == b"w" * 512


Command = Callable[[Any, int], object]

READ: Command = lambda handle, offset: handle.pread(512, offset)  # noqa: E731
WRITE: Command = lambda handle, offset: handle.pwrite(bytes(512), offset)  # noqa: E731
TRIM: Command = lambda handle, offset: handle.trim(512, offset)  # noqa: E731
ZERO: Command = lambda handle, offset: handle.zero(512, offset)  # noqa: E731
CACHE: Command = lambda handle, offset: handle.cache(512, offset)  # noqa: E731
STATUS: Command = lambda handle, offset: extents(handle, 512, offset)  # noqa: E731


def assert_refused(nbd: Any, errno: str, command: Callable[[], object]) -> None:
    """The request fails with this errno; qemu-storage-daemon 7.2 says EINVAL to all of them."""
    with pytest.raises(nbd.Error) as refusal:
        command()
    assert refusal.value.errno == errno or (refusal.value.errno == "EINVAL" and not is_ours())


def error_of(nbd: Any, command: Callable[[], object]) -> str | None:
    """Run what may be refused; return the errno's name, or None when it was done."""
    try:
        command()
    except nbd.Error as refusal:
        return str(refusal.errno)
    return None


def assert_alive(handle: Any) -> None:
    """A refused request must not cost the connection."""
    assert len(handle.pread(512, 0)) == 512


@pytest.mark.parametrize(
    ("command", "errno"),
    [
        pytest.param(READ, "EINVAL", id="read"),
        pytest.param(WRITE, "ENOSPC", id="write"),
        pytest.param(ZERO, "ENOSPC", id="zero"),
        pytest.param(TRIM, "EINVAL", id="trim"),
        pytest.param(CACHE, "EINVAL", id="cache"),
        pytest.param(STATUS, "EINVAL", id="block status"),
    ],
)
@pytest.mark.parametrize("offset", [DISK_SIZE - 511, DISK_SIZE, (1 << 63) - 512])
def test_beyond_the_end(
    command: Command, errno: str, offset: int, daemon: Daemon, connect: Connect, nbd: Any
) -> None:
    def prepare(handle: Any) -> None:
        anything_goes(handle)
        with_allocation(handle)

    handle = connect(daemon, prepare=prepare)
    assert_refused(nbd, errno, lambda: command(handle, offset))
    assert_alive(handle)


@pytest.mark.parametrize("command", [WRITE, TRIM, ZERO], ids=["write", "trim", "zero"])
def test_a_read_only_export_is_not_changed(
    command: Command, read_only_daemon: Daemon, disk: Disk, connect: Connect, nbd: Any
) -> None:
    before = disk.content()
    handle = connect(read_only_daemon, prepare=anything_goes)
    assert_refused(nbd, "EPERM", lambda: command(handle, 0))
    assert_alive(handle)
    assert disk.content() == before


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(lambda handle, flags: handle.pread(512, 0, flags), id="read"),
        pytest.param(lambda handle, flags: handle.pwrite(bytes(512), 0, flags), id="write"),
        pytest.param(lambda handle, flags: handle.trim(512, 0, flags), id="trim"),
        pytest.param(lambda handle, flags: handle.zero(512, 0, flags), id="zero"),
        pytest.param(lambda handle, flags: handle.cache(512, 0, flags), id="cache"),
        pytest.param(lambda handle, flags: handle.flush(flags), id="flush"),
    ],
)
def test_an_unknown_flag_is_refused(
    command: Callable[[Any, int], object], daemon: Daemon, disk: Disk, connect: Connect, nbd: Any
) -> None:
    before = disk.content()
    handle = connect(daemon, prepare=anything_goes)
    assert_refused(nbd, "EINVAL", lambda: command(handle, UNKNOWN_FLAG))
    assert_alive(handle)
    assert disk.content() == before


def test_a_flag_of_another_command_is_refused(daemon: Daemon, connect: Connect, nbd: Any) -> None:
    handle = connect(daemon, prepare=anything_goes)
    assert_refused(nbd, "EINVAL", lambda: handle.pwrite(bytes(512), 0, nbd.CMD_FLAG_FAST_ZERO))
    assert_alive(handle)


def test_a_read_of_nothing(daemon: Daemon, connect: Connect, nbd: Any) -> None:
    """The spec leaves a length of 0 to the server: it answers, and the connection lives."""
    handle = connect(daemon, prepare=anything_goes)
    assert error_of(nbd, lambda: handle.pread(0, 0)) in (None, "EINVAL")
    assert_alive(handle)


def test_nbdsh_speaks_all_commands(daemon: Daemon, disk: Disk) -> None:
    script = """
        import nbd
        assert h.get_size() == 8 * 1024 * 1024
        h.pwrite(b"s" * 512, 0, nbd.CMD_FLAG_FUA)
        assert h.pread(512, 0) == b"s" * 512
        h.zero(512, 512)
        h.trim(4096, 65536)
        h.cache(4096, 0)
        h.flush()
        h.block_status(4096, 0, lambda *_: 0)
    """
    lines = "\n".join(line.strip() for line in script.splitlines())
    # nbdsh starts whatever python3 comes first, and only Debian's knows libnbd.
    system = "/usr/bin:/bin"
    run("nbdsh", "--base-allocation", "--uri", daemon.uri("disk0"), "-c", lines, PATH=system)
    assert disk.content(0, 1024) == b"s" * 512 + bytes(512)


def test_offsets_and_lengths_beyond_32_bits(
    start_daemon: StartDaemon, tmp_path: Path, connect: Connect
) -> None:
    tib = 1 << 40
    huge = Disk(tmp_path / "huge.img")
    with huge.path.open("wb") as file:
        file.truncate(2 * tib)
    daemon = start_daemon(*huge.blockdev(discard="unmap"), *unix_server(), *huge.export())
    handle = connect(daemon, prepare=with_allocation)
    assert handle.get_size() == 2 * tib

    handle.pwrite(b"h" * 4096, tib + 512)
    assert bytes(handle.pread(4608, tib)) == bytes(512) + b"h" * 4096
    assert huge.content(tib + 512, 4096) == b"h" * 4096
    handle.zero(3 << 30, tib)
    handle.trim(3 << 30, tib)
    assert bytes(handle.pread(4608, tib)) == bytes(4608)
    assert extents(handle, 3 << 30, tib)[0][1] == 3

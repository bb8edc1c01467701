# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Some of QEMU's block types, with just the members that the tests need.

They are named and ordered as in QEMU's schema, so that the real program can be asked what it
says of the same input.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated

from nbdjobs.qapi.types import (
    Alternate,
    Int8,
    Int32,
    Null,
    Size,
    Uint16,
    Uint32,
    Uint64,
    features,
    flat_union,
    member,
)


class Discard(StrEnum):
    IGNORE = "ignore"
    UNMAP = "unmap"


class DetectZeroes(StrEnum):
    OFF = "off"
    ON = "on"
    UNMAP = "unmap"


@dataclass(frozen=True, slots=True, kw_only=True)
class Cache:
    direct: bool = False
    no_flush: bool = False


@flat_union("driver", lambda: BLOCKDEVS)
@dataclass(frozen=True, slots=True, kw_only=True)
class Blockdev:
    driver: str
    node_name: str | None = None
    discard: Discard = Discard.IGNORE
    cache: Cache = field(default_factory=Cache)
    read_only: bool = False
    detect_zeroes: DetectZeroes = DetectZeroes.OFF


BlockdevRef = Annotated[Blockdev | str, Alternate("BlockdevRef")]
BlockdevRefOrNull = Annotated[Blockdev | str | Null, Alternate("BlockdevRefOrNull")]


@dataclass(frozen=True, slots=True, kw_only=True)
class NullCo(Blockdev):
    size: int | None = None
    latency_ns: Uint64 | None = None
    read_zeroes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw(Blockdev):
    file: BlockdevRef
    offset: int | None = None
    size: int | None = None


@features("dynamic-auto-read-only")
@dataclass(frozen=True, slots=True, kw_only=True)
class File(Blockdev):
    filename: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Qcow2(Blockdev):
    file: BlockdevRef
    backing: BlockdevRefOrNull | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Quorum(Blockdev):
    children: list[BlockdevRef]
    vote_threshold: int


class Event(StrEnum):
    L2_LOAD = "l2_load"
    L2_UPDATE = "l2_update"


class Permission(StrEnum):
    WRITE = "write"
    RESIZE = "resize"


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectError:
    event: Event
    errno: int | None = None
    once: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Blkdebug(Blockdev):
    image: BlockdevRef
    inject_error: tuple[InjectError, ...] = ()
    take_child_perms: tuple[Permission, ...] = ()


@flat_union("type", lambda: SOCKETS)
@dataclass(frozen=True, slots=True, kw_only=True)
class SocketAddress:
    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class InetAddress(SocketAddress):
    host: str
    port: str


@dataclass(frozen=True, slots=True, kw_only=True)
class UnixAddress(SocketAddress):
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Nbd(Blockdev):
    server: SocketAddress
    reconnect_delay: Uint32 | None = None


SOCKETS: dict[str, type[SocketAddress]] = {"inet": InetAddress, "unix": UnixAddress}

BLOCKDEVS: dict[str, type[Blockdev]] = {
    "blkdebug": Blkdebug,
    "file": File,
    "nbd": Nbd,
    "null-aio": NullCo,
    "null-co": NullCo,
    "qcow2": Qcow2,
    "quorum": Quorum,
    "raw": Raw,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Export:
    """The members of a vhost-user-blk export, the only one with a size."""

    type: str
    id: str
    node_name: str
    writable: bool = False
    addr: SocketAddress
    logical_block_size: Size | None = None
    num_queues: Uint16 | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Odd:
    """What no block type has."""

    small: Int8 = 0
    middle: Int32 = 0
    ratio: float = 0.0
    anything: object = None
    bps_max: int | None = field(default=None, metadata=member("bps_max", features=("unstable",)))
    words: list[str] | None = None

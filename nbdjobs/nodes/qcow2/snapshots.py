# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The table of internal snapshots, as it is in the file; `snapshotting` changes it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from struct import Struct
from typing import ClassVar, Final, Self

from nbdjobs.errors import CommandError
from nbdjobs.nodes.qcow2 import constants
from nbdjobs.nodes.rounding import round_up

_NO_COUNT: Final = -1

MAX_EXTRA: Final = 1024
"""Bytes of extra data of one snapshot, QEMU's limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """One entry of the table.

    Attributes:
        l1_offset: Where the snapshot's L1 table is.
        l1_size: Entries of it.
        date_s: When it was taken, in seconds since the epoch.
        date_ns: The fraction of a second.
        vm_clock_ns: For how long the guest had run.
        vm_state_size: The old field for the bytes of saved guest state.
        extra: Further fields, as they are.
        identifier: Unique in the image.
        name: What the user calls it.
    """

    LAYOUT: ClassVar = Struct(">QIHHIIQII")
    EXTRA: ClassVar = Struct(">QQq")

    l1_offset: int
    l1_size: int
    date_s: int = 0
    date_ns: int = 0
    vm_clock_ns: int = 0
    vm_state_size: int = 0
    extra: bytes = b""
    identifier: bytes
    name: bytes

    @classmethod
    def new(
        cls,
        *,
        identifier: bytes,
        name: bytes,
        l1_offset: int,
        l1_size: int,
        date_ns: int,
        size: int,
    ) -> Self:
        """A snapshot of a disk of `size` bytes, taken `date_ns` nanoseconds after the epoch."""
        return cls(
            l1_offset=l1_offset,
            l1_size=l1_size,
            date_s=date_ns // 10**9,
            date_ns=date_ns % 10**9,
            extra=cls.EXTRA.pack(0, size, _NO_COUNT),
            identifier=identifier,
            name=name,
        )

    @property
    def size(self) -> int | None:
        """Bytes that the disk had, if that is known."""
        return int.from_bytes(self.extra[8:16]) if len(self.extra) >= 16 else None

    @property
    def saved_state_size(self) -> int:
        """Bytes of saved guest state."""
        return int.from_bytes(self.extra[:8]) if len(self.extra) >= 8 else self.vm_state_size

    @property
    def instruction_count(self) -> int | None:
        """How many instructions the guest had executed, if anybody counted."""
        if len(self.extra) < 24:
            return None
        count: int = self.EXTRA.unpack_from(self.extra)[2]
        return None if count == _NO_COUNT else count

    def pack(self) -> bytes:
        """The entry as it is in the file, with its padding."""
        head = self.LAYOUT.pack(
            self.l1_offset,
            self.l1_size,
            len(self.identifier),
            len(self.name),
            self.date_s,
            self.date_ns,
            self.vm_clock_ns,
            self.vm_state_size,
            len(self.extra),
        )
        entry = head + self.extra + self.identifier + self.name
        return entry + bytes(-len(entry) % 8)


def parse_snapshots(
    table: bytes, count: int, cluster_size: int
) -> tuple[tuple[Snapshot, ...], int]:
    """Read a table.

    Args:
        table: From its beginning; it may go on behind its end.
        count: Entries.
        cluster_size: Of the image.

    Returns:
        The snapshots, and how many bytes the table has.

    Raises:
        CommandError: An entry cannot be true.
    """
    snapshots = []
    position = 0
    for _ in range(count):
        if position + Snapshot.LAYOUT.size > len(table):
            raise CommandError("Snapshot table too large")
        fields = Snapshot.LAYOUT.unpack_from(table, position)
        l1_offset, l1_size, id_size, name_size, date_s, date_ns, clock, vm_state, extra_size = (
            fields
        )
        if extra_size > MAX_EXTRA:
            raise CommandError("Too much extra metadata in snapshot table entry")
        _check_l1(l1_offset, l1_size, cluster_size)
        place = position + Snapshot.LAYOUT.size
        end = place + extra_size + id_size + name_size
        if end > len(table):
            raise CommandError("Snapshot table too large")
        snapshots.append(
            Snapshot(
                l1_offset=l1_offset,
                l1_size=l1_size,
                date_s=date_s,
                date_ns=date_ns,
                vm_clock_ns=clock,
                vm_state_size=vm_state,
                extra=table[place : place + extra_size],
                identifier=table[place + extra_size : place + extra_size + id_size],
                name=table[end - name_size : end],
            )
        )
        position = round_up(end, 8)
    return tuple(snapshots), position


def _check_l1(offset: int, size: int, cluster_size: int) -> None:
    if size * constants.ENTRY_SIZE > constants.MAX_L1_BYTES:
        raise CommandError("Snapshot L1 table too large")
    if offset % cluster_size or offset >= 1 << 62:
        raise CommandError("Snapshot L1 table offset invalid")


def find_snapshot(snapshots: Iterable[Snapshot], wanted: str) -> Snapshot | None:
    """The snapshot of that id, or else the first of that name."""
    word = wanted.encode(errors="surrogateescape")
    found = list(snapshots)
    by_id = next((each for each in found if each.identifier == word), None)
    return by_id or next((each for each in found if each.name == word), None)

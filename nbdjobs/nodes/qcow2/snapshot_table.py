# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Reading the table of internal snapshots, whose length no header tells."""

from __future__ import annotations

from typing import Final

from nbdjobs.errors import CommandError
from nbdjobs.nodes.qcow2.constants import MAX_SNAPSHOT_TABLE_BYTES
from nbdjobs.nodes.qcow2.files import Files
from nbdjobs.nodes.qcow2.header import Header
from nbdjobs.nodes.qcow2.snapshots import Snapshot, parse_snapshots

_USUAL: Final = 256
"""Bytes that are enough for most entries."""


async def read_snapshots(header: Header, files: Files) -> tuple[Snapshot, ...]:
    """Read the snapshots of an image; it may be the header of another than is in the file.

    Raises:
        CommandError: The table cannot be true.
        NodeError: It cannot be read.
    """
    if not header.snapshot_count:
        return ()
    available = max(files.file.size - header.snapshots_offset, 0)
    limit = min(available, MAX_SNAPSHOT_TABLE_BYTES)
    length = min(limit, header.snapshot_count * _USUAL)
    while True:
        table = await files.read(header.snapshots_offset, length)
        try:
            return parse_snapshots(table, header.snapshot_count, header.cluster_size)[0]
        except CommandError:
            if length == limit:
                raise
            length = min(4 * length, limit)

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Reads that need more than one look at a cached table, and block status."""

from __future__ import annotations

from typing import assert_never

from nbdjobs.nodes.events import DebugEvent
from nbdjobs.nodes.qcow2.compressed import CompressedClusters
from nbdjobs.nodes.qcow2.files import Files
from nbdjobs.nodes.qcow2.geometry import Geometry
from nbdjobs.nodes.qcow2.mapping import Kind
from nbdjobs.nodes.qcow2.tables import Extent, Tables
from nbdjobs.nodes.status import DATA, HOLE, BlockStatus, Status


class Reader:
    """Reads the disk in one image."""

    def __init__(
        self, geometry: Geometry, files: Files, tables: Tables, compressed: CompressedClusters
    ):
        self._geometry = geometry
        self._files = files
        self._tables = tables
        self._compressed = compressed

    async def read(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` with the disk's content; the range is inside the disk."""
        done = 0
        while done < len(buffer):
            extent = await self._tables.find(offset + done, len(buffer) - done)
            part = buffer[done : done + extent.length]
            await self._read_extent(offset + done, extent, part)
            done += extent.length

    async def _read_extent(self, offset: int, extent: Extent, buffer: memoryview) -> None:
        match extent.kind:
            case Kind.DATA:
                data = self._files.data
                if data.takes_debug_events:
                    await data.debug_event(DebugEvent.READ_AIO)
                await data.pread(extent.host, buffer)
                if self._files.cipher is not None:
                    self._files.cipher.decrypt(offset, extent.host, buffer)
            case Kind.ZERO | Kind.ZERO_RESERVED:
                buffer[:] = bytes(len(buffer))
            case Kind.UNALLOCATED | Kind.RESERVED:
                await self._read_backing(offset, buffer)
            case Kind.COMPRESSED:
                content = await self._compressed.read(extent.host)
                within = offset & (self._geometry.cluster_size - 1)
                buffer[:] = content[within : within + len(buffer)]
            case other:
                assert_never(other)

    async def _read_backing(self, offset: int, buffer: memoryview) -> None:
        backing = self._files.backing
        length = 0
        if backing is not None:
            length = max(0, min(len(buffer), backing.size - offset))
            if length:
                file = self._files.file
                if file.takes_debug_events:
                    await file.debug_event(DebugEvent.READ_BACKING_AIO)
                await backing.pread(offset, buffer[:length])
        if length < len(buffer):
            buffer[length:] = bytes(len(buffer) - length)

    async def is_zero(self, offset: int, length: int) -> bool:
        """Whether the tables say that a range reads as zeroes; data is not looked at."""
        while length:
            extent = await self._tables.find(offset, length)
            if not self.reads_as_zeroes(extent, offset):
                return False
            offset, length = offset + extent.length, length - extent.length
        return True

    def reads_as_zeroes(self, extent: Extent, offset: int) -> bool:
        """Whether a run at `offset` is known to hold nothing but zeroes."""
        if extent.kind in (Kind.UNALLOCATED, Kind.RESERVED):
            backing = self._files.backing
            return backing is None or offset >= backing.size
        return extent.kind in (Kind.ZERO, Kind.ZERO_RESERVED)

    async def status(self, offset: int, length: int) -> BlockStatus:
        """Describe the first run, looking into the backing file where this image has nothing."""
        extent = await self._tables.find(offset, length)
        if extent.kind in (Kind.DATA, Kind.COMPRESSED):
            return BlockStatus(extent.length, DATA)
        if extent.kind in (Kind.ZERO, Kind.ZERO_RESERVED):
            return BlockStatus(extent.length, HOLE)
        backing = self._files.backing
        if backing is None or offset >= backing.size:
            return BlockStatus(extent.length, Status.ZERO)
        found = await backing.block_status(offset, min(extent.length, backing.size - offset))
        return BlockStatus(found.length, found.status & ~Status.ALLOCATED)

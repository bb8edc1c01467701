# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`null-co` and `null-aio`: disks of any size that hold nothing, for tests and measurements.

Reads leave the buffer as it is, which is what makes them fast, unless `read-zeroes` is on.

Source: QEMU qapi/block-core.json (BlockdevOptionsNull); its two drivers differ only inside.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from nbdjobs.errors import CommandError
from nbdjobs.nodes.config import SECTOR, NodeConfig
from nbdjobs.nodes.driver import DriverNode
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.nodes.rounding import round_up
from nbdjobs.nodes.status import DATA, BlockStatus, Status
from nbdjobs.qapi.types import INT64_MAX, Uint64

DEFAULT_SIZE: Final = 1 << 30
_NS_PER_S: Final = 1_000_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class NullOptions(BlockdevOptions):
    """Options of both drivers (QAPI `BlockdevOptionsNull`).

    Attributes:
        size: Bytes; 1 GiB if not given.
        latency_ns: How long every request takes.
        read_zeroes: Reads give zeroes.
    """

    size: int | None = None
    latency_ns: Uint64 | None = None
    read_zeroes: bool = False


class _NullNode(DriverNode[NullOptions]):
    options_type: ClassVar[type[BlockdevOptions]] = NullOptions
    mutable_options: ClassVar[frozenset[str] | None] = frozenset()

    def __init__(self, name: str, config: NodeConfig, options: NullOptions):
        super().__init__(name, config)
        self._options = options
        self._latency_s = (options.latency_ns or 0) / _NS_PER_S
        self._is_zero = options.read_zeroes
        self._highest_written = 0
        self._size = round_up(DEFAULT_SIZE if options.size is None else options.size, SECTOR)

    @classmethod
    async def open(
        cls, name: str, config: NodeConfig, options: NullOptions, children: Mapping[str, Node]
    ) -> Self:
        """Check the numbers."""
        if options.size is not None and options.size < 0:
            raise CommandError("Parameter 'size' expects a non-negative number below 2^64")
        if options.latency_ns is not None and not 0 <= options.latency_ns <= INT64_MAX:
            raise CommandError("latency-ns is invalid")
        return cls(name, config, options)

    @property
    def size(self) -> int:
        """Bytes, as the options say."""
        return self._size

    @property
    def highest_offset_written(self) -> int:
        """Where the furthest write so far ended."""
        return self._highest_written

    @property
    def allocated_size(self) -> int:
        """Nothing is stored."""
        return 0

    @property
    def filename(self) -> str:
        """The driver as a URL, unless options change what it is."""
        return self.json_filename if len(self.content_options) > 1 else f"{self.driver}://"

    @property
    def content_options(self) -> dict[str, object]:
        """Driver, and size and `read-zeroes` where they were given."""
        size = {} if self._options.size is None else {"size": self._options.size}
        zeroes = {"read-zeroes": True} if self._options.read_zeroes else {}
        return {"driver": self.driver, **size, **zeroes}

    async def _pread(self, offset: int, buffer: memoryview) -> None:
        if self._latency_s:
            await asyncio.sleep(self._latency_s)
        if self._is_zero:
            buffer[:] = bytes(len(buffer))

    async def _pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        self._highest_written = max(self._highest_written, offset + len(data))
        if self._latency_s:
            await asyncio.sleep(self._latency_s)

    async def _pwrite_zeroes(
        self, offset: int, length: int, fua: bool, may_unmap: bool, fast_only: bool
    ) -> None:
        self._highest_written = max(self._highest_written, offset + length)
        if self._latency_s:
            await asyncio.sleep(self._latency_s)

    async def _flush(self) -> None:
        if self._latency_s:
            await asyncio.sleep(self._latency_s)

    async def _block_status(self, offset: int, length: int) -> BlockStatus:
        return BlockStatus(length, DATA | Status.ZERO if self._is_zero else DATA)


class NullCoNode(_NullNode):
    """The driver `null-co`."""

    driver: ClassVar[str] = "null-co"


class NullAioNode(_NullNode):
    """The driver `null-aio`."""

    driver: ClassVar[str] = "null-aio"

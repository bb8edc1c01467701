# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`luks`: an encrypted disk, as the LUKS format has it.

    guest ── decrypted ──▶ luks ── encrypted ──▶ file: │ header, keys │ payload │

Sectors are encrypted one by one, so requests are of whole ones. What the storage knows of holes
says nothing of the content: zeroes are written encrypted, and everything is data.

Source: QEMU qapi/block-core.json (BlockdevOptionsLUKS), and the behaviour of its storage daemon.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Final, Self

from nbdjobs.errors import CommandError
from nbdjobs.nodes.config import SECTOR, Limits, NodeConfig
from nbdjobs.nodes.crypto.amend import LuksAmendOptions, amend
from nbdjobs.nodes.crypto.block_cipher import BlockCipher
from nbdjobs.nodes.crypto.luks_header import LuksHeader
from nbdjobs.nodes.crypto.volume import LuksVolume
from nbdjobs.nodes.driver import ChildReference, DriverNode, Reopening
from nbdjobs.nodes.gate import Operation
from nbdjobs.nodes.graph import Edge, Graph, Role
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.options import BlockdevOptions, BlockdevRef
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.rounding import round_down
from nbdjobs.nodes.secrets import Secrets

_PIECE: Final = 1024 * 1024
"""Bytes encrypted in a row, in about a millisecond; then others get their turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LuksOptions(BlockdevOptions):
    """Options of the driver (QAPI `BlockdevOptionsLUKS`).

    Attributes:
        file: Where the volume is.
        key_secret: Name of the object with the password.
    """

    file: BlockdevRef
    key_secret: str | None = None


class LuksNode(DriverNode[LuksOptions]):
    """The driver `luks`."""

    driver: ClassVar[str] = "luks"
    is_format: ClassVar[bool] = True
    is_encrypted = True
    options_type: ClassVar[type[BlockdevOptions]] = LuksOptions
    mutable_options: ClassVar[frozenset[str] | None] = frozenset()

    def __init__(self, name: str, config: NodeConfig, options: LuksOptions):
        super().__init__(name, config, Limits(request_alignment=SECTOR, max_transfer=_PIECE))
        self._options = options
        self._password: bytes | None = None
        self._cipher: BlockCipher | None = None
        self._header: LuksHeader | None = None
        self._start = 0
        self._amending = asyncio.Lock()
        self._key_changes = 0

    # Opening

    @classmethod
    def children_of(cls, options: LuksOptions) -> tuple[ChildReference, ...]:
        """The one child, named in the options."""
        return (ChildReference("file", options.file, Role.DATA),)

    @classmethod
    async def open(
        cls, name: str, config: NodeConfig, options: LuksOptions, children: Mapping[str, Node]
    ) -> Self:
        """Make the node; `load` finds the key."""
        return cls(name, config, options)

    def bind(self, graph: Graph) -> None:
        """Find the password."""
        self._password = graph.secrets.find_required_password(self._options.key_secret)

    async def load(self) -> tuple[ChildReference, ...]:
        """Read the header, and find the key with the password, which is then forgotten."""
        assert self._password is not None, "bound before"
        password, self._password = self._password, None
        volume = await LuksVolume.read(self._file)
        self._cipher = await volume.unlock(password)
        self._header = volume.header
        self._start = self._header.payload_offset
        if self._file.size < self._start:
            raise CommandError("Could not refresh total sector count: Input/output error")
        return ()

    async def prepare_reopen(
        self, graph: Graph, config: NodeConfig, options: LuksOptions
    ) -> Reopening[LuksOptions]:
        """Go on as before, but for what all drivers share."""
        return _LuksReopening(self, config, options)

    # What it is

    @property
    def size(self) -> int:
        """Bytes of the payload."""
        return round_down(max(self._file.size - self._start, 0), SECTOR)

    @property
    def filename(self) -> str:
        """The options written out: the file alone says nothing."""
        return self.json_filename

    @property
    def content_options(self) -> dict[str, object]:
        """The child's, and the name of the password."""
        return super().content_options | {"key-secret": self._options.key_secret}

    @property
    def luks_header(self) -> LuksHeader:
        """The volume's header."""
        assert self._header is not None, "loaded before anyone uses it"
        return self._header

    @property
    def _file(self) -> Node:
        return self.edges["file"].node

    @property
    def _open_cipher(self) -> BlockCipher:
        assert self._cipher is not None, "loaded before anyone uses it"
        return self._cipher

    def child_permissions(
        self, edge: Edge, needed: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """What users need, and in any case to read, so that nobody changes keys meanwhile."""
        needed |= Permission.CONSISTENT_READ
        if not self._key_changes:
            return needed, shared
        exclusive = Permission.CONSISTENT_READ | Permission.WRITE
        return needed | Permission.WRITE, shared & ~exclusive

    # Keys

    @contextmanager
    def changing_keys(self, graph: Graph) -> Iterator[None]:
        """While inside, nobody else uses the file; `CommandError` if somebody does."""
        if not self.is_active:
            raise CommandError("Permission 'write' unavailable on inactive node")

        def begin() -> None:
            self._key_changes += 1

        def end() -> None:
            self._key_changes -= 1

        graph.change(begin, end, [self])
        try:
            yield
        finally:
            graph.change(end, begin, [self])

    async def amend(self, options: LuksAmendOptions, secrets: Secrets, *, is_forced: bool) -> None:
        """Change passwords, while `changing_keys`; as for `crypto.amend.amend`."""
        async with self._amending:
            volume = await LuksVolume.read(self._file)
            try:
                await amend(
                    volume,
                    options,
                    secrets,
                    key_secret=self._options.key_secret,
                    is_forced=is_forced,
                )
            finally:
                self._header = volume.header

    # Requests

    def begin_writeback(self, offset: int, length: int) -> None:
        """Pass the hint on."""
        self._file.begin_writeback(self._start + offset, length)

    async def cache(self, offset: int, length: int) -> None:
        """Cache the child's range."""
        await self._file.cache(self._start + offset, length)

    def pread(self, offset: int, buffer: memoryview) -> Operation:
        """Read; whole sectors need nothing of the gate."""
        if _is_simple(offset, len(buffer)):
            return self._pread(offset, buffer)
        return super().pread(offset, buffer)

    def pread_now(self, offset: int, buffer: memoryview, data_only: bool) -> bool:
        """Read whole sectors on the spot, if the file can; all of them are data."""
        file = self._file
        if file.takes_debug_events or not _is_simple(offset, len(buffer)):
            return False
        if not file.pread_now(self._start + offset, buffer, False):
            return False
        self._open_cipher.decrypt(offset, buffer)
        return True

    async def _pread(self, offset: int, buffer: memoryview) -> None:
        await self._file.pread(self._start + offset, buffer)
        self._open_cipher.decrypt(offset, buffer)
        await _take_turns(len(buffer))

    async def _pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        encrypted = memoryview(bytearray(data))
        self._open_cipher.encrypt(offset, encrypted)
        await self._file.pwrite(self._start + offset, encrypted, fua=fua)
        await _take_turns(len(data))

    async def _flush(self) -> None:
        await self._file.flush()

    async def _truncate(self, size: int) -> None:
        await self._file.truncate(self._start + size)


def _is_simple(offset: int, length: int) -> bool:
    return not (offset | length) % SECTOR and 0 < length <= _PIECE


async def _take_turns(length: int) -> None:
    """Let others have a turn after a long piece: where nothing waited, they had none."""
    if length >= _PIECE:
        await asyncio.sleep(0)


class _LuksReopening(Reopening[LuksOptions]):
    """Another volume has another key: it needs another node, too."""

    _node: LuksNode

    def __init__(self, node: LuksNode, config: NodeConfig, options: LuksOptions):
        super().__init__(node, config, options)
        self._file = node.edges["file"].node

    def commit(self) -> None:
        if self._node.edges["file"].node is not self._file:
            raise CommandError("Cannot change the option 'file' of an encrypted node")
        super().commit()

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`qcow2`: a disk in an image that grows as it is written, with a chain of backing files below.

Where the slice of the L2 table is in memory and the range is one run of allocated clusters, a
request costs a look at an array and goes on to the file; see `_find`. Everything else is done by
the parts of `image.Image`.

Source: QEMU qapi/block-core.json (BlockdevOptionsQcow2), `docs/interop/qcow2`, and the behaviour
of its storage daemon.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
from collections.abc import Callable, Coroutine, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Final, Self

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.config import SECTOR, NodeConfig
from nbdjobs.nodes.crypto.amend import LuksAmendOptions
from nbdjobs.nodes.crypto.luks_header import LuksHeader
from nbdjobs.nodes.driver import BackingFile, ChildReference, DriverNode, Reopening
from nbdjobs.nodes.events import DebugEvent
from nbdjobs.nodes.graph import Edge, Graph, Role
from nbdjobs.nodes.node import Node, total_size
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.qcow2 import chain, constants, reopening, snapshotting
from nbdjobs.nodes.qcow2.check import repair_dirty
from nbdjobs.nodes.qcow2.constants import COPIED, ExtensionType, Incompatible
from nbdjobs.nodes.qcow2.create import CreateOptions, create
from nbdjobs.nodes.qcow2.encryption import (
    ENCRYPTED_LIMITS,
    PayloadCipher,
    amend_keys,
    open_cipher,
)
from nbdjobs.nodes.qcow2.errors import CorruptionError
from nbdjobs.nodes.qcow2.event import BlockImageCorrupted
from nbdjobs.nodes.qcow2.files import Files
from nbdjobs.nodes.qcow2.header import Header
from nbdjobs.nodes.qcow2.header_file import HeaderFile
from nbdjobs.nodes.qcow2.image import Image
from nbdjobs.nodes.qcow2.mapping import ALL_ALLOCATED, Kind
from nbdjobs.nodes.qcow2.options import (
    DEFAULT_CLEAN_INTERVAL,
    MUTABLE_OPTIONS,
    Qcow2Options,
    QCryptoBlockOptions,
    cache_sizes,
    check_cache_options,
)
from nbdjobs.nodes.qcow2.reclaim import Reason, Reclaim
from nbdjobs.nodes.qcow2.resize import resize
from nbdjobs.nodes.qcow2.snapshots import Snapshot, find_snapshot
from nbdjobs.nodes.qcow2.tables import Extent, Slice
from nbdjobs.nodes.qcow2.unbroken import unbroken
from nbdjobs.nodes.rounding import round_down
from nbdjobs.nodes.secrets import Secrets
from nbdjobs.nodes.status import BlockStatus
from nbdjobs.protocol.export import FileRange
from nbdjobs.qapi.types import Null

if TYPE_CHECKING:
    from nbdjobs.nodes.images import ImagePlace

logger = logging.getLogger(__name__)

_NOT_FOUND: Final = -1


class Qcow2Node(DriverNode[Qcow2Options]):
    """The driver `qcow2`."""

    driver: ClassVar[str] = "qcow2"
    is_format: ClassVar[bool] = True
    supports_compressed_writes: ClassVar[bool] = True
    creates_images: ClassVar[bool] = True
    supports_backing: ClassVar[bool] = True
    options_type: ClassVar[type[BlockdevOptions]] = Qcow2Options
    mutable_options: ClassVar[frozenset[str] | None] = MUTABLE_OPTIONS

    _image: Image | None = None

    def __init__(self, name: str, config: NodeConfig, options: Qcow2Options):
        super().__init__(name, config)
        self._options = options
        self._files = Files(self.edges)
        self._header: HeaderFile | None = None
        self._size = 0
        self._is_dead = False
        self._has_told = False
        self._tell: Callable[[object], None] | None = None
        self._secrets = Secrets()
        self._cipher: PayloadCipher | None = None
        self._cleaner: asyncio.TimerHandle | None = None
        self._data_edge = "file"
        self._clean_every_s = 0
        self._forget_tables()

    def _forget_tables(self) -> None:
        """Let every request take the long way."""
        self._slices: dict[int, Slice] = {}
        self._reclaim = Reclaim()
        self._slice_shift = self._cluster_bits = 63
        self._index_mask = 0
        self._within = 0
        self._is_extended = False
        self._not_plain = self._host_mask = 0

    # Opening

    @classmethod
    async def create_image(
        cls, place: ImagePlace, size: int, backing: BackingFile | None = None
    ) -> None:
        """Make an empty image, with QEMU's defaults."""
        name, driver = (None, None) if backing is None else backing
        options = CreateOptions(size=size, backing_file=name, backing_format=driver)
        options.check()
        await place.make_room(0)
        async with place.room() as file:
            await create(options, file)

    @classmethod
    def children_of(cls, options: Qcow2Options) -> tuple[ChildReference, ...]:
        """The children that the options name; the image may name more."""
        children = [ChildReference("file", options.file, Role.DATA)]
        if options.data_file is not None:
            children.append(ChildReference("data-file", options.data_file, Role.DATA))
        if options.backing is not None and not isinstance(options.backing, Null):
            children.append(ChildReference("backing", options.backing, Role.BACKING))
        return tuple(children)

    @classmethod
    async def open(
        cls, name: str, config: NodeConfig, options: Qcow2Options, children: Mapping[str, Node]
    ) -> Self:
        """Make the node; the image is read once nobody else can change it."""
        check_cache_options(options)
        return cls(name, config, options)

    def bind(self, graph: Graph) -> None:
        """Remember whom to tell of damage, and where passwords are."""
        self._tell = graph.on_event
        self._secrets = graph.secrets

    async def load(self) -> tuple[ChildReference, ...]:
        """Read the header, and name the children that it names."""
        header = await self._read_header()
        children = []
        if header.has_data_file and "data-file" not in self.edges:
            if header.data_file is None:
                raise CommandError("'data-file' is required for this image")
            # Unlike a backing file's, its name is not seen from the folder of the image.
            options = await chain.data_file_options(header.data_file)
            children.append(ChildReference("data-file", options, Role.DATA))
        if header.backing_file and self._options.backing is None:
            children.append(await self._backing(header))
        return tuple(children)

    async def _read_header(self) -> Header:
        try:
            found = await HeaderFile.read(self._files)
        except NodeError as error:
            raise CommandError(f"Could not read qcow2 header: {error}") from error
        header = found.header
        self._check(header, self.config, self._options)
        self._header = found
        self._size = round_down(header.size, SECTOR)
        if not self.is_encrypted:  # when an image is taken back, its key is known
            await self._find_key(header)
        return header

    async def _find_key(self, header: Header) -> None:
        cipher = await open_cipher(header, self._files, self._options, self._secrets)
        if cipher is not None:
            self._files.cipher = self._cipher = cipher
            self.is_encrypted = True
            self.set_limits(ENCRYPTED_LIMITS)

    async def amend_keys(
        self, options: LuksAmendOptions, secrets: Secrets, *, is_forced: bool
    ) -> None:
        """Change the passwords of the image; `CommandError` if it has none."""
        self.check_permissions(Permission.WRITE, permissions.ALL)
        encrypt = self._options.encrypt
        key_secret = encrypt.key_secret if isinstance(encrypt, QCryptoBlockOptions) else None
        await amend_keys(
            self.header, self._files, key_secret, options, secrets, is_forced=is_forced
        )

    async def _backing(self, header: Header) -> ChildReference:
        assert header.backing_file is not None
        try:
            name = header.backing_file.decode(errors="surrogateescape")
            path = chain.combine(self._files.file.filename, name)
            options = await chain.backing_options(path, header.backing_format)
        except CommandError as error:
            raise CommandError(f"Could not open backing file: {error}") from error
        return ChildReference("backing", options, Role.BACKING)

    @staticmethod
    def _check(header: Header, config: NodeConfig, options: Qcow2Options) -> None:
        if header.incompatible & Incompatible.CORRUPT and not config.is_read_only:
            raise CommandError("qcow2: Image is corrupt; cannot be opened read/write")
        if options.data_file is not None and not header.has_data_file:
            raise CommandError("'data-file' can only be set for images with an external data file")
        if options.snapshot is not None and not config.is_read_only:
            raise CommandError("A snapshot can only be opened read-only")
        if options.lazy_refcounts and header.version < 3:
            raise CommandError(
                "Lazy refcounts require a qcow2 image with at least qemu 1.1 compatibility level"
            )

    @property
    def _is_writable(self) -> bool:
        """Whether the image may be changed now."""
        return self.is_active and not self.is_read_only

    async def hand_over(self) -> None:
        """Write what was put off, too."""
        if self._is_writable and not self._is_dead:
            await self._open_image.finish()
        else:
            await self.flush()

    async def look_anew(self) -> None:
        """Read the image again; its children stay, and if it cannot be read, so does all else."""
        before = self._image
        await self._read_header()
        await self.start()
        if before is not None:
            await before.close()

    # Going on with other options (see `reopening`)

    async def prepare_reopen(
        self, graph: Graph, config: NodeConfig, options: Qcow2Options
    ) -> Reopening[Qcow2Options]:
        """Write what was put off, so that the image can be read by other rules."""
        return await reopening.prepare(self, config, options)

    def check_options(self, config: NodeConfig, options: Qcow2Options) -> None:
        """Raise `CommandError` for options that do not fit the image."""
        check_cache_options(options)
        self._check(self.header, config, options)
        cache_sizes(options, self.header.geometry, self.header.size)

    def use_options(self, options: Qcow2Options) -> None:
        """Read the image by these options the next time."""
        self._options = options

    def give_up(self) -> None:
        """Serve nobody any more: what is in the image is not known."""
        self._is_dead = True
        self._forget_tables()

    async def start(self) -> None:
        """Read the tables, and make the image ready for changes if it is writable."""
        assert self._header is not None
        header = self._header.header
        options = self._options
        sizes = cache_sizes(options, header.geometry, header.size)
        try:
            if self._is_writable:
                await self._make_ready(self._header)
            self._image = await Image.open(
                self._header,
                self._files,
                name=self.name,
                sizes=sizes,
                checked=options.checked_metadata,
                discarded=self._discarded,
                disk_size=lambda: self._size,
                is_lazy=header.version > 2
                and (header.is_lazy if options.lazy_refcounts is None else options.lazy_refcounts),
                shown=options.snapshot,
            )
        except (NodeError, CorruptionError) as error:
            raise CommandError(f"Could not open the image: {error}") from error
        if options.snapshot is not None:
            self._show_snapshot(options.snapshot)
        self._use(self._image)
        interval = options.cache_clean_interval
        self._clean_every_s = DEFAULT_CLEAN_INTERVAL if interval is None else interval
        self._clean_later()

    def _show_snapshot(self, wanted: str) -> None:
        """Be as large as the disk was then."""
        snapshot = find_snapshot(self.snapshots, wanted)
        if snapshot is not None and snapshot.size is not None:
            self._size = round_down(snapshot.size, SECTOR)

    async def _make_ready(self, header: HeaderFile) -> None:
        fields = header.header
        if fields.incompatible & Incompatible.DIRTY:
            await repair_dirty(header, self._files)
        unknown = fields.autoclear & ~constants.AUTOCLEAR_ALL
        if unknown:
            await header.change(autoclear=fields.autoclear & constants.AUTOCLEAR_ALL)

    @property
    def _discarded(self) -> set[Reason]:
        """For which reasons the file may discard what becomes free."""
        given = {
            Reason.REQUEST: (self._options.pass_discard_request, self.config.can_unmap),
            Reason.SNAPSHOT: (self._options.pass_discard_snapshot, True),
            Reason.OTHER: (self._options.pass_discard_other, False),
        }
        return {
            reason
            for reason, (wanted, default) in given.items()
            if (default if wanted is None else wanted)
        }

    def _use(self, image: Image) -> None:
        """Have at hand what the short way needs."""
        geometry, tables = image.geometry, image.tables
        self._reclaim = image.reclaim
        self._slices = tables.slices
        self._slice_shift = tables.slice_shift
        self._cluster_bits = geometry.cluster_bits
        self._index_mask = tables.index_mask
        self._within = geometry.cluster_size - 1
        self._is_extended = geometry.is_extended
        self._not_plain = geometry.not_plain
        self._host_mask = geometry.host_mask
        self._data_edge = "data-file" if geometry.has_data_file else "file"

    def _clean_later(self) -> None:
        if self._cleaner is not None:
            self._cleaner.cancel()
        if self._clean_every_s:
            loop = asyncio.get_running_loop()
            self._cleaner = loop.call_later(self._clean_every_s, self._clean)

    def _clean(self) -> None:
        if self._image is not None:
            self._image.tables.forget_unused()
        self._clean_later()

    async def settled(self) -> None:
        """Wait for a commit whose requests did not wait for it."""
        if self._image is not None:
            await self._image.committer.idle()

    async def close(self) -> None:
        """Write what was put off."""
        if self._cleaner is not None:
            self._cleaner.cancel()
        if self._image is None:
            return
        try:
            if self._is_writable and not self._is_dead:
                await self._image.finish()
        except (NodeError, CorruptionError) as error:
            logger.error("%s: metadata could not be written at the end: %s", self.name, error)
        await self._image.close()

    # What it is

    @property
    def _open_image(self) -> Image:
        if self._is_dead:
            raise NodeError(errno.ENOMEDIUM)
        assert self._image is not None, "requests come only once the node is open"
        return self._image

    @property
    def header(self) -> Header:
        """The header as it is in the file."""
        assert self._header is not None, "loaded before anyone uses it"
        return self._header.header

    @property
    def luks_header(self) -> LuksHeader | None:
        """What the image says of its encryption, if the method is LUKS."""
        return None if self._files.cipher is None else self._files.cipher.luks_header

    @property
    def size(self) -> int:
        """Bytes of the disk."""
        return self._size

    @property
    def filename(self) -> str:
        """The file's name, if it says all."""
        file = self._files.file
        is_plain = not file.is_format and file.has_plain_filename and not self.is_encrypted
        return file.filename if is_plain else self.json_filename

    @property
    def content_options(self) -> dict[str, object]:
        """The children's, and the name of the password."""
        encrypt = self._options.encrypt
        if not isinstance(encrypt, QCryptoBlockOptions):
            return super().content_options
        return {"encrypt.key-secret": encrypt.key_secret} | super().content_options

    @property
    def names_its_backing(self) -> bool:
        """Whether the header says what the backing node is."""
        backing, name = self._files.backing, self.header.backing_file
        if backing is None or name is None:
            return backing is None and name is None
        try:
            path = chain.combine(self._files.file.filename, name.decode(errors="surrogateescape"))
        except CommandError:
            return False
        return os.path.realpath(path) == os.path.realpath(backing.filename)

    @property
    def cluster_size(self) -> int:
        """Bytes that are allocated together."""
        return self.header.cluster_size

    @property
    def allocated_size(self) -> int | None:
        """What the image takes up, without its backing files."""
        return total_size(
            edge.node.allocated_size for edge in self.edges.values() if edge.is_primary
        )

    def child_permissions(
        self, edge: Edge, needed: Permission, shared: Permission
    ) -> tuple[Permission, Permission]:
        """Nobody else may change the image; the backing file is only read.

        Source: QEMU `block.c` (bdrv_default_perms), told apart by the child's role.
        """
        changes = Permission.WRITE | Permission.RESIZE
        if edge.role is Role.BACKING:
            stays = Permission.CONSISTENT_READ | Permission.WRITE_UNCHANGED
            may_change = changes if Permission.WRITE in shared else permissions.NONE
            return needed & Permission.CONSISTENT_READ, stays | may_change
        needed |= Permission.CONSISTENT_READ
        if not self.is_read_only:
            needed |= changes
        return needed, shared & ~changes

    # The short way

    def _find(self, offset: int, length: int) -> int:
        """Where a range is in the file, if that is one run of data and known without a wait."""
        slice_ = self._slices.get(offset >> self._slice_shift)
        if slice_ is None or offset + length > self._size:
            return _NOT_FOUND
        words = slice_.words
        bits = self._cluster_bits
        index = (offset >> bits) & self._index_mask
        if self._is_extended:
            return self._find_extended(slice_, index, offset & self._within, length)
        entry = words[index]
        host = entry & self._host_mask
        if entry & self._not_plain or not host:
            return _NOT_FOUND
        within = offset & self._within
        last = index + ((within + length - 1) >> bits)
        if last > index:
            if last > self._index_mask:
                return _NOT_FOUND
            size = self._within + 1
            for following in words[index + 1 : last + 1]:
                entry += size
                if following != entry:
                    return _NOT_FOUND
        slice_.was_used = True
        return host + within

    def _find_extended(self, slice_: Slice, index: int, within: int, length: int) -> int:
        """The same for extended entries: whole clusters that are allocated."""
        words = slice_.words
        entry = words[2 * index]
        host = entry & self._host_mask
        last = index + ((within + length - 1) >> self._cluster_bits)
        if entry & self._not_plain or not host or last > self._index_mask:
            return _NOT_FOUND
        size = self._within + 1
        for following in range(2 * index, 2 * last + 2, 2):
            if words[following] != entry or words[following + 1] != ALL_ALLOCATED:
                return _NOT_FOUND
            entry += size
        slice_.was_used = True
        return host + within

    def _find_private(self, offset: int, length: int) -> int:
        """Likewise where it may be written: in clusters of this disk alone."""
        host = self._find(offset, length)
        if host < 0:
            return host
        slice_ = self._slices[offset >> self._slice_shift]
        index = (offset >> self._cluster_bits) & self._index_mask
        entry = slice_.words[2 * index if self._is_extended else index]
        return host if slice_.is_safe and entry & COPIED else _NOT_FOUND

    def pread_now(self, offset: int, buffer: memoryview, data_only: bool) -> bool:
        """Read allocated clusters on the spot, if the file can."""
        node = self.edges[self._data_edge].node
        # Where there is something to be decrypted, reads have to pass the gate.
        if not self._reads_pass or node.takes_debug_events:
            return False
        host = self._find(offset, len(buffer))
        return host >= 0 and node.pread_now(host, buffer, False)

    def stored_at(self, offset: int, length: int, data_only: bool) -> FileRange | None:
        """Where the file stores allocated clusters, if they stay where they are.

        In an image that is written, a cluster may become free and hold something else before the
        client has taken what the kernel sends of it; no epoch would know of that.
        """
        node = self.edges[self._data_edge].node
        if not self.is_read_only or not self._reads_pass or node.takes_debug_events:
            return None
        host = self._find(offset, length)
        return node.stored_at(host, length, False) if host >= 0 else None

    def is_known_data(self, offset: int, length: int) -> bool:
        """Whether all of the range is allocated, as far as the tables in memory tell."""
        return self._find(offset, length) >= 0

    def begin_writeback(self, offset: int, length: int) -> None:
        """Pass the hint on for allocated clusters."""
        host = self._find(offset, length)
        if host >= 0:
            self._files.data.begin_writeback(host, length)

    # Requests. Each counts itself in its epoch, so that no cluster it knows is used anew under it;
    # zeroes and discards do so bit by bit.

    async def _pread(self, offset: int, buffer: memoryview) -> None:
        epoch = self._reclaim.epoch
        epoch.users += 1
        try:
            host = self._find(offset, len(buffer))
            if host >= 0:
                node = self.edges[self._data_edge].node
                if node.takes_debug_events:
                    await node.debug_event(DebugEvent.READ_AIO)
                await node.pread(host, buffer)
                if self._cipher is not None:
                    self._cipher.decrypt(offset, host, buffer)
            else:
                await self._open_image.reader.read(offset, buffer)
        except CorruptionError as error:
            raise await self._signal(error) from error
        finally:
            epoch.users -= 1

    def pwrite_now(self, offset: int, data: memoryview) -> bool:
        """Write to clusters of this disk alone on the spot, if the file can."""
        node = self.edges[self._data_edge].node
        image = self._image
        if not self._writes_pass or node.takes_debug_events or image is None:
            return False
        host = self._find_private(offset, len(data))
        return host >= 0 and image.is_prepared and node.pwrite_now(host, data)

    async def _pwrite(self, offset: int, data: memoryview, fua: bool) -> None:
        epoch = self._reclaim.epoch
        epoch.users += 1
        try:
            host = self._find_private(offset, len(data))
            if host >= 0 and self._open_image.is_prepared:
                node = self.edges[self._data_edge].node
                if node.takes_debug_events:
                    await node.debug_event(DebugEvent.WRITE_AIO)
                if self._cipher is not None:
                    data = self._cipher.encrypted(offset, host, data)
                await node.pwrite(host, data)
            else:
                image = await self._prepared()
                await image.writer.write(offset, data)
        except CorruptionError as error:
            raise await self._signal(error) from error
        finally:
            epoch.users -= 1
        if fua:
            await self._flush()

    async def pwrite_compressed(self, offset: int, data: memoryview) -> None:
        """Write clusters compressed, as far as that makes them smaller.

        Args:
            offset: A multiple of the cluster size.
            data: Whole clusters, but for the disk's last one.

        Raises:
            NodeError: EINVAL if the range is not whole clusters; ENOTSUP if the image cannot have
                compressed clusters, or is encrypted, which they would not be.
        """
        size = self.cluster_size
        end = offset + len(data)
        if offset % size or (end % size and end != self._size):
            raise NodeError(errno.EINVAL, "compressed writes are of whole clusters")
        if self.header.has_data_file or self.is_encrypted:
            raise NodeError(errno.ENOTSUP)
        epoch = self._reclaim.epoch
        epoch.users += 1
        try:
            image = await self._prepared()
            for place in range(0, len(data), size):
                content = data[place : place + size]
                if len(content) < size:
                    content = memoryview(bytes(content).ljust(size, b"\0"))
                await image.writer.write_compressed(offset + place, content)
        except CorruptionError as error:
            raise await self._signal(error) from error
        finally:
            epoch.users -= 1

    async def _pwrite_zeroes(
        self, offset: int, length: int, fua: bool, may_unmap: bool, fast_only: bool
    ) -> None:
        try:
            image = await self._prepared()
            await image.zeroer.zero(offset, length, may_unmap=may_unmap, fast_only=fast_only)
        except CorruptionError as error:
            raise await self._signal(error) from error
        if fua:
            await self._flush()

    async def _pdiscard(self, offset: int, length: int) -> None:
        try:
            image = await self._prepared()
            await image.zeroer.discard(offset, length)
        except CorruptionError as error:
            raise await self._signal(error) from error

    async def _block_status(self, offset: int, length: int) -> BlockStatus:
        epoch = self._reclaim.epoch
        epoch.users += 1
        try:
            return await self._open_image.reader.status(offset, length)
        except CorruptionError as error:
            raise await self._signal(error) from error
        finally:
            epoch.users -= 1

    async def _flush(self) -> None:
        try:
            await self._open_image.flush()
        except CorruptionError as error:
            raise await self._signal(error) from error

    async def allocation(self, offset: int, length: int) -> tuple[bool, int]:
        """Look into the tables, and not at what is below."""
        extent = await self.find(offset, length)
        return extent.kind not in (Kind.UNALLOCATED, Kind.RESERVED), extent.length

    async def change_backing_file(self, name: str | None, driver: str | None) -> None:
        """Write the name, once everything is stable that clients have written so far.

        Until then a crash leaves an image that shows the same with the old backing file.
        """
        assert self._header is not None
        if self.header.is_data_file_raw and name is not None:
            raise NodeError(errno.EINVAL, "a raw data file has no backing file")
        encoded = None if name is None else name.encode(errors="surrogateescape")
        if encoded is not None and len(encoded) > constants.MAX_BACKING_NAME:
            raise NodeError(errno.EINVAL)
        kind = None if encoded is None or driver is None else driver.encode()
        changed = self.header.with_extension(ExtensionType.BACKING_FORMAT, kind)
        await self._flush()
        try:
            await self._header.change(backing_file=encoded, extensions=changed.extensions)
        except CommandError as error:
            raise NodeError(errno.ENOSPC, str(error)) from error

    async def cache(self, offset: int, length: int) -> None:
        """Bring the tables and the data of the range into caches."""
        epoch = self._reclaim.epoch
        epoch.users += 1
        try:
            while length:
                extent = await self._open_image.tables.find(offset, length)
                if extent.kind is Kind.DATA:
                    await self._files.data.cache(extent.host, extent.length)
                offset, length = offset + extent.length, length - extent.length
        except CorruptionError as error:
            raise await self._signal(error) from error
        finally:
            epoch.users -= 1

    async def _truncate(self, size: int) -> None:
        try:
            await resize(await self._prepared(), self._size, size, self._set_size)
        except CorruptionError as error:
            failure = await self._signal(error)
            raise CommandError(f"Failed to resize the image: {failure}") from error
        except NodeError as error:
            raise CommandError(f"Failed to resize the image: {error}") from error

    def _set_size(self, size: int) -> None:
        self._size = size

    async def find(self, offset: int, length: int) -> Extent:
        """Where the first run of a range inside the disk has its content, as the tables say.

        Raises:
            NodeError: They cannot be read, or cannot be true.
        """
        epoch = self._reclaim.epoch
        epoch.users += 1
        try:
            return await self._open_image.tables.find(offset, length)
        except CorruptionError as error:
            raise await self._signal(error) from error
        finally:
            epoch.users -= 1

    async def is_sparse_inside(self) -> bool:
        """Whether allocated clusters may be holes of the file, as after `preallocation=metadata`.

        So it is if more clusters are counted as in use than the file takes up, by a margin.

        Source: QEMU `block/qcow2-refcount.c` (qcow2_detect_metadata_preallocation).
        """
        geometry, file, refcounts = (
            self.header.geometry,
            self._files.file,
            self._open_image.refcounts,
        )
        stored = (file.allocated_size or 0) // geometry.cluster_size
        threshold = max(stored * 10 // 9, stored + 2)
        used = 0
        for cluster in range(geometry.clusters(file.size)):
            found = refcounts.cached_count(cluster)
            used += bool(await refcounts.count(cluster) if found is None else found)
            if used >= threshold:
                return True
        return False

    # Internal snapshots, all inside a drained section

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """The internal snapshots, oldest first."""
        return () if self._image is None else self._image.snapshots

    async def take_snapshot(self, name: str, date_ns: int) -> None:
        """Take a snapshot of the disk as it is.

        Args:
            name: What users call it.
            date_ns: Nanoseconds since the epoch.

        Raises:
            NodeError: It failed, and there is no new snapshot.
        """
        await self._with_image(lambda image: snapshotting.take(image, name, date_ns, self._size))

    async def delete_snapshot(self, snapshot: Snapshot) -> None:
        """Delete a snapshot.

        Raises:
            NodeError: It failed; it may be gone from the list all the same.
        """
        await self._with_image(lambda image: snapshotting.delete(image, snapshot))

    async def apply_snapshot(self, snapshot: Snapshot) -> None:
        """Make the disk what it was when the snapshot was taken; with permission to resize.

        Raises:
            CommandError: The size of the disk cannot be changed back.
            NodeError: It failed; the disk is as before, or as it is to be.
        """
        await self._with_image(lambda image: snapshotting.apply(image, snapshot, self._set_size))

    async def _with_image(self, change: Callable[[Image], Coroutine[Any, Any, None]]) -> None:
        """Change the list of snapshots; cancelling takes effect only when that is done."""
        if self.header.has_data_file:
            raise NodeError(errno.ENOTSUP)
        try:
            await unbroken(change(self._open_image))
        except CorruptionError as error:
            raise await self._signal(error) from error

    async def _prepared(self) -> Image:
        """The image, ready to be changed."""
        image = self._open_image
        if not image.is_prepared:
            await image.prepare()
        return image

    # Damage

    async def _signal(self, error: CorruptionError) -> NodeError:
        """Tell the user of damage; what could destroy more makes the node unusable."""
        is_fatal = error.is_fatal and self._is_writable
        if is_fatal and not self._is_dead:
            self._is_dead = True
            self._forget_tables()
            logger.error(
                "qcow2: Marking image as corrupt: %s; further corruption events will be suppressed",
                error,
            )
            self._emit(error, is_fatal=True)
            await self._mark_corrupt()
        elif not self._has_told and not self._is_dead:
            logger.error(
                "qcow2: Image is corrupt: %s;"
                " further non-fatal corruption events will be suppressed",
                error,
            )
            self._emit(error, is_fatal=False)
        self._has_told = True
        return NodeError(errno.EIO, f"the image is corrupt: {error}")

    def _emit(self, error: CorruptionError, *, is_fatal: bool) -> None:
        if self._tell is not None:
            self._tell(
                BlockImageCorrupted(
                    device="",
                    node_name=self.name,
                    msg=error.message,
                    offset=None if error.offset < 0 else error.offset,
                    size=None if error.size < 0 else error.size,
                    fatal=is_fatal,
                )
            )

    async def _mark_corrupt(self) -> None:
        assert self._header is not None
        if self.header.version < 3:
            return
        incompatible = self.header.incompatible | Incompatible.CORRUPT
        try:
            await self._header.change(incompatible=incompatible)
        except (NodeError, CorruptionError) as failure:
            logger.error("%s cannot be marked as corrupt: %s", self.name, failure)

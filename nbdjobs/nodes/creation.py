# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""New images by their options: a file, or a format over a node that is there.

Source: QEMU qapi/block-core.json (BlockdevCreateOptions), and the behaviour of its storage daemon.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

from nbdjobs.errors import CommandError
from nbdjobs.nodes import permissions
from nbdjobs.nodes.crypto.creation import LuksCreateOptions, create_luks, new_volume
from nbdjobs.nodes.crypto.luks import FilledSlot
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.drivers import DRIVERS
from nbdjobs.nodes.file import FileNode
from nbdjobs.nodes.file_creation import NewFile, create_file
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.opening import open_unowned
from nbdjobs.nodes.options import BlockdevOptions, BlockdevRef
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.preallocation import Preallocation
from nbdjobs.nodes.qcow2 import create as qcow2
from nbdjobs.nodes.qcow2.constants import CompressionType, Encryption
from nbdjobs.qapi.types import INT64_MAX, Size, flat_union

if TYPE_CHECKING:

    class BlockdevDriver(StrEnum):
        """Names of drivers (QAPI `BlockdevDriver`)."""

else:
    BlockdevDriver = StrEnum("BlockdevDriver", {name.upper(): name for name in DRIVERS})


def _branches() -> Mapping[str, type]:
    own: Mapping[str, type] = {
        "file": BlockdevCreateOptionsFile,
        "luks": BlockdevCreateOptionsLUKS,
        "qcow2": BlockdevCreateOptionsQcow2,
    }
    return {name: own.get(name, BlockdevCreateOptions) for name in DRIVERS}


@flat_union("driver", _branches)
@dataclass(frozen=True, slots=True, kw_only=True)
class BlockdevCreateOptions:
    """A new image (QAPI `BlockdevCreateOptions`)."""

    driver: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockdevCreateOptionsFile(BlockdevCreateOptions):
    """A new file (QAPI `BlockdevCreateOptionsFile`); see `file_creation.NewFile`."""

    filename: str
    size: Size
    preallocation: Preallocation = Preallocation.OFF
    nocow: bool = False
    extent_size_hint: Size = 1024 * 1024


@dataclass(frozen=True, kw_only=True)
class BlockdevCreateOptionsLUKS(BlockdevCreateOptions, LuksCreateOptions):
    """A new LUKS volume (QAPI `BlockdevCreateOptionsLUKS`)."""

    file: BlockdevRef
    size: Size
    preallocation: Preallocation = Preallocation.OFF


@flat_union(
    "format",
    lambda: {"luks": QCryptoBlockCreateOptionsLUKS, "qcow": QCryptoBlockCreateOptionsQCow},
)
@dataclass(frozen=True, kw_only=True)
class QCryptoBlockCreateOptions:
    """How data is encrypted in a new image."""

    format: str


@dataclass(frozen=True, kw_only=True)
class QCryptoBlockCreateOptionsQCow(QCryptoBlockCreateOptions):
    """By the older AES method, with the password of a secret."""

    key_secret: str | None = None


@dataclass(frozen=True, kw_only=True)
class QCryptoBlockCreateOptionsLUKS(QCryptoBlockCreateOptions, LuksCreateOptions):
    """As LUKS volumes are."""


class Qcow2Version(StrEnum):
    """QAPI `BlockdevQcow2Version`."""

    V2 = "v2"
    V3 = "v3"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockdevCreateOptionsQcow2(BlockdevCreateOptions):
    """A new qcow2 image (QAPI `BlockdevCreateOptionsQcow2`); see `qcow2.create.CreateOptions`."""

    file: BlockdevRef
    data_file: BlockdevRef | None = None
    data_file_raw: bool = False
    extended_l2: bool = False
    size: Size
    version: Qcow2Version = Qcow2Version.V3
    backing_file: str | None = None
    backing_fmt: BlockdevDriver | None = None
    encrypt: QCryptoBlockCreateOptions | None = None
    cluster_size: Size = qcow2.DEFAULT_CLUSTER_SIZE
    preallocation: Preallocation = Preallocation.OFF
    lazy_refcounts: bool = False
    refcount_bits: int = qcow2.DEFAULT_REFCOUNT_BITS
    compression_type: CompressionType = CompressionType.ZLIB


def check_creatable(options: BlockdevCreateOptions) -> None:
    """Raise `CommandError` if images of the driver cannot be made."""
    if options.driver not in _CREATORS:
        raise CommandError("Driver does not support blockdev-create")


async def create_image(graph: Graph, options: BlockdevCreateOptions) -> None:
    """Make an image.

    Args:
        graph: Where its nodes are, and secrets.
        options: What it is like; `check_creatable` has been asked.

    Raises:
        CommandError: It cannot be done, in QEMU's words; as far as that is not because of the
            options, what was there before may be lost.
        NodeError: Writing failed.
    """
    await _CREATORS[options.driver](graph, options)


async def _create_file(graph: Graph, options: BlockdevCreateOptionsFile) -> None:
    in_use = {
        node.file_id: node.name
        for node in graph.nodes.values()
        if isinstance(node, FileNode) and node.parents
    }
    new = NewFile(
        path=options.filename,
        size=_signed(options.size),
        preallocation=options.preallocation,
        is_without_copy_on_write=options.nocow,
        extent_size_hint=options.extent_size_hint,
    )
    await create_file(new, in_use)


async def _create_luks(graph: Graph, options: BlockdevCreateOptionsLUKS) -> None:
    async with _open_for_creation(graph, options.file) as file:
        size = _signed(options.size)
        volume = await create_luks(file, options, size, graph.secrets)
        if options.preallocation in (Preallocation.FALLOC, Preallocation.FULL):
            start = volume.header.payload_offset
            await qcow2.fill(options.preallocation, file, start, size)
        await file.flush()


async def _create_qcow2(graph: Graph, options: BlockdevCreateOptionsQcow2) -> None:
    async with _open_for_creation(graph, options.file) as file:
        if options.data_file is None:
            await _format_qcow2(graph, options, file, None)
        else:
            async with _open_for_creation(graph, options.data_file) as data_file:
                await _format_qcow2(graph, options, file, data_file)


async def _find_encryption(
    graph: Graph, options: BlockdevCreateOptionsQcow2
) -> tuple[Encryption, FilledSlot | None]:
    """The method, and for LUKS the first key."""
    match options.encrypt:
        case QCryptoBlockCreateOptionsLUKS() as chosen:
            return Encryption.LUKS, await new_volume(chosen, graph.secrets, prefix="encrypt.")
        case QCryptoBlockCreateOptionsQCow(key_secret=name):
            graph.secrets.find_required_password(name, "encrypt.")
            return Encryption.AES, None
    return Encryption.NONE, None


async def _format_qcow2(
    graph: Graph, options: BlockdevCreateOptionsQcow2, file: Node, data_file: Node | None
) -> None:
    encryption, keys = await _find_encryption(graph, options)
    created = qcow2.CreateOptions(
        size=_signed(options.size),
        version=2 if options.version is Qcow2Version.V2 else 3,
        cluster_size=options.cluster_size,
        refcount_bits=options.refcount_bits,
        backing_file=options.backing_file,
        backing_format=options.backing_fmt,
        preallocation=options.preallocation,
        is_lazy=options.lazy_refcounts,
        is_extended=options.extended_l2,
        data_file=None if data_file is None else data_file.filename,
        is_data_file_raw=options.data_file_raw,
        compression=options.compression_type,
        encryption=encryption,
        keys=keys,
    )
    await qcow2.create(created, file, data_file)


@asynccontextmanager
async def _open_for_creation(graph: Graph, reference: BlockdevRef) -> AsyncIterator[Node]:
    """A node whose content and size may be changed, for nobody else meanwhile."""
    if isinstance(reference, BlockdevOptions):
        node = await open_unowned(graph, reference)
    else:
        found = graph.nodes.get(reference)
        if found is None:
            raise CommandError(f"Cannot find device='{reference}' nor node-name='{reference}'")
        node = found
    try:
        changes = Permission.WRITE | Permission.RESIZE
        # Two steps, so that a refusal names the conflict that QEMU would name.
        user = Device(graph, node, needed=changes, shared=permissions.ALL)
        try:
            graph.set_permissions(user.edge, changes, permissions.ALL & ~changes)
            async with graph.drained(node):
                yield node
        finally:
            await user.close()
    finally:
        await graph.drop_if_unused(node)


def _signed(size: int) -> int:
    """A size as QEMU takes it: what does not fit into 63 bits is negative."""
    return size - (1 << 64) if size > INT64_MAX else size


_CREATORS: Final[Mapping[str, Callable[[Graph, Any], Awaitable[None]]]] = {
    "file": _create_file,
    "luks": _create_luks,
    "qcow2": _create_qcow2,
}

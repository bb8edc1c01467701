# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Header extensions: a chain of typed sections behind the header, kept as they were found."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from struct import Struct
from typing import ClassVar, Final, NamedTuple, Self

from nbdjobs.errors import CommandError
from nbdjobs.nodes.qcow2.constants import (
    MAX_BITMAP_DIRECTORY_BYTES,
    MAX_BITMAPS,
    ExtensionType,
    Incompatible,
)
from nbdjobs.nodes.rounding import round_up

_HEAD: Final = Struct(">II")
_ALIGNMENT: Final = 8


class Extension(NamedTuple):
    """One section; `kind` is any 32-bit number but 0."""

    kind: int
    data: bytes


def parse_extensions(area: bytes) -> tuple[Extension, ...]:
    """Read the sections in the bytes between the header and the backing file's name.

    Raises:
        CommandError: A section is longer than the area, or one comes twice that must not.
    """
    found: list[Extension] = []
    position = 0
    while position + _HEAD.size <= len(area):
        kind, length = _HEAD.unpack_from(area, position)
        if kind == ExtensionType.END:
            break
        position += _HEAD.size
        if length > len(area) - position:
            raise CommandError("Header extension too large")
        found.append(Extension(kind, area[position : position + length]))
        position += round_up(length, _ALIGNMENT)
    known = [extension.kind for extension in found if extension.kind in _KNOWN]
    if len(known) != len(set(known)):
        raise CommandError("A header extension is there twice")
    return tuple(found)


_KNOWN: Final = frozenset(ExtensionType)


def pack_extensions(extensions: Iterable[Extension]) -> bytes:
    """Write the sections and the end mark behind them."""
    packed = b"".join(
        _HEAD.pack(kind, len(data)) + data + bytes(-len(data) % _ALIGNMENT)
        for kind, data in extensions
    )
    return packed + _HEAD.pack(ExtensionType.END, 0)


_POINTER: Final = Struct(">QQ")


def encryption_pointer(offset: int, length: int) -> Extension:
    """Where the LUKS header is in the image file, and its length with all of its keys."""
    return Extension(ExtensionType.ENCRYPTION, _POINTER.pack(offset, length))


def read_encryption_pointer(data: bytes, cluster_size: int) -> tuple[int, int]:
    """Offset and length of the LUKS header; `CommandError` in QEMU's words if they cannot be."""
    if len(data) != _POINTER.size:
        raise CommandError(
            f"CRYPTO header extension size {len(data)}, but expected size {_POINTER.size}"
        )
    offset, length = _POINTER.unpack(data)
    if offset % cluster_size:
        raise CommandError(
            f"Encryption header offset '{offset}' is not a multiple of cluster size"
            f" '{cluster_size}'"
        )
    return offset, length


class FeatureField(NamedTuple):
    """A bit of one of the feature fields: 0 is incompatible, 1 compatible, 2 autoclear."""

    kind: int
    bit: int


_FEATURE: Final = Struct("BB46s")

_FEATURE_NAMES: Final[Mapping[FeatureField, str]] = {
    FeatureField(0, 0): "dirty bit",
    FeatureField(0, 1): "corrupt bit",
    FeatureField(0, 2): "external data file",
    FeatureField(0, 3): "compression type",
    FeatureField(0, 4): "extended L2 entries",
    FeatureField(1, 0): "lazy refcounts",
    FeatureField(2, 0): "bitmaps",
    FeatureField(2, 1): "raw external data",
}


def feature_table() -> Extension:
    """The names of all features of the format that are known here."""
    data = b"".join(
        _FEATURE.pack(kind, bit, name.encode()) for (kind, bit), name in _FEATURE_NAMES.items()
    )
    return Extension(ExtensionType.FEATURE_NAMES, data)


def feature_names(data: bytes) -> dict[FeatureField, str]:
    """Read a table of names; a piece of an entry at its end is ignored."""
    whole = len(data) - len(data) % _FEATURE.size
    return {
        FeatureField(kind, bit): name.split(b"\0")[0].decode(errors="replace")
        for kind, bit, name in _FEATURE.iter_unpack(data[:whole])
    }


def describe_unknown(unknown: int, names: Mapping[FeatureField, str]) -> str:
    """Name incompatible features that are not known here, as far as the image names them."""
    words = []
    unnamed = 0
    for bit in range(64):
        if unknown >> bit & 1:
            name = names.get(FeatureField(0, bit))
            if name:
                words.append(name)
            else:
                unnamed |= 1 << bit
    if unnamed:
        words.append(f"Unknown incompatible feature: {unnamed:x}")
    return ", ".join(words)


assert 1 << max(f.bit for f in _FEATURE_NAMES if f.kind == 0) == Incompatible.EXTENDED_L2


@dataclass(frozen=True, slots=True)
class BitmapsExtension:
    """Where the persistent bitmaps are.

    Attributes:
        count: Bitmaps in the directory, 1 to 65535.
        directory_size: Bytes of the directory.
        directory_offset: Where it is in the image file, a multiple of the cluster size.
    """

    LAYOUT: ClassVar = Struct(">IIQQ")

    count: int
    directory_size: int
    directory_offset: int

    def pack(self) -> bytes:
        """The extension's data."""
        return self.LAYOUT.pack(self.count, 0, self.directory_size, self.directory_offset)

    @classmethod
    def unpack(cls, data: bytes, cluster_size: int) -> Self:
        """Read and check the extension.

        Raises:
            CommandError: It cannot be true, in QEMU's words.
        """
        if len(data) != cls.LAYOUT.size:
            raise CommandError("bitmaps_ext: Invalid extension length")
        count, reserved, size, offset = cls.LAYOUT.unpack(data)
        if reserved:
            raise CommandError("bitmaps_ext: Reserved field is not zero")
        if count > MAX_BITMAPS:
            raise CommandError(
                f"bitmaps_ext: image has {count} bitmaps, exceeding the QEMU supported maximum of"
                f" {MAX_BITMAPS}"
            )
        if not count:
            raise CommandError("found bitmaps extension with zero bitmaps")
        if offset % cluster_size:
            raise CommandError("bitmaps_ext: invalid bitmap directory offset")
        if size > MAX_BITMAP_DIRECTORY_BYTES:
            raise CommandError(
                f"bitmaps_ext: bitmap directory size ({size}) exceeds the maximum supported size"
                f" ({MAX_BITMAP_DIRECTORY_BYTES})"
            )
        return cls(count, size, offset)

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The header: the first cluster of an image, read and checked, and written back whole.

Whatever is not understood here (additional fields, extensions, compatible features) is carried
along unchanged.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from struct import Struct
from typing import ClassVar, Final, Self

from nbdjobs.errors import CommandError
from nbdjobs.nodes.qcow2 import constants
from nbdjobs.nodes.qcow2.constants import (
    Autoclear,
    Compatible,
    CompressionType,
    Encryption,
    ExtensionType,
    Incompatible,
)
from nbdjobs.nodes.qcow2.extensions import (
    BitmapsExtension,
    Extension,
    describe_unknown,
    feature_names,
    pack_extensions,
    parse_extensions,
)
from nbdjobs.nodes.qcow2.geometry import Geometry
from nbdjobs.nodes.rounding import round_up

V2_LENGTH: Final = 72
V3_LENGTH: Final = 104
_COMPRESSION_FIELD: Final = slice(104, 105)
_CURRENT_LENGTH: Final = 112


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What the first cluster says.

    Attributes:
        version: 2 or 3.
        cluster_bits: Size of a cluster, as a power of two.
        size: Bytes of the disk.
        crypt_method: How the payload is encrypted.
        l1_size: Entries of the active L1 table.
        l1_offset: Where it is in the image file.
        refcount_table_offset: Where the refcount table is.
        refcount_table_clusters: How many clusters it has.
        snapshot_count: Internal snapshots.
        snapshots_offset: Where their table is.
        incompatible: Features that must be known.
        compatible: Features that may be ignored, with bits not known here.
        autoclear: Features that a writer must know or clear.
        refcount_order: Width of a refcount in bits, as a power of two.
        additional: Bytes of version 3's header beyond byte 104, the compression type among them.
        extensions: All of them, in order.
        backing_file: Name of the backing file, or None.
    """

    V2: ClassVar = Struct(">IIQIIQIIQQIIQ")
    V3: ClassVar = Struct(">QQQII")

    version: int
    cluster_bits: int
    size: int
    crypt_method: int = Encryption.NONE
    l1_size: int
    l1_offset: int
    refcount_table_offset: int
    refcount_table_clusters: int
    snapshot_count: int = 0
    snapshots_offset: int = 0
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    additional: bytes = b""
    extensions: tuple[Extension, ...] = ()
    backing_file: bytes | None = None

    # What it means

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def has_data_file(self) -> bool:
        """Whether guest clusters are in another file."""
        return bool(self.incompatible & Incompatible.DATA_FILE)

    @property
    def is_lazy(self) -> bool:
        """Whether refcounts may be written late."""
        return bool(self.compatible & Compatible.LAZY_REFCOUNTS)

    @property
    def is_data_file_raw(self) -> bool:
        """Whether the data file has to be a raw image of the disk at any time."""
        return self.has_data_file and bool(self.autoclear & Autoclear.RAW_DATA_FILE)

    @property
    def compression_type(self) -> CompressionType:
        """How compressed clusters are compressed."""
        number = int.from_bytes(self.additional[:1])
        return CompressionType.ZSTD if number else CompressionType.ZLIB

    @property
    def geometry(self) -> Geometry:
        """Sizes that follow."""
        return Geometry(
            version=self.version,
            cluster_bits=self.cluster_bits,
            refcount_order=self.refcount_order,
            is_extended=bool(self.incompatible & Incompatible.EXTENDED_L2),
            has_data_file=self.has_data_file,
        )

    @property
    def bitmaps(self) -> BitmapsExtension | None:
        """Where persistent bitmaps are, if there are any that can be trusted."""
        data = self.extension(ExtensionType.BITMAPS)
        if data is None or not self.autoclear & Autoclear.BITMAPS:
            return None
        return BitmapsExtension.unpack(data, self.cluster_size)

    @property
    def backing_format(self) -> str | None:
        """The driver of the backing file, if the image names one."""
        return self._string(ExtensionType.BACKING_FORMAT)

    @property
    def data_file(self) -> str | None:
        """The name of the external data file, if the image names one."""
        return self._string(ExtensionType.DATA_FILE)

    def extension(self, kind: int) -> bytes | None:
        """The data of the extension of a type."""
        return next((data for found, data in self.extensions if found == kind), None)

    def _string(self, kind: int) -> str | None:
        data = self.extension(kind)
        return None if data is None else data.decode(errors="surrogateescape")

    def with_extension(self, kind: int, data: bytes | None) -> Header:
        """The same with an extension's data changed, added, or (None) taken out."""
        kept = [extension for extension in self.extensions if extension.kind != kind]
        if data is not None:
            at = next((i for i, e in enumerate(self.extensions) if e.kind == kind), len(kept))
            kept.insert(at, Extension(kind, data))
        return replace(self, extensions=tuple(kept))

    # Reading

    @classmethod
    def cluster_size_of(cls, start: bytes) -> int:
        """How many bytes have to be read for `parse`, given the first 512.

        Raises:
            CommandError: It is no qcow2 image, or none that can be opened.
        """
        if len(start) < V2_LENGTH or int.from_bytes(start[:4]) != constants.MAGIC:
            raise CommandError("Image is not in qcow2 format")
        version = int.from_bytes(start[4:8])
        if version not in (2, 3):
            raise CommandError(f"Unsupported qcow2 version {version}")
        bits = int.from_bytes(start[20:24])
        if not constants.MIN_CLUSTER_BITS <= bits <= constants.MAX_CLUSTER_BITS:
            raise CommandError(f"Unsupported cluster size: 2^{bits}")
        return 1 << bits

    @classmethod
    def parse(cls, cluster: bytes) -> Self:
        """Read and check the first cluster, or as much of it as the file has.

        Raises:
            CommandError: What is wrong, in QEMU's words.
        """
        cls.cluster_size_of(cluster)
        fields = cls.V2.unpack_from(cluster)
        _, version, name_offset, name_length, cluster_bits, size, crypt, l1_size, l1_offset = (
            fields[:9]
        )
        table_offset, table_clusters, snapshots, snapshots_offset = fields[9:]
        incompatible = compatible = autoclear = 0
        order, length = 4, V2_LENGTH
        if version == 3:
            if len(cluster) < V3_LENGTH:
                raise CommandError("qcow2 header too short")
            incompatible, compatible, autoclear, order, length = cls.V3.unpack_from(
                cluster, V2_LENGTH
            )
            if length < V3_LENGTH:
                raise CommandError("qcow2 header too short")
        if length > 1 << cluster_bits:
            raise CommandError("qcow2 header exceeds cluster size")
        end = name_offset or 1 << cluster_bits
        if name_offset > 1 << cluster_bits:
            raise CommandError("Invalid backing file offset")
        header = cls(
            version=version,
            cluster_bits=cluster_bits,
            size=size,
            crypt_method=crypt,
            l1_size=l1_size,
            l1_offset=l1_offset,
            refcount_table_offset=table_offset,
            refcount_table_clusters=table_clusters,
            snapshot_count=snapshots,
            snapshots_offset=snapshots_offset,
            incompatible=incompatible,
            compatible=compatible,
            autoclear=autoclear,
            refcount_order=order,
            additional=cluster[V3_LENGTH:length] if version == 3 else b"",
        )
        # The names of features come from an extension, so those are read before all is checked.
        header = replace(header, extensions=parse_extensions(cluster[length:end]))
        header.check()
        if not name_offset:
            return header
        return replace(header, backing_file=_backing_name(cluster, name_offset, name_length))

    def check(self) -> None:
        """Refuse what is not known, not supported, or cannot be.

        Raises:
            CommandError: In QEMU's words.
        """
        self._check_features()
        if self.refcount_order > constants.MAX_REFCOUNT_ORDER:
            raise CommandError("Reference count entry width too large; may not exceed 64 bits")
        if self.crypt_method > Encryption.LUKS:
            raise CommandError(f"Unsupported encryption method {self.crypt_method}")
        self._check_tables()
        self._check_extensions()

    def _check_features(self) -> None:
        unknown = self.incompatible & ~constants.INCOMPATIBLE_ALL
        if unknown:
            names = feature_names(self.extension(ExtensionType.FEATURE_NAMES) or b"")
            raise CommandError(f"Unsupported qcow2 feature(s): {describe_unknown(unknown, names)}")
        number = int.from_bytes(self.additional[:1])
        if bool(self.incompatible & Incompatible.COMPRESSION) != bool(number):
            word = "" if number else "not "
            raise CommandError(
                f"qcow2: Compression type incompatible feature bit must {word}be set"
            )
        if number > 1:
            raise CommandError(f"qcow2: unknown compression type: {number}")
        smallest = constants.MIN_EXTENDED_CLUSTER_BITS
        if self.incompatible & Incompatible.EXTENDED_L2 and self.cluster_bits < smallest:
            raise CommandError(
                f"Unsupported subcluster size: {self.cluster_size // constants.SUBCLUSTERS}"
            )
        if self.autoclear & Autoclear.RAW_DATA_FILE and not self.has_data_file:
            raise CommandError("data-file-raw requires a data file")

    def _check_tables(self) -> None:
        table_bytes = self.refcount_table_clusters << self.cluster_bits
        self._check_table(
            "Reference count table",
            self.refcount_table_offset,
            table_bytes,
            constants.MAX_REFCOUNT_TABLE_BYTES,
        )
        if not self.refcount_table_clusters:
            raise CommandError("Image does not contain a reference count table")
        if self.snapshot_count > constants.MAX_SNAPSHOTS:
            raise CommandError("Snapshot table too large")
        if self.snapshot_count:
            self._check_table("Snapshot table", self.snapshots_offset)
        self._check_table(
            "Active L1 table",
            self.l1_offset,
            self.l1_size * constants.ENTRY_SIZE,
            constants.MAX_L1_BYTES,
        )
        needed = self.geometry.l1_entries(self.size)
        if needed * constants.ENTRY_SIZE > constants.MAX_L1_BYTES:
            raise CommandError("Image is too big")
        if self.l1_size < needed:
            raise CommandError("L1 table is too small")
        # QEMU opens these, and then takes the header for a table.
        if self.l1_size and not self.l1_offset:
            raise CommandError("Active L1 table offset invalid")
        if not self.refcount_table_offset:
            raise CommandError("Reference count table offset invalid")

    def _check_table(self, name: str, offset: int, length: int = 0, longest: int = 0) -> None:
        if length > longest:
            raise CommandError(f"{name} too large")
        if offset + length >= 1 << 63 or offset % self.cluster_size:
            raise CommandError(f"{name} offset invalid")

    def _check_extensions(self) -> None:
        name = self.extension(ExtensionType.BACKING_FORMAT)
        if name is not None and len(name) > constants.MAX_FORMAT_NAME:
            raise CommandError(
                f"ERROR: ext_backing_format: len={len(name)} too large"
                f" (>={constants.MAX_FORMAT_NAME + 1})"
            )
        if self.autoclear & Autoclear.BITMAPS:
            self.bitmaps  # noqa: B018 - reading it checks it

    # Writing

    def pack(self) -> bytes:
        """The first cluster up to the end of what is used of it.

        Raises:
            CommandError: It does not fit into a cluster.
        """
        length = V2_LENGTH if self.version == 2 else V3_LENGTH + len(self.additional)
        packed = bytearray(length)
        middle = pack_extensions(self.extensions)
        name = self.backing_file
        name_offset = 0 if name is None else length + len(middle)
        self.V2.pack_into(
            packed,
            0,
            constants.MAGIC,
            self.version,
            name_offset,
            len(name or b""),
            self.cluster_bits,
            self.size,
            self.crypt_method,
            self.l1_size,
            self.l1_offset,
            self.refcount_table_offset,
            self.refcount_table_clusters,
            self.snapshot_count,
            self.snapshots_offset,
        )
        if self.version == 3:
            features = (self.incompatible, self.compatible, self.autoclear)
            self.V3.pack_into(packed, V2_LENGTH, *features, self.refcount_order, length)
            packed[V3_LENGTH:] = self.additional
        whole = bytes(packed) + middle + (name or b"")
        if len(whole) > self.cluster_size:
            raise CommandError("Image header is too large for its cluster size")
        return whole


def additional_for(compression: CompressionType) -> bytes:
    """The additional fields of a new image of version 3."""
    field = bytes([constants.COMPRESSION_NUMBERS[compression]])
    return field.ljust(round_up(_CURRENT_LENGTH - V3_LENGTH, 8), b"\0")


def _backing_name(cluster: bytes, offset: int, length: int) -> bytes:
    cluster_size = Header.cluster_size_of(cluster)
    if length > min(constants.MAX_BACKING_NAME, cluster_size - offset):
        raise CommandError("Backing file name too long")
    return cluster[offset : offset + length]

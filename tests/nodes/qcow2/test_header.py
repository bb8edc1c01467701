# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The header: what is written is read, what cannot be is refused, and nothing is lost."""

from __future__ import annotations

import contextlib
import re
import struct
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.errors import CommandError
from nbdjobs.nodes.qcow2 import constants
from nbdjobs.nodes.qcow2.constants import (
    Autoclear,
    CompressionType,
    ExtensionType,
    Incompatible,
)
from nbdjobs.nodes.qcow2.extensions import (
    BitmapsExtension,
    Extension,
    FeatureField,
    feature_names,
    feature_table,
)
from nbdjobs.nodes.qcow2.header import Header, additional_for

CLUSTER = 65536

PLAIN = Header(
    version=3,
    cluster_bits=16,
    size=64 << 20,
    l1_size=1,
    l1_offset=3 * CLUSTER,
    refcount_table_offset=CLUSTER,
    refcount_table_clusters=1,
    additional=additional_for(CompressionType.ZLIB),
)


def patched(offset: int, layout: str, value: int, header: Header = PLAIN) -> bytes:
    """A header with one field overwritten."""
    packed = bytearray(header.pack().ljust(header.cluster_size, b"\0"))
    struct.pack_into(layout, packed, offset, value)
    return bytes(packed)


unknown_extensions = st.lists(
    st.tuples(st.integers(1, 0xFFFF), st.binary(max_size=40)), max_size=4
).map(lambda pairs: tuple(Extension(*pair) for pair in pairs))


@st.composite
def headers(draw: st.DrawFn) -> Header:
    version = draw(st.sampled_from([2, 3]))
    bits = draw(st.integers(constants.MIN_CLUSTER_BITS, constants.MAX_CLUSTER_BITS))
    is_extended = version == 3 and bits >= 14 and draw(st.booleans())
    compression = draw(st.sampled_from(list(CompressionType))) if version == 3 else None
    incompatible = draw(st.integers(0, 7)) if version == 3 else 0
    incompatible |= Incompatible.EXTENDED_L2 if is_extended else 0
    if compression is CompressionType.ZSTD:
        incompatible |= Incompatible.COMPRESSION
    extensions = draw(unknown_extensions)
    if draw(st.booleans()):
        extensions += (Extension(ExtensionType.BACKING_FORMAT, b"raw"),)
    autoclear = 0
    if version == 3:
        # Bits that nobody knows yet may be set.
        allowed = ~Autoclear.BITMAPS & ~(
            0 if incompatible & Incompatible.DATA_FILE else Autoclear.RAW_DATA_FILE
        )
        autoclear = draw(st.integers(0, (1 << 64) - 1)) & allowed
    geometry_size = draw(st.integers(0, 1 << 30)) * 512
    header = Header(
        version=version,
        cluster_bits=bits,
        size=geometry_size,
        l1_size=0,
        l1_offset=draw(st.integers(1, 1000)) << bits,
        refcount_table_offset=draw(st.integers(1, 1000)) << bits,
        refcount_table_clusters=draw(st.integers(1, 4)),
        incompatible=incompatible,
        compatible=draw(st.integers(0, (1 << 64) - 1)) if version == 3 else 0,
        autoclear=autoclear,
        refcount_order=draw(st.integers(0, 6)) if version == 3 else 4,
        additional=(
            additional_for(compression) + draw(st.binary(max_size=4)) * 2 if compression else b""
        ),
        extensions=extensions,
        backing_file=draw(st.none() | st.binary(min_size=1, max_size=60)),
    )
    entries = header.geometry.l1_entries(header.size)
    if entries * 8 > constants.MAX_L1_BYTES:
        header = replace(header, size=512)
        entries = 1
    return replace(header, l1_size=entries)


@given(headers())
def test_what_is_written_is_read(header: Header) -> None:
    try:
        packed = header.pack()
    except CommandError:
        assert header.cluster_bits == 9, "only the smallest clusters are too small for a header"
        return
    assert Header.parse(packed.ljust(header.cluster_size, b"\0")) == header


@given(headers(), st.data())
def test_any_change_of_a_header_is_read_or_refused(header: Header, data: st.DataObject) -> None:
    try:
        packed = bytearray(header.pack())
    except CommandError:
        return
    for _ in range(3):
        place = data.draw(st.integers(0, len(packed) - 1))
        packed[place] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(packed)))
    for whole in (bytes(packed), bytes(packed[:cut]), bytes(packed).ljust(4096, b"\xff")):
        with contextlib.suppress(CommandError):
            Header.parse(whole)


@given(st.binary(max_size=700))
def test_any_bytes_are_read_or_refused(junk: bytes) -> None:
    for version in (2, 3):
        with contextlib.suppress(CommandError):
            Header.parse(struct.pack(">II", constants.MAGIC, version) + junk)


@pytest.mark.parametrize(
    ("offset", "layout", "value", "message"),
    [
        (0, ">I", 1, "Image is not in qcow2 format"),
        (4, ">I", 9, "Unsupported qcow2 version 9"),
        (8, ">Q", 1 << 20, "Invalid backing file offset"),
        (20, ">I", 30, "Unsupported cluster size: 2^30"),
        (20, ">I", 8, "Unsupported cluster size: 2^8"),
        (24, ">Q", 1 << 62, "Image is too big"),
        (32, ">I", 3, "Unsupported encryption method 3"),
        (36, ">I", 0, "L1 table is too small"),
        (36, ">I", 1 << 30, "Active L1 table too large"),
        (40, ">Q", 77, "Active L1 table offset invalid"),
        (40, ">Q", 0, "Active L1 table offset invalid"),
        (48, ">Q", 5, "Reference count table offset invalid"),
        (48, ">Q", 0, "Reference count table offset invalid"),
        (56, ">I", 0, "Image does not contain a reference count table"),
        (56, ">I", 1 << 20, "Reference count table too large"),
        (60, ">I", 1 << 20, "Snapshot table too large"),
        (72, ">Q", 8, "qcow2: Compression type incompatible feature bit must not be set"),
        (
            72,
            ">Q",
            1 << 7 | 1 << 9,
            "Unsupported qcow2 feature(s): Unknown incompatible feature: 280",
        ),
        (88, ">Q", 2, "data-file-raw requires a data file"),
        (96, ">I", 7, "Reference count entry width too large; may not exceed 64 bits"),
        (100, ">I", 80, "qcow2 header too short"),
        (100, ">I", 1 << 20, "qcow2 header exceeds cluster size"),
        (104, ">B", 1, "qcow2: Compression type incompatible feature bit must be set"),
        (116, ">I", 1 << 20, "Header extension too large"),
    ],
)
def test_what_cannot_be_is_refused_in_the_words_that_users_know(
    offset: int, layout: str, value: int, message: str
) -> None:
    header = replace(PLAIN, extensions=(feature_table(),))
    with pytest.raises(CommandError, match="^" + re.escape(message)):
        Header.parse(patched(offset, layout, value, header))


def test_an_unknown_feature_is_called_by_the_name_that_the_image_gives_it() -> None:
    names = struct.pack("BB46s", 0, 17, b"time travel")
    header = replace(
        PLAIN,
        incompatible=1 << 17,
        extensions=(Extension(ExtensionType.FEATURE_NAMES, names),),
    )
    with pytest.raises(CommandError, match=r"^Unsupported qcow2 feature\(s\): time travel$"):
        Header.parse(header.pack())


def test_the_names_of_features_are_those_of_the_specification() -> None:
    assert feature_names(feature_table().data)[FeatureField(0, 4)] == "extended L2 entries"
    assert feature_names(feature_table().data)[FeatureField(2, 0)] == "bitmaps"


def test_a_name_longer_than_allowed_is_refused() -> None:
    cluster = bytearray(PLAIN.pack().ljust(CLUSTER, b"\0"))
    struct.pack_into(">QI", cluster, 8, 600, 1024)
    with pytest.raises(CommandError, match=r"^Backing file name too long$"):
        Header.parse(bytes(cluster))


def test_extensions_are_changed_where_they_stand_and_others_stay() -> None:
    header = replace(PLAIN, extensions=(Extension(1, b"a"), Extension(2, b"b"), Extension(3, b"")))
    assert header.with_extension(2, b"new").extensions[1] == Extension(2, b"new")
    assert header.with_extension(2, None).extensions == (Extension(1, b"a"), Extension(3, b""))
    assert header.with_extension(9, b"z").extensions[3] == Extension(9, b"z")


@given(st.binary(max_size=24).map(lambda data: data.ljust(24, b"\0")))
def test_the_bitmaps_extension_is_read_or_refused(data: bytes) -> None:
    try:
        extension = BitmapsExtension.unpack(data, CLUSTER)
    except CommandError:
        return
    assert extension.pack() == data


def test_bitmaps_count_only_while_their_feature_bit_says_that_they_are_right() -> None:
    found = BitmapsExtension(2, 128, 5 * CLUSTER)
    header = replace(PLAIN, extensions=(Extension(ExtensionType.BITMAPS, found.pack()),))
    assert header.bitmaps is None
    assert replace(header, autoclear=Autoclear.BITMAPS).bitmaps == found

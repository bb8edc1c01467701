# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Compressed clusters: deflate without a header, or zstd. Output is bounded by one cluster."""

from __future__ import annotations

import errno
import zlib
from collections.abc import Callable
from typing import Final

import zstandard

from nbdjobs.errors import NodeError
from nbdjobs.nodes.qcow2.constants import CompressionType

_WINDOW_BITS: Final = -12
"""What QEMU writes with; a smaller window is one that every reader has."""

_MAX_WINDOW: Final = 8 * 1024 * 1024
"""Most memory that a zstd stream may ask for; a cluster has at most 2 MiB."""


def decompress(kind: CompressionType, data: bytes, cluster_size: int) -> bytes:
    """Get the cluster back; what follows its stream in `data` is not looked at.

    Raises:
        NodeError: EIO, as the data is damaged.
    """
    try:
        content = _DECOMPRESSORS[kind](data, cluster_size)
    except (zlib.error, zstandard.ZstdError) as error:
        raise NodeError(errno.EIO, f"a compressed cluster is damaged: {error}") from error
    if len(content) != cluster_size:
        raise NodeError(errno.EIO, "a compressed cluster is damaged: it is too short")
    return content


def compress(kind: CompressionType, cluster: bytes | memoryview) -> bytes | None:
    """Compress a whole cluster; None if it does not get smaller."""
    packed = _COMPRESSORS[kind](cluster)
    return packed if len(packed) < len(cluster) else None


def _inflate(data: bytes, cluster_size: int) -> bytes:
    return zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, cluster_size)


def _unzstd(data: bytes, cluster_size: int) -> bytes:
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_WINDOW)
    parts = []
    with decompressor.stream_reader(data) as reader:
        while cluster_size and (part := reader.read(cluster_size)):
            parts.append(part)
            cluster_size -= len(part)
    return b"".join(parts)


def _deflate(cluster: bytes | memoryview) -> bytes:
    packer = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zlib.DEFLATED, _WINDOW_BITS)
    return packer.compress(cluster) + packer.flush()


def _zstd(cluster: bytes | memoryview) -> bytes:
    return zstandard.ZstdCompressor().compress(cluster)


_DECOMPRESSORS: Final[dict[CompressionType, Callable[[bytes, int], bytes]]] = {
    CompressionType.ZLIB: _inflate,
    CompressionType.ZSTD: _unzstd,
}
_COMPRESSORS: Final[dict[CompressionType, Callable[[bytes | memoryview], bytes]]] = {
    CompressionType.ZLIB: _deflate,
    CompressionType.ZSTD: _zstd,
}

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What queries tell of images that only some formats have: QAPI types, and how they are filled in.

Source: QEMU qapi/block-core.json (ImageInfoSpecific); what is told of which version of qcow2 is as
its storage daemon does.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from nbdjobs.nodes.crypto.luks_header import LuksHeader
from nbdjobs.nodes.luks import LuksNode
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.qcow2.constants import CompressionType, Encryption, Incompatible
from nbdjobs.nodes.qcow2.header import Header
from nbdjobs.nodes.qcow2.node import Qcow2Node
from nbdjobs.qapi.types import flat_union
from nbdjobs.qmp.commands.encryption_info import QCryptoBlockInfoLUKS, describe_luks


@flat_union(
    "type", lambda: {"luks": ImageInfoSpecificLUKSWrapper, "qcow2": ImageInfoSpecificQCow2Wrapper}
)
@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfoSpecific:
    """What only some formats have to tell."""

    type: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfoSpecificLUKSWrapper(ImageInfoSpecific):
    """How an encrypted volume is encrypted."""

    data: QCryptoBlockInfoLUKS


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfoSpecificQCow2Wrapper(ImageInfoSpecific):
    """Of which kind a qcow2 image is."""

    data: ImageInfoSpecificQCow2


@flat_union(
    "format",
    lambda: {
        "aes": ImageInfoSpecificQCow2Encryption,
        "luks": ImageInfoSpecificQCow2EncryptionLUKS,
    },
)
@dataclass(frozen=True, kw_only=True)
class ImageInfoSpecificQCow2Encryption:
    """How a qcow2 image is encrypted."""

    format: str


@dataclass(frozen=True, kw_only=True)
class ImageInfoSpecificQCow2EncryptionLUKS(ImageInfoSpecificQCow2Encryption, QCryptoBlockInfoLUKS):
    """With what LUKS volumes tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInfoSpecificQCow2:
    """A qcow2 image; what version 2 does not know is left out there."""

    compat: str
    data_file: str | None = None
    data_file_raw: bool | None = None
    extended_l2: bool | None = None
    lazy_refcounts: bool | None = None
    corrupt: bool | None = None
    refcount_bits: int
    encrypt: ImageInfoSpecificQCow2Encryption | None = None
    compression_type: CompressionType


def describe_format(node: Node) -> ImageInfoSpecific | None:
    """What the format of an image has to tell, if anything."""
    if isinstance(node, LuksNode):
        return ImageInfoSpecificLUKSWrapper(type="luks", data=describe_luks(node.luks_header))
    if isinstance(node, Qcow2Node):
        return ImageInfoSpecificQCow2Wrapper(
            type="qcow2", data=describe_qcow2(node.header, node.luks_header)
        )
    return None


def describe_qcow2(header: Header, luks: LuksHeader | None) -> ImageInfoSpecificQCow2:
    """Of which kind an image is.

    Args:
        header: Its header.
        luks: That of its LUKS volume, if it is encrypted so.
    """
    if header.version == 2:
        return ImageInfoSpecificQCow2(
            compat="0.10",
            refcount_bits=1 << header.refcount_order,
            encrypt=_describe_encryption(header, luks),
            compression_type=header.compression_type,
        )
    return ImageInfoSpecificQCow2(
        compat="1.1",
        data_file=header.data_file if header.has_data_file else None,
        data_file_raw=header.is_data_file_raw if header.has_data_file else None,
        extended_l2=header.geometry.is_extended,
        lazy_refcounts=header.is_lazy,
        corrupt=bool(header.incompatible & Incompatible.CORRUPT),
        refcount_bits=1 << header.refcount_order,
        encrypt=_describe_encryption(header, luks),
        compression_type=header.compression_type,
    )


def _describe_encryption(
    header: Header, luks: LuksHeader | None
) -> ImageInfoSpecificQCow2Encryption | None:
    if header.crypt_method == Encryption.NONE:
        return None
    if luks is None:
        return ImageInfoSpecificQCow2Encryption(format="aes")
    info = describe_luks(luks)
    members = {member.name: getattr(info, member.name) for member in fields(info)}
    return ImageInfoSpecificQCow2EncryptionLUKS(format="luks", **members)

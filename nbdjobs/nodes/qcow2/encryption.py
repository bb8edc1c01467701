# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The encryption of guest clusters. Metadata and compressed clusters are never encrypted.

    method   sectors are numbered from         key
    AES      the beginning of the disk         the password
    LUKS     the beginning of the image file   in a LUKS header, to which an extension points

Source: QEMU `docs/interop/qcow2`, "Data encryption" and "Full disk encryption header pointer".
"""

from __future__ import annotations

import asyncio
from typing import Final

from nbdjobs.errors import CommandError
from nbdjobs.nodes.config import SECTOR, Limits
from nbdjobs.nodes.crypto.amend import LuksAmendOptions, amend
from nbdjobs.nodes.crypto.block_cipher import BlockCipher
from nbdjobs.nodes.crypto.luks_header import LENGTH, LuksHeader
from nbdjobs.nodes.crypto.qcow import qcow_cipher
from nbdjobs.nodes.crypto.volume import LuksVolume
from nbdjobs.nodes.qcow2.constants import Encryption, ExtensionType
from nbdjobs.nodes.qcow2.extensions import read_encryption_pointer
from nbdjobs.nodes.qcow2.files import Files
from nbdjobs.nodes.qcow2.header import Header
from nbdjobs.nodes.qcow2.options import Qcow2Options, QCryptoBlockOptions
from nbdjobs.nodes.secrets import Secrets

ENCRYPTED_LIMITS: Final = Limits(request_alignment=SECTOR, max_transfer=1024 * 1024)
"""Sectors are encrypted whole, and for no longer than about a millisecond in a row."""

_NAMES: Final = {Encryption.AES: "aes", Encryption.LUKS: "luks"}


class PayloadCipher:
    """Encrypts and decrypts sectors of guest clusters.

    Attributes:
        luks_header: Header of the LUKS volume, for that method.
        amending: Held while it is changed.
    """

    def __init__(self, cipher: BlockCipher, luks_header: LuksHeader | None = None):
        self.luks_header = luks_header
        self.amending = asyncio.Lock()
        self._cipher = cipher

    def decrypt(self, guest: int, host: int, buffer: memoryview) -> None:
        """Decrypt in place.

        Args:
            guest: Where on the disk the sectors are.
            host: Where they are in their file.
            buffer: Their content.
        """
        self._cipher.decrypt(guest if self.luks_header is None else host, buffer)

    def encrypted(self, guest: int, host: int, data: memoryview) -> memoryview:
        """An encrypted copy; as for `decrypt`."""
        copy = memoryview(bytearray(data))
        self._cipher.encrypt(guest if self.luks_header is None else host, copy)
        return copy


async def open_cipher(
    header: Header, files: Files, options: Qcow2Options, secrets: Secrets
) -> PayloadCipher | None:
    """The cipher of an image, or None if it is not encrypted.

    Raises:
        CommandError: Image and options do not fit, or the password is wrong, in QEMU's words.
    """
    given = options.encrypt
    if header.crypt_method == Encryption.NONE:
        if given is not None:
            raise CommandError(
                f"No encryption in image header, but options specified format '{given.format}'"
            )
        return None
    method = Encryption(header.crypt_method)
    name = _NAMES[method]
    if given is not None and given.format != name:
        raise CommandError(
            f"Header reported '{name}' encryption format but options specify '{given.format}'"
        )
    key_secret = given.key_secret if isinstance(given, QCryptoBlockOptions) else None
    password = secrets.find_required_password(key_secret, "encrypt.")
    if method is Encryption.AES:
        return PayloadCipher(qcow_cipher(password))
    volume = await find_volume(header, files)
    return PayloadCipher(await volume.unlock(password), volume.header)


async def amend_keys(
    header: Header,
    files: Files,
    key_secret: str | None,
    options: LuksAmendOptions,
    secrets: Secrets,
    *,
    is_forced: bool,
) -> None:
    """Change the passwords of an open image; as for `crypto.amend.amend`."""
    cipher = files.cipher
    if cipher is None:
        raise CommandError("image is not encrypted, can't amend")
    if cipher.luks_header is None:
        raise CommandError(
            "Only LUKS encryption options can be amended for qcow2 with blockdev-amend"
        )
    async with cipher.amending:
        volume = await find_volume(header, files)
        try:
            await amend(volume, options, secrets, key_secret=key_secret, is_forced=is_forced)
        finally:
            cipher.luks_header = volume.header


async def find_volume(header: Header, files: Files) -> LuksVolume:
    """The LUKS volume of an image that is encrypted so.

    Raises:
        CommandError: The image does not say where it is, or it is damaged.
    """
    data = header.extension(ExtensionType.ENCRYPTION)
    if data is None:
        raise CommandError("Missing CRYPTO header for crypt method 2")
    offset, length = read_encryption_pointer(data, header.cluster_size)
    volume = await LuksVolume.read(files.file, offset)
    material = volume.header.material_length
    ends = [slot.offset + material for slot in volume.header.slots if slot.is_active]
    if max(ends, default=LENGTH) > length:
        raise CommandError("Request for data outside of extension header")
    return volume

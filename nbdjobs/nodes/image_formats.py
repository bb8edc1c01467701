# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""How disk image formats begin.

Source: the formats' specifications, as collected in QEMU `docs/interop/` and by file(1).
"""

from __future__ import annotations

from typing import Final

PROBED_BYTES: Final = 2048

_SIGNATURES: Final[tuple[tuple[int, bytes, str], ...]] = (
    (0, b"QFI\xfb", "qcow2"),
    (0, b"QED\0", "qed"),
    (0, b"LUKS\xba\xbe", "luks"),
    (0, b"KDMV", "vmdk"),
    (0, b"COWD", "vmdk"),
    (0, b"# Disk DescriptorFile", "vmdk"),
    (0, b"conectix", "vpc"),
    (0, b"vhdxfile", "vhdx"),
    (0x40, b"\x7f\x10\xda\xbe", "vdi"),
    (0, b"WithoutFreeSpace", "parallels"),
    (0, b"WithouFreSpacExt", "parallels"),
    (0, b"Bochs Virtual HD Image", "bochs"),
    (0, b"#!/bin/sh\n#V2.0 Format", "cloop"),
)


def format_of(beginning: bytes | memoryview) -> str:
    """The name of the format whose images begin like this, "raw" for none in particular."""
    for offset, signature, name in _SIGNATURES:
        if beginning[offset : offset + len(signature)] == signature:
            return name
    return "raw"

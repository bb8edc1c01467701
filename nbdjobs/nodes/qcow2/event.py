# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What the user is told of a damaged image."""

from __future__ import annotations

from dataclasses import dataclass

from nbdjobs.qapi.types import event


@event("BLOCK_IMAGE_CORRUPTED")
@dataclass(frozen=True, slots=True, kw_only=True)
class BlockImageCorrupted:
    """An image is damaged (QAPI `BLOCK_IMAGE_CORRUPTED`).

    Attributes:
        device: Always empty: nodes belong to no device.
        node_name: The node.
        msg: What is wrong.
        offset: Where in the image file, if it is at a place.
        size: How many bytes it is about, if that is known.
        fatal: The image is marked as corrupt, and cannot be used any further.
    """

    device: str
    node_name: str | None = None
    msg: str
    offset: int | None = None
    size: int | None = None
    fatal: bool

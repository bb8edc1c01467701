# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What image files are, read from their headers alone: no password, and nothing below, is needed.

Source: `qemu-img info` for what is told, and its JSON form.
"""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any, Final

from nbdjobs.cli.exits import CliError
from nbdjobs.cli.image_files import files_of, find_format, opened_file
from nbdjobs.cli.image_text import date_of
from nbdjobs.cli.units import format_size
from nbdjobs.errors import CommandError
from nbdjobs.nodes.config import SECTOR
from nbdjobs.nodes.crypto.volume import LuksVolume
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.qcow2.chain import combine
from nbdjobs.nodes.qcow2.constants import Encryption, Incompatible
from nbdjobs.nodes.qcow2.encryption import find_volume
from nbdjobs.nodes.qcow2.header_file import HeaderFile
from nbdjobs.nodes.qcow2.snapshot_table import read_snapshots
from nbdjobs.nodes.rounding import round_down
from nbdjobs.qapi.visitor import to_qapi
from nbdjobs.qmp.commands.block_info import ImageInfo
from nbdjobs.qmp.commands.encryption_info import describe_luks
from nbdjobs.qmp.commands.format_info import (
    ImageInfoSpecificLUKSWrapper,
    ImageInfoSpecificQCow2Wrapper,
    describe_qcow2,
)
from nbdjobs.qmp.commands.snapshot_info import describe_snapshot

MAX_CHAIN: Final = 100


async def look_at_chain(
    path: Path, chosen: str | None, *, is_shared: bool, is_whole: bool
) -> list[ImageInfo]:
    """What an image is, and with `is_whole` all images below it, top first.

    Raises:
        CliError: One of them cannot be read, or the chain has no end.
    """
    found: list[ImageInfo] = []
    seen: set[str] = set()
    name: str | None = str(path)
    while name is not None:
        real = await asyncio.to_thread(os.path.realpath, name)
        if real in seen or len(seen) >= MAX_CHAIN:
            raise CliError(f"'{name}' is in its own chain of backing files")
        seen.add(real)
        info = await look_at(name, chosen, is_shared=is_shared)
        found.append(info)
        name = _below(info) if is_whole else None
        chosen = info.backing_filename_format
    return found


def _below(info: ImageInfo) -> str | None:
    if info.backing_filename is None:
        return None
    name = (info.full_backing_filename or info.backing_filename).removeprefix("file:")
    if ":" in name.partition("/")[0]:
        raise CliError(f"'{info.filename}' has a backing file that is not a path: {name}")
    return name


async def look_at(name: str, chosen: str | None, *, is_shared: bool) -> ImageInfo:
    """What one image is.

    Raises:
        CliError: It cannot be read.
    """
    image_format = find_format(name, chosen)
    is_raw = image_format == "raw"
    async with opened_file(name, is_shared=is_shared, is_raw=is_raw) as file:
        if image_format == "qcow2":
            return await _look_at_qcow2(name, file)
        if image_format == "luks":
            return await _look_at_luks(name, file)
        return ImageInfo(
            filename=name,
            format=image_format,
            dirty_flag=False,
            actual_size=file.allocated_size,
            virtual_size=file.size,
        )


async def _look_at_qcow2(name: str, file: Node) -> ImageInfo:
    files = files_of(file)
    header = (await HeaderFile.read(files)).header
    luks = None
    if header.crypt_method == Encryption.LUKS:
        luks = (await find_volume(header, files)).header
    snapshots = await read_snapshots(header, files)
    backing = header.backing_file
    backing_name = None if not backing else backing.decode(errors="replace")
    full_name = None
    if backing_name is not None:
        try:
            full_name = combine(name, backing_name)
        except CommandError:
            full_name = None
    is_encrypted = header.crypt_method != Encryption.NONE
    return ImageInfo(
        filename=name,
        format="qcow2",
        dirty_flag=bool(header.incompatible & Incompatible.DIRTY),
        actual_size=file.allocated_size,
        virtual_size=round_down(header.size, SECTOR),
        cluster_size=header.cluster_size,
        encrypted=is_encrypted or None,
        backing_filename=backing_name,
        full_backing_filename=full_name,
        backing_filename_format=header.backing_format if backing_name else None,
        snapshots=[describe_snapshot(each) for each in snapshots] or None,
        format_specific=ImageInfoSpecificQCow2Wrapper(
            type="qcow2", data=describe_qcow2(header, luks)
        ),
    )


async def _look_at_luks(name: str, file: Node) -> ImageInfo:
    header = (await LuksVolume.read(file)).header
    return ImageInfo(
        filename=name,
        format="luks",
        dirty_flag=False,
        actual_size=file.allocated_size,
        virtual_size=round_down(max(file.size - header.payload_offset, 0), SECTOR),
        encrypted=True,
        format_specific=ImageInfoSpecificLUKSWrapper(type="luks", data=describe_luks(header)),
    )


def to_json(infos: list[ImageInfo], *, is_whole: bool) -> Any:
    """What is printed as JSON: an object, or of a chain a list of them."""
    return to_qapi(infos if is_whole else infos[0])


def to_text(info: ImageInfo) -> str:
    """What people read."""
    lines = [
        f"image:          {info.filename}",
        f"format:         {info.format}",
        f"disk:           {format_size(info.virtual_size)} ({info.virtual_size} bytes)",
        f"takes up:       {format_size(info.actual_size or 0)}",
    ]
    if info.encrypted:
        lines.append("encrypted:      yes")
    if info.cluster_size:
        lines.append(f"cluster size:   {info.cluster_size}")
    if info.dirty_flag:
        lines.append("dirty:          yes, it will be repaired when it is written next")
    if info.backing_filename is not None:
        kind = info.backing_filename_format
        lines.append(f"backing file:   {info.backing_filename}" + (f" ({kind})" if kind else ""))
        if info.full_backing_filename not in (None, info.backing_filename):
            lines.append(f"  which is:     {info.full_backing_filename}")
    if info.format_specific is not None:
        data = to_qapi(info.format_specific)["data"]
        lines.append("details:")
        lines += [f"  {key}: {_word(value)}" for key, value in data.items()]
    if info.snapshots:
        lines.append("snapshots:")
        lines += [f"  {each.id:>3}  {date_of(each)}  {each.name}" for each in info.snapshots]
    return "\n".join(lines)


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list):
        return f"{sum(bool(each.get('active')) for each in value)} of {len(value)} in use"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_word(each)}" for key, each in value.items())
    return str(value)

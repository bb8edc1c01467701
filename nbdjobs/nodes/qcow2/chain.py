# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What the names in a header mean: options of the nodes for the backing file and the data file.

Source: QEMU `block.c` (path_combine, bdrv_get_full_backing_filename, bdrv_find_protocol) for the
behaviour.
"""

from __future__ import annotations

import asyncio
import os
import re
import stat
from typing import Any, Final

from nbdjobs.errors import CommandError
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.nodes.qcow2 import constants
from nbdjobs.qapi.jsonparse import parse_json
from nbdjobs.qapi.visitor import visit

_JSON: Final = "json:"
_PROTOCOL: Final = re.compile(r"[^/]*?:")
_LONGEST_PATH: Final = 4096


def combine(base: str, name: str) -> str:
    """The name, seen from the folder of the image that has it.

    Args:
        base: File name of that image.
        name: What its header says.

    Raises:
        CommandError: It is relative, and the image is in no folder.
    """
    if name.startswith("/") or _PROTOCOL.match(name):
        return name
    if base.startswith(_JSON) or not base:
        raise CommandError(
            f"Cannot use relative paths with VMs whose image has no file name: '{name}'"
        )
    folder = base.rpartition("/")[0]
    return f"{folder}/{name}" if "/" in base else name


async def backing_options(name: str, driver: str | None) -> BlockdevOptions:
    """What to open for a backing file.

    Args:
        name: Its full name, of any form.
        driver: Its format, if known; otherwise it is found out, and raw or qcow2.

    Raises:
        CommandError: There is no such driver, or the name means nothing.
    """
    if name.startswith(_JSON):
        return visit(BlockdevOptions, _json_options(name, driver))
    file = await asyncio.to_thread(_file_options, name)
    if driver is None:
        driver = await asyncio.to_thread(_probe, file["filename"])
    _check_driver(driver)
    options = file if driver in ("file", "host_device") else {"driver": driver, "file": file}
    return visit(BlockdevOptions, options)


async def data_file_options(name: str) -> BlockdevOptions:
    """What to open for an external data file: no format is looked for in it."""
    if name.startswith(_JSON):
        return visit(BlockdevOptions, _json_options(name, None))
    return visit(BlockdevOptions, await asyncio.to_thread(_file_options, name))


def _json_options(name: str, driver: str | None) -> dict[str, Any]:
    options = parse_json(name.removeprefix(_JSON))
    if not isinstance(options, dict):
        raise CommandError("Invalid JSON object given")
    nested = _nest(options)
    nested.setdefault("driver", driver or "raw")
    _check_driver(nested["driver"])
    return nested


def _nest(flat: dict[str, Any]) -> dict[str, Any]:
    """Make `{"file": {"filename": x}}` of `{"file.filename": x}`."""
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        *path, last = key.split(".")
        place = nested
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise CommandError(f"Cannot mix scalar and non-scalar keys: '{key}'")
        if last in place:
            raise CommandError(f"Cannot mix scalar and non-scalar keys: '{key}'")
        place[last] = _nest(value) if isinstance(value, dict) else value
    return nested


def _check_driver(driver: object) -> None:
    # Drivers are in a table that this driver is in, too.
    from nbdjobs.nodes.drivers import DRIVERS

    if driver not in DRIVERS:
        raise CommandError(f"Unknown driver '{driver}'")


def _file_options(name: str) -> dict[str, Any]:
    """The node for a path, or for one with a protocol before it."""
    if name.startswith("file:"):
        name = name.removeprefix("file:")
    elif found := _PROTOCOL.match(name):
        raise CommandError(f"Unknown protocol '{found.group()[:-1]}'")
    if len(name) > _LONGEST_PATH:
        raise CommandError("Backing file name too long")
    driver = "file"
    try:
        mode = os.stat(name).st_mode
        if stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
            driver = "host_device"
    except (OSError, ValueError):
        pass  # opening it tells what is wrong
    return {"driver": driver, "filename": name}


def _probe(path: str) -> str:
    """Find out the format: qcow2, or raw for all else."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError):
        return "raw"  # opening it tells what is wrong
    try:
        start = os.pread(descriptor, 4, 0)
    except OSError:
        start = b""
    finally:
        os.close(descriptor)
    return "qcow2" if start == constants.MAGIC.to_bytes(4) else "raw"

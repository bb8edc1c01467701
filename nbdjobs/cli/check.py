# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs check`: whether a qcow2 image is consistent, and repairs.

Source: `qemu-img check` for the JSON form, what is left out of it, and the exit codes.
"""

from __future__ import annotations

import argparse
import asyncio
import json
from dataclasses import replace
from enum import IntEnum
from pathlib import Path
from typing import Any

from nbdjobs.cli import image_files
from nbdjobs.cli.exits import CliError
from nbdjobs.cli.image_files import files_of, find_format, opened_file
from nbdjobs.nodes.qcow2.check import CheckResult, Fix, check
from nbdjobs.nodes.qcow2.errors import CorruptionError
from nbdjobs.nodes.qcow2.header_file import HeaderFile

_MOST_FINDINGS = 20


class CheckCode(IntEnum):
    """How a check ends."""

    CLEAN = 0
    NOT_DONE = 1
    CORRUPT = 2
    LEAKS = 3
    NO_CHECK = 63


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.epilog = (
        "Exit codes: 0 nothing is wrong (any more), 1 the check could not be done, 2 the image is"
        " corrupt, 3 it has leaked clusters and nothing else, 63 the format knows no checks."
    )
    image_files.add_image(parser)
    image_files.add_output(parser)
    parser.add_argument(
        "-r",
        "--repair",
        choices=(Fix.LEAKS.value, Fix.ALL.value),
        help="give back leaked clusters, or repair everything that can be",
    )


def run(arguments: argparse.Namespace) -> int:
    """Check, and print what was found."""
    path: Path = arguments.image
    image_format = find_format(path, arguments.format)
    if image_format != "qcow2":
        print(f"'{path}' is {image_format}: images of this format know no checks")
        return CheckCode.NO_CHECK
    if arguments.repair and arguments.force_share:
        raise CliError("--repair needs the image for itself: expected no --force-share")
    fix = Fix.NOTHING if arguments.repair is None else Fix(arguments.repair)
    result = asyncio.run(_check(path, fix, is_shared=arguments.force_share))
    if arguments.output == "json":
        print(json.dumps(to_json(path, result), indent=4))
    else:
        print(to_text(result))
    return code_of(result)


async def _check(path: Path, fix: Fix, *, is_shared: bool) -> CheckResult:
    """Check, and if something was repaired, look again; repairs are those of the first time."""
    is_changed = fix is not Fix.NOTHING
    async with opened_file(path, is_changed=is_changed, is_shared=is_shared) as file:
        files = files_of(file)
        try:
            first = await check(await HeaderFile.read(files), files, fix)
            if not first.corruptions_fixed and not first.leaks_fixed:
                return first
            second = await check(await HeaderFile.read(files), files)
        except CorruptionError as error:
            raise CliError(f"'{path}' cannot be checked: {error}") from error
        return replace(
            second, corruptions_fixed=first.corruptions_fixed, leaks_fixed=first.leaks_fixed
        )


def code_of(result: CheckResult) -> CheckCode:
    """The exit code; repairs do not count as faults, since what is counted was found after them."""
    if result.corruptions:
        return CheckCode.CORRUPT
    return CheckCode.LEAKS if result.leaks else CheckCode.CLEAN


def to_json(path: Path, result: CheckResult) -> dict[str, Any]:
    """QAPI `ImageCheck`: what is zero is left out."""
    counts = {
        "image-end-offset": result.image_end_offset,
        "corruptions": result.corruptions,
        "leaks": result.leaks,
        "corruptions-fixed": result.corruptions_fixed,
        "leaks-fixed": result.leaks_fixed,
        "total-clusters": result.total_clusters,
        "allocated-clusters": result.allocated_clusters,
        "fragmented-clusters": result.fragmented_clusters,
        "compressed-clusters": result.compressed_clusters,
    }
    present = {name: count for name, count in counts.items() if count}
    return {"filename": str(path), "format": "qcow2", "check-errors": 0, **present}


def to_text(result: CheckResult) -> str:
    """What people read."""
    lines = list(result.messages[:_MOST_FINDINGS])
    hidden = len(result.messages) - len(lines)
    if hidden > 0:
        lines.append(f"... and {hidden} more")
    if result.corruptions_fixed or result.leaks_fixed:
        lines.append(
            f"repaired: {result.corruptions_fixed} faults and {result.leaks_fixed} leaked clusters;"
            " this is what was found afterwards:"
        )
    if result.corruptions:
        lines.append(
            f"{result.corruptions} faults: data may be damaged, and writing may damage more"
        )
    if result.leaks:
        lines.append(f"{result.leaks} leaked clusters: they take up space, and do no harm")
    if not result.corruptions and not result.leaks:
        lines.append("nothing is wrong")
    total, allocated = result.total_clusters, result.allocated_clusters
    if allocated:
        lines.append(
            f"{allocated} of {total} clusters allocated ({allocated / total:.2%}),"
            f" {result.fragmented_clusters / allocated:.2%} of them fragmented,"
            f" {result.compressed_clusters / allocated:.2%} compressed"
        )
    if result.image_end_offset:
        lines.append(f"the image ends at byte {result.image_end_offset}")
    return "\n".join(lines)

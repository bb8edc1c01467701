# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""How a table was made: what a reader needs to make it again."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

from benchmarks.peers import Address, Peer


def notes(peers: Sequence[Peer], facts: Sequence[str], directory: Path) -> str:
    """Return a markdown section on machine, versions and command lines.

    Args:
        peers: Who took part.
        facts: Sentences on this run, such as sizes and rounds.
        directory: Where the images were, for the kind of its file system.
    """
    machine = [
        f"{_processor()}, {os.cpu_count()} cores, {_memory_gib()} GiB memory",
        f"{platform.system()} {platform.release()}, Python {platform.python_version()},"
        f" images on {_file_system(directory)}",
    ]
    versions = [f"{peer.name}: {peer.version()}" for peer in peers]
    client = _first_line("fio", "--version")
    image, address = Path("disk.img"), Address(unix=Path("nbd.sock"))
    commands = [shlex.join(_short(peer, image, address)) for peer in peers]
    items = [*machine, *facts, f"client: {client}, NBD engine", *versions]
    listing = "\n".join(f"- {item}" for item in items)
    return (
        "## How it was made\n\n"
        "`make bench`. The peers take turns for each row, round after round; a cell is the median\n"
        "of the rounds; before each row the images are read into the page cache, and before each\n"
        "turn dirty pages are written out. The ratio is nbdjobs to the best peer, above 1 when\n"
        "nbdjobs is ahead, also where less is better.\n\n"
        f"{listing}\n\n```sh\n" + "\n".join(commands) + "\n```\n"
    )


def _short(peer: Peer, image: Path, address: Address) -> list[str]:
    """Return the command line without folders that mean nothing elsewhere."""
    program, *rest = peer.command_line(image, address)
    return [Path(program).name, *rest]


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def _memory_gib() -> int:
    return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / (1 << 30))


def _file_system(directory: Path) -> str:
    return _first_line("findmnt", "--noheadings", "--output=FSTYPE", "--target", str(directory))


def _first_line(*command: str) -> str:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    return result.stdout.strip().partition("\n")[0] or "unknown"

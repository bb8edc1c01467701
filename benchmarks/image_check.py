# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""``python -m benchmarks.image_check``: `nbdjobs check` beside `qemu-img check`.

The images are of 1 TiB: one that is new, one with a little data in each half GiB, so that all of
its L2 tables exist; and one that is smaller and has every cluster.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from tests.interop.tools import require

ROUNDS: Final = 3
TABLES: Final = 2048
TABLE_MIB: Final = 512


def main() -> int:
    """Make the images, time both programs, and print a table."""
    print("| image | nbdjobs, s | qemu-img, s | nbdjobs, MiB |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="nbdjobs-bench-") as name:
        for title, make in IMAGES.items():
            path = Path(name) / "disk.qcow2"
            make(path)
            ours, memory = _measure([sys.executable, "-m", "nbdjobs", "check", str(path)])
            theirs, _ = _measure([require("qemu-img"), "check", str(path)])
            print(f"| {title} | {ours:.2f} | {theirs:.2f} | {memory >> 10} |")
    return 0


def _measure(command: list[str]) -> tuple[float, int]:
    """The shortest of several runs in seconds, and the most memory in KiB."""
    shortest, memory = float("inf"), 0
    for _ in range(ROUNDS):
        began = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        shortest = min(shortest, time.perf_counter() - began)
        if process.returncode:
            raise RuntimeError(f"{command} ended with {process.returncode}")
        memory = max(memory, usage.ru_maxrss)
    return shortest, memory


def _create(path: Path, size: str, *options: str) -> None:
    path.unlink(missing_ok=True)
    subprocess.run(
        [require("qemu-img"), "create", "-q", "-f", "qcow2", *options, path, size], check=True
    )


def _new(path: Path) -> None:
    _create(path, "1T")


def _sparse(path: Path) -> None:
    _create(path, "1T")
    lines = "".join(f"write -q {index * TABLE_MIB}M 64k\n" for index in range(TABLES))
    subprocess.run(
        [require("qemu-io"), "-f", "qcow2", "-t", "unsafe", path],
        input=lines,
        text=True,
        check=True,
        stdout=subprocess.DEVNULL,
    )


def _full(path: Path) -> None:
    _create(path, "64G", "-o", "preallocation=metadata")


IMAGES: Final[Mapping[str, Callable[[Path], None]]] = {
    "1 TiB, new": _new,
    "1 TiB, some data everywhere": _sparse,
    "64 GiB, all allocated": _full,
}


if __name__ == "__main__":
    sys.exit(main())

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What the tests need that ask nbdjobs and the real program the same.

Each daemon runs in a directory of its own with the same files in it, so that the names of files
in commands and answers are the same. What must differ all the same is taken away.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

KIB: Final = 1024
IMAGES: Final = {
    "disk.img": 1024 * KIB,
    "target.img": 1024 * KIB,
    "small.img": 64 * KIB,
    "odd.img": 1000,
}

#: Members of answers that depend on when they are asked for, or that only one side has: the
#: bitmaps are those that QEMU copies by, and no user's.
DROPPED: Final = frozenset(
    {
        "active",
        "busy",
        "current-progress",
        "dirty-bitmaps",
        "idle_time_ns",
        "offset",
        "timestamp",
        "x-connections",
        "x-intercepted-bytes",
        "x-intercepted-operations",
    }
)

#: How the rules are written out and what they take up says nothing: it is a driver for tests.
IN_BLKDEBUG: Final = frozenset({"file", "image"})


def prepare(directory: Path) -> None:
    """Make the directory with the files that commands name."""
    directory.mkdir()
    (directory / "folder").mkdir()
    for name, size in IMAGES.items():
        with (directory / name).open("wb") as file:
            file.truncate(size)
    (directory / "password").write_text("secret\n")
    (directory / "rules.conf").write_text('[inject-error]\nevent = "read_aio"\nerrno = "5"\n')
    (directory / "bad.conf").write_text('[inject-error]\nevent = "nonsense"\n')


def is_device_of_export(entry: Any) -> bool:
    """Whether an entry of a list is a device that only nbdjobs lists.

    To QEMU only guests' devices are some, so that `query-block` and `query-blockstats` of its
    storage daemon never have an entry.
    """
    return isinstance(entry, dict) and entry.get("device") == "" and "qdev" in entry


class MadeUpNames:
    """Numbers the names that a daemon made up in the order in which they appear."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def comparable(self, value: Any) -> Any:
        """The value without what must differ."""
        match value:
            case dict():
                left_out = DROPPED | (IN_BLKDEBUG if value.get("drv") == "blkdebug" else set())
                kept = {key: held for key, held in value.items() if key not in left_out}
                return {key: self.comparable(held) for key, held in kept.items()}
            case list():
                return [self.comparable(held) for held in value if not is_device_of_export(held)]
            case str() if value.startswith("json:"):
                return json.dumps(json.loads(value.removeprefix("json:")), sort_keys=True)
            case str():
                return re.sub(r"#block\d+", self._renamed, value)
        return value

    def _renamed(self, found: re.Match[str]) -> str:
        number = self._numbers.setdefault(found[0], len(self._numbers))
        return f"#made-up-{number}"

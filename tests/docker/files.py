# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Reads the container's files: as much of a Dockerfile and of YAML as they use."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
DOCKER = ROOT / "docker"


@dataclass(frozen=True)
class Dockerfile:
    """The instructions of a Dockerfile, in order, as name and arguments."""

    instructions: tuple[tuple[str, str], ...]

    @classmethod
    def read(cls, path: Path) -> Dockerfile:
        lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
        text = re.sub(r"\\\n\s*", "", "\n".join(lines))
        found = [line.split(maxsplit=1) for line in text.splitlines() if line.strip()]
        return cls(tuple((name, arguments) for name, arguments in found))

    def all(self, name: str) -> list[str]:
        return [arguments for found, arguments in self.instructions if found == name]

    def last_stage(self) -> Dockerfile:
        """What the image itself is made by."""
        start = max(i for i, (name, _) in enumerate(self.instructions) if name == "FROM")
        return Dockerfile(self.instructions[start:])

    def one(self, name: str) -> str:
        """The arguments of an instruction that stands there once."""
        [arguments] = self.all(name)
        return arguments


def yaml_values(text: str, key: str) -> list[str]:
    """What a key of a YAML text has: one scalar, or the scalars of a list.

    The key stands once in the text.
    """
    [found] = re.finditer(rf"^( *){key}:(.*)\n((?:\1 +- .*\n)*)", text, re.MULTILINE)
    inline, items = found[2].strip(), found[3]
    if inline.startswith("["):
        return [str(item) for item in json.loads(inline)]
    listed = [line.strip().removeprefix("- ") for line in items.splitlines()]
    return [value.strip('"') for value in ([inline] if inline else listed)]


def seconds(text: str) -> int:
    """A time such as `30s`."""
    found = re.fullmatch(r"(\d+)s", text)
    assert found is not None, text
    return int(found[1])

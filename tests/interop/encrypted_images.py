# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Encrypted images made and compared by QEMU's own tools."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from tests.interop.tools import run, run_for_result

PASSWORD: Final = "open sesame"

SECRET: Final = ("--object", f"secret,id=right,data={PASSWORD}")

#: What qemu-img says now and then of a machine that is too fast, or too busy, to be timed.
UNTIMED: Final = "Unable to get accurate CPU usage"
_TRIES: Final = 100


def create(image_format: str, path: Path, options: str, size: int) -> None:
    """Make an image; passwords are hashed as little as can be."""
    command = ("qemu-img", "create", "-q", *SECRET, "-f", image_format, "-o", options)
    for _ in range(_TRIES):
        result = run_for_result(*command, str(path), str(size))
        if UNTIMED not in result.stderr:
            break
    assert result.returncode == 0, result.stderr


def create_luks(path: Path, options: str, size: int) -> None:
    """Make a LUKS volume."""
    create("luks", path, ",".join(filter(None, ["key-secret=right,iter-time=0", options])), size)


def write(image: str, plain: Path) -> None:
    """Write a raw file to an image that is there, given by its options."""
    run("qemu-img", "convert", "-n", "-f", "raw", *SECRET, "--target-image-opts", str(plain), image)


def assert_same(image: str, plain: Path) -> None:
    """Compare an image, given by its options, with a raw file."""
    raw = f"driver=raw,file.driver=file,file.filename={plain}"
    run("qemu-img", "compare", *SECRET, "--image-opts", raw, image)

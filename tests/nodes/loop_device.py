# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Loop devices for tests: block devices that any machine with root rights can have."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from shutil import which

import pytest

NEEDED = "needs root, losetup and /dev/loop-control"


def has_loop_devices() -> bool:
    """Whether a loop device can be had here."""
    return os.geteuid() == 0 and bool(which("losetup")) and Path("/dev/loop-control").exists()


needs_loop_device = pytest.mark.skipif(not has_loop_devices(), reason=NEEDED)


@contextmanager
def loop_device(image: Path, *, is_read_only: bool = False) -> Iterator[Path]:
    """A loop device on an image, for as long as the block lasts."""
    arguments = ["losetup", "--find", "--show", *(["--read-only"] if is_read_only else [])]
    done = subprocess.run([*arguments, str(image)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"{NEEDED}: {done.stderr.strip()}")
    device = Path(done.stdout.strip())
    try:
        yield device
    finally:
        subprocess.run(["losetup", "--detach", str(device)], check=True)

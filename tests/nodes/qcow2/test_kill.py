# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A process that writes an image is killed, for real: what it had flushed is there.

What the kernel has of the file is what the process wrote so far. `test_crash` is about more, the
loss of what the kernel has not written out; here it is the real file and real threads.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from nbdjobs.nodes.qcow2.create import CreateOptions
from tests.nodes.qcow2.logged_file import LoggedFile
from tests.nodes.qcow2.rig import HAS_QEMU_IMG, checked, content_of, make, opened, qemu_img

DISK = 4 << 20
BATCH = 8
ROOT = Path(__file__).resolve().parents[3]

Operation = tuple[str, int, bytes]


def operations(seed: int) -> Iterator[Operation]:
    """Kind, offset and content, for ever."""
    random = Random(seed)
    while True:
        offset = random.randrange(DISK // 512) * 512
        length = min(random.choice((512, 4096, 40_960, 200_704)), DISK - offset)
        kind = random.choice(("write", "write", "write", "zero", "unmap"))
        content = random.randbytes(length) if kind == "write" else bytes(length)
        yield kind, offset, content


async def write_for_ever(path: Path, seed: int) -> None:
    """What the process to be killed does: it tells how many batches it has flushed."""
    wanted = operations(seed)
    async with opened(path) as device:
        for number in range(1, 1 << 30):
            # One after the other, so that the last one counts where they overlap.
            for _ in range(BATCH):
                kind, offset, content = next(wanted)
                if kind == "write":
                    await device.pwrite(offset, memoryview(content))
                else:
                    await device.pwrite_zeroes(offset, len(content), may_unmap=kind == "unmap")
            if number % 3 == 0:
                await device.flush()
                print(number, flush=True)


def run_and_kill(path: Path, seed: int, after: int) -> int:
    """Kill the process some time after it has told so often; returns the last that it told."""
    command = [sys.executable, "-m", "tests.nodes.qcow2.test_kill", str(path), str(seed)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    flushed = 0
    for _ in range(after):
        flushed = int(process.stdout.readline())
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate()
    return int(rest.split()[-1]) if rest.split() else flushed


@pytest.mark.parametrize("seed", range(6))
def test_a_killed_writer_leaves_a_sound_image_with_all_that_was_flushed(
    seed: int, tmp_path: Path
) -> None:
    path = tmp_path / "a.qcow2"
    cluster_size = (512, 4096, 65536)[seed % 3]

    async def look() -> bytes:
        found = await checked(LoggedFile(path.read_bytes()))
        assert not found.corruptions, found.messages
        async with opened(path, read_only=True) as device:
            return await content_of(device)

    asyncio.run(make(path, CreateOptions(size=DISK, cluster_size=cluster_size)))
    flushed = run_and_kill(path, seed, after=3 + seed)
    content = asyncio.run(look())
    wanted = operations(seed)
    model = bytearray(DISK)
    for _ in range(flushed * BATCH):
        _, offset, data = next(wanted)
        model[offset : offset + len(data)] = data
    # What came after the last flush that was told, in up to so many operations, may be there.
    later = [next(wanted) for _ in range(8 * BATCH)]
    for sector in range(0, DISK, 512):
        found = content[sector : sector + 512]
        if found == model[sector : sector + 512]:
            continue
        assert any(
            offset <= sector < offset + len(data)
            and data[sector - offset : sector - offset + 512] == found
            for _, offset, data in later
        ), f"sector at {sector}"
    if HAS_QEMU_IMG:
        told = subprocess.run(
            ["qemu-img", "check", "-r", "leaks", str(path)], capture_output=True, check=False
        )
        assert told.returncode in (0, 3), told.stdout
        qemu_img("check", path)


if __name__ == "__main__":
    asyncio.run(write_for_ever(Path(sys.argv[1]), int(sys.argv[2])))

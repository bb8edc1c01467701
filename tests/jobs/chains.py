# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A chain of qcow2 images with a guest on top, and a model of what the guest has to see."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.jobs.collection import Jobs
from nbdjobs.jobs.job import Job
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.qcow2.create import CreateOptions, empty_image
from nbdjobs.qapi.visitor import visit
from tests.jobs.rig import Events, ManualClock
from tests.nodes.qcow2.rig import HAS_QEMU_IMG, content_of, qemu_img

CLUSTER = 4096
GUEST = Permission.CONSISTENT_READ | Permission.WRITE


class Chain:
    """Images named `base`, `mid`, `top`, ... in a directory, opened in that order."""

    def __init__(self, directory: Path, sizes: dict[str, int]):
        self.directory = directory
        self.sizes = sizes
        self.graph = Graph()
        self.events = Events()
        self.clock = ManualClock()
        self.jobs = Jobs(self.events.record, self.clock)
        self.model = bytearray(list(sizes.values())[-1])
        self.guest: Device

    def path(self, name: str) -> Path:
        return self.directory / f"{name}.qcow2"

    def make_images(self) -> None:
        below = None
        for name, size in self.sizes.items():
            options = CreateOptions(
                size=size,
                cluster_size=CLUSTER,
                backing_file=None if below is None else f"{below}.qcow2",
                backing_format=None if below is None else "qcow2",
            )
            self.path(name).write_bytes(empty_image(options))
            below = name

    async def open(self, *, fails_at: dict[str, str] | None = None) -> None:
        """Open all images as writable nodes of their names.

        Args:
            fails_at: For names of images, the debug event of their files whose first one is a
                request that fails.
        """
        below: str | None = None
        for name in self.sizes:
            file: dict[str, Any] = {"driver": "file", "filename": str(self.path(name))}
            if fails_at and name in fails_at:
                event = fails_at[name]
                file = {
                    "driver": "blkdebug",
                    "image": file,
                    "inject-error": [{"event": event, "state": 1, "errno": 5, "once": True}],
                    "set-state": [{"event": event, "state": 1, "new_state": 2}],
                }
            await self.add(
                driver="qcow2", **{"node-name": name}, file=file, backing=below, discard="unmap"
            )
            below = name
        assert below is not None
        self.guest = Device(self.graph, self.node(below), needed=GUEST)

    async def add(self, **options: Any) -> Node:
        return await open_node(self.graph, visit(BlockdevOptions, options))

    def node(self, name: str) -> Node:
        return self.graph.nodes[name]

    async def close(self) -> None:
        await self.jobs.shutdown()
        await self.guest.close()
        for node in list(self.graph.nodes.values()):
            node.is_owned_by_user = False
            await self.graph.drop_if_unused(node)
        assert not self.graph.nodes
        assert asyncio.all_tasks() == {asyncio.current_task()}

    async def fill(self, name: str, chance: random.Random, count: int = 6) -> None:
        """Write random ranges into one image, and into the model of what is on top."""
        device = Device(self.graph, self.node(name), needed=GUEST)
        size = self.sizes[name]
        for _ in range(count):
            offset = chance.randrange(size // 512) * 512
            length = min(chance.choice((512, CLUSTER, 3 * CLUSTER)), size - offset)
            if chance.random() < 0.2:
                data = bytes(length)
                await device.pwrite_zeroes(offset, length)
            else:
                data = chance.randbytes(length)
                await device.pwrite(offset, memoryview(data))
            self.model[offset : offset + length] = data[: max(0, len(self.model) - offset)]
        await device.close()

    async def run_through(self, job: Job) -> None:
        """Let the job end, time going on as fast as the job can use it."""
        ended = asyncio.create_task(self.jobs.ended(job))
        while not ended.done():
            self.clock.advance(0.05)
            await asyncio.sleep(0)

    async def resume_through(self, job: Job) -> None:
        """Likewise, with a user who goes on whenever the job is paused."""
        while self.jobs.find(job.id) is not None:
            self.clock.advance(0.05)
            await asyncio.sleep(0)
            with suppress(CommandError):
                job.resume()

    async def until(self, event: str) -> dict[str, object]:
        """Let time go on until an event has come."""
        while not (found := self.events.named(event)):
            assert len(self.jobs), self.events
            self.clock.advance(0.05)
            await asyncio.sleep(0)
        return found[-1]

    async def check_seen(self) -> None:
        """The guest sees what the model says."""
        try:
            seen = await content_of(self.guest)
        except NodeError:  # if nobody else has met the one request that the test lets fail
            seen = await content_of(self.guest)
        assert seen[: len(self.model)] == bytes(self.model)

    def backing_chain(self, name: str) -> list[str]:
        """The names of the images, as qemu-img finds them by their headers."""
        if not HAS_QEMU_IMG:
            return []
        lines = qemu_img("info", "--backing-chain", self.path(name)).splitlines()
        paths = [line.partition(": ")[2] for line in lines if line.startswith("image: ")]
        return [Path(path).stem for path in paths]

    def check_images(self, *names: str) -> None:
        """qemu-img finds nothing wrong, and the first shows what the model says."""
        if not HAS_QEMU_IMG:
            return
        for name in names:
            qemu_img("check", self.path(name))
        raw = self.directory / "seen.raw"
        raw.write_bytes(self.model)
        qemu_img("compare", "-F", "raw", self.path(names[0]), raw)


@asynccontextmanager
async def chain(
    directory: Path,
    sizes: dict[str, int] | None = None,
    *,
    seed: int = 1,
    fails_at: dict[str, str] | None = None,
) -> AsyncIterator[Chain]:
    """A chain with random content, opened; closed in order at the end."""
    sizes = sizes or dict.fromkeys(("base", "mid", "top"), 32 * CLUSTER)
    made = Chain(directory, sizes)
    made.make_images()
    chance = random.Random(seed)
    # Filled one after the other from below, so that the model is what is seen from above.
    await fill_images(made, chance)
    await made.open(fails_at=fails_at)
    try:
        yield made
    finally:
        await made.close()


async def fill_images(made: Chain, chance: random.Random) -> None:
    """Write content into each image, the lowest first; what is short hides what is below it."""
    names = list(made.sizes)
    for number, name in enumerate(names):
        made.model[made.sizes[name] :] = bytes(max(0, len(made.model) - made.sizes[name]))
        part = Chain(made.directory, {each: made.sizes[each] for each in names[: number + 1]})
        part.model = made.model
        await part.open()
        await part.guest.close()
        await part.fill(name, chance)
        part.guest = Device(part.graph, part.node(name))
        await part.close()


class Writer:
    """A guest that writes stripes of the disk, and knows what must be there."""

    def __init__(self, made: Chain, number: int, writers: int, seed: int):
        self.made = made
        self.number = number
        self.writers = writers
        self.chance = random.Random(f"{seed} {number}")
        self.is_to_stop = False

    async def work(self) -> None:
        while not self.is_to_stop:
            await self.change_once()
            await asyncio.sleep(0)

    async def change_once(self) -> None:
        stripe = 3000
        count = -(-len(self.made.model) // stripe)
        begin = self.chance.randrange(self.number, count, self.writers) * stripe
        end = min(begin + stripe, len(self.made.model))
        offset = self.chance.randrange(begin, end)
        length = self.chance.randint(1, end - offset)
        kind = self.chance.randrange(5)
        data = bytes(length) if kind == 0 else self.chance.randbytes(length)
        try:
            await self._change(kind, offset, data)
        except NodeError:  # the one request that the test lets fail may be a guest's
            await self._change(kind, offset, data)

    async def _change(self, kind: int, offset: int, data: bytes) -> None:
        guest, model, end = self.made.guest, self.made.model, offset + len(data)
        if kind == 1:
            seen = bytearray(len(data))
            await guest.pread(offset, memoryview(seen))
            assert seen == model[offset:end]
            return
        if kind == 0:
            await guest.pwrite_zeroes(offset, len(data))
        else:
            await guest.pwrite(offset, memoryview(data))
        model[offset:end] = data


@asynccontextmanager
async def writers(made: Chain, seed: int, count: int = 3) -> AsyncIterator[None]:
    """While inside, guests write."""
    found = [Writer(made, number, count, seed) for number in range(count)]
    tasks = [asyncio.create_task(each.work()) for each in found]
    try:
        yield
    finally:
        for each in found:
            each.is_to_stop = True
        await asyncio.gather(*tasks)

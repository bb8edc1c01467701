# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Images by file name, as older commands name their targets: made new, or opened as they are.

    "file:/srv/a.img"   "/dev/sdb"      "http://host/a.img"
     protocol: file      host_device     http                  + a format: raw, ...

Where no format is given, the content tells it. What looks like nothing in particular is raw, and
then nothing may be written that would make it look like something else the next time: guests
must not choose the format of their backups.

Source: QEMU `block.c` (bdrv_find_protocol, bdrv_img_create, find_image_format) and
`block/raw-format.c` for the behaviour; error texts of its storage daemon.
"""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes import new_file, permissions
from nbdjobs.nodes.config import CacheMode
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.driver import BackingFile
from nbdjobs.nodes.drivers import DRIVERS
from nbdjobs.nodes.file import FileNode
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.image_formats import PROBED_BYTES, format_of
from nbdjobs.nodes.new_file import FileId
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.opening import open_unowned
from nbdjobs.nodes.options import BlockdevOptions
from nbdjobs.nodes.permissions import Permission
from nbdjobs.nodes.raw import RawNode
from nbdjobs.nodes.workers import Workers
from nbdjobs.qapi.visitor import visit

T = TypeVar("T")

_PREFIX: Final = re.compile(r"([^:/]*):")
_PATHS: Final = ("file", "host_device")
_NULL: Final = ("null-co", "null-aio")
_URLS: Final = ("http", "https")
_PROTOCOLS: Final = (*_PATHS, *_NULL, *_URLS)


class ImagePlace:
    """Where an image is, or is to be.

    Attributes:
        graph: The nodes; a driver may open one on the place that it has made room at.
        filename: As the user gave it.
        protocol: Name of the driver that reaches it.
        path: The file name without the protocol's prefix.
        is_new: Whether `make_room` has made a file where there was none.
    """

    def __init__(self, graph: Graph, filename: str, protocol: str, path: str):
        self.graph = graph
        self.filename = filename
        self.protocol = protocol
        self.path = path
        self.is_new = False

    @classmethod
    async def find(cls, graph: Graph, filename: str) -> ImagePlace:
        """Find out which driver a file name is for; `CommandError` if there is none."""
        prefix = _PREFIX.match(filename)
        if prefix is None:
            is_device = await in_thread(lambda: new_file.is_device(filename))
            return cls(graph, filename, "host_device" if is_device else "file", filename)
        protocol = prefix[1]
        if protocol not in _PROTOCOLS:
            raise CommandError(f"Unknown protocol '{protocol}'")
        return cls(graph, filename, protocol, filename[prefix.end() :])

    @property
    def options(self) -> dict[str, Any]:
        """Options of a node that shows the bytes there, as in QAPI."""
        if self.protocol in _PATHS:
            if not self.path:
                raise CommandError("The 'file' block driver requires a file name")
            return {"driver": self.protocol, "filename": self.path}
        if self.protocol in _URLS:
            return {"driver": self.protocol, "url": self.filename}
        if self.filename != f"{self.protocol}://":
            raise CommandError(f"The only allowed filename for this driver is '{self.protocol}://'")
        return {"driver": self.protocol}

    async def make_room(self, size: int) -> None:
        """Make the file, with nothing but zeroes in it, or see to it that the device will do.

        Cancelling takes effect when that is done.

        Raises:
            CommandError: It cannot be done, and nothing was; see `new_file`.
        """
        if self.protocol == "host_device":
            await in_thread(lambda: new_file.check_device(self.path, size))
        elif self.protocol == "file":
            in_use = _files_in_use(self.graph)
            self.is_new = await in_thread(lambda: new_file.make_file(self.path, size, in_use))
        else:
            raise CommandError(f"Protocol driver '{self.protocol}' does not support image creation")

    @asynccontextmanager
    async def room(self) -> AsyncIterator[Node]:
        """The room that was made, as a node to write the image's own structures to.

        Raises:
            CommandError: It cannot be opened, or what is done with it fails.
        """
        node = await open_unowned(self.graph, visit(BlockdevOptions, self.options))
        changes = Permission.CONSISTENT_READ | Permission.WRITE | Permission.RESIZE
        user = Device(self.graph, node, needed=changes, shared=permissions.NONE)
        try:
            yield node
        except NodeError as error:
            raise CommandError(f"Could not create '{self.filename}': {error}") from error
        finally:
            await user.close()

    async def remove(self) -> None:
        """Take back `make_room`, as far as it made something new."""
        if self.is_new:
            await in_thread(lambda: new_file.remove(self.path))
            self.is_new = False

    async def find_format(self) -> str:
        """Look at the content; `CommandError` if it cannot be read or has no driver here."""
        if self.protocol not in _PATHS:
            return self.protocol
        path = self.options["filename"]
        found = format_of(await in_thread(lambda: new_file.read_beginning(path, PROBED_BYTES)))
        if found not in DRIVERS:
            raise CommandError(
                f"'{self.filename}' is a {found} image, for which there is no driver"
            )
        return found


async def create_image(
    place: ImagePlace, image_format: str, size: int, backing: BackingFile | None = None
) -> None:
    """Make an empty image of a format, or one that shows a backing file.

    Raises:
        CommandError: The format or the place does not allow that, in QEMU's words; no file was
            made that was not there before.
    """
    driver = DRIVERS.get(image_format)
    if driver is None:
        raise CommandError(f"Unknown file format '{image_format}'")
    if not driver.creates_images:
        raise CommandError(f"Format driver '{image_format}' does not support image creation")
    if backing is not None and not driver.supports_backing:
        raise CommandError(f"Backing file not supported for file format '{image_format}'")
    try:
        await driver.create_image(place, size, backing)
    except BaseException:
        await place.remove()
        raise


async def open_image(
    place: ImagePlace, image_format: str | None, cache: CacheMode, *, is_alone: bool = False
) -> Node:
    """Open an image for writing, as a node that goes with its last user.

    Args:
        place: Where it is.
        image_format: Driver to open it with; None to find it by the content.
        cache: How to treat caches.
        is_alone: Whether it is opened without the backing file that it names.

    Raises:
        CommandError: It cannot be opened, in QEMU's words.
    """
    chosen = await place.find_format() if image_format is None else image_format
    options = _options_of(chosen, place)
    options |= {
        "discard": "unmap",
        "detect-zeroes": "unmap",
        "cache": {"direct": cache.is_direct, "no-flush": cache.is_no_flush},
    }
    if is_alone and DRIVERS[chosen].supports_backing:
        options["backing"] = None
    node = await open_unowned(place.graph, visit(BlockdevOptions, options))
    if image_format is None and isinstance(node, RawNode):
        node.guard_format()
    return node


async def open_overlay(
    place: ImagePlace, image_format: str, name: str | None, cache: CacheMode
) -> Node:
    """Open an image without its backing file, as a node that goes with its last user.

    Args:
        place: Where it is.
        image_format: Driver to open it with.
        name: The node's name; None lets the graph choose one.
        cache: How to treat caches.

    Raises:
        CommandError: It cannot be opened, in QEMU's words.
    """
    options = _options_of(image_format, place)
    options |= {"cache": {"direct": cache.is_direct, "no-flush": cache.is_no_flush}}
    if name is not None:
        options["node-name"] = name
    if image_format in DRIVERS and DRIVERS[image_format].supports_backing:
        options |= {"backing": None, "discard": "unmap"}
    return await open_unowned(place.graph, visit(BlockdevOptions, options))


def _options_of(image_format: str, place: ImagePlace) -> dict[str, Any]:
    if image_format not in DRIVERS:
        raise CommandError(f"Unknown driver '{image_format}'")
    if image_format in _PATHS:
        return place.options | {"driver": image_format}
    if image_format in _NULL + _URLS:
        return ImagePlace(place.graph, place.filename, image_format, place.path).options
    return {"driver": image_format, "file": place.options}


def _files_in_use(graph: Graph) -> dict[FileId, str]:
    return {node.file_id: node.name for node in graph.nodes.values() if isinstance(node, FileNode)}


async def in_thread(call: Callable[[], T]) -> T:
    """Do a call that a file system may take its time for."""
    workers = Workers("images")
    try:
        return await workers.run(call)
    finally:
        workers.close()

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What a driver adds to `Node` so that users can open it by its options."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Generic, NamedTuple, Self, TypeVar

from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.graph import Graph, Role
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.options import BlockdevOptions

if TYPE_CHECKING:
    from nbdjobs.nodes.images import ImagePlace

OptionsT = TypeVar("OptionsT", bound=BlockdevOptions)


@dataclass(frozen=True, slots=True)
class ChildReference:
    """A child that a node needs.

    Attributes:
        name: What the parent calls it, which is also the option's name.
        reference: Name of a node, or the options of a new one.
        role: What it is to its parent.
    """

    name: str
    reference: str | BlockdevOptions
    role: Role


class BackingFile(NamedTuple):
    """What a new image says of its backing file.

    Attributes:
        name: As it will stand in the image.
        driver: Its format.
    """

    name: str
    driver: str


class DriverNode(Node, Generic[OptionsT]):
    """A node that `opening.open_node` can make from options of its driver.

    Attributes:
        given: The options that users gave for it last; None for one that a job made.
    """

    options_type: ClassVar[type[BlockdevOptions]]

    mutable_options: ClassVar[frozenset[str] | None] = None
    """QAPI names of the options, beside those that all drivers share, which `blockdev-reopen` may
    change; None if the driver's nodes cannot be reopened at all."""

    given: OptionsT | None = None

    creates_images: ClassVar[bool] = False
    """Whether `create_image` makes new images of this driver's format."""

    @classmethod
    async def create_image(
        cls, place: ImagePlace, size: int, backing: BackingFile | None = None
    ) -> None:
        """Make an empty image; a format that has more than the disk's bytes writes its own here.

        Args:
            place: Where; what fails after its `make_room` is taken back by the caller.
            size: Bytes of the disk.
            backing: What the image is to show, for a driver that `supports_backing`.

        Raises:
            CommandError: It cannot be done, in QEMU's words.
        """
        await place.make_room(size)

    @classmethod
    def children_of(cls, options: OptionsT) -> tuple[ChildReference, ...]:
        """The children to open before the node, in that order."""
        return ()

    @classmethod
    @abstractmethod
    async def open(
        cls, name: str, config: NodeConfig, options: OptionsT, children: Mapping[str, Node]
    ) -> Self:
        """Make the node; on failure nothing of it is left behind.

        Args:
            name: Its name, already checked.
            config: The common options, already checked and completed.
            options: The driver's own options.
            children: The opened children by name; edges to them are attached afterwards.

        Raises:
            CommandError: An option or the storage does not fit, in QEMU's words.
        """

    def bind(self, graph: Graph) -> None:
        """Find what the options name beside nodes; on failure the node is closed.

        Raises:
            CommandError: It is not there, in QEMU's words.
        """

    async def load(self) -> Sequence[ChildReference]:
        """Read what the storage says of itself, once the children in the options are attached.

        The node is in no graph yet; nobody else can change what it reads.

        Returns:
            Children that the storage names, to be opened and attached now.

        Raises:
            CommandError: It cannot be opened, in QEMU's words.
        """
        return ()

    async def start(self) -> None:
        """Make the storage ready for requests, once all children are attached.

        Raises:
            CommandError: It cannot be opened, in QEMU's words.
        """

    async def prepare_reopen(
        self, graph: Graph, config: NodeConfig, options: OptionsT
    ) -> Reopening[OptionsT]:
        """Make ready to go on with other options, changing nothing yet.

        Comes inside a drained section, with all data flushed, for drivers that have
        `mutable_options`; those that are not mutable are as before. Failing leaves nothing behind.

        Args:
            graph: Where to find what the options name.
            config: The common options from then on, checked and completed.
            options: The driver's options from then on.

        Raises:
            CommandError: Something does not fit, in QEMU's words.
        """
        return Reopening(self, config, options)


class Reopening(Generic[OptionsT]):
    """One node's change to other options, as `reopening.reopen` does it.

        prepare_reopen ──▶ commit ──▶ finish          all of it is fine
                └──────────────┴──▶ abort ──▶ finish  something of this or another node is not

    Whoever opens or takes something of its own for the change has a subclass. Between `commit`
    and `abort` nothing waits, so no request ever sees what is taken back.
    """

    def __init__(self, node: DriverNode[OptionsT], config: NodeConfig, options: OptionsT):
        assert node.given is not None, "only what users opened is reopened"
        self._node = node
        self._after = config, options
        self._before = node.config, node.given

    def commit(self) -> None:
        """Take effect: children below are as they will be, permissions are looked at afterwards.

        Raises:
            CommandError: It does not fit now; `abort` follows.
        """
        node = self._node
        if not node.is_read_only:
            node.was_writable = True
        node.given = self._after[1]
        node.set_config(self._after[0])

    def abort(self) -> None:
        """Be as before; `commit` may have come, or failed half-way, or not."""
        self._node.given = self._before[1]
        self._node.set_config(self._before[0])

    async def finish(self) -> None:
        """Let go of what is not in use now: the old after `commit`, the new after `abort`."""
        if self._node.was_writable:
            del self._node.was_writable


AnyDriver = type[DriverNode[Any]]

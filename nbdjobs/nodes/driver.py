# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What a driver adds to `Node` so that users can open it by its options."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, Self, TypeVar

from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.graph import Graph, Role
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.options import BlockdevOptions

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


class DriverNode(Node, Generic[OptionsT]):
    """A node that `opening.open_node` can make from options of its driver."""

    options_type: ClassVar[type[BlockdevOptions]]

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


AnyDriver = type[DriverNode[Any]]

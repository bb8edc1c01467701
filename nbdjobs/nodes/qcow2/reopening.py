# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A qcow2 image goes on with other options, or on another backing file, while clients use it.

Before the change everything that was put off is written, so that the file alone says what the
disk is; after it the image is read again, by the rules of the new options. What could be wrong
with them is looked at before anything changes.

Source: QEMU qapi/block-core.json (blockdev-reopen); texts of its storage daemon.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.config import NodeConfig
from nbdjobs.nodes.driver import Reopening
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.qcow2.options import Qcow2Options

if TYPE_CHECKING:
    from nbdjobs.nodes.qcow2.node import Qcow2Node


async def prepare(
    node: Qcow2Node, config: NodeConfig, options: Qcow2Options
) -> Reopening[Qcow2Options]:
    """Check the options, and write what was put off.

    Raises:
        CommandError: They do not fit the image, or it cannot be written.
    """
    has_backing = "backing" in node.edges or bool(node.header.backing_file)
    if options.backing is None and has_backing:
        raise CommandError(f"backing is missing for '{node.name}'")
    node.check_options(config, options)
    try:
        await node.hand_over()
    except NodeError as error:
        raise CommandError(f"Error flushing drive: {os.strerror(error.errno)}") from error
    return _Qcow2Reopening(node, config, options)


class _Qcow2Reopening(Reopening[Qcow2Options]):
    _node: Qcow2Node

    def __init__(self, node: Qcow2Node, config: NodeConfig, options: Qcow2Options):
        super().__init__(node, config, options)
        self._file = node.edges["file"].node
        self._is_changed = False

    def commit(self) -> None:
        file = self._node.edges["file"].node
        if not _content_of(file) & _content_of(self._file):
            # Another image would be another disk; what only filters it is the same one.
            raise CommandError("Cannot change the option 'file'")
        super().commit()
        self._node.use_options(self._after[1])
        self._is_changed = True

    def abort(self) -> None:
        super().abort()
        self._node.use_options(self._before[1])
        self._is_changed = False

    async def finish(self) -> None:
        await super().finish()
        if not self._is_changed:
            return
        try:
            await self._node.look_anew()
        except BaseException:
            self._node.give_up()
            raise


def _content_of(node: Node) -> set[Node]:
    """The node and all that it only filters."""
    found = {node}
    while (below := node.filtered) is not None:
        found.add(below)
        node = below
    return found

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The table of drivers: what `blockdev-add` can open. A new driver is one file and one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from nbdjobs.nodes.blkdebug import BlkdebugNode
from nbdjobs.nodes.copy_before_write import CopyBeforeWrite
from nbdjobs.nodes.copy_on_read import CopyOnRead
from nbdjobs.nodes.driver import AnyDriver
from nbdjobs.nodes.file import FileNode
from nbdjobs.nodes.host_device import HostDeviceNode
from nbdjobs.nodes.http import HttpNode, HttpsNode
from nbdjobs.nodes.luks import LuksNode
from nbdjobs.nodes.null import NullAioNode, NullCoNode
from nbdjobs.nodes.qcow2.node import Qcow2Node
from nbdjobs.nodes.raw import RawNode
from nbdjobs.nodes.snapshot_access import SnapshotAccess
from nbdjobs.nodes.throttle import ThrottleNode

DRIVERS: Final[Mapping[str, AnyDriver]] = {
    driver.driver: driver
    for driver in (
        BlkdebugNode,
        CopyBeforeWrite,
        CopyOnRead,
        FileNode,
        HostDeviceNode,
        HttpNode,
        HttpsNode,
        LuksNode,
        NullAioNode,
        NullCoNode,
        Qcow2Node,
        RawNode,
        SnapshotAccess,
        ThrottleNode,
    )
}
"""Drivers by name, in alphabetical order as in the QAPI enum `BlockdevDriver`."""

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The command that limits the requests of a device.

Source: QEMU qapi/block.json and qapi/block-core.json (block_set_io_throttle).
"""

from __future__ import annotations

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.daemon.io_throttle import BlockIOThrottle, set_io_throttle
from nbdjobs.qmp.registry import command


@command("block_set_io_throttle")
def block_set_io_throttle(daemon: Daemon, arguments: BlockIOThrottle) -> None:
    """Change the limits of an export or device; all 0 for none."""
    device = daemon.named_device(arguments.device, arguments.id)
    set_io_throttle(daemon.graph, device, arguments)

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Any line of qemu-io is answered in whole lines, and leaves nothing behind."""

from __future__ import annotations

import asyncio

from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.nodes.blkdebug import BlkdebugNode, BlkdebugOptions
from nbdjobs.nodes.opening import open_node
from nbdjobs.qmp.qemu_io.shell import COMMANDS, run_line
from tests.nodes.faults import MemoryNode

NAMES = sorted(COMMANDS.keys() - {"wait_break"})
WORDS = ("-q", "-P", "-s", "-l", "-z", "-C", "-v", "-f", "-u", "-n", "-b", "-c", "-i", "-m", "-")
OPERANDS = ("0", "1", "512", "4k", "1M", "8E", "x", "-1", "off", "A", "pwritev", "read_aio", "help")
LINES = st.lists(
    st.tuples(st.sampled_from(NAMES), st.lists(st.sampled_from(WORDS + OPERANDS), max_size=5)),
    max_size=8,
)


@given(LINES)
def test_lines_are_answered_and_leave_nothing_behind(
    lines: list[tuple[str, list[str]]],
) -> None:
    async def main() -> None:
        daemon = Daemon()
        disk = MemoryNode(1024 * 1024)
        daemon.graph.add(disk)
        options = BlkdebugOptions(driver="blkdebug", node_name="b", image="disk")
        node = await open_node(daemon.graph, options)
        assert isinstance(node, BlkdebugNode)
        for name, words in lines:
            for tag in WORDS + OPERANDS:  # or else a request might be held for ever
                node.break_points.remove(tag)
            answer = await run_line(daemon, "b", " ".join([name, *words]))
            assert not answer or answer.endswith("\n")
            assert len(disk.parents) == 1
        await run_line(daemon, "b", "aio_flush")
        assert disk.in_flight == 0
        await daemon.shutdown()
        assert not daemon.graph.nodes

    asyncio.run(main())

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""blkdebug: rules by event, state, kind and place; limits; its configuration file."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.blkdebug import BlkdebugNode, BlkdebugOptions, PermissionName
from nbdjobs.nodes.blkdebug_config import read_config
from nbdjobs.nodes.blkdebug_rules import InjectError, IOType, Rules, SetState
from nbdjobs.nodes.events import DebugEvent
from nbdjobs.nodes.graph import Graph
from nbdjobs.nodes.node import Node
from nbdjobs.nodes.null import NullOptions
from nbdjobs.nodes.opening import open_node
from nbdjobs.nodes.options import Discard
from nbdjobs.nodes.raw import RawOptions
from tests.nodes.faults import MemoryNode, Op

ALWAYS = DebugEvent.NONE


def failures(errors: list[InjectError], *requests: tuple[IOType, int, int]) -> list[int]:
    rules = Rules(errors, [])
    return [rules.failure_of(*request) for request in requests]


def test_a_rule_without_a_kind_spares_only_block_status() -> None:
    rules = Rules([InjectError(event=ALWAYS)], [])
    spared = [kind for kind in IOType if not rules.failure_of(kind, 0, 512)]
    assert spared == [IOType.BLOCK_STATUS]


def test_a_rule_with_a_kind_strikes_only_that_kind() -> None:
    rules = Rules([InjectError(event=ALWAYS, iotype=IOType.BLOCK_STATUS)], [])
    struck = [kind for kind in IOType if rules.failure_of(kind, 0, 512)]
    assert struck == [IOType.BLOCK_STATUS]


def test_a_sector_is_struck_by_every_request_that_touches_it() -> None:
    rule = InjectError(event=ALWAYS, sector=2, errno=errno.ENOSPC)
    read = IOType.READ
    assert failures([rule], (read, 0, 1024), (read, 0, 1025), (read, 1024, 1), (read, 1025, 9)) == [
        0,
        errno.ENOSPC,
        errno.ENOSPC,
        0,
    ]


def test_a_rule_that_holds_once_is_used_up() -> None:
    rule = InjectError(event=ALWAYS, once=True)
    assert failures([rule], (IOType.READ, 0, 1), (IOType.READ, 0, 1)) == [errno.EIO, 0]


def test_the_first_rule_that_fits_counts() -> None:
    rules = [InjectError(event=ALWAYS, errno=28, once=True), InjectError(event=ALWAYS, errno=5)]
    assert failures(rules, (IOType.READ, 0, 1), (IOType.READ, 0, 1)) == [28, 5]


def test_errno_zero_lets_a_request_through() -> None:
    rules = [InjectError(event=ALWAYS, errno=0, sector=0), InjectError(event=ALWAYS)]
    assert failures(rules, (IOType.READ, 0, 512), (IOType.READ, 512, 512)) == [0, errno.EIO]


def test_an_event_with_rules_replaces_what_was_active() -> None:
    rules = Rules(
        [
            InjectError(event=ALWAYS, errno=1),
            InjectError(event=DebugEvent.READ_AIO, errno=2, sector=7),
        ],
        [],
    )
    rules.on_event(DebugEvent.WRITE_AIO)
    assert rules.failure_of(IOType.READ, 0, 512) == 1
    rules.on_event(DebugEvent.READ_AIO)
    assert rules.failure_of(IOType.READ, 0, 512) == 0


def test_states_switch_rules_on() -> None:
    write = DebugEvent.PWRITEV
    rules = Rules(
        [InjectError(event=write, state=2)],
        [SetState(event=write, state=1, new_state=2), SetState(event=write, new_state=3)],
    )
    outcomes = []
    for _ in range(3):
        rules.on_event(write)
        outcomes.append((rules.state, rules.failure_of(IOType.WRITE, 0, 1)))
    assert outcomes == [(2, 0), (3, errno.EIO), (3, errno.EIO)]


def with_blkdebug(
    options: BlkdebugOptions, scenario: Callable[[Node, MemoryNode], Awaitable[None]]
) -> None:
    """A raw node above blkdebug above a disk in memory named "disk"."""

    async def run() -> None:
        graph = Graph()
        disk = MemoryNode(64 * 1024)
        graph.add(disk)
        await scenario(
            await open_node(graph, RawOptions(driver="raw", node_name="top", file=options)), disk
        )

    asyncio.run(run())


def test_a_raw_node_above_tells_what_it_does() -> None:
    options = BlkdebugOptions(
        driver="blkdebug",
        image="disk",
        inject_error=(
            InjectError(event=DebugEvent.READ_AIO, errno=errno.ENXIO, iotype=IOType.READ),
            InjectError(event=DebugEvent.WRITE_AIO, errno=errno.ENOSPC, iotype=IOType.WRITE),
            InjectError(event=DebugEvent.FLUSH_TO_DISK, errno=errno.EIO, iotype=IOType.FLUSH),
        ),
    )

    async def scenario(top: Node, disk: MemoryNode) -> None:
        buffer = memoryview(bytearray(512))
        outcomes = []
        requests: list[Callable[[], Awaitable[None]]] = [
            lambda: top.pread(0, buffer),
            lambda: top.pwrite(0, buffer),
            lambda: top.flush(),
        ]
        for request in requests:
            with pytest.raises(NodeError) as caught:
                await request()
            outcomes.append(caught.value.errno)
        assert outcomes == [errno.ENXIO, errno.ENOSPC, errno.EIO]
        assert not disk.requests

    with_blkdebug(options, scenario)


def test_requests_are_cut_and_aligned_to_the_limits() -> None:
    options = BlkdebugOptions(
        driver="blkdebug",
        image="disk",
        align=4096,
        max_transfer=8192,
        max_write_zero=16384,
        opt_discard=8192,
        max_discard=8192,
        discard=Discard.UNMAP,
    )

    async def scenario(top: Node, disk: MemoryNode) -> None:
        node = top.edges["file"].node
        await node.pwrite(100, memoryview(b"x" * 20000))
        assert [(r.offset, r.length) for r in disk.requests_of(Op.WRITE)] == [
            (0, 8192),
            (8192, 8192),
            (16384, 4096),
        ]
        await node.pwrite_zeroes(0, 32768)
        assert [r.length for r in disk.requests_of(Op.ZERO)] == [16384, 16384]
        await node.pdiscard(100, 30000)
        assert [(r.offset, r.length) for r in disk.requests_of(Op.DISCARD)] == [
            (8192, 8192),
            (16384, 8192),
        ]

    with_blkdebug(options, scenario)


def test_a_failing_read_modify_write_changes_nothing() -> None:
    rule = InjectError(event=DebugEvent.PWRITEV_RMW_HEAD, iotype=IOType.WRITE)
    options = BlkdebugOptions(driver="blkdebug", image="disk", align=4096, inject_error=(rule,))

    async def scenario(top: Node, disk: MemoryNode) -> None:
        await top.pwrite(0, memoryview(b"x" * 4096))  # nothing to fill up
        with pytest.raises(NodeError):
            await top.pwrite(512, memoryview(b"y" * 512))
        assert disk.content == b"x" * 4096 + bytes(60 * 1024)

    with_blkdebug(options, scenario)


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"align": 3}, "align 3"),
        ({"align": 1 << 40}, "align 1099511627776"),
        ({"align": 4096, "max_transfer": 2048}, "max-transfer 2048"),
        ({"align": 4096, "opt_write_zero": 2048}, "opt-write-zero 2048"),
        ({"align": 4096, "max_write_zero": 2048}, "max-write-zero 2048"),
        ({"align": 4096, "opt_discard": 2048}, "opt-discard 2048"),
        ({"opt_discard": 1536, "max_discard": 1024}, "max-discard 1024"),
    ],
)
def test_limits_must_fit_together(members: dict[str, int], words: str) -> None:
    options = BlkdebugOptions(
        driver="blkdebug",
        node_name="b",
        image=NullOptions(driver="null-co"),
        **members,  # type: ignore[arg-type]  # a table of members of one type
    )
    with pytest.raises(CommandError) as caught:
        asyncio.run(open_node(Graph(), options))
    assert caught.value.description == f"Cannot meet constraints with {words}"


def test_limits_are_not_negative() -> None:
    image = NullOptions(driver="null-co")
    options = BlkdebugOptions(driver="blkdebug", node_name="b", image=image, max_transfer=-512)
    with pytest.raises(CommandError) as caught:
        asyncio.run(open_node(Graph(), options))
    expected = "Parameter 'max-transfer' expects a non-negative number below 2^64"
    assert caught.value.description == expected


def test_permissions_can_be_taken_and_refused() -> None:
    options = BlkdebugOptions(
        driver="blkdebug",
        node_name="b",
        image=NullOptions(driver="null-co"),
        take_child_perms=(PermissionName.WRITE,),
        unshare_child_perms=(PermissionName.RESIZE,),
    )
    edge = asyncio.run(open_node(Graph(), options)).edges["image"]
    assert edge.needed.name == "WRITE"
    assert "RESIZE" not in str(edge.shared.name)


def test_a_config_file_gives_rules(tmp_path: Path) -> None:
    path = tmp_path / "rules"
    path.write_text(
        '# a comment\n[inject-error]\nevent = "read_aio"\nerrno = "28"\nonce = "on"\n'
        '  sector = "8"\n\n[set-state]\nevent = "pwritev"\nstate = "1"\nnew_state = "2"\n'
    )
    assert read_config(str(path)) == [
        InjectError(event=DebugEvent.READ_AIO, errno=28, once=True, sector=8),
        SetState(event=DebugEvent.PWRITEV, state=1, new_state=2),
    ]
    options = BlkdebugOptions(
        driver="blkdebug",
        node_name="b",
        image=NullOptions(driver="null-co"),
        config=str(path),
    )
    node = asyncio.run(open_node(Graph(), options))
    assert isinstance(node, BlkdebugNode)
    asyncio.run(node.debug_event(DebugEvent.READ_AIO))
    assert node.rules.failure_of(IOType.READ, 0, 8192) == 28


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[bad]\n", "There is no option group 'bad'"),
        ('event = "none"\n', "no group defined"),
        ('[inject-error]\nerrno = "28"\n', "Missing event name for rule"),
        ('[inject-error]\nevent = "nope"\n', "invalid parameter value: nope"),
        (
            '[inject-error]\nevent = "none"\niotype = "foo"\n',
            "invalid parameter value: foo",
        ),
        ('[inject-error]\nevent = "none"\nerrno = "x"\n', "Parameter 'errno' expects a number"),
        ('[inject-error]\nevent = "none"\nonce = "x"\n', "Parameter 'once' expects 'on' or 'off'"),
        ('[inject-error]\nevent = "none"\nfoo = "x"\n', "Invalid parameter 'foo'"),
        ("[inject-error]\nwhat\n", "Invalid line in blkdebug config file: 'what'"),
    ],
)
def test_a_wrong_config_file_is_refused(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "rules"
    path.write_text(text)
    with pytest.raises(CommandError) as caught:
        read_config(str(path))
    assert caught.value.description == words


def test_a_missing_config_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CommandError) as caught:
        read_config(str(tmp_path / "nope"))
    assert caught.value.description == (
        "Could not read blkdebug config file: No such file or directory"
    )

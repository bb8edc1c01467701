# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The human monitor: how lines are read, and what is answered.

The expected texts, but for help, are what QEMU 7.2's monitor answers to the same lines.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdjobs.daemon.daemon import Daemon
from nbdjobs.errors import CommandError
from nbdjobs.qmp.commands import REGISTRY
from nbdjobs.qmp.commands.human.line import Argument, Flag, LineError, Word, parse_arguments
from nbdjobs.qmp.commands.human.texts import size_text, tree_lines
from nbdjobs.qmp.commands.human_monitor import MAX_LINE

MIB = 1024 * 1024
NODES: Sequence[dict[str, object]] = (
    {"driver": "null-co", "node-name": "n0", "size": MIB, "read-zeroes": True},
    {"driver": "raw", "node-name": "r0", "file": "n0", "read-only": True},
    {
        "driver": "null-co",
        "node-name": "n1",
        "cache": {"direct": True, "no-flush": True},
        "detect-zeroes": "on",
        "size": 1000 * 512,
    },
)

N0 = """\
n0: json:{"driver": "null-co", "size": 1048576, "read-zeroes": true} (null-co)
    Cache mode:       writeback
"""
N0_IMAGE = """
Images:
image: json:{"driver": "null-co", "size": 1048576, "read-zeroes": true}
file format: null-co
virtual size: 1 MiB (1048576 bytes)
disk size: 0 B
"""
R0 = """\
r0: json:{"driver": "raw", "file": {"driver": "null-co", "size": 1048576, "read-zeroes": true}}\
 (raw, read-only)
    Cache mode:       writeback
"""
N1 = """\
n1: json:{"driver": "null-co", "size": 512000} (null-co)
    Cache mode:       writeback, direct, ignore flushes
    Detect zeroes:    on
"""


async def execute(daemon: Daemon, command: str, **arguments: object) -> Any:
    named = {name.replace("_", "-"): value for name, value in arguments.items()}
    return await REGISTRY.find(command).execute(daemon, named)


async def ask(daemon: Daemon, line: str) -> str:
    answer: str = await execute(daemon, "human-monitor-command", command_line=line)
    return answer


def answer_to(line: str) -> str:
    """What a daemon with a few nodes answers."""

    async def go() -> str:
        daemon = Daemon()
        for node in NODES:
            await REGISTRY.find("blockdev-add").execute(daemon, node)
        answer = await ask(daemon, line)
        await daemon.shutdown()
        return answer

    return asyncio.run(go())


def hint(command: str) -> str:
    return f'Try "help {command}" for more information\n'


@pytest.mark.parametrize(
    ("line", "answer"),
    [
        ("", ""),
        ("   ", ""),
        ("foo", "unknown command: 'foo'\n"),
        ("# foo", "unknown command: '#'\n"),
        ("info foo", "unknown command: 'info foo'\n"),
        ("info block", ""),
        ("info block nope", ""),
        ("info block -n", f"{N1}\n{R0}\n{N0}"),
        ("info\t block n1", N1),
        ("info block n0", f"\n{N0}"),
        ('info block "n0"', f"\n{N0}"),
        ("info block -v n0", f"\n{N0}{N0_IMAGE}"),
        ("info block -n -v n0", f"\n{N0}{N0_IMAGE}"),
        ("info block -v -n", ""),
        ("info block -x", "block: unsupported option -x\n" + hint("info block")),
        (
            "info block a b",
            "block: extraneous characters at the end of line\n" + hint("info block"),
        ),
        ("info block-jobs", "No active jobs\n"),
        ("info blockstats", ""),
        (
            "info blockstats x",
            "blockstats: extraneous characters at the end of line\n" + hint("info blockstats"),
        ),
        ("info status", "VM status: running\n"),
        ("qemu-io", "qemu-io: block device name expected\n" + hint("qemu-io")),
        ("qemu-io n0", "qemu-io: string expected\n" + hint("qemu-io")),
        ("qemu-io n0 length", "1 MiB\n"),
        ('qemu-io  n1  "length" ', "500 KiB\n"),
        ('qemu-io n0 ""', ""),
        ('qemu-io n0 "a\\nb"', 'command "a\nb" not found\n'),
        ("qemu-io nope length", "Error: Cannot find device='' nor node-name='nope'\n"),
        ("qemu-io -d n0 length", "Error: Device 'n0' not found\n"),
        ("qemu-io -x n0 length", "qemu-io: unsupported option -x\n" + hint("qemu-io")),
        (
            'qemu-io n0 "length',
            "unterminated string\nqemu-io: string expected\n" + hint("qemu-io"),
        ),
        (
            'qemu-io n0 "a\\qb"',
            "unsupported escape code: '\\q'\nqemu-io: string expected\n" + hint("qemu-io"),
        ),
        (
            "qemu-io n0 length extra",
            "qemu-io: extraneous characters at the end of line\n" + hint("qemu-io"),
        ),
        ('qemu-io r0 "write 0 512"', "Block node is read-only\n"),
        ("help nope", "unknown command: 'nope'\n"),
        ("help info nope", "unknown command: 'info nope'\n"),
    ],
)
def test_lines_are_answered_as_by_qemu(line: str, answer: str) -> None:
    assert answer_to(line) == answer


def test_help_has_a_line_for_each_command() -> None:
    def names(text: str) -> list[str]:
        return [line.split(" [")[0].split("  ")[0] for line in text.splitlines()]

    assert names(answer_to("help")) == ["help", "info", "qemu-io"]
    assert names(answer_to("info")) == [f"info {name}" for name in INFO_NAMES]
    assert answer_to("?") == answer_to("help")
    assert answer_to("help info") == answer_to("info")
    for topic in ("qemu-io", "help", *(f"info {name}" for name in INFO_NAMES)):
        assert names(answer_to(f"help {topic}")) == [topic]


INFO_NAMES = ("block", "block-jobs", "blockstats", "status")


@pytest.mark.parametrize("number", [-1, 1])
def test_there_is_no_processor_to_choose_but_the_first(number: int) -> None:
    async def status(number: int) -> str:
        answer: str = await execute(
            Daemon(), "human-monitor-command", command_line="info status", cpu_index=number
        )
        return answer

    assert asyncio.run(status(0)) == "VM status: running\n"
    with pytest.raises(CommandError, match="Parameter 'cpu-index' expects a CPU number"):
        asyncio.run(status(number))


def test_an_endless_line_is_refused() -> None:
    assert answer_to("x" * MAX_LINE).startswith("unknown command: 'xxx")
    with pytest.raises(CommandError, match=f"more than {MAX_LINE} characters"):
        answer_to("x" * (MAX_LINE + 1))


def test_exports_and_jobs_are_shown(tmp_path: Path) -> None:
    async def main() -> None:
        daemon = Daemon()
        await execute(daemon, "blockdev-add", driver="null-co", node_name="d", size=MIB)
        await execute(daemon, "blockdev-add", driver="null-co", node_name="t", size=MIB)
        address = {"type": "unix", "data": {"path": str(tmp_path / "sock")}}
        await execute(daemon, "nbd-server-start", addr=address)
        await execute(daemon, "block-export-add", type="nbd", id="e", node_name="d", writable=True)
        await REGISTRY.find("block_set_io_throttle").execute(daemon, LIMITS)
        shown = await ask(daemon, "info block")
        assert shown.splitlines()[1:] == [
            "    Attached to:      e",
            "    Cache mode:       writeback",
            "    I/O throttling:   bps=0 bps_rd=0 bps_wr=0 bps_max=0 bps_rd_max=0 bps_wr_max=0"
            " iops=7 iops_rd=0 iops_wr=0 iops_max=0 iops_rd_max=0 iops_wr_max=0 iops_size=0"
            " group=e",
        ]
        await ask(daemon, 'qemu-io -d e "write -q 0 512"')
        (stats,) = (await ask(daemon, "info blockstats")).splitlines()
        assert stats.startswith("e: rd_bytes=0 wr_bytes=512 rd_operations=0 wr_operations=1 ")
        await execute(
            daemon, "blockdev-backup", job_id="j", device="d", target="t", sync="none", speed=5
        )
        assert await ask(daemon, "info block-jobs") == (
            "Type backup, device j: Completed 0 of 1048576 bytes, speed limit 5 bytes/s\n"
        )
        await execute(daemon, "stop")
        assert await ask(daemon, "info status") == "VM status: paused\n"
        await daemon.shutdown()

    asyncio.run(main())


LIMITS = {"id": "e", "bps": 0, "bps_rd": 0, "bps_wr": 0, "iops": 7, "iops_rd": 0, "iops_wr": 0}

ARGUMENTS: Sequence[Argument] = (Flag("a"), Flag("b"), Word("first", "word"), Word("second"))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x", {"first": "x"}),
        (" -a x y ", {"a": "", "first": "x", "second": "y"}),
        ("-b x", {"b": "", "first": "x"}),
        ("-a -b x", {"a": "", "b": "", "first": "x"}),
        ("-b -a", {"b": "", "first": "-a"}),
        ('"x y"  "\\"\\\\\\n"', {"first": "x y", "second": '"\\\n'}),
        ('""', {"first": ""}),
    ],
)
def test_arguments_are_told_apart(text: str, found: dict[str, str]) -> None:
    assert parse_arguments(text, ARGUMENTS) == found


@given(st.text(max_size=30))
def test_any_text_has_arguments_or_a_complaint_in_whole_lines(text: str) -> None:
    try:
        found = parse_arguments(text, ARGUMENTS)
    except LineError as error:
        complaint = str(error)
    else:
        complaint = "\n"
        assert found.keys() <= {"a", "b", "first", "second"}
    assert complaint.endswith("\n")


def test_what_a_format_tells_is_a_tree() -> None:
    told = {"cipher-mode": "xts", "slots": [{"active": True, "iters": 5}, {}], "uuid": "u"}
    assert list(tree_lines(told)) == [
        "    cipher mode: xts",
        "    slots:",
        "        [0]:",
        "            active: true",
        "            iters: 5",
        "        [1]:",
        "    uuid: u",
    ]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "0.977 KiB"),
        (4096, "4 KiB"),
        (200704, "196 KiB"),
        (1536 * 1024, "1.5 MiB"),
        (1000 * MIB, "0.977 GiB"),
        ((1 << 63) - 512, "8 EiB"),
    ],
)
def test_sizes_have_three_digits(size: int, text: str) -> None:
    assert size_text(size) == text

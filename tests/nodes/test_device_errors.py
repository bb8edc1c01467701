# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What devices do about failed requests: every policy, and how a stopped request comes through."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.device import Device
from nbdjobs.nodes.device_errors import ErrorHandler, ErrorPolicy
from nbdjobs.nodes.error_policy import IoStatus, OnError
from nbdjobs.nodes.permissions import Permission
from nbdjobs.qapi.types import event_name
from nbdjobs.qapi.visitor import to_qapi
from tests.nodes.faults import MemoryNode, Op
from tests.nodes.graphs import make_graph

WRITER = Permission.CONSISTENT_READ | Permission.WRITE

Request = Callable[[Device], Coroutine[Any, Any, object]]

#: What only writes, and writes alone, do to a disk, and as what the disk sees it.
WRITES: dict[Op, Request] = {
    Op.WRITE: lambda device: device.pwrite(0, memoryview(b"new" + bytes(509))),
    Op.ZERO: lambda device: device.pwrite_zeroes(0, 512),
    Op.DISCARD: lambda device: device.pdiscard(0, 512),
    Op.FLUSH: lambda device: device.flush(),
}
ALL: dict[Op, Request] = {
    Op.READ: lambda device: device.pread(0, memoryview(bytearray(512))),
    **WRITES,
}


class Rig:
    """A device with a policy."""

    def __init__(self, rerror: OnError | None = None, werror: OnError | None = None):
        self.disk = MemoryNode(b"old!" * 1024)
        self.device = Device(make_graph(self.disk), self.disk, needed=WRITER)
        self.events: list[dict[str, object]] = []
        policy = ErrorPolicy.checked(rerror, werror)
        assert policy is not None
        self.device.errors = ErrorHandler(
            policy, path="export", emit=self._record, stop=self.device.stop
        )

    def _record(self, event: object) -> None:
        assert event_name(type(event)) == "BLOCK_IO_ERROR"
        self.events.append(to_qapi(event))

    @property
    def errors(self) -> ErrorHandler:
        assert self.device.errors is not None
        return self.device.errors

    def cont(self) -> None:
        self.errors.reset()
        self.device.cont()


async def let_all_run() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


async def failure_of(request: Coroutine[Any, Any, object]) -> int:
    with pytest.raises(NodeError) as failure:
        await request
    return failure.value.errno


# Which policies there are


def test_without_options_there_is_no_policy() -> None:
    assert ErrorPolicy.checked(None, None) is None


@pytest.mark.parametrize("word", [OnError.IGNORE, OnError.ENOSPC])
def test_some_things_cannot_be_done_about_reads(word: OnError) -> None:
    with pytest.raises(CommandError, match=f"'{word}' invalid read error action"):
        ErrorPolicy.checked(word, None)


@pytest.mark.parametrize(
    ("rerror", "werror", "may_stop"),
    [
        (OnError.REPORT, None, False),
        (None, OnError.IGNORE, False),
        (OnError.AUTO, None, False),
        (OnError.STOP, None, True),
        (None, OnError.STOP, True),
        (None, OnError.ENOSPC, True),
        (None, OnError.AUTO, True),
    ],
)
def test_an_io_status_is_there_where_errors_may_stop(
    rerror: OnError | None, werror: OnError | None, may_stop: bool
) -> None:
    policy = ErrorPolicy.checked(rerror, werror)
    assert policy is not None
    assert policy.may_stop is may_stop


# What they do


@pytest.mark.parametrize("op", ALL)
@pytest.mark.parametrize("policy", [OnError.REPORT, OnError.AUTO])
def test_reported_errors_reach_the_client_and_are_told(op: Op, policy: OnError) -> None:
    async def scenario() -> None:
        rig = Rig(policy, policy)
        rig.disk.fail(op)
        assert await failure_of(ALL[op](rig.device)) == errno.EIO
        expected = {
            "qom-path": "export",
            "device": "",
            "node-name": "disk",
            "operation": "read" if op is Op.READ else "write",
            "action": "report",
            "reason": "Input/output error",
        }
        if policy is OnError.AUTO:
            expected["nospace"] = False  # type: ignore[assignment]  # the only one that is no text
        assert rig.events == [expected]
        assert rig.errors.io_status is IoStatus.OK
        assert rig.device.in_flight == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("op", WRITES)
def test_an_ignored_error_is_success_for_the_client(op: Op) -> None:
    async def scenario() -> None:
        rig = Rig(werror=OnError.IGNORE)
        rig.disk.fail(op)
        await WRITES[op](rig.device)
        assert [event["action"] for event in rig.events] == ["ignore"]
        assert rig.disk.content[:4] == b"old!"
        assert rig.device.in_flight == 0

    asyncio.run(scenario())


@pytest.mark.parametrize("op", ALL)
@pytest.mark.parametrize(
    ("error", "status"), [(errno.EIO, IoStatus.FAILED), (errno.ENOSPC, IoStatus.NOSPACE)]
)
def test_a_stopped_request_is_done_when_somebody_continues(
    op: Op, error: int, status: IoStatus
) -> None:
    async def scenario() -> None:
        rig = Rig(OnError.STOP, OnError.STOP)
        rig.disk.fail(op, error)
        request = asyncio.create_task(ALL[op](rig.device))
        await let_all_run()
        assert not request.done()
        assert rig.device.in_flight == 0
        assert rig.errors.io_status is status
        (told,) = rig.events
        assert (told["action"], told["nospace"]) == ("stop", error == errno.ENOSPC)
        rig.cont()
        await request
        assert rig.disk.counts[op] == 2
        assert rig.errors.io_status is IoStatus.OK
        assert len(rig.events) == 1
        if op is Op.WRITE:
            assert rig.disk.content[:3] == b"new"
            assert rig.device.accounting.highest_offset_written == 512

    asyncio.run(scenario())


def test_enospc_stops_a_full_disk_only() -> None:
    async def scenario() -> None:
        rig = Rig(werror=OnError.ENOSPC)
        rig.disk.fail(Op.WRITE, errno.EIO)
        assert await failure_of(WRITES[Op.WRITE](rig.device)) == errno.EIO
        rig.disk.fail(Op.WRITE, errno.ENOSPC)
        request = asyncio.create_task(WRITES[Op.WRITE](rig.device))
        await let_all_run()
        assert not request.done()
        rig.cont()
        await request
        assert [event["action"] for event in rig.events] == ["report", "stop"]

    asyncio.run(scenario())


def test_an_error_that_stays_stops_again_each_time_without_end() -> None:
    async def scenario() -> None:
        rig = Rig(werror=OnError.STOP)
        fault = rig.disk.fail(Op.WRITE, times=None)
        request = asyncio.create_task(WRITES[Op.WRITE](rig.device))
        for number in range(1, 1500):  # more often than calls may be nested
            await let_all_run()
            assert len(rig.events) == number
            rig.cont()
        fault.stop()
        await let_all_run()
        rig.cont()
        await request
        assert rig.disk.content[:3] == b"new"

    asyncio.run(scenario())


def test_who_continues_may_find_the_request_failing_for_good() -> None:
    async def scenario() -> None:
        rig = Rig(OnError.STOP)
        rig.disk.fail(Op.READ)
        request = asyncio.create_task(ALL[Op.READ](rig.device))
        await let_all_run()
        rig.disk.fail(Op.READ)
        rig.device.errors = None
        rig.device.cont()
        with pytest.raises(NodeError):
            await request

    asyncio.run(scenario())


def test_several_requests_fail_together_and_go_on_in_order() -> None:
    async def scenario() -> None:
        rig = Rig(werror=OnError.STOP)
        fault = rig.disk.fail(Op.WRITE, errno.ENOSPC, times=None)
        async with rig.disk.hold() as gate:
            writes = [
                asyncio.create_task(rig.device.pwrite(512 * number, memoryview(bytes(512))))
                for number in range(5)
            ]
            await gate.reached(5)
        await let_all_run()
        assert rig.errors.io_status is IoStatus.NOSPACE
        assert len(rig.events) == 5, "those in flight when the first one failed"
        writes.append(asyncio.create_task(rig.device.pwrite(5 * 512, memoryview(bytes(512)))))
        await let_all_run()
        assert len(rig.events) == 5, "and none that came later"
        fault.stop()
        rig.disk.requests.clear()
        rig.cont()
        await asyncio.gather(*writes)
        assert [request.offset for request in rig.disk.requests] == [512 * n for n in range(6)]

    asyncio.run(scenario())


# What is no I/O error


def test_users_mistakes_and_refusals_are_no_errors_of_the_disk() -> None:
    async def scenario() -> None:
        rig = Rig(OnError.STOP, OnError.STOP)
        with pytest.raises(NodeError):
            await rig.device.pread(rig.device.size, memoryview(bytearray(512)))
        with pytest.raises(NodeError):
            await rig.device.pdiscard(rig.device.size, 512)
        rig.disk.fail(Op.ZERO, errno.ENOTSUP)
        with pytest.raises(NodeError) as refusal:
            await rig.device.pwrite_zeroes(0, 512, fast_only=True)
        assert refusal.value.errno == errno.ENOTSUP
        rig.disk.fail(Op.STATUS)
        with pytest.raises(NodeError):
            await rig.device.block_status(0, 512)
        assert rig.events == []
        await WRITES[Op.WRITE](rig.device)

    asyncio.run(scenario())


@pytest.mark.parametrize("op", ALL)
def test_a_request_can_be_cancelled_while_it_is_stopped(op: Op) -> None:
    async def scenario() -> None:
        rig = Rig(OnError.STOP, OnError.STOP)
        rig.disk.fail(op)
        request = asyncio.create_task(ALL[op](rig.device))
        await let_all_run()
        request.cancel()
        with pytest.raises(asyncio.CancelledError):
            await request
        rig.cont()
        await let_all_run()
        assert rig.device.in_flight == 0
        assert rig.disk.counts[op] == 1

    asyncio.run(scenario())


def test_a_device_with_a_stopped_request_can_be_closed() -> None:
    async def scenario() -> None:
        rig = Rig(werror=OnError.STOP)
        rig.disk.fail(Op.WRITE, times=None)
        request = asyncio.create_task(WRITES[Op.WRITE](rig.device))
        await let_all_run()
        await rig.device.close()
        with pytest.raises(NodeError) as failure:
            await request
        assert failure.value.errno == errno.ENOMEDIUM
        assert len(rig.events) == 1

    asyncio.run(scenario())

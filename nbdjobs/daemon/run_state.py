# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Whether clients are served: `stop` holds their requests at every device, `cont` lets them go on.

Jobs, negotiation and everything else go on meanwhile: what QEMU does to the processors of its
guest, this does to the requests of clients. An I/O error stops everything likewise where a device
is to do so (see `nodes.device_errors`).

Source: QEMU qapi/run-state.json and qapi/misc.json (stop, cont).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum

from nbdjobs.errors import NodeError
from nbdjobs.nodes.device import Device
from nbdjobs.qapi.types import event

logger = logging.getLogger(__name__)


class RunState(StrEnum):
    """Whether clients are served, and if not, why (those of QEMU's states that occur here)."""

    IO_ERROR = "io-error"
    PAUSED = "paused"
    RUNNING = "running"


@event("STOP")
@dataclass(frozen=True, slots=True, kw_only=True)
class Stop:
    """Requests of clients are held back from now on."""


@event("RESUME")
@dataclass(frozen=True, slots=True, kw_only=True)
class Resume:
    """Requests of clients go on."""


class RunControl:
    """Stops and continues the devices of a daemon.

    Args:
        devices: Gives all of them.
        emit: Takes events.

    Attributes:
        state: What it is now.
    """

    def __init__(self, devices: Callable[[], Iterable[Device]], emit: Callable[[object], None]):
        self.state = RunState.RUNNING
        self._devices = devices
        self._emit = emit
        self._resumed = asyncio.Event()

    @property
    def is_running(self) -> bool:
        """Whether requests of clients are let in."""
        return self.state is RunState.RUNNING

    def adopt(self, device: Device) -> None:
        """Let a new device be as the others are."""
        if not self.is_running:
            device.stop()

    async def stop(self) -> None:
        """Hold the requests of clients; those in flight are done and flushed on return.

        It ends early if somebody continues meanwhile. A flush that fails is only logged: who
        relies on the data hears of it from the flush of their own.
        """
        self._hold(RunState.PAUSED)
        settling = asyncio.ensure_future(self._settle())
        resumed = asyncio.ensure_future(self._resumed.wait())
        try:
            await asyncio.wait([settling, resumed], return_when=asyncio.FIRST_COMPLETED)
        finally:
            resumed.cancel()
            settling.cancel()
            await asyncio.wait([settling, resumed])
        if not settling.cancelled():
            settling.result()

    def stop_for_error(self) -> None:
        """Hold the requests of clients because one of them has failed."""
        if self.is_running:
            logger.error("clients are stopped because of an I/O error, until somebody continues")
        self._hold(RunState.IO_ERROR)

    def cont(self) -> None:
        """Let the requests of clients go on, at each device in the order in which they came."""
        for device in self._devices():
            if device.errors is not None:
                device.errors.reset()
        if self.is_running:
            return
        self.state = RunState.RUNNING
        self._resumed.set()
        self._emit(Resume())
        for device in self._devices():
            device.cont()

    def _hold(self, state: RunState) -> None:
        """Hold all devices, unless they are held: then the reason stays what it was."""
        if not self.is_running:
            return
        self.state = state
        self._resumed.clear()
        for device in self._devices():
            device.stop()
        self._emit(Stop())

    async def _settle(self) -> None:
        async with asyncio.TaskGroup() as group:
            for device in self._devices():
                group.create_task(self._settle_device(device))

    @staticmethod
    async def _settle_device(device: Device) -> None:
        try:
            await device.settle()
        except NodeError as error:
            logger.error("node %s could not be flushed: %s", device.node.name, error)

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What a device does about requests that fail: report, ignore, or stop until somebody continues.

Source: QEMU qapi/block-core.json (BLOCK_IO_ERROR, BlockdevOnError) and the manual's `rerror` and
`werror`.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from nbdjobs.errors import CommandError, NodeError
from nbdjobs.nodes.error_policy import ErrorAction, IoOperation, IoStatus, OnError, choose_action
from nbdjobs.qapi.types import event

_ANSWERS: Final = frozenset({errno.ENOTSUP, errno.ENOMEDIUM, errno.ESHUTDOWN})
"""What says that a request cannot be, or cannot be any more: no disk has failed."""


@event("BLOCK_IO_ERROR")
@dataclass(frozen=True, slots=True, kw_only=True)
class BlockIoError:
    """A request of a device has failed.

    Attributes:
        qom_path: Which device, since those of exports have no name: the export's id.
        device: Name of the device, or "".
        node_name: The node that failed.
        operation: What was asked of it.
        action: What is done about it.
        nospace: Whether the storage is full; only where errors may stop the device.
        reason: For humans.
    """

    qom_path: str
    device: str
    node_name: str | None = None
    operation: IoOperation
    action: ErrorAction
    nospace: bool | None = None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorPolicy:
    """What is wanted about failed requests.

    Attributes:
        on_read: About reads.
        on_write: About everything that changes the disk, and about flushes.
    """

    on_read: OnError = OnError.REPORT
    on_write: OnError = OnError.REPORT

    @classmethod
    def checked(cls, on_read: OnError | None, on_write: OnError | None) -> ErrorPolicy | None:
        """The policy that a user's options ask for; None if they ask for none.

        A read cannot be ignored, as there is nothing to answer it with. `auto` is what QEMU's
        devices do by themselves: stop when a write finds the storage full.

        Raises:
            CommandError: That cannot be done about reads, in QEMU's words.
        """
        if on_read in (OnError.IGNORE, OnError.ENOSPC):
            raise CommandError(f"'{on_read}' invalid read error action")
        if on_read is None and on_write is None:
            return None
        return cls(
            on_read=OnError.STOP if on_read is OnError.STOP else OnError.REPORT,
            on_write=_WRITE_DEFAULTS.get(on_write, on_write or OnError.REPORT),
        )

    @property
    def may_stop(self) -> bool:
        """Whether the device has an I/O status to show."""
        stopping = (OnError.STOP, OnError.ENOSPC)
        return self.on_read in stopping or self.on_write in stopping


_WRITE_DEFAULTS: Final = {None: OnError.REPORT, OnError.AUTO: OnError.ENOSPC}


class ErrorHandler:
    """Reacts to the failed requests of one device.

    Args:
        policy: What is wanted.
        name: Name of the device, or "".
        path: What events say besides, where there is no name.
        emit: Takes events.
        stop: Makes the device hold requests back, this one included, until somebody continues.

    Attributes:
        policy: What is wanted.
        io_status: Whether an error has stopped the device.
    """

    def __init__(
        self,
        policy: ErrorPolicy,
        *,
        name: str = "",
        path: str,
        emit: Callable[[object], None],
        stop: Callable[[], None],
    ):
        self.policy = policy
        self.io_status = IoStatus.OK
        self._name = name
        self._path = path
        self._emit = emit
        self._stop = stop

    def handle(self, error: NodeError, *, is_read: bool, node_name: str) -> ErrorAction:
        """Decide about a failed request, tell users, and stop the device if it has to be.

        Returns:
            What the device has to do: with STOP, try again once it is let in.
        """
        if error.errno in _ANSWERS:
            return ErrorAction.REPORT
        policy = self.policy
        action = choose_action(policy.on_read if is_read else policy.on_write, error.errno)
        if action is ErrorAction.STOP:
            # Before the event, so that who asks because of it finds the status that it tells of.
            self.io_status = self.io_status.after(error.errno)
        self._emit(
            BlockIoError(
                qom_path=self._path,
                device=self._name,
                node_name=node_name,
                operation=IoOperation.READ if is_read else IoOperation.WRITE,
                action=action,
                nospace=error.errno == errno.ENOSPC if policy.may_stop else None,
                reason=os.strerror(error.errno),
            )
        )
        if action is ErrorAction.STOP:
            self._stop()
        return action

    def reset(self) -> None:
        """Somebody continues: whether the error is gone, the next request will see."""
        self.io_status = IoStatus.OK

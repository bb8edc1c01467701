# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""One client's session, without its socket: bytes in, messages out, replies as bytes.

    greeting ──▶ negotiation ──qmp_capabilities──▶ commands and events

A message is checked at its turn, not at its arrival, because a message before it in the same
packet may have changed the session.

Source: QEMU docs/interop/qmp-spec.rst; behaviour of qemu-storage-daemon 7.2.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from enum import StrEnum
from typing import Final

from nbdjobs.errors import CommandError, ErrorClass
from nbdjobs.qapi.jsonparse import DEFAULT_LIMITS, JsonError, JsonLimits, JsonStream, Parsed
from nbdjobs.qmp.registry import Registry
from nbdjobs.qmp.version import VERSION
from nbdjobs.qmp.wire import Request, encode, failure, parse_request, reply_id, success

logger = logging.getLogger(__name__)


class Capability(StrEnum):
    """QAPI `QMPCapability`: what a client may switch on."""

    OOB = "oob"


class Session:
    """The state of one client's session.

    Args:
        registry: The commands on offer.
        pretty: Indent what is sent.
        limits: Bounds of one message.
    """

    def __init__(
        self, registry: Registry, *, pretty: bool = False, limits: JsonLimits = DEFAULT_LIMITS
    ) -> None:
        self.registry: Final = registry
        self.pretty: Final = pretty
        self.is_negotiated = False
        self._capabilities: frozenset[Capability] = frozenset()
        self._stream = JsonStream(limits)

    def greeting(self) -> bytes:
        """What the client is sent first."""
        offer = {"version": VERSION, "capabilities": list(Capability)}
        return encode({"QMP": success(offer, {})["return"]}, pretty=self.pretty)

    def receive(self, data: bytes) -> Iterator[Parsed | JsonError]:
        """Yield the messages that `data` completes, to be answered in this order."""
        return self._stream.feed(data)

    def is_urgent(self, message: Parsed | JsonError) -> bool:
        """Whether the message overtakes those that wait to be answered."""
        if Capability.OOB not in self._capabilities or isinstance(message, JsonError):
            return False
        value = message.value
        return isinstance(value, dict) and "exec-oob" in value and "execute" not in value

    def negotiate(self, capabilities: list[Capability]) -> None:
        """Complete the negotiation with the capabilities that the client wants.

        Raises:
            CommandError: It is complete already.
        """
        if self.is_negotiated:
            raise CommandError(
                "Capabilities negotiation is already complete, command ignored",
                ErrorClass.COMMAND_NOT_FOUND,
            )
        self._capabilities = frozenset(capabilities)
        self.is_negotiated = True

    async def answer(self, message: Parsed | JsonError, context: object) -> bytes:
        """Execute a message and give the reply.

        A failure of any kind becomes an error reply; one that nobody planned is logged.
        Cancelling leaves done what the command leaves done.

        Args:
            message: From `receive`.
            context: What commands act on.
        """
        if isinstance(message, JsonError):
            return encode(failure(message, {}), pretty=self.pretty)
        id_member = reply_id(message.value)
        try:
            request = parse_request(message.value, allow_oob=Capability.OOB in self._capabilities)
            reply = success(await self._execute(request, context), id_member)
            return encode(reply, pretty=self.pretty)
        except CommandError as error:
            return encode(failure(error, id_member), pretty=self.pretty)
        except Exception as error:
            logger.exception("a QMP command failed unexpectedly")
            described = CommandError(f"Internal error: {error!r}")
            return encode(failure(described, id_member), pretty=self.pretty)

    async def _execute(self, request: Request, context: object) -> object:
        command = self.registry.commands.get(request.name)
        if not self.is_negotiated and (command is None or not command.is_negotiation):
            raise CommandError(
                "Expecting capabilities negotiation with 'qmp_capabilities'",
                ErrorClass.COMMAND_NOT_FOUND,
            )
        command = self.registry.find(request.name)
        if request.is_out_of_band and not command.allow_oob:
            raise CommandError(f"The command {request.name} does not support OOB")
        target = self if command.is_on_session else context
        return await command.execute(target, request.arguments)

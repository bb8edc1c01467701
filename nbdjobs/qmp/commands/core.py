# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Commands about the protocol and the server as a whole.

Source: QEMU qapi/control.json and qapi/introspect.json.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

from nbdjobs.qapi.schema import SchemaInfo
from nbdjobs.qmp.registry import command
from nbdjobs.qmp.session import Capability, Session
from nbdjobs.qmp.version import VERSION, VersionInfo


class CoreContext(Protocol):
    """What these commands need of the daemon."""

    def quit(self) -> None:
        """Begin to shut down; the reply to the command still goes out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QmpCapabilities:
    """Arguments of qmp_capabilities."""

    enable: list[Capability] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class CommandInfo:
    """QAPI `CommandInfo`."""

    name: str


@command("qmp_capabilities", is_on_session=True, is_negotiation=True)
def qmp_capabilities(session: Session, arguments: QmpCapabilities) -> None:
    """Complete the negotiation of a session."""
    session.negotiate(arguments.enable)


@command("query-version")
def query_version(context: CoreContext) -> VersionInfo:
    """Say which version answers."""
    return VERSION


@command("query-commands", is_on_session=True)
def query_commands(session: Session) -> list[CommandInfo]:
    """List the commands by name."""
    return [CommandInfo(name=name) for name in session.registry.commands]


@command("quit")
def quit_(context: CoreContext) -> None:
    """Shut the daemon down."""
    context.quit()


@command("query-qmp-schema", is_on_session=True)
def query_qmp_schema(session: Session) -> list[SchemaInfo]:
    """Describe all commands and events."""
    return session.registry.schema

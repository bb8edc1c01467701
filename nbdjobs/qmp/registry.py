# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Which commands and events there are.

A command is a plain or async function whose annotations say it all::

    @command("block-job-cancel")
    async def block_job_cancel(daemon: Daemon, arguments: BlockJobCancel) -> None: ...

The second parameter is missing when there are no arguments; None, a dataclass or a list of
one is returned. The decorated function is called in tests like the plain one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from types import ModuleType
from typing import Any, Final, Generic, ParamSpec, TypeVar, get_type_hints

from nbdjobs.errors import CommandError, ErrorClass
from nbdjobs.qapi.model import QapiType, describe
from nbdjobs.qapi.schema import CommandShape, EventShape, SchemaInfo, build_schema
from nbdjobs.qapi.types import event_name
from nbdjobs.qapi.visitor import visit

P = ParamSpec("P")
R = TypeVar("R")
V = TypeVar("V")


@dataclass(frozen=True, slots=True, kw_only=True)
class NoArguments:
    """The arguments of a command that takes none."""


class Command(Generic[P, R]):
    """A function that clients may call.

    Attributes:
        name: QMP name.
        features: QAPI features shown in the schema.
        allow_oob: It may be executed out of band: it must not wait for anything.
        is_on_session: It acts on the client's session instead of the daemon.
        is_negotiation: A session takes it before negotiation is complete, and nothing else.
    """

    def __init__(
        self,
        name: str,
        function: Callable[P, R],
        *,
        features: tuple[str, ...],
        allow_oob: bool,
        is_on_session: bool,
        is_negotiation: bool,
    ) -> None:
        self.name: Final = name
        self.features: Final = features
        self.allow_oob: Final = allow_oob
        self.is_on_session: Final = is_on_session
        self.is_negotiation: Final = is_negotiation
        self._function = function

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        """Call the function itself."""
        return self._function(*args, **kwargs)

    @cached_property
    def shape(self) -> CommandShape:
        """What the schema says about the command, from the function's annotations.

        Raises:
            TypeError: The function's parameters or annotations are not those of a command.
        """
        hints = get_type_hints(self._function, include_extras=True)
        result: QapiType | None = None
        if hints["return"] is not type(None):
            result = describe(hints["return"])
        names = list(inspect.signature(self._function).parameters)
        if len(names) not in (1, 2):
            raise TypeError(f"{self.name}: a command takes a context and its arguments")
        arguments = hints[names[1]] if len(names) == 2 else None
        return CommandShape(self.name, arguments, result, self.features, self.allow_oob)

    async def execute(self, context: object, arguments: object) -> object:
        """Check JSON arguments, then call the function.

        Args:
            context: What the function acts on.
            arguments: A decoded JSON object.

        Raises:
            CommandError: The arguments are refused, before any effect, or the function
                refuses.
        """
        function: Callable[..., Any] = self._function
        expected = self.shape.arguments
        if expected is None:
            visit(NoArguments, arguments)
            outcome = function(context)
        else:
            outcome = function(context, visit(expected, arguments))
        return await outcome if inspect.isawaitable(outcome) else outcome


def command(
    name: str,
    *,
    features: tuple[str, ...] = (),
    allow_oob: bool = False,
    is_on_session: bool = False,
    is_negotiation: bool = False,
) -> Callable[[Callable[P, R]], Command[P, R]]:
    """Make a function the command `name`; see `Command` for the arguments."""

    def declare(function: Callable[P, R]) -> Command[P, R]:
        return Command(
            name,
            function,
            features=features,
            allow_oob=allow_oob,
            is_on_session=is_on_session,
            is_negotiation=is_negotiation,
        )

    return declare


class Registry:
    """All commands and events of a server.

    Args:
        commands: The commands, in the order the schema shows them.
        events: Dataclasses declared with `@event`.

    Raises:
        TypeError: Two have the same name, or one is not declared as it must be.
    """

    def __init__(self, commands: Iterable[Command[Any, Any]], events: Iterable[type] = ()) -> None:
        self.commands: Final = _by_name((each.shape.name, each) for each in commands)
        self.events: Final = _by_name((event_name(each), each) for each in events)

    def find(self, name: str) -> Command[Any, Any]:
        """The command `name`.

        Raises:
            CommandError: There is none.
        """
        found = self.commands.get(name)
        if found is None:
            raise CommandError(
                f"The command {name} has not been found", ErrorClass.COMMAND_NOT_FOUND
            )
        return found

    @cached_property
    def schema(self) -> list[SchemaInfo]:
        """The answer to query-qmp-schema."""
        return build_schema(
            [each.shape for each in self.commands.values()],
            [EventShape(name, data) for name, data in self.events.items()],
        )


def commands_of(*groups: ModuleType) -> list[Command[Any, Any]]:
    """The commands that modules define, in the order of the text."""
    return [
        value for group in groups for value in vars(group).values() if isinstance(value, Command)
    ]


def _by_name(pairs: Iterable[tuple[str, V]]) -> Mapping[str, V]:
    table: dict[str, V] = {}
    for name, value in pairs:
        if name in table:
            raise TypeError(f"{name} is declared twice")
        table[name] = value
    return table

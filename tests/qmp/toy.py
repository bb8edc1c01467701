# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""A daemon of a few commands for testing sessions and their server."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from nbdjobs.errors import CommandError, ErrorClass
from nbdjobs.qapi.types import event
from nbdjobs.qmp.commands import core
from nbdjobs.qmp.registry import Registry, command, commands_of


class ToyContext:
    """What the commands act on.

    Attributes:
        log: What was executed, in order.
        entered: `toy-hold` is running.
        gate: Lets `toy-hold` go on.
        has_quit: `quit` was executed.
    """

    def __init__(self) -> None:
        self.log: list[str] = []
        self.entered = asyncio.Event()
        self.gate = asyncio.Event()
        self.has_quit = False

    def quit(self) -> None:
        self.has_quit = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    text: str


@event("TOY_HAPPENED")
@dataclass(frozen=True, slots=True, kw_only=True)
class ToyHappened:
    text: str
    count: int | None = None


@event("TOY_BARE")
@dataclass(frozen=True, slots=True, kw_only=True)
class ToyBare:
    pass


@command("toy-echo")
def toy_echo(context: ToyContext, arguments: Text) -> Text:
    context.log.append(arguments.text)
    return Text(text=arguments.text)


@command("toy-hold")
async def toy_hold(context: ToyContext, arguments: Text) -> None:
    context.entered.set()
    await context.gate.wait()
    context.log.append(arguments.text)


@command("toy-open", allow_oob=True, features=("unstable",))
def toy_open(context: ToyContext) -> None:
    context.gate.set()


@command("toy-refuse")
def toy_refuse(context: ToyContext) -> None:
    raise CommandError("no such toy", ErrorClass.DEVICE_NOT_FOUND)


@command("toy-break")
async def toy_break(context: ToyContext) -> list[Text]:
    raise ZeroDivisionError("toy is broken")


TOY_REGISTRY = Registry(
    [
        *commands_of(core),
        toy_echo,
        toy_hold,
        toy_open,
        toy_refuse,
        toy_break,
    ],
    [ToyHappened, ToyBare],
)

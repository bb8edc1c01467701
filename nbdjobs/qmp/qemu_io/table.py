# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""How a qemu-io command is declared."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from nbdjobs.qmp.qemu_io.target import Target
from nbdjobs.qmp.qemu_io.words import RefusedError, Words, split_options

Run = Callable[["IoCommand", Target, Words], Awaitable[str]]


@dataclass(frozen=True, slots=True, kw_only=True)
class IoCommand:
    """A command of qemu-io.

    Attributes:
        name: Its name.
        short_name: Another one, or "".
        arguments: How the manual writes what follows the name.
        summary: What it does, in a few words.
        letters: Its options, as C's getopt takes them; None where "-" has no meaning.
        at_least: Words that have to follow the name.
        at_most: Words that may follow it; None for any number.
        run: Does it; the answer is what the user is told.
    """

    name: str
    short_name: str = ""
    arguments: str = ""
    summary: str
    letters: str | None = None
    at_least: int = 0
    at_most: int | None = 0
    run: Run

    @property
    def usage(self) -> str:
        """The line that shows how to use it."""
        return f"{' '.join(filter(None, (self.name, self.arguments)))} -- {self.summary}\n"

    async def execute(self, target: Target, words: Sequence[str]) -> str:
        """Check how many words there are, tell options from operands, and run it.

        Raises:
            RefusedError: The words are wrong.
            CommandError: The target does not let it do what it needs.
            NodeError: A request failed of which the command says nothing by itself.
        """
        count = len(words)
        if count < self.at_least or (self.at_most is not None and count > self.at_most):
            raise RefusedError(
                f"bad argument count {count} to {self.name},"
                f" expected {self._expected()} arguments\n"
            )
        if self.letters is None:
            return await self.run(self, target, Words(operands=list(words)))
        return await self.run(
            self, target, split_options(self.name, words, self.letters, self.usage)
        )

    def check_operands(self, words: Words, at_least: int, at_most: int | None = None) -> None:
        """Show how to use the command where another number of operands is left."""
        count = len(words.operands)
        if count < at_least or (at_most is not None and count > at_most):
            raise RefusedError(self.usage)

    def _expected(self) -> str:
        if self.at_most is None:
            return f"at least {self.at_least}"
        if self.at_most == self.at_least:
            return str(self.at_least)
        return f"between {self.at_least} and {self.at_most}"

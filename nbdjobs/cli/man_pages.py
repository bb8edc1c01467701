# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Manual pages for man(1), made from what `--help` is made from. Pure: a parser in, pages out.

There is a page for the program and one for each subcommand. They have no date, so that the same
program always has the same pages. Made here rather than by a library, since those know neither a
page per subcommand nor the daemon's command line, which argparse cannot describe.

Source: man(7), which groff and mandoc read alike.
"""

from __future__ import annotations

import argparse
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from nbdjobs import __version__
from nbdjobs.cli.daemon_options import USAGE
from nbdjobs.cli.exits import ExitCode
from nbdjobs.cli.logs import FORMAT_VARIABLE, LEVEL_VARIABLE
from nbdjobs.cli.main import DAEMON
from nbdjobs.cli.parsers import (
    Described,
    alternatives_of,
    arguments_of,
    help_of,
    name_of,
    options_of,
    subcommands,
)

PROGRAM: Final = "nbdjobs"

EXIT_STATUS: Final[Mapping[ExitCode, str]] = {
    ExitCode.DONE: "done",
    ExitCode.FAILED: "failed or refused; one sentence on standard error says why",
    ExitCode.USAGE: "the command line is wrong",
    ExitCode.CANCELLED: "the backup was cancelled",
    ExitCode.INTERRUPTED: "interrupted by Ctrl-C",
}

ENVIRONMENT: Final[Mapping[str, str]] = {
    FORMAT_VARIABLE: "form of a server's log on standard error: text (default) or json",
    LEVEL_VARIABLE: "the least that is logged: debug, info, warning (default) or error",
    "XDG_RUNTIME_DIR": "where the folder nbdjobs is, in which servers have their sockets",
    "XDG_STATE_HOME": "where the folder nbdjobs is, in which the QMP shell has its history",
}

#: Column of the usage text of the daemon where help begins.
_HELP_COLUMN: Final = 25

#: Characters of a line in a page, for people who look into it and for mandoc, which complains.
_LINE_LENGTH: Final = 78


def pages(parser: argparse.ArgumentParser) -> dict[str, str]:
    """Make all pages.

    Args:
        parser: The program's, with the arguments of all subcommands.

    Returns:
        Content by file name, such as `nbdjobs-serve.1`.
    """
    commands = subcommands(parser)
    summary = parser.description or ""
    made = {f"{PROGRAM}.1": _page(PROGRAM, summary, _program(summary, commands))}
    for each in commands:
        body = _daemon() if each.name == DAEMON else _subcommand(each)
        made[f"{PROGRAM}-{each.name}.1"] = _page(f"{PROGRAM}-{each.name}", each.summary, body)
    return made


def _page(name: str, summary: str, body: Iterable[str]) -> str:
    lines = [
        f'.TH "{name.upper()}" "1" "" "{PROGRAM} {__version__}" "{PROGRAM}"',
        # Neither hyphens nor wide gaps: both would be in the way of whoever pastes a command.
        ".nh",
        ".ad l",
        ".SH NAME",
        f"{_text(name)} \\- {_text(summary.rstrip('.'))}",
        *body,
    ]
    return "\n".join(lines) + "\n"


# The pages' bodies


def _program(description: str, commands: Sequence[Described]) -> Iterator[str]:
    yield from (".SH SYNOPSIS", _bold(PROGRAM), r"\fISUBCOMMAND\fR [\fIARGUMENT\fR ...]")
    yield from (".SH DESCRIPTION", _text(description))
    yield ".SH SUBCOMMANDS"
    for each in commands:
        yield from (".TP", f".BR {_text(f'{PROGRAM}-{each.name}')} (1)", _text(each.summary))
    yield from _table("EXIT STATUS", {str(int(code)): text for code, text in EXIT_STATUS.items()})
    yield from _table("ENVIRONMENT", ENVIRONMENT)
    yield ".SH SEE ALSO"
    yield ".BR qemu\\-storage\\-daemon (1),"
    yield ".BR nbdinfo (1),"
    yield ".BR nbdcopy (1)"


def _table(heading: str, rows: Mapping[str, str]) -> Iterator[str]:
    yield f".SH {heading}"
    for name, text in rows.items():
        yield from (".TP", _bold(name), _text(text))


def _subcommand(command: Described) -> Iterator[str]:
    parser = command.parser
    yield from (".SH SYNOPSIS", _bold(f"{PROGRAM} {command.name}"), *_synopsis(parser))
    yield from (".SH DESCRIPTION", _text(parser.description or ""))
    if parser.epilog:
        yield from (".PP", _text(parser.epilog))
    explained = [action for action in arguments_of(parser) if help_of(action)]
    if explained:
        yield ".SH ARGUMENTS"
        for action in explained:
            yield from (".TP", _value(action), _text(help_of(action)))
    yield ".SH OPTIONS"
    for action in options_of(parser):
        yield from (".TP", _option(action), _text(help_of(action)))
    yield from _back()


def _daemon() -> Iterator[str]:
    usage, description, *rest = USAGE.splitlines()
    words = usage.removeprefix(f"Usage: {PROGRAM} {DAEMON} ")
    yield from (".SH SYNOPSIS", _bold(f"{PROGRAM} {DAEMON}"), _text(words))
    yield from (".SH DESCRIPTION", _text(description), ".SH OPTIONS")
    yield from _daemon_options(rest)
    yield from _back()


def _daemon_options(lines: Iterable[str]) -> Iterator[str]:
    """Headings, forms of options, which may go on in further lines, and what they do."""
    is_explained = True
    for line in lines:
        if line and not line.startswith(" "):
            yield from (".PP", _text(line))
        elif re.match(r" {2}\S", line):
            form, _, said = line.strip().partition("  ")
            yield from (".TP" if is_explained else ".TQ", _bold(form))
            is_explained = bool(said)
            if said:
                yield _text(said.strip())
        elif line.startswith(" " * _HELP_COLUMN):
            if not is_explained:
                yield ".br"
            is_explained = True
            yield _text(line.strip())
        elif line:
            yield from (".br", _bold(line.strip()))


def _back() -> Iterator[str]:
    yield from (".SH SEE ALSO", f".BR {PROGRAM} (1)")


# Their parts


def _synopsis(parser: argparse.ArgumentParser) -> Iterator[str]:
    """Every option and argument in brackets unless it has to be there, alternatives together."""
    told: set[str] = set()
    asked = [each for each in options_of(parser) if not isinstance(each, argparse._HelpAction)]
    for action in (*asked, *arguments_of(parser)):
        group, is_required = alternatives_of(parser, action)
        if action.dest not in told:
            told.update(each.dest for each in group)
            words = " | ".join(_briefly(each) for each in group)
            if not is_required:
                yield f"[{words}]"
            else:
                yield words if len(group) == 1 else f"{{{words}}}"


def _briefly(action: argparse.Action) -> str:
    if not action.option_strings:
        return _value(action)
    name = _bold_inline(action.option_strings[-1])
    return name if action.nargs == 0 else f"{name} {_value(action)}"


def _option(action: argparse.Action) -> str:
    names = ", ".join(_bold_inline(name) for name in action.option_strings)
    return names if action.nargs == 0 else f"{names} {_value(action)}"


def _value(action: argparse.Action) -> str:
    if action.choices:
        return "|".join(_bold_inline(str(choice)) for choice in action.choices)
    dots = " ..." if action.nargs in ("*", "+") else ""
    return rf"\fI{_escaped(name_of(action))}\fR{dots}"


# man(7)


def _bold(text: str) -> str:
    return f".B {_escaped(text)}"


def _bold_inline(text: str) -> str:
    return rf"\fB{_escaped(text)}\fR"


def _text(text: str) -> str:
    """Lines of text; what begins one must not be taken for a request."""
    lines = textwrap.wrap(
        _escaped(text), _LINE_LENGTH, break_on_hyphens=False, break_long_words=False
    )
    return "\n".join(rf"\&{line}" if line[0] in (".", "'") else line for line in lines)


def _escaped(text: str) -> str:
    """Backslashes, and dashes: others are hyphens that nobody can paste into a shell."""
    plain = text.replace("\\", r"\e").replace("-", r"\-").replace('"', r"\(dq")
    return "".join(each if each.isascii() else rf"\[u{ord(each):04X}]" for each in plain)

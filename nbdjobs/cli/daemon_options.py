# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The daemon's command line: qemu-storage-daemon's options, kept in the order they came in.

Source: QEMU docs/tools/qemu-storage-daemon.rst.
"""

from __future__ import annotations

import getopt
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from nbdjobs.cli.daemon_trace import wants_list
from nbdjobs.daemon.addresses import UNIX_PATH_LIMIT
from nbdjobs.errors import CommandError

USAGE: Final = """\
Usage: nbdjobs daemon [options]
Serve block nodes over NBD, steered over QMP; the options are those of qemu-storage-daemon.

  -h, --help             show this help and exit
  -V, --version          show the version and exit

Options that take effect in the order in which they are given:

  --blockdev [driver=]<driver>[,node-name=<N>][,discard=ignore|unmap]
             [,cache.direct=on|off][,cache.no-flush=on|off]
             [,read-only=on|off][,auto-read-only=on|off][,force-share=on|off]
             [,detect-zeroes=on|off|unmap][,<options of the driver>...]
                         add a block node
  --chardev socket,id=<id>,path=<path>[,server=on|off][,wait=on|off]
  --chardev socket,id=<id>,host=<host>,port=<port>[,server=on|off][,wait=on|off]
            [,ipv4=on|off][,ipv6=on|off]
                         make a socket for a monitor
  --export [type=]nbd,id=<id>,node-name=<node-name>[,name=<export-name>]
           [,writable=on|off][,description=<text>]
           [,rerror=report|stop|auto][,werror=report|ignore|enospc|stop|auto]
                         export a block node over NBD (needs --nbd-server first)
  --monitor [chardev=]<id>[,mode=control][,pretty=on|off]
                         run a QMP monitor on a socket
  --nbd-server addr.type=inet,addr.host=<host>,addr.port=<port>[,max-connections=<n>]
  --nbd-server addr.type=unix,addr.path=<path>[,max-connections=<n>]
  --nbd-server addr.type=fd,addr.str=<number>[,max-connections=<n>]
                         start the NBD server
  --object <type>,id=<id>[,<property>=<value>...]
                         make an object: secret, throttle-group, iothread
  -T, --trace [enable=]<pattern>[,events=<file>][,file=<file>]
                         accepted without effect: there are no trace events

The value of --blockdev, --export, --monitor, --nbd-server and --object may also be JSON.

Options that hold for the whole run:

  --check                check the command line, say all that is wrong, start nothing
  --daemonize            go to the background once everything is set up
  --pidfile <path>       write the process id to a file once everything is set up

Exit code: 0 after a clean stop; 1 if it cannot start, for wrong usage too, as
qemu-storage-daemon has it (other subcommands of nbdjobs end with 2 then).

Environment:

  NBDJOBS_LOG_FORMAT     form of the log on standard error: text (default) or json
  NBDJOBS_LOG_LEVEL      the least that is logged: debug, info, warning (default) or error
  NOTIFY_SOCKET          where a service manager such as systemd is told of start and stop
"""

_LONG: Final = (
    "blockdev=",
    "chardev=",
    "daemonize",
    "export=",
    "help",
    "monitor=",
    "nbd-server=",
    "object=",
    "pidfile=",
    "trace=",
    "version",
)


_SHORT: Final = "hT:V"
_LONG_NAMES: Final = {"T": "trace"}
"""Short options that mean what a long one does, as far as that matters here."""

_HINTS: Final = {
    r"Parameter 'id' expects an identifier": (
        "\nIdentifiers consist of letters, digits, '-', '.', '_', starting with a letter."
    ),
    r"UNIX socket path '.*' is too long": f"\nPath must be less than {UNIX_PATH_LIMIT} bytes",
}
"""What a command line's user is told in addition to a sentence of this form."""


class UsageError(Exception):
    """The command line itself is wrong; its text is for the user, the exit code is 1.

    Attributes:
        word: The word that is wrong; an option without its dashes.
    """

    def __init__(self, text: str, word: str):
        self.word = word
        super().__init__(text)


@dataclass(frozen=True, slots=True)
class Step:
    """One option that sets something up.

    Attributes:
        option: Name without dashes, such as "blockdev".
        text: Its value as the user wrote it.
        typed: Both as the user wrote them, for messages.
    """

    option: str
    text: str
    typed: str

    def complain(self, error: CommandError) -> str:
        """Return what the user is told when the option is refused."""
        hints = (h for form, h in _HINTS.items() if re.fullmatch(form, error.description, re.S))
        return f"{self.typed}: {error}{''.join(hints)}"


@dataclass(frozen=True, slots=True)
class CommandLine:
    """A whole command line.

    Attributes:
        steps: What to set up, in order.
        is_daemonized: Whether to go to the background afterwards.
        pidfile: Where to write the process id, or None.
        wants_help: Show the help and do nothing else.
        wants_version: Show the version and do nothing else.
        wants_trace_events: List the trace events, of which there are none, and do nothing else.
    """

    steps: tuple[Step, ...] = ()
    is_daemonized: bool = False
    pidfile: str | None = None
    wants_help: bool = False
    wants_version: bool = False
    wants_trace_events: bool = False


def without_check(arguments: list[str]) -> list[str] | None:
    """Return the command line without `--check`; None if it is not there.

    It is looked for apart from the other options and by its full name only: among them, it would
    make abbreviations like `--c` ambiguous that qemu-storage-daemon takes.
    """
    takers = {f"--{name[:-1]}" for name in _LONG if name.endswith("=")}
    for number, word in enumerate(arguments):
        if word == "--check" and (number == 0 or arguments[number - 1] not in takers):
            return arguments[:number] + arguments[number + 1 :]
    return None


def parse_command_line(arguments: list[str]) -> CommandLine:
    """Take the command line apart, without looking into the options' values.

    Raises:
        UsageError: An unknown option, a missing value, or a word that is no option.
    """
    try:
        found, rest = getopt.getopt(arguments, _SHORT, list(_LONG))
    except getopt.GetoptError as error:
        raise UsageError(_describe(error), error.opt) from error
    if rest:
        raise UsageError(f"{rest[0]}: Unexpected argument", rest[0])
    short = [(name.lstrip("-"), text) for name, text in found]
    options = [(_LONG_NAMES.get(name, name), text) for name, text in short]
    typed = _as_typed(arguments)
    names = {name for name, _ in options}
    pidfiles = [text for name, text in options if name == "pidfile"]
    return CommandLine(
        steps=tuple(
            Step(name, text, shown)
            for (name, text), shown in zip(options, typed, strict=False)
            if name in SETTING_UP
        ),
        is_daemonized="daemonize" in names,
        pidfile=pidfiles[-1] if pidfiles else None,
        wants_help=not names.isdisjoint({"h", "help"}),
        wants_version=not names.isdisjoint({"V", "version"}),
        wants_trace_events=any(name == "trace" and wants_list(text) for name, text in options),
    )


SETTING_UP: Final = frozenset(
    {"blockdev", "chardev", "export", "monitor", "nbd-server", "object", "trace"}
)


def _as_typed(arguments: list[str]) -> Iterator[str]:
    """Each option as it stands on the command line: `--export=X`, `--export X`, `--exp X`.

    Short ones in a bundle come one by one.
    """
    words = iter(arguments)
    for word in words:
        if not word.startswith("--"):
            yield from _short_ones(word, words)
        elif "=" in word or not _takes_value(word[2:]):
            yield word
        else:
            yield f"{word} {next(words)}"


def _takes_value(name: str) -> bool:
    """Whether a long option that was understood, perhaps abbreviated, has a value."""
    found = [each for each in _LONG if each.rstrip("=") == name]
    found = found or [each for each in _LONG if each.startswith(name)]
    return found[0].endswith("=")


def _short_ones(bundle: str, words: Iterator[str]) -> Iterator[str]:
    for number, letter in enumerate(bundle[1:], start=2):
        if f"{letter}:" not in _SHORT:
            yield f"-{letter}"
            continue
        value = bundle[number:]
        yield f"-{letter}{value}" if value else f"-{letter} {next(words)}"
        return


def _describe(error: getopt.GetoptError) -> str:
    dashed = f"--{error.opt}" if len(error.opt) > 1 else f"-{error.opt}"
    if "requires argument" in error.msg and len(error.opt) == 1:
        return f"option requires an argument -- '{error.opt}'"
    if "requires argument" in error.msg:
        return f"option '{dashed}' requires an argument"
    if "not a unique prefix" in error.msg:
        return f"option '{dashed}' is ambiguous"
    if "must not have an argument" in error.msg:
        return f"option '{dashed}' doesn't allow an argument"
    if len(error.opt) == 1:
        return f"invalid option -- '{error.opt}'"
    return f"unrecognized option '{dashed}'"

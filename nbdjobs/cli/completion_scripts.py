# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Completion scripts for bash, zsh and fish, from a description of the command line. Pure."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Argument:
    """A value that the user gives, by its place or behind an option.

    Attributes:
        name: What the help calls it.
        choices: All values there are; empty when they are not known.
        is_path: It is a path.
        is_repeated: It may be given again and again.
    """

    name: str
    choices: tuple[str, ...] = ()
    is_path: bool = False
    is_repeated: bool = False


@dataclass(frozen=True, slots=True)
class Option:
    """An option: all its names with dashes, its help, and its value if it has one."""

    names: tuple[str, ...]
    summary: str
    value: Argument | None = None


@dataclass(frozen=True, slots=True)
class Command:
    """A subcommand with what it takes."""

    name: str
    summary: str
    options: tuple[Option, ...]
    arguments: tuple[Argument, ...]


def bash(commands: Sequence[Command]) -> str:
    """Write the script for bash; it needs nothing but bash itself."""
    names = " ".join(command.name for command in commands)
    values = "".join(_bash_values(command) for command in commands)
    words = "".join(_bash_words(command) for command in commands)
    return f"""\
# bash completion for nbdjobs, made by: nbdjobs completion bash
_nbdjobs() {{
    local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD - 1]}}
    local options="" words="" files=""
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        mapfile -t COMPREPLY < <(compgen -W "{names} --help --version" -- "$current")
        return
    fi
    case "${{COMP_WORDS[1]}} $previous" in
{values}\
    *)
        case "${{COMP_WORDS[1]}}" in
{words}\
        esac
        [[ $current == -* ]] && words=$options files=""
        ;;
    esac
    if [[ -n $files ]]; then
        compopt -o filenames 2>/dev/null
        mapfile -t COMPREPLY < <(compgen -f -- "$current")
    else
        mapfile -t COMPREPLY < <(compgen -W "$words" -- "$current")
    fi
}}
complete -F _nbdjobs nbdjobs
"""


def _bash_values(command: Command) -> str:
    """What comes behind each option that has a value."""
    cases = ""
    for option in command.options:
        if option.value is not None:
            patterns = " | ".join(f'"{command.name} {name}"' for name in option.names)
            cases += f"    {patterns}) {_bash_offer([option.value])} ;;\n"
    return cases


def _bash_words(command: Command) -> str:
    """What comes anywhere else: options, choices, files."""
    options = " ".join(name for option in command.options for name in option.names)
    offer = _bash_offer(command.arguments)
    return f'        {command.name}) options="{options}" {offer} ;;\n'


def _bash_offer(arguments: Iterable[Argument]) -> str:
    arguments = list(arguments)
    words = " ".join(choice for argument in arguments for choice in argument.choices)
    files = "yes" if any(argument.is_path for argument in arguments) else ""
    return f'words="{words}" files="{files}"'


def zsh(commands: Sequence[Command]) -> str:
    """Write the script for zsh, to be sourced or to be a file of `$fpath`."""
    summaries = "\n".join(
        "        " + shlex.quote(f"{command.name}:{command.summary}") for command in commands
    )
    cases = "".join(_zsh_case(command) for command in commands)
    return f"""\
#compdef nbdjobs
# zsh completion for nbdjobs, made by: nbdjobs completion zsh
_nbdjobs() {{
    local -a subcommands
    subcommands=(
{summaries}
    )
    if (( CURRENT == 2 )); then
        _describe subcommand subcommands
        return
    fi
    local subcommand=$words[2]
    shift words
    (( CURRENT-- ))
    case $subcommand in
{cases}\
    esac
}}
if [[ $funcstack[1] == _nbdjobs ]]; then
    _nbdjobs "$@"
else
    compdef _nbdjobs nbdjobs
fi
"""


def _zsh_case(command: Command) -> str:
    specs = [spec for option in command.options for spec in _zsh_option(option)]
    for number, argument in enumerate(command.arguments, 1):
        place = "*" if argument.is_repeated else str(number)
        specs.append(f"{place}:{argument.name}:{_zsh_action(argument)}")
    listed = "".join(f" \\\n            {shlex.quote(spec)}" for spec in specs)
    return f"    {command.name})\n        _arguments{listed}\n        ;;\n"


def _zsh_option(option: Option) -> list[str]:
    summary = re.sub(r"([\[\]:\\])", r"\\\1", option.summary)
    value = option.value
    ending = "" if value is None else f":{value.name}:{_zsh_action(value)}"
    # The star: what the program takes twice, the shell need not forbid.
    return [f"*{name}[{summary}]{ending}" for name in option.names]


def _zsh_action(argument: Argument) -> str:
    if argument.choices:
        return f"({' '.join(argument.choices)})"
    # Beginning an option is not beginning a value that nobody can guess.
    return "_files" if argument.is_path else f'_guard "^-*" {argument.name}'


def fish(commands: Sequence[Command]) -> str:
    """Write the script for fish."""
    lines = ["# fish completion for nbdjobs, made by: nbdjobs completion fish"]
    lines.append("complete -c nbdjobs -f")
    for command in commands:
        lines.append(
            f"complete -c nbdjobs -n __fish_use_subcommand"
            f" -a {command.name} -d {_fish_quote(command.summary)}"
        )
    for command in commands:
        lines += _fish_command(command)
    return "\n".join(lines) + "\n"


def _fish_command(command: Command) -> list[str]:
    start = f"complete -c nbdjobs -n '__fish_seen_subcommand_from {command.name}'"
    lines = []
    for option in command.options:
        names = " ".join(
            f"-l {name[2:]}" if name.startswith("--") else f"-s {name[1:]}" for name in option.names
        )
        value = "" if option.value is None else f" {_fish_value(option.value)}"
        summary = f" -d {_fish_quote(option.summary)}" if option.summary else ""
        lines.append(f"{start} {names}{value}{summary}")
    for argument in command.arguments:
        if argument.choices:
            lines.append(f"{start} -a {_fish_quote(' '.join(argument.choices))}")
        elif argument.is_path:
            lines.append(f"{start} -F")
    return lines


def _fish_value(value: Argument) -> str:
    if value.choices:
        return f"-x -a {_fish_quote(' '.join(value.choices))}"
    return "-r -F" if value.is_path else "-x"


def _fish_quote(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"


SCRIPTS: Final[Mapping[str, Callable[[Sequence[Command]], str]]] = {
    "bash": bash,
    "zsh": zsh,
    "fish": fish,
}
"""Who writes the script, by the shell's name."""

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs serve --config`: a file instead of a command line, checked as a whole before it acts."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import sys
from pathlib import Path
from typing import Final

from nbdjobs.cli.config import Config, Reading, read_config
from nbdjobs.cli.config_options import (
    ConfigServing,
    config_banner,
    config_daemon_options,
    exported,
    steps,
)
from nbdjobs.cli.config_walk import Problem
from nbdjobs.cli.exits import CliError, ExitCode
from nbdjobs.cli.images import node_name
from nbdjobs.cli.logs import LogFormat, log_options
from nbdjobs.cli.runtime import NBD_SUFFIX, QMP_SUFFIX
from nbdjobs.cli.serve_options import Listen, TcpListen, UnixListen, parse_tcp
from nbdjobs.cli.serve_sockets import passed_socket, unix_socket

logger = logging.getLogger(__name__)

#: Bytes of a file: far more than anyone writes, and little to hold.
SIZE_MAX: Final = 4 << 20

#: Stands in for an address that cannot be used, so that the rest can be checked.
_NOWHERE: Final = TcpListen("localhost", 0)


def run_config(arguments: argparse.Namespace) -> int:
    """Check the file, then serve as it says or only say what is wrong with it.

    Relative paths in the file begin at its folder.

    Raises:
        CliError: The file cannot be read.
    """
    path: Path = arguments.config
    reading = read_config(_text(path))
    with contextlib.chdir(path.parent):
        serving, problems = asyncio.run(check_config(reading, node_name(path.stem)))
        for problem in problems:
            print(f"nbdjobs: {path}: {problem}", file=sys.stderr)
        if problems:
            return ExitCode.FAILED
        if arguments.check:
            print(f"{path} is right: {_summary(serving)}")
            return ExitCode.DONE
        return _serve(serving, arguments)


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(SIZE_MAX + 1)
    except OSError as error:
        raise CliError(f"'{path}' cannot be read: {error.strerror}") from error
    if len(data) > SIZE_MAX:
        raise CliError(
            f"'{path}' is too long for a configuration: expected at most {SIZE_MAX} bytes"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise CliError(f"'{path}' is not TOML: it is not UTF-8 at byte {error.start}") from error


async def check_config(reading: Reading, stem: str) -> tuple[ConfigServing, list[str]]:
    """Complete what was read with sockets, and rehearse all of it.

    Args:
        reading: What is in the file.
        stem: What sockets are called that the file does not place.

    Returns:
        What to serve, and all that is wrong, as sentences; with any, nothing can be served.
    """
    # Only now: the daemon is needed by nobody who just asks for help.
    from nbdjobs.cli.daemon_check import NBD_SERVER, check
    from nbdjobs.cli.daemon_options import CommandLine

    problems = list(reading.problems)
    serving = _place(reading.config, stem, problems)
    wrong = _sections(problems)
    sound = tuple(step for step in steps(serving) if step.typed not in wrong)
    doubtful = {*reading.doubtful, *({NBD_SERVER} if "nbd" in wrong else ())}
    found = await check(CommandLine(steps=sound), doubtful)
    return serving, [*map(str, problems), *found]


def _place(config: Config, stem: str, problems: list[Problem]) -> ConfigServing:
    """Find out where the sockets are to be; what is wrong with that is added to the problems."""
    qmp = Path(stem)
    listen: Listen = _NOWHERE
    wrong = _sections(problems)
    if "qmp" not in wrong:
        try:
            qmp = unix_socket(_path(config.qmp.socket), stem + QMP_SUFFIX)
        except CliError as error:
            problems.append(Problem("qmp.socket", str(error)))
    if "nbd" not in wrong:
        try:
            listen = _listen(config, stem)
        except CliError as error:
            problems.append(Problem("nbd", str(error)))
    is_found = config.qmp.socket is None
    return ConfigServing(config=config, listen=listen, qmp=qmp, is_found=is_found)


def _sections(problems: list[Problem]) -> set[str]:
    """The outermost tables in which something is wrong."""
    return {problem.path.partition(".")[0] for problem in problems}


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _listen(config: Config, stem: str) -> Listen:
    nbd = config.nbd
    passed = passed_socket()
    if passed is not None:
        if nbd.tcp is not None or nbd.socket is not None:
            raise CliError(
                "the service manager passed a socket: expected neither tcp nor socket beside it"
            )
        return passed
    if nbd.tcp is not None:
        return parse_tcp(str(nbd.tcp))
    return UnixListen(unix_socket(_path(nbd.socket), stem + NBD_SUFFIX))


def _summary(serving: ConfigServing) -> str:
    from nbdjobs.cli.daemon_check import summary

    return summary(steps(serving))


def _serve(serving: ConfigServing, arguments: argparse.Namespace) -> int:
    from nbdjobs.cli.daemon import daemon_main

    log = serving.config.log
    chosen = log_options(
        os.environ, form=arguments.log_format or log.format, level=arguments.log_level or log.level
    )

    def announce() -> None:
        if chosen.form is LogFormat.JSON:
            for fields in exported(serving):
                logger.info("serving %s", fields["export"], extra={"fields": fields})
        elif not arguments.quiet:
            print(*config_banner(serving), "stop:       Ctrl-C", sep="\n", flush=True)

    return daemon_main(config_daemon_options(serving), on_ready=announce, logs=chosen)

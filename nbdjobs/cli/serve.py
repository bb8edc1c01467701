# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`nbdjobs serve`: disk images over NBD with a control socket, checked and in one line."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import Final

from nbdjobs.cli import logs
from nbdjobs.cli.exits import CliError, ExitCode
from nbdjobs.cli.images import Format, export_names, look_at, node_name
from nbdjobs.cli.runtime import NBD_SUFFIX, QMP_SUFFIX
from nbdjobs.cli.serve_options import (
    Listen,
    Served,
    Serving,
    TcpListen,
    UnixListen,
    banner,
    daemon_options,
    parse_tcp,
)
from nbdjobs.cli.serve_sockets import passed_socket, unix_socket

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "images", nargs="*", default=[], type=Path, metavar="IMAGE", help="raw image or device"
    )
    what.add_argument(
        "--config", type=Path, metavar="FILE", help="serve what this TOML file describes instead"
    )
    parser.add_argument(
        "--check", action="store_true", help="only say what is wrong, and start nothing"
    )
    parser.add_argument(
        "--name",
        dest="names",
        action="append",
        default=[],
        metavar="NAME",
        help="export name of the first, second, ... image (default: the file name's stem)",
    )
    parser.add_argument("--read-only", action="store_true", help="no client may write")
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--tcp",
        type=_tcp,
        metavar="[HOST:]PORT",
        help="listen on TCP; a port alone is for this machine, 0.0.0.0:PORT or [::]:PORT for all",
    )
    where.add_argument("--socket", type=Path, metavar="PATH", help="listen on this unix socket")
    parser.add_argument("--qmp", type=Path, metavar="PATH", help="control socket")
    parser.add_argument("--direct", action="store_true", help="bypass the page cache (O_DIRECT)")
    parser.add_argument(
        "--format",
        choices=[each.value for each in Format],
        help="what the images are (default: raw, and refused if they look like anything else)",
    )
    parser.add_argument(
        "--snapshot",
        metavar="NAME",
        help="serve an internal snapshot of a qcow2 image, read-only; by id or name",
    )
    parser.add_argument(
        "--max-connections", type=_count, metavar="N", help="NBD clients at once (default: 100)"
    )
    parser.add_argument("-q", "--quiet", action="store_true", help="print nothing but errors")
    logs.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    """Serve until SIGTERM, SIGINT or QMP `quit`; return the exit code.

    Raises:
        CliError: Something was wrong before anything was started.
    """
    if arguments.config is not None:
        _check_alone(arguments)
        # Only a file needs what reads it.
        from nbdjobs.cli.serve_config import run_config

        return run_config(arguments)
    log_options = logs.log_options(os.environ, form=arguments.log_format, level=arguments.log_level)
    serving = plan(arguments)
    # Only a server needs the daemon: `nbdjobs backup` starts quicker without it.
    from nbdjobs.cli.daemon import daemon_main

    def announce() -> None:
        if log_options.form is logs.LogFormat.JSON:
            _log_what_is_served(serving)
        elif not arguments.quiet:
            print(*banner(serving), "stop:       Ctrl-C", sep="\n", flush=True)

    options = daemon_options(serving)
    if arguments.check:
        options.append("--check")
    return daemon_main(options, on_ready=announce, logs=log_options)


#: What a configuration file says by itself.
_IN_FILE: Final = {
    "--direct": "direct",
    "--format": "format",
    "--max-connections": "max_connections",
    "--name": "names",
    "--qmp": "qmp",
    "--read-only": "read_only",
    "--snapshot": "snapshot",
    "--socket": "socket",
    "--tcp": "tcp",
}


def _check_alone(arguments: argparse.Namespace) -> None:
    for option, attribute in _IN_FILE.items():
        if getattr(arguments, attribute):
            raise CliError(
                f"{option} was given beside --config: expected it in the file", ExitCode.USAGE
            )


def _log_what_is_served(serving: Serving) -> None:
    """The banner for programs: whoever reads JSON wants no lines between."""
    for disk in serving.disks:
        fields = {
            "export": disk.name,
            "image": str(disk.image.path),
            "size": disk.image.size,
            "uri": serving.listen.uri(disk.name),
            "qmp": str(serving.qmp),
        }
        logger.info("serving %s", disk.image.path, extra={"fields": fields})


def plan(arguments: argparse.Namespace) -> Serving:
    """Check everything that can be checked before the daemon starts.

    Raises:
        CliError: An image, name or socket path cannot be used.
    """
    names = export_names(arguments.images, arguments.names)
    chosen = None if arguments.format is None else Format(arguments.format)
    if arguments.snapshot is not None and chosen is not Format.QCOW2:
        raise CliError("--snapshot is about qcow2 images: expected --format qcow2", ExitCode.USAGE)
    read_only = arguments.read_only or arguments.snapshot is not None
    images = [look_at(path, read_only=read_only, chosen=chosen) for path in arguments.images]
    disks = tuple(Served(image, name) for image, name in zip(images, names, strict=True))
    return Serving(
        disks=disks,
        listen=_listen(arguments, node_name(names[0])),
        qmp=unix_socket(arguments.qmp, node_name(names[0]) + QMP_SUFFIX),
        read_only=read_only,
        snapshot=arguments.snapshot,
        is_direct=arguments.direct,
        max_connections=arguments.max_connections,
        is_found=arguments.qmp is None,
    )


def _listen(arguments: argparse.Namespace, stem: str) -> Listen:
    passed = passed_socket()
    if passed is not None:
        if arguments.tcp or arguments.socket:
            raise CliError(
                "the service manager passed a socket: expected neither --tcp nor --socket beside it"
            )
        return passed
    if isinstance(arguments.tcp, TcpListen):
        return arguments.tcp
    return UnixListen(unix_socket(arguments.socket, stem + NBD_SUFFIX))


def _tcp(text: str) -> TcpListen:
    try:
        return parse_tcp(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of clients: expected 1 or more")
    return int(text)

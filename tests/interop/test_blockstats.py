# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""query-blockstats shows the same of each node after the same requests of a client."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from tests.interop.daemon import program
from tests.interop.oracle import PROGRAM, Oracle
from tests.interop.side_by_side import MadeUpNames, prepare
from tests.interop.tools import run_for_result

OPTIONS: Final = (
    "--object throttle-group,id=limits",
    "--blockdev file,filename=disk.img,node-name=f,discard=unmap",
    "--blockdev raw,file=f,node-name=window,offset=4096,discard=unmap",
    "--blockdev blkdebug,image=window,node-name=debug,discard=unmap",
    "--blockdev throttle,file=debug,throttle-group=limits,node-name=top,discard=unmap",
    "--blockdev null-co,size=1048576,node-name=nothing",
    "--nbd-server addr.type=unix,addr.path=nbd.sock",
    "--export nbd,id=e,node-name=top,writable=on",
    "--export nbd,id=n,node-name=nothing,writable=on",
)
REQUESTS: Final = (
    "write 0 512",
    "write 64k 512",
    "write 0 512",
    "read 512k 512",
    "write -z 100k 4k",
    "write -z -u 104k 4k",
    "discard 200k 4k",
    "discard 300k 8k",
    "write 1M 512",
    "write 1019k 1k",
)


def test_nodes_have_the_same_statistics_after_each_request(tmp_path: Path) -> None:
    ours, theirs = (
        statistics(tmp_path / name, command)
        for name, command in (("ours", program()), ("theirs", [PROGRAM]))
    )
    for request, mine, other in zip(("nothing", *REQUESTS), ours, theirs, strict=True):
        assert (request, mine) == (request, other)


def statistics(directory: Path, command: Sequence[str]) -> list[Any]:
    """What a daemon shows at the beginning and after each request to both exports."""
    prepare(directory)
    names = MadeUpNames()
    options = [word for option in OPTIONS for word in option.split(" ")]
    shown = []
    with Oracle(directory, *options, capabilities=[], program=command) as daemon:

        def look() -> None:
            reply = daemon.execute("query-blockstats", {"query-nodes": True})
            shown.append(names.comparable(reply))

        look()
        for request in REQUESTS:
            for export in ("top", "nothing"):
                uri = f"nbd+unix:///{export}?socket={directory}/nbd.sock"
                run_for_result("qemu-io", "-f", "raw", "-c", request, uri)
            look()
    return shown

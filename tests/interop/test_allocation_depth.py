# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`qemu:allocation-depth`: which node of a chain has what, as the real program tells it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.interop.conftest import MIB, StartDaemon
from tests.interop.daemon import unix_server
from tests.interop.tools import run

KIB = 1024

#: Begin, depth: of the chain that `chain` makes, as qemu-storage-daemon 7.2 shows it.
DEPTHS = [
    (0, 3),
    (64 * KIB, 1),
    (192 * KIB, 2),
    (384 * KIB, 0),
    (512 * KIB, 1),
    (576 * KIB, 0),
    (1 * MIB, 3),  # the lowest image ends, and so determines that there are zeroes
]


@pytest.fixture
def chain(tmp_path: Path) -> Path:
    """Three images; the lowest is shorter than the others."""
    base, middle, top = (tmp_path / f"{name}.qcow2" for name in ("base", "middle", "top"))
    run("qemu-img", "create", "-q", "-f", "qcow2", base, "1M")
    run("qemu-io", "-c", "write -P 1 0 256k", base)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", base, "-F", "qcow2", middle, "2M")
    run("qemu-io", "-c", "write -P 2 128k 256k", middle)
    run("qemu-img", "create", "-q", "-f", "qcow2", "-b", middle, "-F", "qcow2", top, "2M")
    run("qemu-io", "-c", "write -P 3 64k 128k", "-c", "write -z 512k 64k", top)
    return top


def depths(start_daemon: StartDaemon, top: Path, node: str, *more: str) -> list[tuple[int, int]]:
    image = f"driver=qcow2,node-name=top,file.driver=file,file.filename={top}"
    export = f"nbd,id=export,node-name={node},name=disk0,allocation-depth=on"
    daemon = start_daemon("--blockdev", image, *more, *unix_server(), "--export", export)
    shown = run("nbdinfo", "--map=qemu:allocation-depth", daemon.uri("disk0"))
    fields = (line.split() for line in shown.splitlines())
    return [(int(begin), int(depth)) for begin, _, depth, *_ in fields]


def test_each_image_counts(start_daemon: StartDaemon, chain: Path) -> None:
    assert depths(start_daemon, chain, "top") == DEPTHS


def test_filters_count_too(start_daemon: StartDaemon, chain: Path) -> None:
    filtered = depths(
        start_daemon, chain, "filter", "--blockdev", "driver=copy-on-read,node-name=filter,file=top"
    )
    assert filtered == [(begin, depth + 1 if depth > 1 else depth) for begin, depth in DEPTHS]


def test_a_format_on_top_has_what_the_image_itself_has(
    start_daemon: StartDaemon, chain: Path
) -> None:
    shown = depths(start_daemon, chain, "raw", "--blockdev", "driver=raw,node-name=raw,file=top")
    merged: list[tuple[int, int]] = []
    for begin, depth in DEPTHS:
        own = 1 if depth == 1 else 0
        if not merged or merged[-1][1] != own:
            merged.append((begin, own))
    assert shown == merged

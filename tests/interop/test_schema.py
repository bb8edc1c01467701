# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What query-qmp-schema says is what the real program says, but for what these tables name.

A row that stands for no difference any more fails the test too: whoever adds a driver or a
command takes its row away.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Final

import pytest

import nbdjobs
from nbdjobs.qapi.visitor import to_qapi
from nbdjobs.qmp.commands import REGISTRY
from tests.interop.oracle import Oracle
from tests.qmp.schema_shape import Difference, differences

#: What only nbdjobs has, and why. `*` stands for any part of a path.
OURS: Final[Mapping[str, str]] = {
    "* arg*.driver.copy-before-write.min-cluster-size": "since QEMU 9.2",
    "*.active": "since QEMU 10.0",
    "* arg*.driver.qcow2.snapshot": "an extra of nbdjobs",
    "block-export-add arg.allow-inactive": "since QEMU 10.0",
    "blockdev-backup arg.cbw-timeout": "since QEMU 7.1 only on the copy-before-write node",
    "blockdev-backup arg.on-cbw-error": "since QEMU 7.1 only on the copy-before-write node",
    "blockdev-backup arg.discard-source": "since QEMU 9.1",
    "blockdev-backup arg.x-perf.min-cluster-size": "since QEMU 9.2",
    "BLOCK_IO_ERROR arg.qom-path": "since QEMU 9.2",
    "block-export-add arg.type.nbd.rerror": "an extra of nbdjobs",
    "block-export-add arg.type.nbd.werror": "an extra of nbdjobs",
    "drive-backup arg.cbw-timeout": "as blockdev-backup",
    "drive-backup arg.on-cbw-error": "as blockdev-backup",
    "drive-backup arg.discard-source": "as blockdev-backup",
    "drive-backup arg.x-perf.min-cluster-size": "since QEMU 9.2",
    "nbd-server-start arg.handshake-max-seconds": "since QEMU 9.2",
    "query-block-exports ret.*.x-connections": "an extra of nbdjobs",
    "query-block-jobs ret.*.x-intercepted-bytes": "an extra of nbdjobs",
    "query-block-jobs ret.*.x-intercepted-operations": "an extra of nbdjobs",
}

#: Commands and events that qemu-storage-daemon does not have, and where they are from.
OURS_ALONE: Final[Mapping[str, str]] = {
    "blockdev-set-active": "since QEMU 10.0",
    "block-latency-histogram-set": "QEMU's own, for the devices of guests",
    "human-monitor-command": "QEMU's own, like all of its human monitor",
    "block_set_io_throttle": "QEMU's own, for the devices of guests",
    "cont": "QEMU's own, for guests",
    "query-status": "QEMU's own, for guests",
    "stop": "QEMU's own, for guests",
    "RESUME": "QEMU's own, for guests",
    "STOP": "QEMU's own, for guests",
}

_BITMAPS: Final = "comes with dirty bitmaps"
_CHAINS: Final = "comes with qcow2 and backing chains"
_DEBUG: Final = "a debugging aid of QEMU's own block layer"
_EMULATOR: Final = "only means something inside an emulator"
_FORMAT: Final = "a disk format that nbdjobs does not read"
_KERNEL: Final = "exports to the kernel or a virtual machine instead of NBD clients"
_NETWORK: Final = "storage reached by a client library"
_QUORUM: Final = "comes with the quorum driver, which is not planned"

#: Drivers of QEMU that nbdjobs does not have, and why.
DRIVERS: Final[Mapping[str, str]] = {
    "blklogwrites": _DEBUG,
    "blkreplay": _DEBUG,
    "blkverify": _DEBUG,
    "bochs": _FORMAT,
    "cloop": _FORMAT,
    "compress": _CHAINS,
    "dmg": _FORMAT,
    "ftp": _NETWORK,
    "ftps": _NETWORK,
    "gluster": _NETWORK,
    "host_cdrom": _EMULATOR,
    "iscsi": _NETWORK,
    "nbd": "comes with jobs of other kinds, as their target on another machine",
    "nfs": _NETWORK,
    "nvme": "needs a device taken away from the kernel",
    "parallels": _FORMAT,
    "preallocate": "a filter for storage that grows; exports have a fixed size",
    "qcow": _FORMAT,
    "qed": _FORMAT,
    "quorum": _QUORUM,
    "rbd": _NETWORK,
    "replication": _EMULATOR,
    "ssh": _NETWORK,
    "vdi": _FORMAT,
    "vhdx": _FORMAT,
    "vmdk": _FORMAT,
    "vpc": _FORMAT,
    "vvfat": _FORMAT,
}

#: Types of objects of QEMU that nbdjobs does not have, and why.
OBJECTS: Final[Mapping[str, str]] = {
    "authz-*": "comes with TLS",
    "can-*": _EMULATOR,
    "colo-compare": _EMULATOR,
    "cryptodev-*": _EMULATOR,
    "dbus-vmstate": _EMULATOR,
    "filter-*": _EMULATOR,
    "input-*": _EMULATOR,
    "main-loop": "one event loop serves all, and has nothing to set",
    "memory-backend-*": _EMULATOR,
    "pef-guest": _EMULATOR,
    "pr-manager-helper": "persistent reservations are not passed on",
    "qtest": _EMULATOR,
    "rng-*": _EMULATOR,
    "s390-pv-guest": _EMULATOR,
    "secret_keyring": "keys of the kernel's are not read",
    "sev-guest": _EMULATOR,
    "thread-context": _EMULATOR,
    "tls-*": "comes with TLS",
    "x-remote-object": _EMULATOR,
    "x-vfio-user-server": _EMULATOR,
}

#: Kinds of character devices of QEMU that nbdjobs does not have: they carry consoles of guests.
CHARDEVS: Final = (
    "braille",
    "console",
    "dbus",
    "msmouse",
    "mux",
    "parallel",
    "pipe",
    "pty",
    "qemu-vdagent",
    "serial",
    "spiceport",
    "spicevmc",
    "stdio",
    "testdev",
    "udp",
    "vc",
    "wctablet",
)

#: What else only QEMU has, and why. Commands and events stand in the manual, see below.
THEIRS: Final[Mapping[str, str]] = {
    **{f"* arg*.driver.{name}": reason for name, reason in DRIVERS.items()},
    **{f"blockdev-create arg.*.backing-fmt.{name}": reason for name, reason in DRIVERS.items()},
    **{f"object-add arg.qom-type.{name}": reason for name, reason in OBJECTS.items()},
    **{f"chardev-* arg.backend.type.{name}": _EMULATOR for name in CHARDEVS},
    "chardev-* arg.backend.type.*.data.log*": "QMP sessions are logged by no one",
    "chardev-* arg.backend.type.socket.data.addr.type.fd": "needs a way to hand descriptors over",
    "chardev-* arg.backend.type.socket.data.addr.type.vsock": _EMULATOR,
    "chardev-* arg.backend.type.socket.data.telnet": "an encoding for terminals",
    "chardev-* arg.backend.type.socket.data.tls-*": "comes with TLS",
    "chardev-* arg.backend.type.socket.data.tn3270": "an encoding for terminals",
    "chardev-* arg.backend.type.socket.data.websocket": "an encoding for browsers",
    "* arg.type.fuse": _KERNEL,
    "* arg.type.vduse-blk": _KERNEL,
    "* arg.type.vhost-user-blk": _KERNEL,
    "query-block-exports ret.*.type.fuse": _KERNEL,
    "query-block-exports ret.*.type.vduse-blk": _KERNEL,
    "query-block-exports ret.*.type.vhost-user-blk": _KERNEL,
    "*.type.snapshot-*": _EMULATOR,
    "nbd-server-start arg.addr.type.fd": "needs a way to hand descriptors over",
    "nbd-server-start arg.addr.type.vsock": _EMULATOR,
    "query-blockstats ret.*.driver-specific.driver.*": "a word that no node answers with",
    "query-* ret.*.dirty-bitmaps": _BITMAPS,
    "query-* ret.*.image.format-specific.type.qcow2.data.bitmaps": _BITMAPS,
    "query-* ret.*.image.format-specific.type.rbd": _NETWORK,
    "query-* ret.*.image.format-specific.type.vmdk": _FORMAT,
}

Schema = list[dict[str, Any]]

MANUAL: Final = Path(nbdjobs.__file__).parent.parent / "docs" / "qmp.md"


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Schema]:
    with Oracle(tmp_path_factory.mktemp("oracle"), capabilities=[]) as oracle:
        yield oracle.execute("query-qmp-schema")["return"]


@pytest.fixture(scope="module")
def found(theirs: Schema) -> list[Difference]:
    """What differs in the commands and events that both have."""
    ours: Schema = to_qapi(REGISTRY.schema)
    return differences(ours, theirs, frozenset(names(ours) & names(theirs)))


def names(schema: Schema) -> set[str]:
    return {entry["name"] for entry in schema if entry["meta-type"] in ("command", "event")}


def matching(path: str, table: Mapping[str, str]) -> list[str]:
    return [pattern for pattern in table if fnmatchcase(path, pattern)]


def missing_in_the_manual() -> set[str]:
    section = MANUAL.read_text().split("## What qemu-storage-daemon has besides")[1]
    rows = [line for line in section.split("\n## ")[0].splitlines() if line.startswith("|")]
    return set(re.findall(r"`([A-Za-z_0-9-]+)`", "\n".join(rows)))


def test_nothing_that_both_have_differs(found: list[Difference]) -> None:
    assert [each for each in found if each.ours is not None and each.theirs is not None] == []


def test_what_only_nbdjobs_has_is_listed(found: list[Difference]) -> None:
    extra = {each.path for each in found if each.theirs is None}
    assert {path for path in extra if not matching(path, OURS)} == set()
    assert {pattern for path in extra for pattern in matching(path, OURS)} == set(OURS)


def test_what_only_qemu_has_is_listed(found: list[Difference]) -> None:
    lacking = {each.path for each in found if each.ours is None}
    assert {path for path in lacking if not matching(path, THEIRS)} == set()
    assert {pattern for path in lacking for pattern in matching(path, THEIRS)} == set(THEIRS)


def test_the_manual_lists_the_commands_and_events_that_are_missing(theirs: Schema) -> None:
    assert missing_in_the_manual() == names(theirs) - set(REGISTRY.commands) - set(REGISTRY.events)


def test_commands_and_events_that_only_nbdjobs_has_are_listed(theirs: Schema) -> None:
    ours = set(REGISTRY.commands) | set(REGISTRY.events)
    assert ours - names(theirs) == set(OURS_ALONE)

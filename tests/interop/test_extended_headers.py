# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Extended headers with libnbd, which knows them from version 1.18 on; Debian 12 has 1.14.

Where another Python has a newer one, name the command in ``NBDJOBS_LIBNBD_PYTHON``, such as
``chroot /srv/trixie python3``: it reaches the server over TCP.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.interop.conftest import MIB, StartDaemon
from tests.interop.daemon import Disk
from tests.interop.test_transports import free_port

GIB = 1 << 30
TOO_OLD = 77

SCRIPT = f"""
import os, sys
try:
    import nbd
except ImportError:
    sys.exit({TOO_OLD})
h = nbd.NBD()
if not hasattr(h, "get_extended_headers_negotiated"):
    sys.exit({TOO_OLD})
h.add_meta_context("base:allocation")
h.connect_uri(sys.argv[1])
assert h.get_extended_headers_negotiated()
assert h.can_block_status_payload()
size = h.get_size()
assert size == {6 * GIB}

# Data, with every flag of the header.
data = os.urandom(300000)
h.pwrite(data, 123456, nbd.CMD_FLAG_FUA)
assert h.pread(300000, 123456) == data
chunks = []
h.pread_structured({MIB}, 0, lambda b, offset, *rest: chunks.append(offset), nbd.CMD_FLAG_DF)
assert chunks == [0]
chunks.clear()
h.pread_structured({MIB}, 0, lambda b, offset, status, e: chunks.append((offset, len(b), status)))
assert sum(length for _, length, _ in chunks) == {MIB}
assert {{status for _, _, status in chunks}} == {{nbd.READ_DATA, nbd.READ_HOLE}}

# Lengths that need 64 bits, where no data is moved.
h.cache({32 * MIB}, 0)
h.zero({5 * GIB}, 0)
assert h.pread(4096, 123456) == bytes(4096)
h.pwrite(data, 123456)
h.trim({5 * GIB}, {MIB})
h.flush()
extents = []
def found(context, offset, entries, error):
    extents.extend((context, offset, entry) for entry in entries)
h.block_status_64(size, 0, found)
assert all(context == "base:allocation" for context, _, _ in extents)
assert extents[-1][2][0] > {4 * GIB}, extents
assert extents[-1][2][1] == 3, extents

# A request for some contexts only, in its payload.
extents.clear()
h.block_status_filter(size, 0, ["base:allocation"], found)
assert extents
extents.clear()
h.block_status_64(size - {MIB}, {MIB}, found, nbd.CMD_FLAG_REQ_ONE)
assert len(extents) == 1

# Errors leave the connection in order.
h.set_strict_mode(h.get_strict_mode() & ~nbd.STRICT_BOUNDS)
try:
    h.pwrite(b"x" * 512, size)
    raise AssertionError("a write behind the end was taken")
except nbd.Error as error:
    assert error.errno == "ENOSPC", error
assert h.pread(300000, 123456) == data
h.shutdown()
"""


def test_a_client_that_knows_them(start_daemon: StartDaemon, tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, 6 * GIB)
    disk = Disk(path)
    port = free_port("127.0.0.1")
    server = ["--nbd-server", f"addr.type=inet,addr.host=127.0.0.1,addr.port={port}"]
    start_daemon(*disk.blockdev(discard="unmap"), *server, *disk.export())
    python = shlex.split(os.environ.get("NBDJOBS_LIBNBD_PYTHON", sys.executable))
    client = subprocess.run(
        [*python, "-c", SCRIPT, f"nbd://127.0.0.1:{port}/disk0"],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    if client.returncode == TOO_OLD:
        pytest.skip("libnbd is older than 1.18 and has no extended headers")
    assert client.returncode == 0, client.stderr

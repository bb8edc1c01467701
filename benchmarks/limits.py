# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""How well real clients are kept to the limits of an export.

    python -m benchmarks.limits

fio works as fast as it is let. Its warm-up uses up what may begin at once, so what is measured
behind it is the rate itself; it is right within 5 % where nothing else keeps the processors busy.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.fio import FioError, Load, run_for
from benchmarks.images import Images
from benchmarks.peers import Peer, ServerError, Transport, peers, serving
from tests.interop.qmp_client import QmpClient

KIB: Final = 1 << 10
MIB: Final = 1 << 20

DISK_SIZE: Final = 256 * MIB
TOLERANCE: Final = 0.05
RATES: Final = ("bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr")


@dataclass(frozen=True, slots=True)
class Row:
    """A limit and a load that goes to it.

    Attributes:
        limit: Its name in QMP.
        rate: Units per second.
        load: What the client does.
    """

    limit: str
    rate: int
    load: Load

    @property
    def title(self) -> str:
        load = self.load
        return (
            f"{self.limit}={self.rate}, {load.pattern} of {load.block_size // KIB} KiB, "
            f"depth {load.depth}, connections: {load.connections}"
        )


ROWS: Final = (
    Row("bps", 20 * MIB, Load("randread", 64 * KIB, 16)),
    Row("bps_rd", 50 * MIB, Load("randread", 256 * KIB, 4, connections=2)),
    Row("bps_wr", 20 * MIB, Load("randwrite", 256 * KIB, 4, connections=2)),
    Row("bps", 100 * MIB, Load("randrw", 32 * KIB, 16)),
    Row("iops", 2000, Load("randread", 4 * KIB, 1)),
    Row("iops", 10000, Load("randread", 4 * KIB, 32)),
    Row("iops_wr", 500, Load("randwrite", 4 * KIB, 32)),
)


def measure(row: Row, peer: Peer, image: Path, seconds: float, directory: Path) -> float:
    """Return what a client got, as a part of what it is allowed."""
    path = directory / "qmp.sock"
    chardev = f"socket,id=qmp,path={path},server=on,wait=off"
    monitor = ("--chardev", chardev, "--monitor", "chardev=qmp")
    with (
        serving(peer, image, Transport.UNIX, directory, *monitor) as server,
        QmpClient.connect(path) as qmp,
    ):
        (export,) = qmp.execute("query-block-exports")
        limits = {**dict.fromkeys(RATES, 0), row.limit: row.rate}
        qmp.execute("block_set_io_throttle", {"id": export["id"], **limits})
        result = run_for(row.load, server.address.uri, DISK_SIZE, seconds, directory)
    got = result.bytes_per_s if row.limit.startswith("bps") else result.iops
    return got / row.rate


def main() -> int:
    """Print one table; 1 when a limit is missed by more than 5 %, or cannot be measured."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.limits", description=__doc__)
    parser.add_argument("--seconds", type=float, default=4.0, metavar="S", help="per measurement")
    seconds: float = parser.parse_args().seconds
    missed = 0
    print("| limit and load | measured |\n| --- | ---: |")
    with tempfile.TemporaryDirectory(prefix="nbdjobs-bench-") as name:
        directory = Path(name)
        ours = peers(directory)[0]
        images = Images.create(directory, DISK_SIZE, 0)
        images.warm()
        for row in ROWS:
            try:
                share = measure(row, ours, images.disk, seconds, directory)
            except (ServerError, FioError, OSError) as error:
                print(f"failed: {row.title}: {error}", file=sys.stderr)
                missed += 1
            else:
                missed += abs(share - 1) > TOLERANCE
                print(f"| {row.title} | {share:.1%} |", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Keep a server busy for a while, and see that nothing is left behind and all data is right.

python -m tests.soak [--seconds N] [--seed N]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.soak.busy_server import BusyServer


def main() -> int:
    """Go on until the time is over, or something is wrong, which then is raised."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--seconds", type=float, default=300, metavar="N", help="how long")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**32, help="for chance")
    arguments = parser.parse_args()
    print(f"seed {arguments.seed}", flush=True)
    end = time.monotonic() + arguments.seconds
    with (
        tempfile.TemporaryDirectory(prefix="nbdjobs-soak-") as directory,
        BusyServer(Path(directory), arguments.seed) as server,
    ):
        while time.monotonic() < end:
            server.round()
            if server.rounds % 10 == 1:
                print(f"{server.rounds} rounds, {server.memory >> 20} MiB", flush=True)
    print(f"{server.rounds} rounds, and nothing is left")
    for name, count in sorted(server.deeds.items()):
        print(f"{count:8} {name.replace('_', ' ')}, refused {server.refused[name]}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

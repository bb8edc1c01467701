# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""What a request pays for the overlap table, with 1 to 1,000 others in flight.

    python -m benchmarks.overlap_table

The cost has to stay flat: a list of all requests, walked by each new one, would cost a thousand
times more in the last row than in the first.
"""

from __future__ import annotations

import random
import time
from typing import Final

from nbdjobs.nodes.tracked import Kind, TrackedRequests

IN_FLIGHT: Final = (1, 10, 100, 1000)
BLOCK: Final = 4096
DISK: Final = 10 * 2**30
ROUNDS: Final = 20_000
REPEATS: Final = 3


def cost_ns(in_flight: int, serialising_share: float) -> float:
    """Nanoseconds to begin and end one 4 KiB request beside so many others."""
    chance = random.Random(in_flight)
    table = TrackedRequests()
    blocks = chance.sample(range(DISK // BLOCK), in_flight + ROUNDS)

    def new(block: int) -> tuple[int, bool]:
        return block * BLOCK, chance.random() < serialising_share

    others = [new(block) for block in blocks[:in_flight]]
    window = [
        table.request(offset, BLOCK, Kind.WRITE, is_serialising=hard) for offset, hard in others
    ]
    for request in window:
        table.begin(request)
    arrivals = [new(block) for block in blocks[in_flight:]]
    begun = time.perf_counter_ns()
    for number, (offset, hard) in enumerate(arrivals):
        slot = number % in_flight
        table.end(window[slot])
        window[slot] = table.request(offset, BLOCK, Kind.WRITE, is_serialising=hard)
        table.begin(window[slot])
    return (time.perf_counter_ns() - begun) / ROUNDS


def main() -> None:
    """Print one row per number of requests in flight; the best of some repeats counts."""
    print(f"{'in flight':>9}  {'none serialises':>16}  {'every 10th':>12}  {'all':>12}")
    for in_flight in IN_FLIGHT:
        costs = [
            min(cost_ns(in_flight, share) for _ in range(REPEATS)) for share in (0.0, 0.1, 1.0)
        ]
        none, some, all_of_them = (f"{cost / 1000:.2f} us" for cost in costs)
        print(f"{in_flight:>9}  {none:>16}  {some:>12}  {all_of_them:>12}")


if __name__ == "__main__":
    main()

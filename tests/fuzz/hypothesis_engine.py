# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Fuzzing without guidance: seeds that are cut, mixed and spoilt, by hypothesis."""

from __future__ import annotations

import faulthandler
import resource
import time
from typing import Final

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from tests.fuzz.targets import LONGEST, Target

CHUNK: Final = 500
"""Examples between two looks at the clock."""

HANG_S: Final = 30
"""Seconds that one example may take; then the process ends and says where it was."""

MAX_GROWTH: Final = 128 * 1024
"""KiB that memory may grow by after the first chunk."""


def inputs(target: Target) -> st.SearchStrategy[bytes]:
    """Bytes that have something in common with the seeds of a target."""
    some_seed = st.sampled_from(target.seeds)

    @st.composite
    def spoilt(draw: st.DrawFn) -> bytes:
        data = bytearray(draw(some_seed))
        for _ in range(draw(st.integers(0, 4))):
            at = draw(st.integers(0, len(data)))
            length = draw(st.sampled_from((0, 0, 1, 2, 4, 8, len(data))))
            data[at : at + length] = draw(
                st.one_of(
                    st.binary(max_size=8),
                    st.sampled_from((b"\0" * 8, b"\xff" * 8, b"\x7f\xff\xff\xff", b"\0\0\0\1")),
                    some_seed,
                )
            )
        return bytes(data)

    parts = st.lists(st.one_of(spoilt(), spoilt(), st.binary(max_size=40)), max_size=4)
    return parts.map(lambda pieces: b"".join(pieces)[:LONGEST])


def run_examples(target: Target, count: int, number: int = 0) -> None:
    """Run some examples, always the same for a number; raises what the target raises."""

    @seed(number)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(inputs(target))
    def check(data: bytes) -> None:
        target.run(data)

    check()


def run_for(target: Target, seconds: float) -> int:
    """Run examples until the time is over.

    Returns:
        How many.

    Raises:
        MemoryError: They make memory grow.
        Exception: What the target raised.
    """
    end = time.monotonic() + seconds
    chunks = 0
    before = 0
    while time.monotonic() < end:
        faulthandler.dump_traceback_later(HANG_S * CHUNK, exit=True)
        run_examples(target, CHUNK, number=time.time_ns())
        chunks += 1
        highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        before = before or highest
        if highest - before > MAX_GROWTH:
            raise MemoryError(f"{highest - before} KiB more after {chunks * CHUNK} examples")
    faulthandler.cancel_dump_traceback_later()
    return chunks * CHUNK

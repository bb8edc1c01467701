# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Guests that write as fast as they can, and know what the disk has to hold.

Each writer is a thread with a connection of its own. It changes some of its plots at a time, by
all commands there are, waits until that is acknowledged, and goes on with others.
"""

from __future__ import annotations

import errno
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Any

from nbdjobs.nodes.rounding import round_down, round_up
from tests.stress.plots import Plot

#: Seconds after which the test is given up as hung; never reached by a sound daemon.
PATIENCE_S = 60.0

#: Changes in flight of one writer.
MAX_DEPTH = 8

#: What a file that takes discards surely punches out; ragged ends may keep their content.
TRIM_UNIT = 4096


class Crowd:
    """Writers that can be held together, and counted.

    Attributes:
        plots: What all of them write.
    """

    def __init__(self, nbd: Any, uri: str, plots: list[Plot], random_: random.Random, count: int):
        self.plots = plots
        self._nbd = nbd
        self._condition = threading.Condition()
        self._is_held = False
        self._is_over = False
        self._idle = 0
        self._done = 0
        self._threads: list[threading.Thread] = []
        self.writers: list[Writer] = []
        shares: list[list[Plot]] = [[] for _ in range(count)]
        for plot in plots:
            random_.choice(shares).append(plot)
        for share in shares:
            writer = Writer(self, nbd, uri, share, random.Random(random_.random()))
            self.writers.append(writer)
            self._threads.append(threading.Thread(target=writer.run))

    def start(self) -> None:
        """Let them write."""
        for thread in self._threads:
            thread.start()

    def finish(self) -> None:
        """Let them end what they do; what went wrong for one of them is raised."""
        with self._condition:
            self._is_over = True
            self._condition.notify_all()
        self.join()
        for writer in self.writers:
            if writer.failure is not None:
                raise writer.failure

    def join(self) -> None:
        """Wait until all have ended, by themselves or because the daemon has."""
        for thread in self._threads:
            if thread.ident is None:
                continue  # never started
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "a request was never answered"

    def join_cut_off(self) -> None:
        """Wait until all have lost their connections, and check that nothing else was wrong."""
        self.join()
        for writer in self.writers:
            failure = writer.failure
            if not isinstance(failure, self._nbd.Error):
                raise AssertionError("a writer ended in another way") from failure
            assert not writer.errors

    @contextmanager
    def held(self) -> Iterator[None]:
        """While inside, nothing is in flight."""
        with self._condition:
            self._is_held = True
            self._wait(lambda: self._idle == len(self._threads))
        try:
            yield
        finally:
            with self._condition:
                self._is_held = False
                self._condition.notify_all()

    def let_write(self, count: int) -> None:
        """Wait until so many more changes are acknowledged."""
        with self._condition:
            target = self._done + count
            self._wait(lambda: self._done >= target)

    def _wait(self, is_reached: Any) -> None:
        def is_reached_or_broken() -> bool:
            return bool(is_reached()) or any(writer.failure for writer in self.writers)

        assert self._condition.wait_for(is_reached_or_broken, PATIENCE_S), "the writers hang"
        for writer in self.writers:
            if writer.failure is not None:
                raise writer.failure

    def may_go_on(self, done: int) -> bool:
        """Called by writers between their changes: counts, and waits while they are held."""
        with self._condition:
            self._done += done
            self._idle += 1
            self._condition.notify_all()
            self._condition.wait_for(lambda: not self._is_held or self._is_over)
            self._idle -= 1
            return not self._is_over

    def ended(self) -> None:
        """Called by a writer whose connection broke."""
        with self._condition:
            self._condition.notify_all()


class Writer:
    """One guest.

    Attributes:
        failure: What went wrong, or None.
        errors: Errors of requests that were answered.
        unanswered: Requests that got no answer.
    """

    def __init__(
        self, crowd: Crowd, nbd: Any, uri: str, plots: list[Plot], random_: random.Random
    ) -> None:
        self.failure: BaseException | None = None
        self.errors: list[int] = []
        self.unanswered = 0
        self._crowd = crowd
        self._nbd = nbd
        self._plots = plots
        self._random = random_
        self._handle = nbd.NBD()
        self._handle.connect_uri(uri)
        self._completed = 0

    def run(self) -> None:
        """Write until told to end or cut off."""
        try:
            done = 0
            while self._crowd.may_go_on(done):
                done = self._change_some()
            self._handle.shutdown()
        except BaseException as error:
            self.failure = error
        finally:
            self._crowd.ended()

    def _change_some(self) -> int:
        """Change some plots at a time; returns how many."""
        plots = self._random.sample(self._plots, min(len(self._plots), MAX_DEPTH))
        begun = self._completed + len(plots)
        self.unanswered += len(plots)
        for plot in plots:
            self._change(plot)
        while self._completed < begun:
            self._handle.poll(-1)
        if not self._random.randrange(4):
            self._handle.flush()
        if not self._random.randrange(4):
            plot = self._random.choice(plots)
            found = self._handle.pread(len(plot.content), plot.offset)
            assert found == plot.content, f"read back wrong: {plot.describe()}"
        return len(plots)

    def _change(self, plot: Plot) -> None:
        length = self._random.randint(1, len(plot.content))
        start = self._random.randint(0, len(plot.content) - length)
        offset = plot.offset + start
        flags = self._nbd.CMD_FLAG_FUA if not self._random.randrange(8) else 0
        kind = self._random.choice(("write", "write", "write", "zero", "no hole", "trim"))
        if (offset | length) % TRIM_UNIT and kind == "trim":
            begin, end = round_up(offset, TRIM_UNIT), round_down(offset + length, TRIM_UNIT)
            if begin < end:
                start, offset, length = begin - plot.offset, begin, end - begin
            else:
                kind = "zero"

        def completed(error: Any) -> int:
            # An exception in here would be lost: whatever is wrong is looked at later.
            number = error.value
            if number == errno.ENOTCONN:  # no answer: the connection is gone
                return 1
            if number:
                self.errors.append(number)
            else:
                plot.acknowledge(monotonic())
            self._completed += 1
            self.unanswered -= 1
            return 1

        data = self._random.randbytes(length) if kind == "write" else bytes(length)
        plot.begin(start, data, monotonic())
        if kind == "write":
            buffer = self._nbd.Buffer.from_bytearray(bytearray(data))
            self._handle.aio_pwrite(buffer, offset, completed, flags)
        elif kind == "trim":
            self._handle.aio_trim(length, offset, completed, flags)
        else:
            flags |= self._nbd.CMD_FLAG_NO_HOLE if kind == "no hole" else 0
            self._handle.aio_zero(length, offset, completed, flags)

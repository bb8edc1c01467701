# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Options as JSON: each driver takes its own, children by name or inline, and nothing else."""

from __future__ import annotations

import pytest

from nbdjobs.errors import CommandError
from nbdjobs.nodes.blkdebug import BlkdebugOptions
from nbdjobs.nodes.blkdebug_rules import InjectError, IOType, SetState
from nbdjobs.nodes.config import DetectZeroes
from nbdjobs.nodes.drivers import DRIVERS
from nbdjobs.nodes.events import DebugEvent
from nbdjobs.nodes.file import AioBackend, FileOptions, OnOffAuto
from nbdjobs.nodes.null import NullOptions
from nbdjobs.nodes.options import BlockdevOptions, CacheOptions, Discard
from nbdjobs.nodes.raw import RawOptions
from nbdjobs.qapi.visitor import visit


def test_common_and_own_members_are_read() -> None:
    assert visit(
        BlockdevOptions,
        {
            "driver": "file",
            "node-name": "f",
            "filename": "a.raw",
            "discard": "unmap",
            "cache": {"direct": True, "no-flush": False},
            "read-only": True,
            "auto-read-only": False,
            "force-share": True,
            "detect-zeroes": "unmap",
            "locking": "off",
            "aio": "io_uring",
            "aio-max-batch": 5,
        },
    ) == FileOptions(
        driver="file",
        node_name="f",
        filename="a.raw",
        discard=Discard.UNMAP,
        cache=CacheOptions(direct=True, no_flush=False),
        read_only=True,
        auto_read_only=False,
        force_share=True,
        detect_zeroes=DetectZeroes.UNMAP,
        locking=OnOffAuto.OFF,
        aio=AioBackend.IO_URING,
        aio_max_batch=5,
    )


def test_children_are_names_or_options() -> None:
    inline = {"driver": "raw", "file": {"driver": "null-co", "size": 512}, "offset": 0}
    assert visit(BlockdevOptions, inline) == RawOptions(
        driver="raw", file=NullOptions(driver="null-co", size=512), offset=0
    )
    by_name = visit(BlockdevOptions, {"driver": "raw", "file": "f"})
    assert by_name == RawOptions(driver="raw", file="f")


def test_rules_of_blkdebug_are_read() -> None:
    assert visit(
        BlockdevOptions,
        {
            "driver": "blkdebug",
            "image": "f",
            "inject-error": [{"event": "none", "iotype": "write-zeroes", "errno": 28}],
            "set-state": [{"event": "pwritev", "new_state": 2}],
        },
    ) == BlkdebugOptions(
        driver="blkdebug",
        image="f",
        inject_error=(InjectError(event=DebugEvent.NONE, iotype=IOType.WRITE_ZEROES, errno=28),),
        set_state=(SetState(event=DebugEvent.PWRITEV, new_state=2),),
    )


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({"driver": "foo"}, "Parameter 'driver' does not accept value 'foo'"),
        (
            {"driver": "file", "filename": "a", "locking": "foo"},
            "Parameter 'locking' does not accept value 'foo'",
        ),
        ({"driver": "file"}, "Parameter 'filename' is missing"),
        ({"driver": "null-co", "filename": "a"}, "Parameter 'filename' is unexpected"),
    ],
)
def test_what_does_not_belong_is_refused(members: dict[str, object], words: str) -> None:
    with pytest.raises(CommandError) as caught:
        visit(BlockdevOptions, members)
    assert caught.value.description == words


def test_every_driver_has_options_of_its_own() -> None:
    assert all(driver.options_type is not BlockdevOptions for driver in DRIVERS.values())

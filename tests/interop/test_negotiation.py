# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Negotiation option by option, with libnbd as the client."""

from __future__ import annotations

from typing import Any

import pytest

from tests.interop.conftest import DISK_SIZE, Connect, StartDaemon
from tests.interop.daemon import Daemon, Disk, unix_server
from tests.interop.tools import run

ALLOCATION = "base:allocation"


def stay_in_options(handle: Any) -> None:
    """Prepare a handle to stop after the handshake, for options one by one."""
    handle.set_opt_mode(True)


def test_go_chooses_the_export(daemon: Daemon, connect: Connect) -> None:
    handle = connect(daemon)
    assert handle.get_protocol() == "newstyle-fixed"
    assert handle.get_size() == DISK_SIZE
    assert not handle.is_read_only()


def test_go_after_options_chooses_the_export(daemon: Daemon, connect: Connect) -> None:
    handle = connect(daemon, prepare=stay_in_options)
    assert handle.aio_is_negotiating()
    handle.opt_go()
    assert handle.aio_is_ready()
    assert handle.get_size() == DISK_SIZE


def test_go_refuses_an_unknown_export_and_goes_on(
    daemon: Daemon, connect: Connect, nbd: Any
) -> None:
    handle = connect(daemon, "unknown", stay_in_options)
    with pytest.raises(nbd.Error, match="ENOENT"):
        handle.opt_go()
    handle.set_export_name("disk0")
    handle.opt_go()
    assert handle.get_size() == DISK_SIZE


def test_info_tells_size_and_flags_without_choosing(daemon: Daemon, connect: Connect) -> None:
    handle = connect(daemon, prepare=stay_in_options)
    handle.opt_info()
    assert handle.aio_is_negotiating()
    assert handle.get_size() == DISK_SIZE
    assert not handle.is_read_only()


def test_info_refuses_an_unknown_export(daemon: Daemon, connect: Connect, nbd: Any) -> None:
    handle = connect(daemon, "unknown", stay_in_options)
    with pytest.raises(nbd.Error, match="ENOENT"):
        handle.opt_info()
    assert handle.aio_is_negotiating()


def test_info_tells_name_and_block_sizes(daemon: Daemon, connect: Connect, nbd: Any) -> None:
    def ask_for_all(handle: Any) -> None:
        stay_in_options(handle)
        handle.set_full_info(True)

    handle = connect(daemon, prepare=ask_for_all)
    handle.opt_info()
    assert handle.get_canonical_export_name() == "disk0"
    smallest, preferred, largest = (
        handle.get_block_size(kind)
        for kind in (nbd.SIZE_MINIMUM, nbd.SIZE_PREFERRED, nbd.SIZE_MAXIMUM)
    )
    assert smallest == 1
    assert preferred >= 512
    assert preferred & (preferred - 1) == 0
    assert largest == 32 << 20


def test_info_tells_the_description(
    start_daemon: StartDaemon, disk: Disk, connect: Connect
) -> None:
    daemon = start_daemon(*disk.blockdev(), *unix_server())
    export = {"type": "nbd", "id": "e", "node-name": "disk0", "description": "The first disk"}
    daemon.qmp.execute("block-export-add", export)

    def ask_for_all(handle: Any) -> None:
        handle.set_full_info(True)

    assert connect(daemon, prepare=ask_for_all).get_export_description() == "The first disk"


def test_list_names_every_export(start_daemon: StartDaemon, disk: Disk, connect: Connect) -> None:
    twin = ["--export", "type=nbd,id=twin,node-name=disk0,name=twin,writable=on"]
    daemon = start_daemon(*disk.blockdev(), *unix_server(), *disk.export(), *twin)
    handle = connect(daemon, prepare=stay_in_options)
    names: list[str] = []
    assert handle.opt_list(lambda name, _description: names.append(name)) == 2
    assert sorted(names) == ["disk0", "twin"]


def test_abort_ends_the_negotiation(daemon: Daemon, connect: Connect) -> None:
    handle = connect(daemon, prepare=stay_in_options)
    handle.opt_abort()
    assert handle.aio_is_closed()


def test_list_meta_context_names_what_there_is(daemon: Daemon, connect: Connect) -> None:
    handle = connect(daemon, prepare=stay_in_options)
    names: list[str] = []
    handle.opt_list_meta_context(names.append)
    assert names == [ALLOCATION]


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("base:", [ALLOCATION]),
        (ALLOCATION, [ALLOCATION]),
        ("base:unknown", []),
        ("unknown:context", []),
    ],
)
def test_list_meta_context_answers_queries(
    query: str, found: list[str], daemon: Daemon, connect: Connect
) -> None:
    def ask(handle: Any) -> None:
        stay_in_options(handle)
        handle.add_meta_context(query)

    names: list[str] = []
    connect(daemon, prepare=ask).opt_list_meta_context(names.append)
    assert names == found


def test_set_meta_context_ignores_unknown_namespaces(daemon: Daemon, connect: Connect) -> None:
    def ask(handle: Any) -> None:
        handle.add_meta_context("unknown:context")
        handle.add_meta_context(ALLOCATION)

    handle = connect(daemon, prepare=ask)
    assert handle.can_meta_context(ALLOCATION)
    assert not handle.can_meta_context("unknown:context")


def test_structured_replies_are_agreed_on(daemon: Daemon, connect: Connect) -> None:
    handle = connect(daemon)
    assert handle.get_structured_replies_negotiated()
    assert handle.can_df()


def test_structured_replies_may_be_left_out(daemon: Daemon, disk: Disk, connect: Connect) -> None:
    handle = connect(daemon, prepare=lambda handle: handle.set_request_structured_replies(False))
    assert not handle.get_structured_replies_negotiated()
    assert not handle.can_df()
    assert bytes(handle.pread(65536, 512)) == disk.content(512, 65536)
    handle.pwrite(b"n" * 512, 512)
    assert disk.content(512, 512) == b"n" * 512


def test_contexts_need_structured_replies(daemon: Daemon, connect: Connect) -> None:
    def ask(handle: Any) -> None:
        handle.set_request_structured_replies(False)
        handle.add_meta_context(ALLOCATION)

    assert not connect(daemon, prepare=ask).can_meta_context(ALLOCATION)


def test_tls_is_refused_and_the_client_goes_on_without(
    daemon: Daemon, connect: Connect, nbd: Any
) -> None:
    handle = connect(daemon, prepare=lambda handle: handle.set_tls(nbd.TLS_ALLOW))
    assert not handle.get_tls_negotiated()
    assert handle.get_size() == DISK_SIZE


def test_a_client_that_insists_on_tls_is_told_no(
    daemon: Daemon, connect: Connect, nbd: Any
) -> None:
    with pytest.raises(nbd.Error, match="TLS"):
        connect(daemon, prepare=lambda handle: handle.set_tls(nbd.TLS_REQUIRE))


def test_export_name_serves_a_client_without_fixed_newstyle(
    daemon: Daemon, disk: Disk, connect: Connect
) -> None:
    """Without flags: no other option is known, and 124 zeroes follow the answer."""
    handle = connect(daemon, prepare=lambda handle: handle.set_handshake_flags(0))
    assert handle.get_protocol() == "newstyle"
    assert handle.get_size() == DISK_SIZE
    assert bytes(handle.pread(4096, 0)) == disk.content(0, 4096)


def test_export_name_without_the_zeroes(
    daemon: Daemon, disk: Disk, connect: Connect, nbd: Any
) -> None:
    flags = nbd.HANDSHAKE_FLAG_NO_ZEROES
    handle = connect(daemon, prepare=lambda handle: handle.set_handshake_flags(flags))
    assert handle.get_size() == DISK_SIZE
    assert bytes(handle.pread(4096, 0)) == disk.content(0, 4096)


def test_go_with_fixed_newstyle_and_zeroes(
    daemon: Daemon, disk: Disk, connect: Connect, nbd: Any
) -> None:
    flags = nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE
    handle = connect(daemon, prepare=lambda handle: handle.set_handshake_flags(flags))
    assert handle.get_protocol() == "newstyle-fixed"
    assert bytes(handle.pread(4096, 0)) == disk.content(0, 4096)


def test_export_name_unknown_ends_the_connection(
    daemon: Daemon, connect: Connect, nbd: Any
) -> None:
    with pytest.raises(nbd.Error):
        connect(daemon, "unknown", lambda handle: handle.set_handshake_flags(0))
    assert run("nbdinfo", "--size", daemon.uri("disk0")) == f"{DISK_SIZE}\n"


def test_flags_of_a_writable_export(daemon: Daemon, connect: Connect) -> None:
    handle = connect(daemon)
    promises = (
        *(handle.can_flush(), handle.can_fua(), handle.can_trim(), handle.can_zero()),
        *(handle.can_fast_zero(), handle.can_df(), handle.can_cache()),
    )
    assert all(promises), promises
    assert not handle.is_read_only()


def test_flags_of_a_read_only_export(read_only_daemon: Daemon, connect: Connect) -> None:
    handle = connect(read_only_daemon)
    assert handle.is_read_only()
    assert handle.can_multi_conn()
    assert handle.can_df()
    assert handle.can_cache()
    assert not handle.can_trim()
    assert not handle.can_zero()

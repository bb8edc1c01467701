# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Which test covers which NBD option, command and flag from outside our own code.

``test_coverage.py`` checks that each named test exists. Extended headers and the block status
payload, which came with them, are known to no client that Debian 12 has (libnbd speaks them
since 1.18, qemu since 8.2): a raw client of our own covers them in ``tests/protocol``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

NEGOTIATION = "test_negotiation.py::"
COMMANDS = "test_commands.py::"
NBDINFO = "test_nbdinfo.py::"

COVERAGE: Final[Mapping[str, str]] = {
    # Handshake flags
    "NBD_FLAG_C_FIXED_NEWSTYLE": NEGOTIATION + "test_go_with_fixed_newstyle_and_zeroes",
    "NBD_FLAG_C_NO_ZEROES": NEGOTIATION + "test_export_name_without_the_zeroes",
    # Options
    "NBD_OPT_EXPORT_NAME": NEGOTIATION + "test_export_name_serves_a_client_without_fixed_newstyle",
    "NBD_OPT_ABORT": NEGOTIATION + "test_abort_ends_the_negotiation",
    "NBD_OPT_LIST": NEGOTIATION + "test_list_names_every_export",
    "NBD_OPT_STARTTLS": NEGOTIATION + "test_tls_is_refused_and_the_client_goes_on_without",
    "NBD_OPT_INFO": NEGOTIATION + "test_info_tells_size_and_flags_without_choosing",
    "NBD_OPT_GO": NEGOTIATION + "test_go_chooses_the_export",
    "NBD_OPT_STRUCTURED_REPLY": NEGOTIATION + "test_structured_replies_are_agreed_on",
    "NBD_OPT_LIST_META_CONTEXT": NEGOTIATION + "test_list_meta_context_answers_queries",
    "NBD_OPT_SET_META_CONTEXT": NEGOTIATION + "test_set_meta_context_ignores_unknown_namespaces",
    # Information
    "NBD_INFO_EXPORT": NEGOTIATION + "test_info_tells_size_and_flags_without_choosing",
    "NBD_INFO_NAME": NEGOTIATION + "test_info_tells_name_and_block_sizes",
    "NBD_INFO_DESCRIPTION": NEGOTIATION + "test_info_tells_the_description",
    "NBD_INFO_BLOCK_SIZE": NEGOTIATION + "test_info_tells_name_and_block_sizes",
    # Transmission flags
    "NBD_FLAG_READ_ONLY": NEGOTIATION + "test_flags_of_a_read_only_export",
    "NBD_FLAG_SEND_FLUSH": NEGOTIATION + "test_flags_of_a_writable_export",
    "NBD_FLAG_SEND_FUA": NEGOTIATION + "test_flags_of_a_writable_export",
    "NBD_FLAG_ROTATIONAL": NBDINFO + "test_a_file_is_rotational_only_where_its_disk_is",
    "NBD_FLAG_SEND_TRIM": NEGOTIATION + "test_flags_of_a_writable_export",
    "NBD_FLAG_SEND_WRITE_ZEROES": NEGOTIATION + "test_flags_of_a_writable_export",
    "NBD_FLAG_SEND_DF": NEGOTIATION + "test_flags_of_a_writable_export",
    "NBD_FLAG_CAN_MULTI_CONN": COMMANDS + "test_a_write_is_seen_by_another_connection",
    "NBD_FLAG_SEND_CACHE": NEGOTIATION + "test_flags_of_a_writable_export",
    "NBD_FLAG_SEND_FAST_ZERO": NEGOTIATION + "test_flags_of_a_writable_export",
    # Commands
    "NBD_CMD_READ": COMMANDS + "test_read",
    "NBD_CMD_WRITE": COMMANDS + "test_write",
    "NBD_CMD_DISC": COMMANDS + "test_disconnect_leaves_the_server_serving",
    "NBD_CMD_FLUSH": COMMANDS + "test_flush",
    "NBD_CMD_TRIM": COMMANDS + "test_trim_gives_the_space_back",
    "NBD_CMD_CACHE": COMMANDS + "test_cache",
    "NBD_CMD_WRITE_ZEROES": COMMANDS + "test_zero",
    "NBD_CMD_BLOCK_STATUS": COMMANDS + "test_block_status_tells_data_and_holes",
    # Command flags
    "NBD_CMD_FLAG_FUA": COMMANDS + "test_write_with_fua",
    "NBD_CMD_FLAG_NO_HOLE": COMMANDS + "test_zero_without_a_hole_keeps_the_space",
    "NBD_CMD_FLAG_DF": COMMANDS + "test_read_in_one_piece_when_asked",
    "NBD_CMD_FLAG_REQ_ONE": COMMANDS + "test_block_status_of_one_extent",
    "NBD_CMD_FLAG_FAST_ZERO": COMMANDS + "test_fast_zero_is_done_or_refused_at_once",
    # Reply chunks
    "NBD_REPLY_TYPE_OFFSET_DATA": COMMANDS + "test_read_in_one_piece_when_asked",
    "NBD_REPLY_TYPE_OFFSET_HOLE": COMMANDS + "test_read_tells_holes",
    "NBD_REPLY_TYPE_BLOCK_STATUS": COMMANDS + "test_block_status_tells_data_and_holes",
    "NBD_REPLY_TYPE_ERROR": COMMANDS + "test_beyond_the_end",
    # Errors
    "NBD_EPERM": COMMANDS + "test_a_read_only_export_is_not_changed",
    "NBD_EINVAL": COMMANDS + "test_an_unknown_flag_is_refused",
    "NBD_ENOSPC": COMMANDS + "test_beyond_the_end",
    "NBD_REP_ERR_UNKNOWN": NEGOTIATION + "test_go_refuses_an_unknown_export_and_goes_on",
}

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Side by side with qemu-nbd, qemu-storage-daemon and nbdkit: ``python -m benchmarks``.

A report, never a test: nothing here passes or fails by time. One row is one question, such as
"4 KiB random reads at depth 16 over a unix socket". The peers answer it in turn, A B C D, A B C D,
on the same file, in the same minutes, and a cell is the median of a peer's answers; so a machine
that slows down half way slows everyone.
"""

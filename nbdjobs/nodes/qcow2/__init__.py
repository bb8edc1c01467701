# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The image format qcow2, one idea per module.

Pure, bytes in and values out: `constants`, `geometry`, `header`, `extensions`, `mapping` (L2
entries) and `refcount_table` (widths of refcounts). On an open image: `tables` (L1, L2 and their
cache), `refcounts` (which clusters are in use), `commit` (what is written in which order),
`requests` (what becomes of reads and writes), and `node`, the driver.

Source: QEMU `docs/interop/qcow2`, the specification of the format.
"""

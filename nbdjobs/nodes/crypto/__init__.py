# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Encrypted disks: sector ciphers, the LUKS format, and the older encryption of qcow2.

All algorithms are those of the `cryptography` package; how they are put together is here. Nothing
in this package but `volume` does I/O.
"""

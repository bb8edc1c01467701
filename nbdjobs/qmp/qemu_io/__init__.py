# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The commands of qemu-io, which try a disk out by hand, and what they answer."""

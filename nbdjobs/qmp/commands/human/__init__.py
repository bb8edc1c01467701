# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The human monitor: QEMU's other control language, in which lines are answered with texts."""

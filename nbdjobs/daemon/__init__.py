# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The daemon: owner of nodes, devices, exports and jobs."""

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""The block graph: nodes, edges, devices, and one file per driver."""

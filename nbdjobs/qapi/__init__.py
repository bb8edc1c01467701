# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""QAPI types, and how JSON and key=value options become them."""

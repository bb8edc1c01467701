# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""nbdjobs: an NBD block server with live backup jobs, driven over QMP."""

__version__ = "0.1.0"

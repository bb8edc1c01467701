# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""NBD: messages and negotiation without I/O, and the asyncio server around them."""

# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""QAPI: typed options and command arguments, read from JSON or from key=value text.

`types` says how a dataclass describes a QAPI struct, `visitor` turns decoded input into such
dataclasses and back, `keyval` and `json` read the two texts a user may write, and `schema`
describes the types to clients. All of it is pure.
"""

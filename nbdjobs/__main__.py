# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""`python -m nbdjobs` is the same as `nbdjobs`."""

from __future__ import annotations

import sys

from nbdjobs.cli.main import main

if __name__ == "__main__":
    sys.exit(main())

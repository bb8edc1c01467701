# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Fuzzing guided by coverage, with atheris: one target in a process of its own.

    python -m tests.fuzz.guided TARGET [OPTION OF LIBFUZZER]... [DIRECTORY]...

libFuzzer ends the process when an input fails, hangs or takes too much memory, and leaves that
input in a file.
"""

from __future__ import annotations

import importlib
import sys

atheris = importlib.import_module("atheris")  # no dependency: who has it, uses it

with atheris.instrument_imports(include=["nbdjobs"]):
    from tests.fuzz.targets import TARGETS


def main() -> None:
    """Fuzz until an option of libFuzzer says that it is enough."""
    name, *options = sys.argv[1:]
    atheris.Setup([sys.argv[0], *options], TARGETS[name].run)
    atheris.Fuzz()


if __name__ == "__main__":
    main()

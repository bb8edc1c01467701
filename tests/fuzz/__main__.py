# SPDX-FileCopyrightText: The nbdjobs authors
# SPDX-License-Identifier: Apache-2.0
"""Fuzz for a while: with atheris, guided by coverage, where it is installed, else with hypothesis.

python -m tests.fuzz [--seconds N] [TARGET]...
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final

from tests.fuzz.hypothesis_engine import HANG_S, run_for
from tests.fuzz.targets import LONGEST, TARGETS

MEMORY_MIB: Final = 1024
"""What a guided process may take, with all that libFuzzer keeps."""


def main() -> int:
    """Fuzz the targets one after the other; 1 if one of them failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--seconds", type=int, default=60, metavar="N", help="for each target")
    parser.add_argument("--without-atheris", action="store_true", help="use hypothesis alone")
    parser.add_argument("--corpus", type=Path, metavar="DIR", help="keep what was found there")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    arguments = parser.parse_args()
    unknown = set(arguments.targets) - set(TARGETS)
    if unknown:
        parser.error(f"unknown target: {', '.join(sorted(unknown))}")
    is_guided = importlib.util.find_spec("atheris") is not None and not arguments.without_atheris
    failed = []
    for name in arguments.targets or TARGETS:
        print(f"{name}: {'atheris' if is_guided else 'hypothesis'}", flush=True)
        if is_guided:
            is_sound = _guide(name, arguments.seconds, arguments.corpus)
        else:
            is_sound = _try(name, arguments.seconds)
        if not is_sound:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "nothing was found")
    return 1 if failed else 0


def _try(name: str, seconds: int) -> bool:
    try:
        print(f"  {run_for(TARGETS[name], seconds)} examples")
    except Exception as error:
        # With the smallest example, which hypothesis adds as a note.
        print(f"  {error!r}", *getattr(error, "__notes__", ()), sep="\n  ")
        return False
    return True


def _guide(name: str, seconds: int, kept: Path | None) -> bool:
    with tempfile.TemporaryDirectory(prefix="nbdjobs-fuzz-") as scratch:
        corpus = kept / name if kept is not None else Path(scratch)
        corpus.mkdir(parents=True, exist_ok=True)
        for number, seed in enumerate(TARGETS[name].seeds):
            (corpus / f"seed{number}").write_bytes(seed)
        command = [
            *(sys.executable, "-m", "tests.fuzz.guided", name),
            *(f"-max_total_time={seconds}", f"-timeout={HANG_S}", f"-max_len={LONGEST}"),
            *(f"-rss_limit_mb={MEMORY_MIB}", f"-artifact_prefix=fuzz-{name}-", "-verbosity=0"),
            *("-print_final_stats=1", str(corpus)),
        ]
        finished = subprocess.run(command, capture_output=True, text=True, check=False)
    said = finished.stderr + finished.stdout
    if finished.returncode:
        print(said)
        return False
    for line in said.splitlines():
        if "number_of_executed_units" in line or "peak_rss" in line:
            print("  " + line.replace("stat::", ""))
    return True


if __name__ == "__main__":
    sys.exit(main())

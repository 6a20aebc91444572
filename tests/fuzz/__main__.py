"""`python -m tests.fuzz [--seconds N] [TARGET…]`: fuzz the targets in turns, each turn with another seed."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.targets import TARGETS, fuzz

TURN = 20.0
"""Seconds of a turn."""


def main() -> int:
    """Fuzz; returns the exit code, 1 if a target failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("targets", nargs="*", choices=[[], *TARGETS], help="all of them if none is named")
    parser.add_argument("--seconds", type=float, default=3600)
    options = parser.parse_args()
    names = options.targets or list(TARGETS)
    end, turn, failed = time.monotonic() + options.seconds, 0, False
    with tempfile.TemporaryDirectory() as folder:
        ready = {name: TARGETS[name].prepare(Path(folder, name)) for name in names}
        while time.monotonic() < end and not failed:
            for name in names:
                print(f"{name}, seed {turn}", file=sys.stderr, flush=True)
                try:
                    fuzz(TARGETS[name], ready[name], min(TURN, max(1.0, end - time.monotonic())), seed=turn)
                except Exception as error:  # noqa: BLE001 - it is printed, and the run has failed
                    failed = True
                    print(f"{name}, seed {turn}: {type(error).__name__}: {error}", *getattr(error, "__notes__", ()), sep="\n")
            turn += 1
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

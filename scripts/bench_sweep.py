"""Prints what experiments cost and give, as Markdown: sweeps, sensitivity, mixed precision.

    python scripts/bench_sweep.py
    python scripts/bench_sweep.py --parts sensitivity --quick

Each part is a module beside this one, `bench_sweep_PART.py`; its `lines(quick)` yields lines of Markdown, which are
printed as they come.
"""

from __future__ import annotations

import argparse
import importlib

from bench_header import header

PARTS = ("configurations", "sensitivity", "precision")
"""What is measured, in order."""


def main() -> None:
    """Prints the parts asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--quick", action="store_true", help="a smaller run, to see that all of it works")
    arguments = parser.parse_args()
    print(f"{header()}\n", flush=True)
    for part in arguments.parts:
        for line in importlib.import_module(f"bench_sweep_{part}").lines(quick=arguments.quick):
            print(line, flush=True)
        print(flush=True)


if __name__ == "__main__":
    main()

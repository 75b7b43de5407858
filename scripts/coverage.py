"""Writes docs/coverage.md: ONNX's own cases, real files and exports, and forward times, each table by a command.

.venv/bin/python -m scripts.coverage                     all tables; half an hour on two cores
.venv/bin/python -m scripts.coverage cases               one of them; the others stay as they are
.venv/bin/python -m scripts.coverage files
.venv/bin/python -m scripts.coverage bench
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

from scripts import coverage_cases, coverage_files
from scripts.bench_header import header, version_of

_ROOT = Path(__file__).parents[1]
_BUILT = ("mobilenet_v2", "resnet18", "resnet50")  # by scripts/networks.py
_DOCUMENT = """\
# What is covered

Which operators, files and exporters are read and run, and how fast. Each table is written by the command above it,
which also notes the date, the machine and the versions.

## ONNX's own cases

The cases of `onnx.backend.test`, with their own tolerances; element types and shapes must match. Of kind "node":
training are the cases with an operator of a training or preview domain; string, sequence and narrow (below 16 bits, but
for the integers of NumPy) say what a graph input or output is; plain is the rest. ONNX Runtime's CPU provider ran the
same cases in the same run; where its Python interface cannot pass a type, the value was passed as a constant, or cast
to float32 at the end.

<!-- cases -->
<!-- end -->

## Real files

The largest difference of an output's elements from ONNX Runtime's, relative to the largest magnitude in that output.
Inputs are random. "Written again": ONNX Runtime on `write(read(file))` against ONNX Runtime on the file. A batch size
is left out where the file fixes its own. The files themselves are not part of this repository. The exports are small
networks of the published structures with random weights (`tests/exports`), made by torch while the table is.

<!-- files -->
<!-- end -->

## Forward times

Float forward pass, here and in ONNX Runtime, in turn in one process.

<!-- bench -->
<!-- end -->
"""


def main() -> None:
    """Makes the tables asked for and puts them into the document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables: Mapping[str, Callable[[argparse.Namespace], str]] = {"cases": _cases, "files": _files, "bench": _bench}
    parser.add_argument("tables", nargs="*", metavar="TABLE", help=f"{', '.join(tables)}; all by default")
    parser.add_argument("--out", type=Path, default=_ROOT / "docs" / "coverage.md", help="the document")
    parser.add_argument("--models", type=Path, default=_ROOT.parent / "shared" / "models", help="the real files")
    parser.add_argument("--processes", type=int, default=os.cpu_count(), help="cases and files run at a time")
    options = parser.parse_args()
    unknown = [name for name in options.tables if name not in tables]
    if unknown:
        parser.error(f"there is no table '{unknown[0]}'; known are {', '.join(tables)}")
    for name in options.tables or tables:
        text = f"    .venv/bin/python -m scripts.coverage {name}\n\n{tables[name](options)}"
        document = options.out.read_text(encoding="utf-8") if options.out.is_file() else _DOCUMENT
        options.out.write_text(with_section(document, name, text), encoding="utf-8")
        print(text)


def with_section(document: str, name: str, text: str) -> str:
    """Returns the document with `text` between the marks of section `name`.

    Raises:
        ValueError: The document has no such marks.
    """
    pattern = rf"<!-- {name} -->\n.*?<!-- end -->"
    if not re.search(pattern, document, flags=re.DOTALL):
        raise ValueError(f"no section '{name}': expected the marks '<!-- {name} -->' and '<!-- end -->' on their lines")
    return re.sub(pattern, lambda _: f"<!-- {name} -->\n\n{text}\n\n<!-- end -->", document, count=1, flags=re.DOTALL)


def _cases(options: argparse.Namespace) -> str:
    found = coverage_cases.outcomes(options.processes)
    return f"{header()}\n\n{coverage_cases.table(found)}\n\nWhat fails here:\n\n{coverage_cases.failures(found)}"


def _files(options: argparse.Namespace) -> str:
    conditions = header(also=f"torch {version_of('torch')}")
    return f"{conditions}\n\n{coverage_files.table(options.models, options.processes)}"


def _bench(options: argparse.Namespace) -> str:
    command = [sys.executable, "scripts/bench_lowering.py", *_BUILT, *map(str, sorted(options.models.glob("*.onnx")))]
    done = subprocess.run(command, cwd=_ROOT, check=True, stdout=subprocess.PIPE, text=True)
    conditions, heading, rows = done.stdout.strip().partition("| network ")
    return f"{conditions.strip()}\n\n{heading}{rows}"


if __name__ == "__main__":
    main()

"""Whether a command keeps compiled programs on disk: the option, and what it makes of JAX's complaints."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from ptqjax.errors import OutputError
from ptqjax.programs import keep_programs, remove_programs

cache_option = click.option(
    "--no-cache",
    is_flag=True,
    help="Keep no compiled programs on disk, and use none. They are kept in PTQJAX_CACHE_DIR, or else in the "
    "platform's folder, 1 GB at most; a second run like the first then compiles nothing.",
)
"""The option of commands that compile."""

_COMPLAINT = re.compile(r"Error (reading|writing) persistent compilation cache entry for '(\S+)': ([\s\S]*)")


@contextmanager
def kept_programs(*, is_off: bool = False) -> Iterator[None]:
    """Keeps compiled programs on disk while the body runs; what fails there is one line, and the body goes on.

    A program that cannot be read or written (damaged, half written, a full disk) is removed, compiled again, and kept
    where that is possible.
    """
    if is_off:
        yield
        return
    try:
        folder = keep_programs()
    except OutputError as error:
        click.echo(f"Warning: {error}; --no-cache leaves it out", err=True)
        yield
        return
    show, said = warnings.showwarning, list[str]()

    def shown(message: Warning | str, *place: Any, **settings: Any) -> None:
        complaint = _COMPLAINT.match(str(message))
        if complaint is None:
            show(message, *place, **settings)
            return
        remove_programs(folder, complaint[2])
        if not said:
            said.append(_line(folder, complaint[1], " ".join(complaint[3].split())))
            click.echo(said[0], err=True)

    with warnings.catch_warnings():
        warnings.filterwarnings("always", message=_COMPLAINT.pattern)  # of each program, not once for each text
        warnings.showwarning = shown
        yield


def _line(folder: Path, what: str, reason: str) -> str:
    if what == "reading":
        return f"Warning: a compiled program in '{folder}' is damaged ({reason}); it is compiled again"
    return f"Warning: compiled programs cannot be kept in '{folder}' ({reason}); free space, or take --no-cache"

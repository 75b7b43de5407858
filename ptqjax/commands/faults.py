"""How a command ends when something is wrong: one line on stderr, and an exit code."""

from __future__ import annotations

import functools
import os
import traceback
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import click

from ptqjax.errors import ConfigError, PtqjaxError

_F = TypeVar("_F", bound=Callable[..., Any])
_LONGEST = 300  # characters of a message that was not written for people


class Note(str):
    """What an error's line is to end with, beside notes of others (JAX adds one on its traceback)."""

    __slots__ = ()


class _Fault(click.ClickException):
    """The data, the model or we are at fault: one line on stderr, exit code 1."""

    exit_code = 1


def reports_faults(command: _F) -> _F:
    """Returns the command with errors as one line on stderr: usage exits with 2, all others with 1.

    An error that nobody foresaw is a fault of ours and says so; PTQJAX_DEBUG=1 shows the traceback of any error.
    Interrupts and a closed pipe are left to click. A `Note` of an error (`add_note`) ends its line.
    """

    @functools.wraps(command)
    def reporting(*args: Any, **settings: Any) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.showwarning = lambda message, *_, **__: click.echo(f"Warning: {message}", err=True)
                return command(*args, **settings)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if os.environ.get("PTQJAX_DEBUG", "0") not in ("", "0"):
                click.echo(traceback.format_exc(), err=True)
            raise _shown(error) from error

    return reporting  # pyright: ignore[reportReturnType]


def _shown(error: Exception) -> click.ClickException:
    text = " ".join(str(error).split())
    notes = "".join(f"; {note}" for note in getattr(error, "__notes__", ()) if isinstance(note, Note))
    if isinstance(error, ConfigError):
        return click.UsageError(text + notes, click.get_current_context(silent=True))
    if isinstance(error, PtqjaxError):
        return _Fault(text + notes)
    found = f"{type(error).__name__}: {text}" if text else type(error).__name__
    shortened = found if len(found) <= _LONGEST else f"{found[:_LONGEST]}..."
    return _Fault(f"internal error: {shortened}; please report it; PTQJAX_DEBUG=1 shows the traceback{notes}")

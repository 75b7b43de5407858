"""What `ptqjax quantize` does besides calling public functions: settings from options, provenance."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptqjax.errors import ConfigError, OutputError
from ptqjax.faults import Note
from ptqjax.publish import stamp

if TYPE_CHECKING:
    from ptqjax.config import QuantizationConfig
    from ptqjax.ir import Model
    from ptqjax.quantize import Encodings

NO_DATA = "none"
"""What stands in place of DATA.npz where there is none."""
NO_REPORT = "none"
"""What `--report` says where none is wanted."""
MODEL, REPORT = ("model.onnx", "model.encodings"), ("report.json", "report.html")
"""The files of a run: what is there first, and what follows."""
_INTERRUPTED = 130  # the exit code of what SIGINT ended


def without_equalization(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the options with equalization off.

    Raises:
        ConfigError: It is asked for by name.
    """
    if given.get("equalize"):
        raise ConfigError("--equalize with --encodings: scaled tensors have other ranges; leave one of the two out")
    return given | {"equalize": False}


def frozen_encodings(file: Path, source: Model) -> Encodings:
    """Returns the encodings in a file, which are for the model with folded batch norms."""
    import ptqjax

    return ptqjax.read_encodings(file, ptqjax.fold_batch_norms(source)[0])[0]


def named() -> dict[str, Any]:
    """Returns the options that are given by name."""
    context = click.get_current_context()
    by_name = click.core.ParameterSource.COMMANDLINE
    return {name: value for name, value in context.params.items() if context.get_parameter_source(name) is by_name}


def configured(file: Path | None, given: dict[str, Any]) -> QuantizationConfig:
    """Returns the settings of a file, or the defaults of the target, with those that are given in their place."""
    import ptqjax

    if file is None:
        return ptqjax.QuantizationConfig.for_target(given.pop("target", "ort-cpu"), **given)
    if file.suffix != ".json":
        return ptqjax.read_config(file, **given)
    config, notes = ptqjax.config_from_aimet(file, **given)
    for note in notes:
        click.echo(f"Note: {file.name}: {note}", err=True)
    return config


def require_consistent(calibration: str, config: QuantizationConfig, given: dict[str, Any]) -> None:
    """Refuses what cannot be done, before any work.

    Raises:
        ConfigError: What needs samples is asked for by name, and there are none; or absorption is asked for by name,
            and equalization is off.
    """
    if calibration == NO_DATA and given.get("correct") == "empirical":
        raise ConfigError(
            "--correct empirical with --calibration none: the empirical correction is measured on samples; give a "
            "DATA.npz (a hundred will do, no labels needed), or take --correct analytic"
        )
    if calibration == NO_DATA and config.scaling == "learned":
        raise ConfigError(
            "--scaling learned with --calibration none: scales are learned on samples; give a DATA.npz, or take "
            "--scaling noise"
        )
    parts = {"scaling": "scaling", "bounds": "scaling", "absorb": "absorption"}
    for name, part in parts.items():
        if not config.equalize and given.get(name, "off") != "off":
            raise ConfigError(
                f"--{name} {given[name]} with --no-equalize: {part} is a part of equalization; leave one of the two out"
            )


def provenance(model: Path, data: Path | None) -> dict[str, Any]:
    """Returns the names of the files that a run reads, and their SHA-256."""
    files = {"model": model} | ({} if data is None else {"data": data})
    hashes = {f"{key}_sha256": hashlib.sha256(path.read_bytes()).hexdigest() for key, path in files.items()}
    return {key: path.name for key, path in files.items()} | hashes


@contextmanager
def model_is_written(out: Path) -> Iterator[None]:
    """Says of whatever ends the body early that the model is in `out`, and checks at the end that it still is that one.

    Raises:
        OutputError: Another run has put its model there.
    """
    model, state = out / MODEL[0], stamp(out / MODEL[0])
    try:
        yield
    except KeyboardInterrupt:
        click.echo(f"Interrupted: '{model}' is whole, its report is missing", err=True)
        raise click.exceptions.Exit(_INTERRUPTED) from None
    except Exception as error:
        error.add_note(Note(f"'{model}' is whole, its report is missing"))
        raise
    if stamp(model) != state:
        raise OutputError(
            f"'{model}' is no longer the one of this run: another has replaced it, and this one's report is not put "
            "beside it; give each run a DIR of its own"
        )


def set_aside(out: Path, folder: Path) -> tuple[str, ...]:
    """Copies the reports in `out`, which are of an earlier model, to `folder` under other names; returns these."""
    found = [name for name in REPORT if (out / name).is_file()]
    for name in found:
        shutil.copy2(out / name, folder / f"earlier-{name}")
    return tuple(f"earlier-{name}" for name in found)

"""What `ptqjax quantize` does: settings from options, the calls of public functions, files and what is said."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptqjax.commands.branch import read_with_branch
from ptqjax.commands.data import DataFiles, called, load
from ptqjax.commands.faults import Note
from ptqjax.commands.metric import metrics_of
from ptqjax.errors import ConfigError, OutputError
from ptqjax.progress import Follow
from ptqjax.publish import publish, stamp, write_text
from ptqjax.stopwatch import Stopwatch, summary

if TYPE_CHECKING:
    from ptqjax.config import QuantizationConfig
    from ptqjax.drafts import Result
    from ptqjax.encodings.encoding import Encodings
    from ptqjax.ir import Model

NO_REPORT = "none"
"""What `--report` says where none is wanted."""
MODEL, REPORT = ("model.onnx", "model.encodings"), ("report.json", "report.html")
"""The files of a run: what is there first, and what follows."""
_INTERRUPTED = 130  # the exit code of what SIGINT ended


@dataclass(frozen=True, kw_only=True, slots=True)
class Job:
    """What is to be quantized, and how."""

    model: Path
    """The float model."""
    data: DataFiles
    """Samples; none where batch norms tell."""
    batch_axes: Mapping[str, int | None]
    """The axis of the samples by input, where it is told."""
    encodings: Path | None
    """A file of grids that are kept."""
    out: Path
    """Where the files go."""
    config: QuantizationConfig
    """The settings."""
    details: str
    """What the report holds: "full", "short" or `NO_REPORT`."""
    metrics: tuple[str, ...] = ()
    """What is measured although no output looks so."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Done:
    """What became of it."""

    stages: Sequence[Mapping[str, Any]] = ()
    """The rows of the table of stages."""
    measured_in: str = ""
    """What computed them."""
    measured_on: str = ""
    """The samples, in words."""
    judged: tuple[str, ...] = ()
    """What was kept or left out because of samples held back, in sentences."""
    execution: Mapping[str, Any] | None = None
    """What a session makes of the file, as `explain` tells it; None where that was not looked at."""
    aside: tuple[str, ...] = ()
    """Reports of an earlier model, by their new names."""
    warning: str = ""
    """Where the file's sums may saturate in a plain session, and what to do; "" where nowhere."""


def job_done(job: Job, folder: Path, *, device: str, watch: Stopwatch, follow: Follow) -> Done:
    """Quantizes, and puts the files into `job.out` as soon as they exist.

    Args:
        job: What to do.
        folder: Where files are written first, a hidden folder of `job.out`.
        device: What computes, as the report says it.
        watch: Measures the stages.
        follow: Shows passes over samples.
    """
    import ptqjax
    from ptqjax.exportable import check_exportable

    with watch("read"):
        metrics = metrics_of(job.metrics)
        source, origin = read_with_branch(job.model), _provenance(job.model, job.data.files)
        check_exportable(source, job.config)
        frozen = None if job.encodings is None else _frozen_encodings(job.encodings, source)
        labels, batches = load(job.data, source.graph, job.batch_axes, decoder=source) if job.data else (None, None)
    data = None if batches is None else follow(batches, "quantizing")
    result = ptqjax.quantize(source, data, job.config, frozen=frozen, stage=watch)
    with watch("export"):
        aside = _exported(job, result, folder)
    warning = _saturation(result, job.config)
    if job.details == NO_REPORT:
        return Done(judged=_judged(result), aside=aside, warning=warning)
    with _model_is_written(job.out):
        with watch("report"):
            facts = ptqjax.explain(
                source,
                result,
                batches,
                job.config,
                labels=labels,
                metrics=metrics,
                origin=origin,
                device=device,
                file=job.out / MODEL[0],
                float_file=job.model,
                full=job.details == "full",
                follow=follow,
            )
        _write_report(folder, facts | {"seconds": [each.as_dict() for each in watch.spent()]})
    publish(folder, job.out, option="--out")
    return Done(
        stages=facts["stages"],
        measured_in=facts["measured_in"],
        measured_on=facts["measured_on"],
        judged=_judged(result),
        execution=facts.get("execution"),
        warning=warning,
    )


def _judged(result: Result) -> tuple[str, ...]:
    from ptqjax.fit.trials import verdicts

    return verdicts((record.what, record.reason) for records in result.reports.values() for record in records)


def _saturation(result: Result, config: QuantizationConfig) -> str:
    from ptqjax.ranges.pairs import saturating_layers
    from ptqjax.transforms.saturation import saturation_text

    return saturation_text(saturating_layers(result.model, result.encodings, config))


def _exported(job: Job, result: Result, folder: Path) -> tuple[str, ...]:
    """Puts the model into `job.out`; returns the new names of reports that were there, where none follows."""
    import ptqjax

    ptqjax.export(
        result.model, result.encodings, folder, "model", settings=asdict(job.config), target=job.config.target
    )
    aside = _set_aside(job.out, folder) if job.details == NO_REPORT else ()
    publish(folder, job.out, stale=REPORT, option="--out")
    return aside


def _write_report(folder: Path, facts: Mapping[str, Any]) -> None:
    from ptqjax import report

    write_text(folder / "report.json", report.to_json(facts))
    write_text(folder / "report.html", report.page(facts))


def say_done(job: Job, done: Done, watch: Stopwatch) -> None:
    """Says what was written, what it is worth, and what it took."""
    from ptqjax.report import running, tables

    tables.print_stages(done.stages, done.measured_in, done.measured_on)
    for sentence in done.judged:
        click.echo(sentence)
    for line in running.lines(done.execution):
        click.echo(line)
    for warning in (done.execution or {}).get("warnings", ()):
        click.echo(f"Warning: {warning}; what runs in float and why is in the report", err=True)
    model, has_report = job.out / MODEL[0], job.details != NO_REPORT
    if has_report and not job.data:
        click.echo("nothing was measured, because there are no samples: ranges and corrections are from batch norms")
    what = f"; what was done and why: {job.out / 'report.html'}" if has_report else ", and no report"
    click.echo(f"wrote {model}{what}")
    for name in done.aside:
        click.echo(f"a report of an earlier model was there: it is {job.out / name} now")
    if done.warning:
        click.echo(f"Warning: {done.warning}", err=True)
    click.echo(f"what the file is worth: ptqjax evaluate {model} --data TEST.npz --reference {job.model}")
    click.echo(summary(watch.spent()))


def without_equalization(given: dict[str, Any]) -> dict[str, Any]:
    """Returns the options with equalization off.

    Raises:
        ConfigError: It is asked for by name.
    """
    if given.get("equalize"):
        raise ConfigError("--equalize with --encodings: scaled tensors have other ranges; leave one of the two out")
    return given | {"equalize": False}


def _frozen_encodings(file: Path, source: Model) -> Encodings:
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


def locating(file: Path | None, given: Container[str]) -> AbstractContextManager[None]:
    """Returns what gives errors about settings the line of the file that they come from; `given` are from options."""
    if file is None or file.suffix == ".json":
        return nullcontext()
    from ptqjax.config import located
    from ptqjax.config.checks import read_text

    return located(read_text(file, f"config '{file}'"), str(file), given=given)


def require_consistent(config: QuantizationConfig, given: dict[str, Any], *, has_data: bool) -> None:
    """Refuses what cannot be done, before any work.

    Raises:
        ConfigError: What needs samples is asked for by name, and there are none; or absorption is asked for by name,
            and equalization is off.
    """
    if not has_data and given.get("correct") == "empirical":
        raise ConfigError(
            "--correct empirical with --calibration none: the empirical correction is measured on samples; give a "
            "DATA.npz (a hundred will do, no labels needed), or take --correct analytic"
        )
    if not has_data and config.scaling == "learned":
        raise ConfigError(
            "--scaling learned with --calibration none: scales are learned on samples; give a DATA.npz, or take "
            "--scaling noise"
        )
    if not has_data and config.rounding in {"solved", "learned"}:
        raise ConfigError(
            f"--rounding {config.rounding} with --calibration none: roundings are found on samples; give a DATA.npz, "
            "or take --rounding nearest"
        )
    parts = {"scaling": "scaling", "bounds": "scaling", "absorb": "absorption"}
    for name, part in parts.items():
        if not config.equalize and given.get(name, "off") != "off":
            raise ConfigError(
                f"--{name} {given[name]} with --no-equalize: {part} is a part of equalization; leave one of the two out"
            )


def _provenance(model: Path, data: tuple[Path, ...]) -> dict[str, Any]:
    """Returns the names of the files that a run reads, and their SHA-256: of several files, that of their hashes."""
    found = {"model": model.name, "model_sha256": _digest(model)}
    if not data:
        return found
    digests = [_digest(file) for file in data]
    digest = digests[0] if len(data) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    return found | {"data": called([Path(file.name) for file in data]), "data_sha256": digest}


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


@contextmanager
def _model_is_written(out: Path) -> Iterator[None]:
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


def _set_aside(out: Path, folder: Path) -> tuple[str, ...]:
    """Copies the reports in `out`, which are of an earlier model, to `folder` under other names; returns these."""
    found = [name for name in REPORT if (out / name).is_file()]
    for name in found:
        shutil.copy2(out / name, folder / f"earlier-{name}")
    return tuple(f"earlier-{name}" for name in found)

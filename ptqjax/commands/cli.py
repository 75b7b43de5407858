"""The command line: options in, a call of the public functions, tables and files out."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from ptqjax.commands.cache import cache_option, kept_programs
from ptqjax.commands.data import NO_DATA, axes_option, data_files, data_option, load, say_reading
from ptqjax.commands.device import device_option, use_device
from ptqjax.commands.faults import reports_faults
from ptqjax.commands.help_sections import WithTargets
from ptqjax.commands.metric import metric_option, metrics_of, require_metrics
from ptqjax.commands.pictures import preprocessing_option
from ptqjax.commands.quantize import (
    MODEL,
    NO_REPORT,
    REPORT,
    Job,
    configured,
    job_done,
    locating,
    named,
    require_consistent,
    say_done,
    without_equalization,
)
from ptqjax.commands.recipe import replay, run
from ptqjax.commands.settings import setting_options
from ptqjax.places import require_encodings, require_model
from ptqjax.progress import progress, quiet_option
from ptqjax.publish import staging
from ptqjax.stopwatch import Stopwatch, listening

_NO_ALARMS = "3"  # of XLA: of compilations that take long, of programs compiled elsewhere; errors come as exceptions


def main() -> None:
    """Runs the command line; the entry point of the `ptqjax` script."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", _NO_ALARMS)  # is read when JAX is imported
    commands()


_model = click.argument("model", metavar="MODEL.onnx", type=click.Path(path_type=Path))
_config = click.option(
    "--config",
    "config_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Settings and rules: a .toml file, or one of AIMET's .json files (see the end). Options win over it.",
)
_target = click.option(
    "--target",
    default="ort-cpu",
    show_default=True,
    metavar="NAME|FILE",
    help="What the runtime accepts, and its defaults in place of those that this help names: one of the names at the "
    "end, or the path of a .toml file in their form.",
)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="ptqjax")
def commands() -> None:
    """Quantize trained ONNX models, without training, and see what it costs.

    \b
    A first run, on a hundred samples of your data (no labels needed):
        python -c "import numpy; numpy.savez('data.npz', input=samples)"
        ptqjax quantize model.onnx --calibration data.npz --out quantized
    \b
    What the result is worth, in ONNX Runtime, on samples that took no part:
        ptqjax evaluate quantized/model.onnx --data test.npz --reference model.onnx
    \b
    What is in a model, and what can be done to it:
        ptqjax inspect model.onnx
    \b
    An experiment as a file, and the proof that it repeats to the bit:
        ptqjax run recipe.toml --out runs; ptqjax replay runs/HASH

    What settings files and recipes hold: docs/settings.md and docs/experiments.md of the sources.

    Exit codes: 0 done; 1 the data or the model is at fault; 2 usage.
    """


@commands.command(cls=WithTargets)
@_model
@click.option(
    "--calibration",
    required=True,
    multiple=True,
    metavar="DATA.npz|DIR|LIST|none",
    help="Samples to find ranges on, one array per model input. Also a folder of such files, or a pattern in quotes; "
    "may be given several times. Or a folder of pictures, DIR/CLASS/PICTURE or DIR/PICTURE, or a list of them (.tsv: "
    "path, tab, class index), with --preprocessing. Or 'none': ranges from the model's batch norms, which it must "
    "still have.",
)
@preprocessing_option
@axes_option
@click.option("--out", required=True, metavar="DIR", type=click.Path(path_type=Path), help="Where the files go.")
@_config
@setting_options
@click.option(
    "--exclude",
    multiple=True,
    metavar="PATTERN",
    help="Leave the tensors of this name in float; * and ? stand for any characters. May be given several times.",
)
@click.option(
    "--exclude-node",
    "exclude_nodes",
    multiple=True,
    metavar="PATTERN",
    help="Leave the nodes (layers) of this name in float: weights, inputs and results. The same patterns.",
)
@click.option(
    "--encodings",
    "encodings_file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Keep the grids in this file (AIMET's JSON, or .safetensors), and find the others. Turns equalization off.",
)
@metric_option
@_target
@click.option(
    "--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Of the samples that learning draws."
)
@click.option(
    "--report",
    "details",
    default="full",
    show_default=True,
    type=click.Choice(["full", "short", NO_REPORT]),
    help="What the report holds: full, also where the noise comes from and what to do next; short, what was done; "
    "none, nothing: no report is written, and nothing is measured.",
)
@device_option
@cache_option
@quiet_option
@reports_faults
def quantize(
    model: Path,
    calibration: tuple[str, ...],
    out: Path,
    device: str,
    *,
    preprocessing: str | None,
    batch_axes: Mapping[str, int | None],
    config_file: Path | None,
    encodings_file: Path | None,
    metrics: tuple[str, ...],
    details: str,
    no_cache: bool,
    quiet: bool,
    **settings: Any,
) -> None:
    """Quantize MODEL.onnx and write it to DIR, with its encodings and a report.

    \b
    DIR gets  model.onnx        the quantized model (QDQ), for ONNX Runtime
              model.encodings   its grids, as JSON
              report.json       what was done, what it gave, stage by stage
              report.html       the same to look at, and what to do next
    The model is there as soon as it is made; the report follows.
    \b
    Examples:
        ptqjax quantize net.onnx --calibration data.npz --out q
        ptqjax quantize net.onnx --calibration data.npz --out q --granularity tensor
        ptqjax quantize net.onnx --calibration data.npz --out q --weights int4
        ptqjax quantize net.onnx --calibration data.npz --out q --target tensorrt
        ptqjax quantize net.onnx --calibration data.npz --out q --config settings.toml
        ptqjax quantize net.onnx --calibration data.npz --out q --no-equalize --correct none
        ptqjax quantize net.onnx --calibration data.npz --out q --exclude logits
        ptqjax quantize net.onnx --calibration data.npz --out q --exclude-node '/head/*'
        ptqjax quantize net.onnx --calibration data.npz --out q --encodings earlier/model.encodings
        ptqjax quantize net.onnx --calibration none --out q
        ptqjax quantize net.onnx --calibration sizes/ --out q
        ptqjax quantize net.onnx --calibration pictures/ --preprocessing torch --out q

    With 'labels' in DATA.npz, the table at the end shows top-1 accuracy as well. Without samples nothing is measured:
    the table is left out.
    """
    has_data = set(calibration) != {NO_DATA}
    given = {name: value for name, value in named().items() if name in settings}
    if encodings_file is not None:
        given = without_equalization(given)
    config = configured(config_file, dict(given))
    require_consistent(config, given, has_data=has_data)
    if not has_data and config.correct == "empirical":
        config = replace(config, correct="analytic")
    require_model(model)
    job = Job(
        model=model,
        data=data_files(calibration, "--calibration", preprocessing),
        batch_axes=batch_axes,
        encodings=encodings_file,
        out=out,
        config=config,
        details=details,
        metrics=metrics,
    )
    require_metrics(metrics)
    if encodings_file is not None:
        require_encodings(encodings_file)
    watch = Stopwatch()
    with staging(out, (*MODEL, *REPORT), option="--out") as folder:  # what is wrong so far is told without JAX
        say_reading(model, job.data, is_quiet=quiet)
        with watch("start"):
            device_name = use_device(device)
        shown = kept_programs(is_off=no_cache), listening(watch), progress(is_quiet=quiet, stopwatch=watch)
        with locating(config_file, given), shown[0], shown[1], shown[2] as follow:
            done = job_done(job, folder, device=device_name, watch=watch, follow=follow)
    say_done(job, done, watch)


@commands.command()
@_model
@data_option
@preprocessing_option
@axes_option
@click.option(
    "--reference",
    metavar="FLOAT.onnx",
    type=click.Path(path_type=Path),
    help="The model that MODEL.onnx was made from: adds SQNR, and agreement where an output looks like classes.",
)
@metric_option
@device_option
@quiet_option
@reports_faults
def evaluate(
    model: Path,
    data: tuple[str, ...],
    reference: Path | None,
    device: str,
    *,
    metrics: tuple[str, ...],
    preprocessing: str | None,
    batch_axes: Mapping[str, int | None],
    quiet: bool,
) -> None:
    """Run MODEL.onnx in ONNX Runtime and tell how good it is.

    \b
    With 'labels' in DATA.npz: top-1 accuracy; with one for each token, [samples, tokens] (-100 where none
    counts): how many tokens are named right, and perplexity.
    With a reference, on the same samples:
        agreement   how often both name the same class, where an output looks like classes, or scores tokens
        KL          how far the scores of tokens are from the reference's, in nats
        SQNR        10 log10(sum y^2 / sum (y - y_q)^2) of each output, in dB; of an output that joins
                    unlike parts, such as boxes and scores, of each part

    The session is the one that ONNX Runtime opens without options. Where its sums may saturate on this processor (x86
    without VNNI), figures of exact sums stand beside it.

    \b
    Examples:
        ptqjax evaluate quantized/model.onnx --data test.npz
        ptqjax evaluate quantized/model.onnx --data test.npz --reference model.onnx
        ptqjax evaluate quantized/model.onnx --data val/ --preprocessing torch --reference model.onnx
    """
    for file, label in ((model, None), (reference, f"the reference '{reference}'")):
        if file is not None:
            require_model(file, label)
    require_metrics(metrics)
    files = data_files(data, "--data", preprocessing)
    say_reading(model, files, is_quiet=quiet)
    import ptqjax
    from ptqjax.agreement import accuracy_levels, exact_function, may_saturate, saturates_here
    from ptqjax.data.batches import checked_batches
    from ptqjax.decoders import like_model
    from ptqjax.evaluation import evaluate_each
    from ptqjax.report import tables
    from ptqjax.transforms.saturation import warn_of_saturation

    quantized = ptqjax.read(model)
    graph = quantized.graph  # ONNX Runtime alone computes: it says where it can
    labels, batches = load(files, graph, batch_axes, decoder=quantized)
    saturating = may_saturate(quantized)
    differs = bool(saturating) and device != "cuda" and saturates_here()
    with progress(is_quiet=quiet) as follow:
        found, *exact = evaluate_each(
            [model, exact_function(model, device=device)] if differs else [model],
            checked_batches(graph, follow(batches, "evaluating")),
            labels=labels,
            reference=reference and like_model(reference, graph),
            metrics=metrics_of(metrics),
            device=device,
        )
        compared = None
        if reference is not None and labels is not None:
            compared = ptqjax.evaluate(
                like_model(reference, graph),
                follow(batches, "evaluating the reference"),
                labels=labels,
                device=device,
            )
    tables.print_evaluation(model, found, compared, *exact)
    for line in tables.level_lines(accuracy_levels(quantized)):
        click.echo(line)
    for warning in warn_of_saturation(saturating):
        click.echo(f"Warning: {warning}", err=True)


@commands.command()
@click.argument("model", metavar="DIR|MODEL.onnx", type=click.Path(path_type=Path))
@data_option
@preprocessing_option
@axes_option
@device_option
@cache_option
@quiet_option
@reports_faults
def validate(
    model: Path,
    data: tuple[str, ...],
    device: str,
    *,
    preprocessing: str | None,
    batch_axes: Mapping[str, int | None],
    no_cache: bool,
    quiet: bool,
) -> None:
    """Compare what is simulated with what ONNX Runtime computes from a quantized model.

    Each group of operators is recomputed from ONNX Runtime's own integers before it, in steps of its grid: on the CPU,
    expect at most 1 step and equality in 99.99 %. Each tensor is also computed from the inputs, where a single flipped
    rounding changes all that follows; the whole programs are compared by SQNR and agreement.

    \b
    Examples:
        ptqjax validate quantized --data test.npz
        ptqjax validate quantized/model.onnx --data test.npz
    """
    path = model / "model.onnx" if model.is_dir() else model
    require_model(path)
    files = data_files(data, "--data", preprocessing)
    say_reading(path, files, is_quiet=quiet)
    import ptqjax
    from ptqjax.report import tables

    use_device(device)
    quantized = ptqjax.read(path)
    _, batches = load(files, quantized.graph, batch_axes, decoder=quantized)
    watch = Stopwatch()
    with kept_programs(is_off=no_cache), listening(watch), progress(is_quiet=quiet, stopwatch=watch) as follow:
        found = ptqjax.validate(quantized, follow(batches, "validating"), device=device)
        tables.print_validation(path, found)


@commands.command(cls=WithTargets)
@_model
@_target
@_config
@reports_faults
def inspect(model: Path, target: str, config_file: Path | None) -> None:
    """Show what is in MODEL.onnx and what can be done to it; nothing is computed or written.

    Inputs, outputs, operators and those without a lowering; what folding and equalization would do and what they would
    leave alone, with the reason; which tensor would get which grid for a target, and why.

    \b
    Examples:
        ptqjax inspect model.onnx
        ptqjax inspect model.onnx --target tensorrt
        ptqjax inspect model.onnx --config settings.toml
    """
    del target  # it counts where it is given by name
    config = configured(config_file, {name: value for name, value in named().items() if name == "target"})
    require_model(model)
    import ptqjax
    from ptqjax import report
    from ptqjax.report import tables

    with locating(config_file, ()):
        tables.print_inspection(model, report.inspect(ptqjax.read(model), config))


commands.add_command(run)
commands.add_command(replay)

"""`ptqjax run` and `ptqjax replay`: recipes, their results, and what they say on the way."""

from __future__ import annotations

import os
import shlex
import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ptqjax.commands.cache import cache_option, kept_programs
from ptqjax.commands.data import say_reading
from ptqjax.commands.faults import reports_faults
from ptqjax.places import require_data, require_model, require_run
from ptqjax.progress import Follow, progress, quiet_option
from ptqjax.stopwatch import Stopwatch, listening

if TYPE_CHECKING:
    from ptqjax.recipes.replaying import Compared, Replay
    from ptqjax.recipes.run import Run, StageRun

_INTERRUPTED = 130  # the exit code of what SIGINT ended
_DIFFERS = 1
_WIDTH = 10  # of the column of stages
_METRICS = {
    "top1": "top-1 {:.2%}",
    "token_accuracy": "token accuracy {:.2%}",
    "perplexity": "perplexity {:.3f}",
    "agreement": "agreement {:.2%}",
    "kl": "KL {:.4f}",
    "sqnr_db": "SQNR {:.2f} dB",
}
_DETERMINISTIC = "--xla_gpu_deterministic_ops=true"

_file = click.Path(path_type=Path)


@click.command()
@click.argument("recipe", metavar="RECIPE.toml", type=_file)
@click.option(
    "--out", default="runs", show_default=True, metavar="DIR", type=_file, help="Where the run's folder goes."
)
@cache_option
@quiet_option
@reports_faults
def run(recipe: Path, out: Path, *, no_cache: bool, quiet: bool) -> None:
    """Run RECIPE.toml; its results go to DIR/HASH, and what is there already is not computed again.

    \b
    HASH is of the model, the data, the settings, the versions of packages and the class of the machine: the same hash,
    the same bytes. It may be stopped at any moment, and goes on where it was when it is called again.
    \b
    DIR/HASH gets  fold, equalize, calibrate, correct   the model and its grids after each stage
                   export      model.onnx, model.encodings
                   evaluate    metrics.json, measured in ONNX Runtime
                   report      report.json, report.html
                   recipe.toml, run.json   what it takes to run it again
    \b
    Examples:
        ptqjax run recipe.toml
        ptqjax run recipe.toml --out results
        ptqjax replay results/HASH
    """
    with _resumable(shlex.join(["ptqjax", "run", str(recipe), "--out", str(out)])) as check:
        from ptqjax.recipes.recipe import read_recipe

        read = read_recipe(recipe)
        require_model(read.model)
        for data in (read.calibration, read.evaluation):
            if isinstance(data, Path):
                require_data(data)
        say_reading(read.model, is_quiet=quiet)
        from ptqjax.recipes.run import run_recipe

        _use(read.device)
        watch = Stopwatch()
        with kept_programs(is_off=no_cache), listening(watch), progress(is_quiet=quiet, stopwatch=watch) as follow:
            done = run_recipe(read, out, follow=_checked(follow, check), told=lambda stage: check(_say_stage(stage)))
        _say_run(done)


@click.command()
@click.argument("folder", metavar="DIR", type=_file)
@click.option(
    "--recipe", metavar="FILE", type=_file, help="Another recipe to run, to see from which stage on it differs."
)
@click.option("--model", metavar="FILE", type=_file, help="Where the model is now, if it was moved.")
@click.option("--calibration", metavar="FILE|DIR", type=_file, help="Where the data to calibrate with are now.")
@click.option("--evaluation", metavar="FILE|DIR", type=_file, help="Where the data to evaluate on are now.")
@quiet_option
@click.pass_context
@reports_faults
def replay(context: click.Context, folder: Path, *, quiet: bool, **places: Any) -> None:
    """Run again what is in DIR, a folder that `ptqjax run` wrote, and compare every file.

    Everything is computed anew, and compiled anew too; nothing in DIR is changed. Exit code 0: all files have the same
    bytes; 1: not, and the first stage that differs is named, beside what differs in settings, versions and machine.

    \b
    Examples:
        ptqjax replay runs/HASH
        ptqjax replay runs/HASH --model moved/model.onnx
        ptqjax replay runs/HASH --recipe changed.toml
    """
    with _resumable(None) as check:
        require_run(folder)
        if not quiet:
            click.echo(f"reading {folder}", err=True)
        import ptqjax
        from ptqjax.recipes.replaying import stored_recipe

        _use(stored_recipe(folder, places["recipe"]).device)
        watch = Stopwatch()
        with listening(watch), progress(is_quiet=quiet, stopwatch=watch) as follow:
            found = ptqjax.replay(folder, **places, follow=_checked(follow, check), told=check)
        _say_replay(found)
    if not found.is_same:
        context.exit(_DIFFERS)


@contextmanager
def _resumable(command: str | None) -> Iterator[Callable[[Any], None]]:
    """Ends an interrupted command with one line, which says how to go on, and the exit code of an interrupt.

    Yields what is to be called now and then, as in `_noted`.
    """
    try:
        with _noted() as check:
            yield check
    except KeyboardInterrupt:
        on = "nothing was changed" if command is None else f"finished stages are kept, and `{command}` goes on"
        click.echo(f"Interrupted: {on}", err=True)
        raise click.exceptions.Exit(_INTERRUPTED) from None


@contextmanager
def _noted() -> Iterator[Callable[[Any], None]]:
    """Yields a function of anything that interrupts again where an interrupt came and had no effect.

    Python drops what is raised in a callback of its garbage collector, of which JAX has one, and a bare `except:` takes
    interrupts for errors, of which JAX has several.
    """
    came: list[int] = []

    def note(number: int, _: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    def check(_: Any) -> None:
        if came:
            raise KeyboardInterrupt

    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # ignored, as under nohup, or another's
        yield check
        return
    signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _checked(follow: Follow, check: Callable[[Any], None]) -> Follow:
    """Returns a `Follow` that ends interrupted work before the next passes."""

    def following(collection: Any, label: str) -> Any:
        check(label)
        return follow(collection, label)

    return following


def _use(device: str) -> None:
    """Prepares JAX, before it starts: a CPU alone, or a GPU whose results repeat."""
    import jax

    if device == "cpu":
        jax.config.update("jax_platforms", "cpu")
    elif "xla_gpu_deterministic_ops" not in os.environ.get("XLA_FLAGS", ""):
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_DETERMINISTIC}".strip()


def _say_stage(stage: StageRun) -> None:
    again = f" (again: {stage.note})" if stage.note else ""
    click.echo(f"{stage.name:{_WIDTH}} {f'{stage.seconds:.1f} s' if stage.is_new else 'already there'}{again}")


def _say_run(done: Run) -> None:
    if done.metrics:
        click.echo(f"on {done.metrics['num_samples']} samples: {_figures(done.metrics)}")
    else:
        click.echo("nothing was measured: the recipe has no evaluation data")
    click.echo(f"wrote {done.model}; all of it, and what it takes to run it again: {done.folder}")


def _figures(metrics: Mapping[str, Any]) -> str:
    known = [form.format(float(metrics[name])) for name, form in _METRICS.items() if name in metrics]
    told = {"num_samples", "outputs", "worst_output", "worst_sqnr_db", *_METRICS}
    known += [f"{name} {float(value):.4g}" for name, value in metrics.items() if name not in told]
    if "worst_output" in metrics:
        known.append(f"the worst output '{metrics['worst_output']}' {float(metrics['worst_sqnr_db']):.2f} dB")
    return ", ".join(known)


def _say_replay(found: Replay) -> None:
    for stage in found.stages:
        click.echo(f"{stage.name:{_WIDTH}} {_outcome(stage)}")
    for reason in found.reasons:
        click.echo(f"not as it was: {reason}")
    if found.first is not None:
        click.echo(f"first stage that differs: {found.first.name}")
    else:
        click.echo(f"{len(found.stages)} stages, all files of the same bytes")
    if found.unfinished:
        click.echo(f"not compared, as the run did not come to them: {', '.join(found.unfinished)}")


def _outcome(stage: Compared) -> str:
    if stage.note:
        return f"stored files are damaged: {stage.note}"
    return "same" if stage.is_same else f"differs: {', '.join(stage.differing)}"

#!/usr/bin/env python3
"""Runs a recipe on several processes, which calibrate together; one launcher starts them here, or each is started.

On this machine:     scripts/launch_distributed.py --processes 2 recipe.toml --out runs
On each of several:  scripts/launch_distributed.py --processes 2 --coordinator HOST:PORT --process-id 0 recipe.toml

Results are those of `ptqjax run recipe.toml`, byte for byte, where the machines are of one class.
Exit code 0; 1 after an error, which one line on stderr names, or Ctrl-C. Where a process fails, all end.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NoReturn

_INTERRUPTED = "error: interrupted; the same command goes on where it was"
_GRACE = 5.0  # seconds in which the first process says itself what is wrong, where all find the same


def main(arguments: list[str] | None = None) -> int:
    """Returns the exit code."""
    options = _parser().parse_args(arguments)
    if options.process_id is not None:
        return _work(options)
    return _launch(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path, help="the recipe")
    parser.add_argument("--out", type=Path, default=Path("runs"), help="where the run's folder goes")
    parser.add_argument("--processes", type=int, default=1, help="how many processes there are in all")
    parser.add_argument("--devices-per-process", type=int, help="how many devices a process takes of a CPU")
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 listens; with --process-id")
    parser.add_argument("--process-id", type=int, help="which process this is, from 0: nothing else is started")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    return parser


# The launcher


def _launch(options: argparse.Namespace) -> int:
    coordinator = options.coordinator or f"127.0.0.1:{_free_port()}"
    running: list[subprocess.Popen[str]] = []
    signals: list[int] = []  # noted, not raised: so none comes between a process and its place in the list
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, _: signals.append(received))
    with tempfile.TemporaryFile("w+") as said:
        try:
            running.extend(_started(options, coordinator, index, said) for index in range(options.processes))
            return _watch(running, said, signals)
        finally:
            for process in running:
                process.kill()
                process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _started(options: argparse.Namespace, coordinator: str, index: int, said: Any) -> subprocess.Popen[str]:
    command = [sys.executable, __file__, str(options.recipe), "--out", str(options.out), "--coordinator", coordinator]
    command += ["--processes", str(options.processes), "--process-id", str(index)]
    command += ["--quiet"] if options.quiet else []
    if options.devices_per_process:
        command += ["--devices-per-process", str(options.devices_per_process)]
    streams = {} if index == 0 else {"stdout": subprocess.DEVNULL, "stderr": said}
    # In a session of its own, Ctrl-C reaches it through this launcher alone.
    return subprocess.Popen(command, start_new_session=True, text=True, **streams)


def _watch(running: list[subprocess.Popen[str]], said: Any, signals: list[int]) -> int:
    """Returns the exit code, once all have ended well or one has not."""
    while not signals:
        codes = [process.poll() for process in running]
        if any(codes):  # the code of one that ended by a signal is negative
            return _failed(running, said)
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)
    print(_INTERRUPTED, file=sys.stderr)
    return 1


def _failed(running: list[subprocess.Popen[str]], said: Any) -> int:
    deadline = time.monotonic() + _GRACE * (1 in [process.poll() for process in running])
    while running[0].poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    if running[0].poll() != 1:
        said.seek(0)
        errors = [line for line in said.read().splitlines() if line.startswith("error: ")]
        at = next(i for i, process in enumerate(running) if process.poll())
        code = running[at].returncode
        print(errors[0] if errors else f"error: process {at} ended with exit code {code}", file=sys.stderr)
    return 1


# A process


def _work(options: argparse.Namespace) -> int:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # one line says what is wrong, not each library's own
    if options.devices_per_process:
        flags = os.environ.get("XLA_FLAGS", "")
        os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count={options.devices_per_process}"
    import jax  # noqa: PLC0415 - reads the environment

    from ptqjax.errors import PtqjaxError  # noqa: PLC0415
    from ptqjax.progress import progress  # noqa: PLC0415
    from ptqjax.recipes.together import run_recipe_together  # noqa: PLC0415

    try:
        jax.distributed.initialize(options.coordinator, num_processes=options.processes, process_id=options.process_id)
        with progress(is_quiet=options.quiet or options.process_id != 0) as follow:
            run = run_recipe_together(options.recipe, options.out, follow=follow)
    except (PtqjaxError, RuntimeError) as error:
        _end(f"error: {' '.join(str(error).split())}")
    except KeyboardInterrupt:
        _end(_INTERRUPTED)
    if run is not None:
        print(run.folder)
    jax.distributed.shutdown()
    return 0


def _end(message: str) -> NoReturn:
    """Ends the process at once: a shutdown in order would wait for the other processes."""
    print(message, file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main())

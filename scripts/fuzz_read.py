"""Reads mutated models until the time is up, and reports what is neither a model nor a ModelError.

Each trial mutates a small model, its bytes or its protobuf fields, and reads it in a worker process whose memory is
bounded; one that takes too long is ended. A trial is known by the seed and its number, so that it can be replayed:

    python scripts/fuzz_read.py --minutes 60 --seed 1
    python scripts/fuzz_read.py --replay 1:4711 --out trial.onnx
"""

from __future__ import annotations

import argparse
import os
import resource
import select
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
from fuzz_models import DATA_FILE, seeds
from fuzz_mutations import mutated

from ptqjax.errors import ModelError
from ptqjax.ir import text
from ptqjax.onnx_io import read, to_proto

MEMORY = 2**29  # bytes that a trial may take beyond what the worker has
SECONDS = 20.0  # that a trial may take
TRIALS_PER_WORKER = 500
_REPORTED_EVERY = 20_000  # trials
_LONGEST = 4000  # bytes of a result: what a pipe takes in one piece


def main() -> int:
    """Runs trials, or replays one; returns the exit code: 1 where something was found."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--replay", help="SEED:TRIAL of a finding, run again in this process")
    parser.add_argument("--out", type=Path, help="where --replay leaves the mutated model")
    arguments = parser.parse_args()
    models = seeds()
    if arguments.replay:
        seed, number = map(int, arguments.replay.split(":"))
        data = trial(models, seed, number)
        if arguments.out:
            arguments.out.write_bytes(data)
        sys.stdout.write(f"{seed}:{number}: {outcome(data)}\n")
        return 0
    return fuzz(models, arguments.seed, arguments.minutes)


def trial(models: list[bytes], seed: int, number: int) -> bytes:
    """Returns the mutated model of a trial: the same for the same seed and number."""
    return mutated(models, np.random.default_rng([seed, number]))


def fuzz(models: list[bytes], seed: int, minutes: float) -> int:
    """Runs trials for some minutes; returns 1 where something was found."""
    print(
        f"seed {seed}: {len(models)} models, {minutes} minutes, {MEMORY >> 20} MiB and {SECONDS} s a trial", flush=True
    )
    until, number, counts = time.monotonic() + 60 * minutes, 0, Counter[str]()
    while time.monotonic() < until:
        number, results = worked_off(models, seed, number)
        for which, result in results:
            counts[result.split("\n", 1)[0].split(":", 1)[0]] += 1
            if not result.startswith(("model", "ModelError")):
                print(f"FOUND {seed}:{which}: {result}", flush=True)
        if number % _REPORTED_EVERY < TRIALS_PER_WORKER:
            print(f"{number} trials: {dict(counts.most_common())}", flush=True)
    print(f"{number} trials: {dict(counts.most_common())}", flush=True)
    return int(any(kind not in {"model", "ModelError"} for kind in counts))


def worked_off(models: list[bytes], seed: int, start: int) -> tuple[int, list[tuple[int, str]]]:
    """Runs trials from `start` on in a worker; returns the number of the next one, and the results so far."""
    receiver, sender = os.pipe()
    worker = os.fork()
    if worker == 0:
        os.close(receiver)
        _work(models, seed, start, sender)
    os.close(sender)
    results = [(start + index, result) for index, result in enumerate(_received(receiver))]
    os.close(receiver)
    following = start + len(results)
    ended, status = os.waitpid(worker, os.WNOHANG)
    if not ended:
        os.kill(worker, signal.SIGKILL)
        _, status = os.waitpid(worker, 0)
    if len(results) < TRIALS_PER_WORKER:
        how = f"took more than {SECONDS} s" if not ended else f"ended the process (status {status})"
        results.append((following, f"died: {how}"))
        following += 1
    return following, results


def _received(receiver: int) -> Iterator[str]:
    """Yields one result after another, until the worker ends or is silent for too long."""
    buffer = b""
    while select.select([receiver], [], [], SECONDS)[0]:
        part = os.read(receiver, 1 << 16)
        buffer += part
        *lines, buffer = buffer.split(b"\0")
        yield from (line.decode() for line in lines)
        if not part:
            time.sleep(0.1)  # it is about to end
            return


def _work(models: list[bytes], seed: int, start: int, sender: int) -> None:
    """Runs trials and sends their results; does not return."""
    in_use = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (in_use + MEMORY, in_use + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for number in range(start, start + TRIALS_PER_WORKER):
        result = outcome(trial(models, seed, number)).replace("\0", "?").encode(errors="replace")
        os.write(sender, result[:_LONGEST] + b"\0")
    os._exit(0)


def outcome(data: bytes) -> str:
    """Returns what became of reading a model: "model", "ModelError", or what should not have happened."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder, warnings.catch_warnings():
        warnings.simplefilter("error")
        (Path(folder) / DATA_FILE).write_bytes(bytes(range(256)) * 8)
        path = Path(folder) / "m.onnx"
        path.write_bytes(data)
        try:
            model = read(path)
            text(model)
            hash(model.graph)
            read(onnx.ModelProto.FromString(to_proto(model).SerializeToString()))
        except ModelError as error:
            return f"ModelError: {error}"
        except BaseException:  # noqa: BLE001 (whatever else is raised is a finding)
            return traceback.format_exc()[-3500:].replace("\n", "\n  ")
        return "model"


if __name__ == "__main__":
    sys.exit(main())

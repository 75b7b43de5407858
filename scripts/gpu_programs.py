"""Compiles every program of the product for an NVIDIA H200, without one, and counts kernels, bytes and memory.

    python scripts/gpu_programs.py --environment ~/gpu-programs --out counts.jsonl      # makes the environment; an hour
    python scripts/gpu_programs.py --environment ~/gpu-programs --network mobilenet_v2 --batch 64 --out counts.jsonl
    python scripts/gpu_programs.py --table counts.jsonl                                 # the tables in Markdown

What is there already is not compiled again, so that a run that was stopped goes on. The environment holds `jax[cuda12]`
(about 6 GB) of the version that is in use here, apart, since it needs no GPU but brings the plugin. Networks of files
(`--models DIR`) are left out where the files are missing; the others are built with random weights.

These are compiled programs and counts, not times: nothing is run, and XLA's autotuning needs a device.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
BATCHES = (64, 1, 256)
FILES = {"efficientnet_lite0": "efficientnet_lite0.onnx", "minilm": "minilm_l6_sentiment.onnx"}
NETWORKS = ("every_kind", "mobilenet_v2", "efficientnet_lite0", "minilm", "resnet50", "vit_s16")
PROGRAMS = (
    "float",
    "simulated",
    "integer",
    "calibration",
    "correction",
    "behaviour",
    "rounding",
    "learned rounding",
    "learned scales",
)
_USUAL = frozenset({"float", "simulated", "integer", "calibration"})
_ALSO = {
    ("every_kind", 64): frozenset(PROGRAMS) - {"rounding"},
    ("mobilenet_v2", 64): frozenset({"correction", "behaviour"}),
}
"""What is counted beside the usual where no program is named: what is of many programs takes minutes to compile. What
solves for roundings is part of what learns them."""
_SEQUENCE = 128  # of texts


def main() -> None:
    """Reads the command line; makes the environment and goes on in it, or prints tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, help="the folder of the environment; made where it is missing")
    parser.add_argument(
        "--models", type=Path, default=Path("shared/models"), help="the folder of the networks of files"
    )
    parser.add_argument("--network", action="append", choices=NETWORKS, help="may be given several times")
    parser.add_argument(
        "--batch", action="append", type=int, help="may be given several times; 64, 1 and 256 by default"
    )
    parser.add_argument(
        "--program",
        action="append",
        choices=PROGRAMS,
        help="may be given several times; by default the usual four, and all others of few networks",
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_programs.jsonl"), help="where the counts are added")
    parser.add_argument("--table", type=Path, help="print the tables of a file of counts, and compile nothing")
    options = parser.parse_args()
    if options.table:
        from gpu_tables import tables  # noqa: PLC0415

        print("\n".join(tables(_records(options.table))))
    elif options.environment and Path(sys.prefix).resolve() != options.environment.resolve():
        sys.exit(subprocess.call([_made(options.environment), *sys.argv], env=_environment()))
    else:
        count_all(options)


def _made(folder: Path) -> str:
    """Returns the interpreter of the environment, which is made where it is missing."""
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        from importlib.metadata import requires, version  # noqa: PLC0415

        needed = [each for each in requires("ptqjax") or () if "extra ==" not in each]
        subprocess.check_call([sys.executable, "-m", "venv", str(folder)])
        packages = [f"jax[cuda12]=={version('jax')}", *needed]
        subprocess.check_call([str(python), "-m", "pip", "install", "--quiet", *packages])
        (folder / "made").touch()
    return str(python)


def _environment() -> dict[str, str]:
    from described_gpu import ENVIRONMENT  # noqa: PLC0415

    return {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}


def _records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def count_all(options: argparse.Namespace) -> None:
    """Compiles what is not in the file yet, and adds what it counts, program by program."""
    done = {(each["network"], each["batch"], each["call"]) for each in _records(options.out) if each["program"] == ""}
    prepared = _prepared(_records(options.out))
    for batch in options.batch or BATCHES:
        for network in options.network or NETWORKS:
            usual = _USUAL | _ALSO.get((network, batch), frozenset())
            calls = options.program or [each for each in PROGRAMS if each in usual]
            calls = [call for call in calls if (network, batch, call) not in done]
            model = _model(network, options.models) if calls else None
            if calls and model is None:
                print(f"{network}: no file in {options.models}; left out", flush=True)
            for call in calls if model is not None else ():
                for record in _counted(network, model, batch, call, prepared.setdefault(network, {})):
                    with options.out.open("a") as file:
                        print(json.dumps(record), file=file)
                    print(_summary(record), flush=True)


def _prepared(records: Iterable[Mapping[str, Any]]) -> dict[str, dict[tuple[str, str], Any]]:
    """Returns by network, call and program the counts of what is prepared for parameters and encodings."""
    from described_gpu import Counts  # noqa: PLC0415
    from gpu_tables import is_prepared  # noqa: PLC0415

    found: dict[str, dict[tuple[str, str], Any]] = {}
    for record in records:
        if is_prepared(record["program"]) and "kernels" in record:
            counts = {each.name: record[each.name] for each in fields(Counts) if each.name in record}
            found.setdefault(record["network"], {})[record["call"], record["program"]] = Counts(by_kind={}, **counts)
    return found


def _summary(record: Mapping[str, Any]) -> str:
    found = record.get("error") or f"{record['kernels']} kernels, {record['num_bytes'] / 1e9:.3f} GB"
    return (
        f"{record['network']} {record['batch']} {record['call']} {record['program']}: {found} {record['seconds']:.0f} s"
    )


def _model(network: str, folder: Path) -> Any:
    import recorded_programs  # noqa: PLC0415
    from networks import NETWORKS as MADE  # noqa: PLC0415

    import ptqjax  # noqa: PLC0415

    del recorded_programs  # in place before the package is imported
    if network in MADE:
        return ptqjax.read(MADE[network]())
    path = folder / FILES[network]
    return ptqjax.fold_batch_norms(ptqjax.read(path))[0] if path.exists() else None


def _counted(
    network: str, model: Any, batch: int, call: str, prepared_before: dict[tuple[str, str], Any]
) -> Iterator[dict[str, Any]]:
    """Yields a record for each program of a call, and one without a program's name for the call as a whole.

    Counts of what is prepared are looked up in `prepared_before`, by call and program, and added to it.
    """
    from described_gpu import count, placed  # noqa: PLC0415
    from gpu_tables import is_prepared  # noqa: PLC0415
    from recorded_programs import recording  # noqa: PLC0415

    from ptqjax.kernels.platforms import made_for  # noqa: PLC0415

    record = {"network": network, "batch": batch, "call": call}
    start, error = time.perf_counter(), ""
    total = {"kernels": 0, "num_bytes": 0, "temporary": 0}
    with made_for("gpu"):
        try:
            prepared = prepared_calls(model, batch)[call]()
            with recording() as programs:
                prepared()
        except Exception as failure:  # noqa: BLE001 - what fails is a row of the table
            yield {**record, "program": "", "error": f"{type(failure).__name__}: {failure}"[:300], "seconds": 0.0}
            return
        for program in programs:
            began = time.perf_counter()
            try:
                found = prepared_before.get((call, program.name)) or count(program.lower(placed).compile())
            except Exception as failure:  # noqa: BLE001
                error = f"{program.name}: {type(failure).__name__}: {failure}"[:300]
                yield {**record, "program": program.name, "error": error, "seconds": time.perf_counter() - began}
                continue
            counts = {key: value for key, value in asdict(found).items() if key != "by_kind"}
            if is_prepared(program.name):  # for parameters and encodings, whatever the batch
                prepared_before[call, program.name] = found
            total["kernels"] += found.kernels
            total["num_bytes"] += found.num_bytes
            total["temporary"] = max(total["temporary"], found.temporary)
            yield {**record, "program": program.name, **counts, "seconds": time.perf_counter() - began}
    least = _least(model, batch) if call == "float" else 0
    yield {**record, "program": "", **total, "error": error, "least": least, "seconds": time.perf_counter() - start}


def _least(model: Any, batch: int) -> int:
    from least_bytes import least_bytes  # noqa: PLC0415

    return least_bytes(model, inputs_of(model, batch))


def inputs_of(model: Any, batch: int) -> dict[str, Any]:
    """Returns inputs that hold one number each, of any size."""
    import numpy as np  # noqa: PLC0415

    def shape(spec: Any) -> list[int]:
        sizes = [size if isinstance(size, int) else _SEQUENCE for size in spec.shape]
        return [batch, *sizes[1:]]

    return {spec.name: np.broadcast_to(np.ones((), np.dtype(spec.dtype)), shape(spec)) for spec in model.graph.inputs}


def prepared_calls(model: Any, batch: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Returns for each of `PROGRAMS` what makes a call of the public function ready, and gives it."""
    import ptqjax  # noqa: PLC0415
    from ptqjax.fit.behaviour import observe_behaviour  # noqa: PLC0415
    from ptqjax.fit.learned_rounding import RoundingLearning, learn_rounding  # noqa: PLC0415
    from ptqjax.fit.learned_scales import Learning, learn_scales  # noqa: PLC0415
    from ptqjax.fit.rounding import solve_rounding  # noqa: PLC0415

    inputs = inputs_of(model, batch)
    config = ptqjax.QuantizationConfig()

    def encodings() -> Any:
        from recorded_programs import recording  # noqa: PLC0415

        with recording():
            return ptqjax.calibrate(model, [inputs_of(model, 1)], config)

    def simulated(arithmetic: str) -> Callable[[], Any]:
        grids = encodings()
        run = ptqjax.simulate(model, grids, arithmetic=arithmetic)
        return lambda: run(model.params, grids, inputs)

    def with_encodings(function: Callable[[Any], Any]) -> Callable[[], Callable[[], Any]]:
        def prepare() -> Callable[[], Any]:
            grids = encodings()
            return lambda: function(grids)

        return prepare

    return {
        "float": lambda: lambda: ptqjax.apply(model.graph, model.params, inputs),
        "simulated": lambda: simulated("float"),
        "integer": lambda: simulated("integer"),
        "calibration": lambda: lambda: ptqjax.calibrate(model, [inputs], config),
        "correction": with_encodings(lambda grids: ptqjax.correct_biases(model, grids, [inputs])),
        "behaviour": lambda: lambda: observe_behaviour(model, [inputs]),
        "rounding": with_encodings(lambda grids: solve_rounding(model, grids, [inputs])),
        "learned rounding": with_encodings(
            lambda grids: learn_rounding(model, grids, [inputs], learning=RoundingLearning(num_steps=1))
        ),
        "learned scales": lambda: (
            lambda: learn_scales(
                model, [inputs_of(model, 2 * batch)], learning=Learning(num_steps=1, batch_size=batch, held_back=0.5)
            )
        ),
    }


if __name__ == "__main__":
    main()

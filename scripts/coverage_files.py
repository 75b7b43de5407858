"""Real files and torch's exports: how far what is computed here is from ONNX Runtime, as a table."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jax
import onnx

from ptqjax.onnx_io import read
from tests.real_files import FILES, Comparison, batches_of, compare, largest_difference, outputs_here, random_inputs

_BATCHES = (1, 5)
_HEADING = """\
| file | from | nodes | opset | batch 1 | batch 5 | written again |
|---|---|---:|---:|---:|---:|---:|"""


def table(models: Path, processes: int) -> str:
    """Returns the table as Markdown: files of the folder `models`, then the exports of every network."""
    names = [name for name in FILES if (models / f"{name}.onnx").is_file()]
    with ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("spawn")) as pool:
        running = [pool.submit(_rows_of_file, models, name) for name in names]
        running += [pool.submit(_rows_of_network, name) for name in _network_names()]
        return "\n".join([_HEADING, *(row for future in running for row in future.result())])


def _network_names() -> list[str]:
    from tests.exports.networks import NETWORKS  # noqa: PLC0415 (torch is imported where it is needed)

    return list(NETWORKS)


def _rows_of_file(models: Path, name: str) -> list[str]:
    file = (models / f"{name}.onnx").read_bytes()
    jax.config.update("jax_platforms", "cpu")
    graph = read(file).graph
    return [_row(name, "a file", lambda: compare(file, random_inputs(graph, FILES[name]), batches_of(graph)))]


def _rows_of_network(name: str) -> list[str]:
    jax.config.update("jax_platforms", "cpu")
    from tests.exports.exporters import exports  # noqa: PLC0415
    from tests.exports.networks import NETWORKS, TRAINED  # noqa: PLC0415

    network = NETWORKS[name]
    rows = [
        _row(name, how, lambda file=file: compare(file, network.inputs, _BATCHES))
        for how, file in exports(network).items()
    ]
    return [*rows, *([_row_in_training(name)] if name in TRAINED else [])]


def _row_in_training(name: str) -> str:
    """Returns the row of a file that was exported in training, which is compared with torch."""
    from tests.exports.exporters import computed_by_torch, traced  # noqa: PLC0415
    from tests.exports.networks import NETWORKS  # noqa: PLC0415

    def measure() -> Comparison:
        network = NETWORKS[name]
        file = traced(network, "traced in training")
        model, proto = read(file), onnx.load_from_string(file)
        differences = {}
        for batch in _BATCHES:
            found = outputs_here(model, network.inputs(batch))
            expected = dict(zip(found, computed_by_torch(network, batch, training=True), strict=True))
            differences[batch] = largest_difference(found, expected)
        opset = proto.opset_import[0].version
        return Comparison(num_nodes=len(proto.graph.node), opset=opset, differences=differences, rewritten=None)

    return _row(name, "traced in training, against torch", measure)


def _row(name: str, origin: str, measure: Callable[[], Comparison]) -> str:
    try:
        found = measure()
    except Exception as error:  # noqa: BLE001 (a file that fails is a row that says so)
        return f"| {name} | {origin} | | | {type(error).__name__}: {' '.join(str(error).split())[:150]} | | |"
    figures = [f"{found.differences[batch]:.1e}" if batch in found.differences else "" for batch in _BATCHES]
    figures += ["" if found.rewritten is None else f"{found.rewritten:.1e}"]
    return f"| {name} | {origin} | {found.num_nodes} | {found.opset} | {' | '.join(figures)} |"

"""Torch's two exporters, each in the ways in which people call it; every file's first axis is dynamic."""

import io
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout

import numpy as np
import torch
from torch.onnx import TrainingMode

from tests.exports.networks import Network

_TRACED_BATCH = 2  # a size of 1 would be taken for a constant

TRACED: Mapping[str, tuple[TrainingMode, int]] = {
    "traced": (TrainingMode.EVAL, 17),
    "traced for opset 9": (TrainingMode.EVAL, 9),
    "traced, mode preserved": (TrainingMode.PRESERVE, 14),
    "traced in training": (TrainingMode.TRAINING, 15),
}
"""What the tracing exporter is told: the mode, and the operator set."""


def captured(network: Network, *, training: bool = False) -> dict[str, bytes]:
    """The files of the exporter that captures the graph (`dynamo=True`): `optimize=False`, and True."""
    batch = torch.export.Dim("batch", min=1, max=64)
    arguments = _arguments(network)
    with _quiet():
        program = torch.onnx.export(
            network.module(training=training),
            arguments,
            dynamo=True,
            optimize=False,
            input_names=list(network.inputs(1)),
            dynamic_shapes=tuple({0: batch} for _ in arguments),
        )
        plain = program.model_proto.SerializeToString()
        program.optimize()  # all that `optimize=True` adds
        return {"dynamo": plain, "dynamo, optimized": program.model_proto.SerializeToString()}


def traced(network: Network, how: str) -> bytes:
    """A file of the exporter that traces (`dynamo=False`), its constants not folded."""
    mode, opset = TRACED[how]
    names = list(network.inputs(1))
    buffer = io.BytesIO()
    with _quiet():
        torch.onnx.export(
            network.module(training=mode == TrainingMode.TRAINING),
            _arguments(network),
            buffer,
            dynamo=False,
            do_constant_folding=False,
            training=mode,
            opset_version=opset,
            input_names=names,
            dynamic_axes={name: {0: "batch"} for name in names},
        )
    return buffer.getvalue()


def exports(network: Network) -> dict[str, bytes]:
    """All files of a network, by how they were exported."""
    return captured(network) | {how: traced(network, how) for how in network.traced}


def computed_by_torch(network: Network, batch: int, *, training: bool = False) -> list[np.ndarray]:
    """The outputs of the network itself."""
    module, inputs = network.module(training=training), network.inputs(batch)
    with torch.no_grad():
        outputs = module(*(torch.from_numpy(value) for value in inputs.values()))
    return [value.numpy() for value in (outputs if isinstance(outputs, tuple) else (outputs,))]


def _arguments(network: Network) -> tuple[torch.Tensor, ...]:
    return tuple(torch.from_numpy(value) for value in network.inputs(_TRACED_BATCH).values())


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporters print, log and warn of."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # dozens of deprecations of torch and of its Python; not ours to mend
        logger.setLevel(logging.ERROR)  # it says four times that torchvision is missing
        yield
    logger.setLevel(level)

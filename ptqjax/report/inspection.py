"""What is in a model and what can be done to it, found without running it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ptqjax.config import QuantizationConfig, load_target
from ptqjax.errors import ModelError, UnsupportedOperatorError
from ptqjax.ir import Model, Node, Record, Report, all_nodes, first_quantized_node, place_of
from ptqjax.ops import find_lowering
from ptqjax.placement.place import Placement, place
from ptqjax.report.facts import contents, operator_name
from ptqjax.transforms import equalize, fold_batch_norms


@dataclass(frozen=True, kw_only=True, slots=True)
class Unknown:
    """An operator of a model that has no lowering."""

    operator: str
    """What `contents["operators"]` calls it."""
    domain: str
    """Its domain; "" is ONNX's own."""
    opset: int
    """The version of that domain's operators that the model uses."""
    nodes: tuple[Node, ...]
    """Where it stands, subgraphs included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Inspection:
    """What is known of a model before anything is done to it."""

    contents: dict[str, Any]
    """Inputs, outputs, opset, operators, number of parameters: see `contents`."""
    without_lowering: tuple[Unknown, ...]
    """Operators that cannot be computed here, in the order in which the graph first uses them."""
    records: tuple[Record, ...]
    """What folding and equalization would do and leave alone."""
    placement: Placement | None
    """Which tensor would get which grid; None where the model cannot be quantized."""
    obstacle: str
    """Why the model cannot be quantized; "" where it can."""
    config: QuantizationConfig
    """The settings that `placement` is made by."""


def inspect(model: Model, config: QuantizationConfig | None = None) -> Inspection:
    """Returns what is in `model`, what the transforms would do to it, and where `config` would put grids.

    Raises:
        ConfigError: `config` does not fit the model: see `place`.
    """
    config = QuantizationConfig() if config is None else config
    records, placement, obstacle = (), None, _obstacle(model)
    if not obstacle:
        try:
            prepared, records = _prepared(model, config)
            placement = place(prepared, config)
        except ModelError as error:
            obstacle = str(error)
    return Inspection(
        contents=contents(model),
        without_lowering=_without_lowering(model),
        records=records,
        placement=placement,
        obstacle=obstacle,
        config=config,
    )


def _prepared(model: Model, config: QuantizationConfig) -> tuple[Model, Report]:
    """Returns the model as it would be quantized, and what was done to it, as far as that takes no data."""
    folded, fold_report = fold_batch_norms(model)
    if not config.equalize:
        return folded, fold_report
    bounds = config.bounds
    if bounds == "exact" and not load_target(config.target).bounds_per_channel:
        bounds = "auto"
    scaling = "off" if config.scaling == "off" else "ranges"
    equalized, equalize_report = equalize(folded, config.absorb, scaling=scaling, bounds=bounds)
    return equalized, (*fold_report, *equalize_report)


def _obstacle(model: Model) -> str:
    node = first_quantized_node(model.graph)
    return f"the model is quantized already: it holds {place_of(node)}" if node is not None else ""


def _without_lowering(model: Model) -> tuple[Unknown, ...]:
    found: dict[tuple[str, str], list[Node]] = {}
    for node in all_nodes(model.graph):
        if not _has_lowering(node, model):
            found.setdefault((node.domain, node.op_type), []).append(node)
    return tuple(
        Unknown(operator=operator_name(nodes[0]), domain=domain, opset=model.graph.opset(domain), nodes=tuple(nodes))
        for (domain, _), nodes in found.items()
    )


def _has_lowering(node: Node, model: Model) -> bool:
    try:
        find_lowering(node.op_type, opset=model.graph.opset(node.domain), domain=node.domain)
    except UnsupportedOperatorError:
        return False
    return True

"""What becomes of bounds between scaled channels, where they are not to become one per channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ptqjax.errors import ConfigError
from ptqjax.ir import Model, Node, Record, Report, rebuild
from ptqjax.kernels.moments import cumulative_normal
from ptqjax.kernels.precision import is_traced
from ptqjax.transforms.activations import limits_of
from ptqjax.transforms.moments import channel_moments
from ptqjax.transforms.ties import find_ties

_NAME = "relax_bounds"
_KINDS = ("exact", "relu", "leave", "auto")
_NEGLIGIBLE = 1e-3  # of the values: ReLU6 in MobileNets saturates for 2 to 20 %, where a Relu costs 10 to 50 points


def relax_bounds(
    model: Model, *, bounds: str = "exact", beyond: Mapping[str, float] | None = None
) -> tuple[Model, frozenset[str], Report]:
    """Returns the model with some Clips turned into Relu, the bounded tensors at which nothing is scaled, and why.

    Args:
        model: The model; its Clips between channels that can be scaled are looked at.
        bounds: "exact": nothing to do, scaling divides the bounds. "relu": each Clip from zero becomes a Relu, which
            changes the function where values lie beyond the upper bound; others are left. "leave": all are left.
            "auto": Relu where no more than a thousandth of the values lie beyond the bound, else left.
        beyond: Share of the values beyond the upper bound, by the Clip's output, where it was observed on data; else it
            is that of normal variables with the statistics of what is bounded.

    Raises:
        ConfigError: `bounds` is unknown.
    """
    if bounds not in _KINDS:
        raise ConfigError(f"bounds={bounds!r} is unknown; expected one of {', '.join(_KINDS)}")
    if bounds == "exact":
        return model, frozenset(), ()
    shares = beyond if beyond is not None else _implied_shares(model)
    nodes = {node.output: node for node in model.graph.nodes}
    left: set[str] = set()
    records: list[Record] = []
    for found in find_ties(model).limited:
        node, share = found.node, shares.get(found.node.output)
        reason = _why_left(model, node, bounds, share)
        if reason:
            left.add(node.output)
        else:
            nodes[node.output] = Node(op_type="Relu", inputs=node.inputs[:1], outputs=node.outputs, name=node.name)
        records.append(_record(node, reason, share))
    return rebuild(model, nodes=nodes.values()), frozenset(left), tuple(records)


def _why_left(model: Model, node: Node, bounds: str, share: float | None) -> str:
    """Returns why a bounded activation is left as it is; "" where it becomes a Relu."""
    low, high = limits_of(model, node)
    if bounds == "leave":
        return "asked to be left"
    if node.op_type != "Clip" or is_traced(low) or np.any(low != 0.0) or not np.all(np.asarray(high) > 0.0):
        return "not a Clip from zero"
    if bounds == "relu":
        return ""
    if share is None:
        return "nothing is known of what it bounds"
    return "" if share <= _NEGLIGIBLE else f"{share:.2%} of the values lie beyond the bound"


def _implied_shares(model: Model) -> dict[str, float]:
    moments = channel_moments(model)
    found: dict[str, float] = {}
    for node in model.graph.nodes:
        if node.op_type == "Clip" and not node.domain and node.inputs[0] in moments:
            found[node.output] = _share(model, node, moments[node.inputs[0]])
    return found


def _share(model: Model, node: Node, known: Any) -> float:
    high = np.asarray(limits_of(model, node)[1])
    return float(np.mean(1.0 - np.asarray(cumulative_normal(high, known.mean, known.std))))


def _record(node: Node, reason: str, share: float | None) -> Record:
    return Record(
        transform=_NAME,
        done=not reason,
        what="left as it is: nothing is scaled here" if reason else "Clip became Relu",
        where=(node.output,),
        reason=reason or "few values lie beyond the bound",
        before={} if share is None else {"share beyond the bound": share},
    )

"""The intermediate representation: an immutable graph beside a tree of parameters."""

from ptqjax.ir.graph import (
    Attribute,
    Constant,
    Dimension,
    Graph,
    Model,
    Node,
    SparseConstant,
    Statistics,
    TensorSpec,
    captured,
    place_of,
)
from ptqjax.ir.origins import Origin, origins_of
from ptqjax.ir.query import (
    all_nodes,
    bias_behind,
    first_quantized_node,
    fresh_name,
    is_one_per_output,
    is_private,
    only_reader,
    scalar_of,
    value_of,
)
from ptqjax.ir.record import Record, Report
from ptqjax.ir.rewrite import rebuild, sort_topologically
from ptqjax.ir.text import text
from ptqjax.ir.verify import verify

__all__ = [
    "Attribute",
    "Constant",
    "Dimension",
    "Graph",
    "Model",
    "Node",
    "Origin",
    "Record",
    "Report",
    "SparseConstant",
    "Statistics",
    "TensorSpec",
    "all_nodes",
    "bias_behind",
    "captured",
    "first_quantized_node",
    "fresh_name",
    "is_one_per_output",
    "is_private",
    "only_reader",
    "origins_of",
    "place_of",
    "rebuild",
    "scalar_of",
    "sort_topologically",
    "text",
    "value_of",
    "verify",
]

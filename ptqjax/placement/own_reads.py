"""Tensors of their own for products that find grids at run time, where others read the same values in float."""

from __future__ import annotations

from dataclasses import replace

from ptqjax.config import QuantizationConfig, load_target
from ptqjax.ir import Model, Node, fresh_name, rebuild
from ptqjax.placement.place import place
from ptqjax.placement.run_time import rounded_reads


def with_own_reads(model: Model, config: QuantizationConfig) -> Model:
    """Returns the model in which products that find grids at run time read tensors of their own.

    Where others read a tensor as well, an Identity stands in between, one for each block size. Nothing changes where
    activations are not `dynamic`.

    Args:
        model: The float model.
        config: The settings.
    """
    if config.activations != "dynamic":
        return model
    decided = {site.tensor: site for site in place(model, config).sites}
    graph, made, renamed = model.graph, [], {}
    for (tensor, block_size), products in rounded_reads(model, load_target(config.target), decided).items():
        is_alone = len(products) == len(graph.readers[tensor]) and tensor not in graph.output_names
        if is_alone:
            continue
        name = fresh_name(graph, f"{tensor}_read" + ("" if block_size is None else f"_in_{block_size}"))
        made.append(Node(op_type="Identity", inputs=(tensor,), outputs=(name,)))
        renamed |= {id(node): name for node in products}
    if not made:
        return model
    nodes = [replace(n, inputs=(renamed[id(n)], *n.inputs[1:])) if id(n) in renamed else n for n in graph.nodes]
    return rebuild(model, nodes=[*made, *nodes])

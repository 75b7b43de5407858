"""Roundings that a runtime's integer kernels repay; the others cost time and accuracy, and are left out.

An integer convolution has to round its result; a product reads integers, and may give what it sums up in float. Lighter
operators repay a rounding only in between: where what they read comes in integers and what they give goes on in
integers. So what nothing but Softmax, a normalization or a recurrent cell reads and makes stays in float.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

from ptqjax.config import Target
from ptqjax.ir import Model, Node
from ptqjax.placement.movement import moves_data
from ptqjax.placement.supergroups import Groups
from ptqjax.transforms.linear import HOSTS


def unrepaid(model: Model, target: Target, groups: Groups, off: Container[str]) -> Mapping[str, str]:
    """Returns the tensors in front of and behind no integer kernel, each with the reason for people.

    None where the target does not tell its kernels, and none where no layer of the network has one: what is asked for
    is done then, for the file's size if for nothing else.

    Args:
        model: The model.
        target: What the runtime computes in integers.
        groups: Its runs of operators that are rounded once.
        off: Tensors that stay in float by their settings; what reads one is computed in float.
    """
    if not target.products:
        return {}
    survey = _Survey(model=model, target=target, groups=groups, off=off)
    if not any(map(survey.is_product, model.graph.nodes)) and any(map(survey.is_other_layer, model.graph.nodes)):
        return {}
    forced, given = _forward(survey)
    repaid = _backward(survey, forced, given)
    tensors = {name for node in model.graph.nodes for name in (*node.inputs, *node.outputs)} - {""}
    return dict.fromkeys(tensors - repaid, f"nothing that target {target.name!r} has in integers needs it")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Survey:
    """What is asked about nodes."""

    model: Model
    target: Target
    groups: Groups
    off: Container[str]

    def is_product(self, node: Node) -> bool:
        """Tells whether the node sums products of integers."""
        return node.op_type in self.target.products and self._reads_integers(node.inputs[:2], node)

    def is_other_layer(self, node: Node) -> bool:
        """Tells whether the node multiplies a weight that could be rounded, and has no integer kernel."""
        is_layer = node.op_type in HOSTS and node.op_type not in self.target.products
        return is_layer and self._reads_integers(node.inputs[:2], node) and node.inputs[1] in self.model.params

    def is_companion(self, node: Node) -> bool:
        """Tells whether the node computes in integers where it gets and gives them."""
        return node.op_type in self.target.companions and self._reads_integers(node.inputs, node)

    def _reads_integers(self, operands: Sequence[str], node: Node) -> bool:
        return not node.domain and not any(name in self.off for name in operands)

    def moves(self, node: Node) -> bool:
        """Tells whether the node only moves values."""
        return moves_data(self.model, node, self.target)

    def is_inside(self, tensor: str) -> bool:
        """Tells whether the tensor exists inside a kernel only."""
        return tensor in self.groups.inside


def _forward(survey: _Survey) -> tuple[set[str], set[str]]:
    """Returns the tensors that a kernel has to round, and those that come in integers for that reason.

    What is forced inside of a group is so behind it.
    """
    forced: set[str] = set()
    given: set[str] = set()
    for node in survey.model.graph.nodes:
        is_forced = survey.is_product(node) and node.op_type not in survey.target.float_results
        if is_forced or any(name in forced and survey.is_inside(name) for name in node.inputs):
            forced.update(node.outputs)
        passes = survey.moves(node) or survey.is_companion(node)
        if forced.intersection(node.outputs) or (passes and given.intersection(node.inputs)):
            given.update(node.outputs)
    return forced, given


def _backward(survey: _Survey, forced: set[str], given: set[str]) -> set[str]:
    """Returns the tensors that are rounded, and constants that are read in integers."""
    made, ends = _made_by_products(survey), _ends(survey)
    repaid = _needed(survey, forced | ((given | made) & ends), given)
    free = _passed_on(survey, repaid)  # what comes in integers anyway may go out in integers
    return _with_moved(survey, _needed(survey, forced | ((given | made | free) & ends), given | free))


def _ends(survey: _Survey) -> set[str]:
    """Returns the graph's outputs, and what is read beside a tensor that is excluded: others stay what they were."""
    found = set(survey.model.graph.output_names)
    for node in survey.model.graph.nodes:
        if any(name in survey.off for name in (*node.inputs, *node.outputs)):
            found.update(node.inputs)
    return found


def _needed(survey: _Survey, repaid: set[str], given: set[str]) -> set[str]:
    """Returns the tensors with those before them that products and what is in between read."""
    found = set(repaid)
    for node in reversed(survey.model.graph.nodes):
        goes_on = not found.isdisjoint(node.outputs)
        is_between = survey.is_companion(node) and not given.isdisjoint(node.inputs)
        if survey.is_product(node) or (goes_on and (survey.moves(node) or is_between)):
            found.update(node.inputs)
    return found


def _passed_on(survey: _Survey, tensors: set[str]) -> set[str]:
    """Returns the tensors with what follows of them alone through operators that keep integers."""
    found = set(tensors)
    for node in survey.model.graph.nodes:
        read = {name for name in node.inputs if name in survey.model.graph.producers or name in found}
        if (survey.moves(node) or survey.is_companion(node)) and read and read <= found:
            found.update(node.outputs)
    return found


def _made_by_products(survey: _Survey) -> set[str]:
    """Returns the results of products, with what follows inside their groups."""
    made: set[str] = set()
    for node in survey.model.graph.nodes:
        if survey.is_product(node) or any(name in made and survey.is_inside(name) for name in node.inputs):
            made.update(node.outputs)
    return made


def _with_moved(survey: _Survey, repaid: set[str]) -> set[str]:
    """Returns the tensors with what is moved of them: the same integers."""
    found = set(repaid)
    for node in survey.model.graph.nodes:
        if survey.moves(node) and node.inputs[0] in found:
            found.update(node.outputs)
    return found

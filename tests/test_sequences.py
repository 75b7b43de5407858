"""Sequences of tensors: what is outside of them is refused, none at all is a sequence as well."""

import numpy as np
import onnx.parser
import pytest

from ptqjax.errors import ModelError
from ptqjax.lowering import apply
from ptqjax.onnx_io import read

_HEADER = '<ir_version: 8, opset_import: ["" : 17]>'

_INSERTED = """
g (float[2] x) => (float[4] y) <int64 position = {%d}> {
  one = SequenceConstruct(x)
  two = SequenceInsert(one, x, position)
  y = ConcatFromSequence <axis = 0> (two)
}
"""

_SPLIT = """
g (float[4] x) => (int64 y) <int64[2] sizes = {%d, %d}> { parts = SplitToSequence(x, sizes)  y = SequenceLength(parts) }
"""

_MAPPED_OVER_NOTHING = """
g () => (int64 num_sums, int64 num_signs) {
  nothing = SequenceEmpty()
  sums, signs = SequenceMap(nothing) <
    body = b (float[N] e) => (float[N] s, float[N] t) { s = Add(e, e)  t = Sign(e) }
  >
  num_sums = SequenceLength(sums)
  num_signs = SequenceLength(signs)
}
"""


def _run(text, **inputs):
    model = read(onnx.parser.parse_model(_HEADER + text))
    return apply(model.graph, model.params, inputs)


@pytest.mark.parametrize("position", [-2, 2])
def test_a_tensor_is_not_inserted_outside_of_a_sequence(position):
    x = np.ones(2, np.float32)
    with pytest.raises(ModelError, match=rf"SequenceInsert .*position {position} is outside of the sequence of 1"):
        _run(_INSERTED % position, x=x)
    for inside in (-1, 0, 1):
        np.testing.assert_array_equal(_run(_INSERTED % inside, x=x)["y"], np.ones(4, np.float32))


def test_pieces_that_are_not_the_whole_are_refused():
    x = np.ones(4, np.float32)
    assert int(_run(_SPLIT % (1, 3), x=x)["y"]) == 2
    with pytest.raises(ModelError, match=r"SplitToSequence .*\[1, 2\] do not add up to 4"):
        _run(_SPLIT % (1, 2), x=x)


def test_a_map_over_nothing_gives_an_empty_sequence_for_each_output():
    outputs = _run(_MAPPED_OVER_NOTHING)
    assert int(outputs["num_sums"]) == int(outputs["num_signs"]) == 0

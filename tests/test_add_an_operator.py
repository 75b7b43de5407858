"""The example of an operator of one's own: without a lowering it is read and refused, with one it is like any other."""

import sys
from pathlib import Path

import numpy as np
import onnx
import pytest

import ptqjax
from ptqjax.ops.registry import _lowerings

_EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(monkeypatch):
    """The module; what it registers is forgotten afterwards."""
    monkeypatch.syspath_prepend(str(_EXAMPLES))
    import add_an_operator  # noqa: PLC0415 (found only with the path above)

    yield add_an_operator
    _lowerings.pop((add_an_operator.DOMAIN, "Squareplus"), None)
    sys.modules.pop("add_an_operator")


@pytest.fixture
def images():
    return np.random.default_rng(2).normal(size=(8, 3, 8, 8)).astype(np.float32)


def test_the_example_runs(example, capsys):
    example.main()
    refused, ran, quantized = capsys.readouterr().out.splitlines()
    assert refused.startswith("without a lowering: Squareplus 'smooth' (producing 'activation')")
    assert ran.endswith("(32, 3)")
    assert float(quantized.split()[-2]) > 30  # dB: 8 bits of well-scaled layers


def test_without_a_lowering_it_is_read_and_written_as_it_is(example):
    model = ptqjax.read(example.model())
    found = next(node for node in model.graph.nodes if node.domain == example.DOMAIN)
    assert (found.op_type, found.attribute("b"), model.graph.opset(example.DOMAIN)) == ("Squareplus", 4.0, 1)


def test_the_error_is_the_line_to_write(example, images):
    """What it says to register is registered by the example, to the letter, but for what may be added."""
    model = ptqjax.read(example.model())
    with pytest.raises(ptqjax.UnsupportedOperatorError) as raised:
        ptqjax.apply(model.graph, model.params, {"input": images})
    advice = '@ptqjax.lowers("Squareplus", since=1, domain="org.example")'
    assert advice in str(raised.value)
    assert "Squareplus 'smooth' (producing 'activation')" in str(raised.value)
    example.register()
    assert ptqjax.apply(model.graph, model.params, {"input": images})["output"].shape == (8, 3)


def test_the_lowering_computes_what_the_operator_says(example, images):
    example.register()
    model = ptqjax.read(example.model())
    values = {name: np.asarray(value, np.float64) for name, value in model.params.items()}
    padded = np.pad(images.astype(np.float64), [(0, 0), (0, 0), (1, 1), (1, 1)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))
    conv = np.einsum("ncyxhw,ochw->noyx", windows, values["conv.weight"]) + values["conv.bias"][:, None, None]
    features = ((conv + np.sqrt(conv * conv + 4)) / 2).mean(axis=(2, 3))
    expected = features @ values["fc.weight"].T + values["fc.bias"]
    found = ptqjax.apply(model.graph, model.params, {"input": images})["output"]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_attributes_that_the_lowering_does_not_know_are_refused(example, images):
    example.register()
    proto = example.model()
    proto.graph.node[1].attribute.append(onnx.helper.make_attribute("c", 1.0))
    model = ptqjax.read(proto)
    with pytest.raises(ptqjax.UnsupportedOperatorError, match=r"attribute 'c' = 1\.0 has no lowering"):
        ptqjax.apply(model.graph, model.params, {"input": images})


def test_an_exported_model_keeps_the_operator(example, images, tmp_path):
    example.register()
    result = ptqjax.quantize(ptqjax.read(example.model()), [{"input": images}], ptqjax.QuantizationConfig())
    ptqjax.export(result.model, result.encodings, tmp_path, "net")
    exported = onnx.load(tmp_path / "net.onnx")
    assert [node.domain for node in exported.graph.node if node.op_type == "Squareplus"] == [example.DOMAIN]
    assert {opset.domain: opset.version for opset in exported.opset_import}[example.DOMAIN] == 1

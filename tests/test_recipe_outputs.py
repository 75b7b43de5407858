"""What a recipe measures of several outputs: each by itself, as `evaluate` does."""

import json

import click.testing
import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import ptqjax
from ptqjax.commands.cli import commands

RNG = np.random.default_rng(2)
RECIPE = """\
model = "m.onnx"
device = "cpu"
report = "none"
metrics = {metrics}
[data]
calibration = "d.npz"
evaluation = "d.npz"
[transforms]
equalize = false
correct = "none"
[config]
ranges = "min-max"
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two outputs, one a thousand times as large as the other."""
    folder = tmp_path_factory.mktemp("outputs")
    weights = {
        "w0": 1000 * RNG.normal(size=(8, 8)).astype(np.float32),
        "w1": RNG.normal(size=(8, 8)).astype(np.float32),
    }
    nodes = [helper.make_node("MatMul", ["x", f"w{i}"], [f"y{i}"]) for i in range(2)]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info(f"y{i}", TensorProto.FLOAT, ["n", 8]) for i in range(2)],
        [numpy_helper.from_array(value, name) for name, value in weights.items()],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    np.savez(folder / "d.npz", x=RNG.normal(size=(64, 8)).astype(np.float32))
    return folder


def run(place, metrics):
    (place / "r.toml").write_text(RECIPE.format(metrics=metrics))
    told = click.testing.CliRunner().invoke(commands, ["run", str(place / "r.toml"), "--out", str(place / "runs")])
    assert told.exit_code == 0, told.output
    done = ptqjax.run_recipe(place / "r.toml", place / "runs")
    return done, told.output


def test_each_output_has_its_figure_and_the_worst_is_named(place):
    done, told = run(place, '["sqnr_db"]')
    batch = [{"x": np.load(place / "d.npz")["x"]}]
    wanted = ptqjax.evaluate(done.model, batch, reference=place / "m.onnx")
    assert wanted.worst is not None
    worst, figure = wanted.worst
    assert done.metrics["outputs"] == pytest.approx(dict(wanted.outputs))
    assert (done.metrics["worst_output"], done.metrics["worst_sqnr_db"]) == (worst, pytest.approx(figure))
    assert done.metrics == json.loads((done.folder / "evaluate" / "metrics.json").read_text())
    assert f"the worst output '{worst}' {figure:.2f} dB" in told


def test_what_is_not_asked_for_is_not_told(place):
    done, _ = run(place, "[]")
    assert dict(done.metrics) == {"num_samples": 64}

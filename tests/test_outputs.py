"""Laws of what outputs are: parts lie where their Concat put them, and their figures are those of the parts alone."""

from pathlib import Path

import numpy as np
import pytest

import ptqjax
from ptqjax.commands.metric import require_metrics
from ptqjax.errors import ConfigError
from ptqjax.evaluation import Evaluation, evaluate, sqnr
from ptqjax.ir import Model, Node
from ptqjax.metrics.classes import class_output
from ptqjax.outputs import strung_outputs
from ptqjax.report.tables import print_evaluation, print_stages
from tests.models import build, node

X = np.random.default_rng(0).normal(size=(4, 2, 3, 5)).astype(np.float32)
PARTS = [node("Mul", ["x", "k"], "boxes"), node("Sigmoid", ["x"], "scores")]
MOVES = {
    "as it is": [node("Concat", ["boxes", "scores"], "y", axis=1)],
    "moved": [
        node("Concat", ["boxes", "scores"], "c", axis=2),
        node("Transpose", ["c"], "t", perm=(0, 2, 3, 1)),
        node("Reshape", ["t", "shape"], "r"),
        node("Transpose", ["r"], "y", perm=(2, 0, 1)),
    ],
    "scaled": [node("Concat", ["boxes", "scores"], "c", axis=-1), node("Div", ["c", "k"], "y")],
    "in two steps": [
        node("Concat", ["boxes", "scores"], "c", axis=1),
        node("Flatten", ["c"], "f"),
        node("Flatten", ["scores"], "g"),
        node("Concat", ["f", "g"], "y", axis=1),
    ],
}


def network(nodes: list[Node], outputs: tuple[str, ...] = ("y",)) -> Model:
    shape = np.asarray([4, -1, 5], np.int64)
    used = {name for each in (*PARTS, *nodes) for name in each.inputs}
    params = {name: value for name, value in {"k": np.float32(500), "shape": shape}.items() if name in used}
    return build([*PARTS, *nodes], params, input_shape=(4, 2, 3, 5), outputs=outputs)


def file_of(model: Model, folder) -> str:
    path = str(folder / "net.onnx")
    ptqjax.write(model, path)
    return path


@pytest.mark.parametrize("way", MOVES)
def test_each_element_is_labelled_with_its_part(way):
    """Told by the values: those of one part are multiples of 500 times the input's, those of the other in (0, 1)."""
    model = network(MOVES[way])
    strung = strung_outputs(model)
    found = strung.parts({"x": X})["y"]
    y = np.asarray(ptqjax.apply(model.graph, model.params, {"x": X})["y"])
    assert found.labels.shape == y.shape
    boxes = np.sort(
        np.asarray(ptqjax.apply(network([], ("boxes",)).graph, {"k": np.float32(500)}, {"x": X})["boxes"]).ravel()
    )
    scale = 1 / 500 if way == "scaled" else 1
    is_box = np.isin(found.labels, [i for i, name in enumerate(found.names) if name == "boxes"])
    np.testing.assert_allclose(np.sort(y[is_box]), boxes * np.float32(scale), rtol=1e-6)
    assert set(found.names) >= {"boxes"}


def test_figures_of_unlike_parts_are_those_of_each_alone_and_alike_ones_are_not_told_apart(tmp_path):
    reference = file_of(network(MOVES["moved"]), tmp_path)
    model = network(MOVES["moved"])

    def noisy(batch):
        boxes, scores = np.float32(500) * batch["x"], 1 / (1 + np.exp(-batch["x"]))
        y = np.concatenate([boxes, 0 * scores], axis=2)  # the scores are lost
        y = y.transpose(0, 2, 3, 1).reshape(4, -1, 5).transpose(2, 0, 1)
        return {"y": y.astype(np.float32)}

    found = evaluate(noisy, [{"x": X}], reference=reference)
    assert found.sqnr is not None
    assert found.sqnr > 50  # the average hides it
    assert found.worst == ("y: scores", 0.0)
    assert found.outputs["y: boxes"] > 100
    assert found.agreement is None
    alike = model.replace(params=model.params | {"k": np.float32(0.5)})
    again = evaluate(
        lambda batch: ptqjax.apply(alike.graph, alike.params, batch), [{"x": X}], reference=file_of(alike, tmp_path)
    )
    assert list(again.outputs) == ["y"]
    assert again.worst is None


def test_several_outputs_have_figures_of_their_own_and_the_worst_is_named():
    exact = {"a": 100 * X, "b": X}
    found = evaluate(lambda _: {"a": 100 * X, "b": 0.9 * X}, [{"x": X}], reference=lambda _: exact)
    assert found.worst == ("b", pytest.approx(sqnr(X, 0.9 * X)))
    assert found.outputs["a"] == np.inf
    assert found.as_dict()["outputs"] == found.outputs


def of(shape, dtype: type = np.float32):
    return np.zeros(shape, dtype)


@pytest.mark.parametrize(
    ("outputs", "expected"),
    [
        ({"y": of((8, 10))}, "y"),
        ({"y": of((8, 10, 1, 1))}, "y"),
        ({"y": of((8, 1))}, None),
        ({"y": of((8, 3, 16, 16))}, None),
        ({"y": of((8, 100, 6))}, None),
        ({"y": of((8, 7))}, None),  # the shape of the input: a reconstruction
        ({"ids": of((8, 10), np.int64)}, None),
        ({"bbox": of((8, 4)), "label_scores": of((8, 10))}, "label_scores"),
        ({"block_out": of((8, 10))}, "block_out"),
    ],
)
def test_what_looks_like_classes(outputs, expected):
    assert class_output(outputs, {"x": of((8, 7))}) == expected


def test_agreement_is_told_where_it_is_asked_for():
    images = {"y": X}
    plain = evaluate(lambda _: images, [{"x": X[:, :1]}], reference=lambda _: images)
    assert plain.agreement is None
    for metric in ("agreement", "agreement:y"):
        assert evaluate(lambda _: images, [{"x": X}], reference=lambda _: images, metrics=(metric,)).agreement == 1.0
    for metric, message in (("agreement:z", "no such output"), ("f1", "expected sqnr_db, agreement")):
        with pytest.raises(ConfigError, match=message):
            evaluate(lambda _: images, [{"x": X}], reference=lambda _: images, metrics=(metric,))


def test_tables_tell_each_output_and_name_the_worst(capsys):
    found = Evaluation(
        num_samples=4, top1=None, agreement=None, sqnr=47.8, outputs={"y: boxes": 48.0, "y: scores": 2.5}
    )
    print_evaluation(Path("net.onnx"), found, None)
    told = capsys.readouterr().out
    assert "the worst output: 'y: scores'" in told
    assert "47.8" not in told  # what the average hides
    stage = {"stage": "fold", "metrics": {"sqnr_db": 47.8, "worst_sqnr_db": 2.5}, "outputs": dict(found.outputs)}
    print_stages([stage], "ONNX Runtime", "4 samples")
    told = capsys.readouterr().out
    assert "47.8" not in told
    assert "the worst" in next(line for line in told.splitlines() if line.startswith("y: scores"))


def test_a_metric_that_there_is_not_is_refused_before_any_work():
    with pytest.raises(ConfigError, match=r"expected one of .*agreement"):
        require_metrics(["agreement:y", "f1"])

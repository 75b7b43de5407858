"""What a session makes of a file: layers in integers, in float with the reason, size, time, and what is said of it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from ptqjax.agreement import Execution, Layer, execution, milliseconds
from ptqjax.config import QuantizationConfig
from ptqjax.errors import ModelError
from ptqjax.exporting import export
from ptqjax.ir import Model
from ptqjax.onnx_io import write
from ptqjax.ranges.calibrate import calibrate
from ptqjax.report import running
from tests.test_placement import CONV, SAME, build, floats

WIDE = {"w": floats(64, 4, 3, 3), "v": floats(64, 64, 3, 3)}
LAYERS = (
    Layer(name="w", operator="Conv", in_integers=True, reason=""),
    Layer(name="t", operator="LSTM", in_integers=False, reason="ONNX Runtime has no integer kernel for LSTM"),
)
FOUND = Execution(
    layers=LAYERS,
    kernels={"QLinearConv": 1, "LSTM": 1},
    num_bytes=3 * 1024,
    float_num_bytes=2 * 1024,
    milliseconds=2.0,
    float_milliseconds=1.0,
)


def exported(model: Model, folder: Path, **settings) -> tuple[Path, Path, dict[str, np.ndarray]]:
    """Returns the quantized file, the float one, and a sample."""
    spec = model.graph.inputs[0]
    sample = {spec.name: floats(*(size if isinstance(size, int) else 1 for size in spec.shape or ()))}
    config = QuantizationConfig(**settings)
    export(model, calibrate(model, [sample], config), folder, "quantized")
    write(model, folder / "float.onnx")
    return folder / "quantized.onnx", folder / "float.onnx", sample


def kinds(found: Execution) -> dict[str, bool]:
    return {layer.name: layer.in_integers for layer in found.layers}


def test_layers_are_told_by_what_the_session_has(tmp_path: Path) -> None:
    model = build(
        ("Conv", "x w b", "c", SAME), ("LeakyRelu", "c", "l"), ("ConvTranspose", "l t", "d"), ("Conv", "d v", "y"),
        **CONV, t=floats(4, 4, 2, 2), v=floats(4, 4, 1, 1),
    )  # fmt: skip
    found = execution(*exported(model, tmp_path), seconds=0.01)
    assert kinds(found) == {"w": True, "t": False, "v": True}
    assert found.layers[1].reason == "ONNX Runtime has no integer kernel for ConvTranspose"
    assert found.kernels["QLinearConv"] == 2


def test_products_of_activations_and_rows_of_them_are_found(tmp_path: Path) -> None:
    model = build(
        ("MatMul", "x m", "a"), ("Transpose", "a", "t", {"perm": [0, 1, 3, 2]}), ("MatMul", "a t", "s"),
        ("Softmax", "s", "p"), ("MatMul", "p a", "y"), m=floats(6, 6),
    )  # fmt: skip
    found = execution(*exported(model, tmp_path), seconds=0.01)
    assert kinds(found) == {"m": True, "s": True, "y": True}


def test_a_layer_that_the_user_leaves_in_float_is_told_with_the_reason(tmp_path: Path) -> None:
    model = build(("Conv", "x w b", "c", SAME), ("Conv", "c v", "y"), **CONV, v=floats(4, 4, 1, 1))
    found = execution(*exported(model, tmp_path, exclude=("v",)), seconds=0.01)
    assert kinds(found) == {"w": True, "v": False}
    assert found.layers[1].reason


def test_sizes_are_those_of_the_files(tmp_path: Path) -> None:
    quantized, reference, sample = exported(build(("Conv", "x w", "c"), ("Conv", "c v", "y"), **WIDE), tmp_path)
    found = execution(quantized, reference, sample, seconds=0.01)
    assert (found.num_bytes, found.float_num_bytes) == (quantized.stat().st_size, reference.stat().st_size)
    assert min(found.milliseconds, found.float_milliseconds) > 0


def test_a_sample_that_does_not_fit_is_an_error_of_ours(tmp_path: Path) -> None:
    quantized, reference, _ = exported(build(("Conv", "x w", "y"), w=CONV["w"]), tmp_path)
    with pytest.raises(ModelError, match="does not run one of the models on the sample"):
        execution(quantized, reference, {"x": floats(1, 3, 6, 6)})
    with pytest.raises(ModelError, match="does not accept the model"):
        execution(quantized, tmp_path / "absent.onnx", {"x": floats(1, 4, 6, 6)})


def test_what_takes_longer_is_timed_longer() -> None:
    short, long = milliseconds([lambda: sum(range(1000)), lambda: sum(range(20_000))], seconds=0.05)
    assert 0 < 4 * short < long


def test_a_file_that_is_larger_or_slower_is_warned_of() -> None:
    larger, slower = FOUND.warnings
    assert "larger than the float one, 3 KB against 2 KB" in larger
    assert "slower than the float one on this processor, 2 against 1 ms" in slower
    assert replace(FOUND, num_bytes=1024, milliseconds=1.04).warnings == ()


def test_it_is_said_on_the_terminal_and_on_the_first_screen() -> None:
    facts = {"execution": {"measured": True} | FOUND.as_dict()}
    assert running.lines(facts["execution"]) == [
        "in ONNX Runtime 1 of 2 layers run in integers",
        "  in float: 1 LSTM, because ONNX Runtime has no integer kernel for LSTM",
        "a run takes 2 ms of one thread here, float 1",
        "the file has 3 KB, float 2 KB",
    ]
    assert [big for big, _ in running.cards(facts)] == ["1 of 2", "2 ms", "3 KB"]
    assert running.warnings(facts).count("<li>") == 2
    page = running.execution(facts)
    assert "1 QLinearConv, 1 LSTM" in page
    assert "<code>t</code>" in page


def test_where_it_was_not_looked_at_nothing_is_said_or_the_reason() -> None:
    assert running.lines(None) == []
    assert running.execution({}) == running.warnings({}) == ""
    reason = {"execution": {"measured": False, "reason": "onnxruntime is not installed"}}
    assert "onnxruntime is not installed" in running.execution(reason)
    assert running.cards(reason) == running.lines(reason["execution"]) == []

"""The notebook runs from its first cell to its last, on a few pictures and the smallest of the real networks."""

from pathlib import Path

import pytest

nbclient = pytest.importorskip("nbclient", reason="the notebook runs where nbclient and ipykernel are installed")
nbformat = pytest.importorskip("nbformat")

NOTEBOOK = Path(__file__).parents[1] / "examples" / "cross_layer_equalization.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def printed(notebook) -> str:
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "".join(output.text for output in outputs if output.output_type == "stream")


def test_notebook_is_stored_without_outputs(notebook):
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in code)


# The kernel's client opens sockets and an event loop whose warnings are not about us.
@pytest.mark.filterwarnings("ignore")
def test_notebook_shows_the_drop_and_the_recovery(notebook, shared, tmp_path, monkeypatch):
    settings = {
        "IMAGENET": shared / "data" / "imagenet",
        "MODEL": shared / "models" / "mobilenet_v1_0.25_224.onnx",
        "OUT": tmp_path,
        "NUM_CALIBRATION": 32,
        "NUM_EVALUATION": 64,
        "TORCH_MODEL": "",
        "PREPROCESSING": "tf",
    }
    for name, value in settings.items():
        monkeypatch.setenv(f"PTQJAX_{name}", str(value))
    folder = {"metadata": {"path": str(NOTEBOOK.parent)}}
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3", resources=folder).execute()

    lines = [line.rsplit(maxsplit=2) for line in printed(notebook).splitlines() if line.endswith(" %")]
    accuracy = {name.strip(): float(value) for name, value, _ in (line for line in lines if len(line) == 3)}
    # 64 pictures: a standard error of 6 points
    assert accuracy["float, ONNX Runtime"] > 50
    assert accuracy["folded, simulated W8A8"] < 10
    assert accuracy["exported, ONNX Runtime"] > accuracy["float, ONNX Runtime"] - 10
    assert (tmp_path / "quantized.encodings").is_file()

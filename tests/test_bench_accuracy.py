"""The table of the accuracy bench: figures, filters, and a record that survives an interruption."""

import importlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

SCRIPTS = Path(__file__).resolve().parents[1] / "scripts"


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(SCRIPTS))
    try:
        yield importlib.import_module("bench_accuracy")
    finally:
        sys.path.remove(str(SCRIPTS))


def cell(bench, row="fold", column="W8A8 per tensor", **figures):
    return bench.Cell(
        network="net", row=row, column=column, num_evaluation=4, num_calibration=2, measured="today", **figures
    )


def test_the_error_is_that_of_the_paired_difference(bench):
    classes = np.array([0, 1, 0, 1])
    reference = np.eye(2)[[0, 1, 0, 0]]
    logits = np.eye(2)[[0, 1, 1, 1]]
    found = bench.figures(logits, reference, classes)
    assert found["top1"] == 0.75
    assert found["agreement"] == 0.5
    assert found["top1_error"] == pytest.approx(np.std([0, 0, -1, 1], ddof=1) / 2)
    assert bench.figures(reference, reference, classes)["top1_error"] == 0
    assert set(bench.figures(logits, reference, None)) == {"agreement", "sqnr_db"}


def test_cells_survive_the_file_and_a_line_that_was_cut_off(bench):
    cells = [cell(bench, top1=0.5, top1_error=0.01, agreement=0.75, sqnr_db=12.0, seconds=3.0), cell(bench, row="none")]
    text = "".join(map(bench.as_line, cells))
    assert bench.from_lines(text + '{"network": "n') == cells


def test_of_cells_measured_twice_the_later_one_is_shown(bench):
    first = cell(bench, top1=0.5, top1_error=0.01, agreement=0.75, sqnr_db=12.0, seconds=3.0)
    text = bench.markdown([cell(bench, row="float", column="", top1=0.6), first, replace(first, top1=0.55)])
    assert "| float | 60.0 | |" in text
    assert "| fold | 55.0 ± 1.0 / 75.0 / 12.0 | 3 |" in text


def test_processor_seconds_are_those_of_children_too(bench):
    start = bench.processor_seconds()
    subprocess.run([sys.executable, "-c", "sum(range(10**7))"], check=True)
    assert bench.processor_seconds() - start > 0.05


def test_a_failure_is_a_footnote(bench):
    failed = cell(bench, failure="ConfigError: no")
    text = bench.markdown([failed, replace(failed, row="other"), cell(bench, row="fine", sqnr_db=1.0)])
    assert text.count("- [1]") == 2
    assert text.endswith("[1] ConfigError: no")


def test_a_whole_label_picks_its_row_alone(bench):
    names = ["fold", "fold, scaling", "defaults"]
    assert bench.matching(names, ["fold"]) == ["fold"]
    assert bench.matching(names, ["scal", "def"]) == ["fold, scaling", "defaults"]
    assert bench.matching(names, None) == names

"""The report in a real browser without a network: it opens, and its tables have the figures of the run."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

import ptqjax
from ptqjax.report import page, to_json
from ptqjax.report.markup import decibels, percent
from ptqjax.report.recommendations import shares
from ptqjax.report.texts import metric_headings, metric_text

EXAMPLES = Path(__file__).parents[1] / "examples"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND"


def run_browser(*options: str, file: Path, profile: Path) -> str:
    """What a headless Chromium without a network writes to its output; skipped where there is none."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)} is installed")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", OFFLINE]
    command += [f"--user-data-dir={profile}", *options, file.resolve().as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    return done.stdout


class Tables(HTMLParser):
    """The text of every table's rows by its id, the ids of all, and whatever would be fetched or run."""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.ids: set[str] = set()
        self.fetched: list[str] = []
        self._table, self._in_cell = "", False

    def handle_starttag(self, tag, attrs):
        found = {name: value or "" for name, value in attrs}
        self.ids |= {found["id"]} if "id" in found else set()
        self.fetched += [value for name, value in found.items() if name in ("src", "href", "xlink:href", "action")]
        self.fetched += [tag] if tag in ("script", "link", "iframe", "img") else []
        if tag == "table":
            self._table = found["id"]
            self.rows[self._table] = []
        elif tag == "tr":
            self.rows[self._table].append([])
        elif tag == "td":
            self.rows[self._table][-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag):
        if tag == "td":
            self._in_cell = False

    def handle_data(self, data):
        if self._in_cell:
            self.rows[self._table][-1][-1] += data


CONFIG = ptqjax.QuantizationConfig(
    weights="int4", granularity="tensor", equalize=False, correct="none", ranges="min-max", rounding="nearest"
)


@pytest.fixture(scope="module")
def run() -> tuple:
    """A run on digits in four bits per tensor, which leaves something to say: model, result, batches, settings."""
    model = ptqjax.read(EXAMPLES / "digits.onnx")
    batches = [{"input": np.load(EXAMPLES / "digits_calibration.npz")["input"][:16]}]
    return model, ptqjax.quantize(model, batches, CONFIG), batches, CONFIG


@pytest.fixture(scope="module")
def facts(run) -> dict:
    """All that is to be said of it."""
    return ptqjax.explain(*run, samples=8, origin={"model": "<digits>.onnx"})


@pytest.fixture(scope="module")
def tables(facts, tmp_path_factory) -> Tables:
    """The page as the browser has it after loading it."""
    folder = tmp_path_factory.mktemp("page")
    (folder / "report.html").write_text(page(facts), encoding="utf-8")
    document = run_browser("--dump-dom", file=folder / "report.html", profile=folder / "profile")
    assert "&lt;digits&gt;.onnx" in document
    parser = Tables()
    parser.feed(document)
    return parser


def body(tables: Tables, name: str) -> list[list[str]]:
    return [row for row in tables.rows[name] if row]


def test_the_table_of_stages_has_the_figures_of_the_run(facts, tables):
    headings = metric_headings(facts["stages"])
    expected = [
        [stage["stage"], *(metric_text(name, stage["metrics"].get(name)) for name in headings)]
        for stage in facts["stages"]
    ]
    assert len(expected) == 2
    assert body(tables, "stage-table") == expected


def test_every_tensor_stands_in_the_table_along_the_depth_in_the_order_of_the_graph(facts, tables):
    flowing = [tensor for tensor in facts["tensors"] if tensor["kind"] == "activation"]
    rows = body(tables, "depth-table")
    assert [row[0] for row in rows] == [tensor["name"] for tensor in flowing]
    assert [row[3] for row in rows] == [decibels(tensor["sqnr_db"]) for tensor in flowing]
    assert [row[5] for row in rows] == [percent(tensor["clipped"]) for tensor in flowing]
    assert rows[0][0] == "input"
    assert rows[-1][0] == "output"


def test_sensitivities_are_told_the_largest_first(facts, tables):
    rows = body(tables, "sensitivity-table")
    assert [(row[0], row[2]) for row in rows] == [(n, percent(s)) for n, s in list(shares(facts).items())[: len(rows)]]
    assert sum(shares(facts).values()) == pytest.approx(1)
    assert len(shares(facts)) == len(rows) + len(tables.rows.get("sensitivity-rest", [""])) - 1


def test_what_the_runtime_computes_is_told(facts, tables):
    found = facts["runtime"]
    assert found["compared"]
    rows = body(tables, "runtime-outputs")
    assert found["by"] == "definition"
    figures = decibels(found["integer"]["sqnr"]), *(percent(found["integer"][name]) for name in ("agreement", "equal"))
    assert rows[0] == ["operators as defined", *figures]
    assert "as ONNX defines them" in page(facts)
    assert "integer program" in page(facts | {"runtime": found | {"by": "simulation"}})
    assert len(body(tables, "runtime-groups")) == len(found["groups"])


def test_all_grids_are_listed_and_all_parts_are_there(facts, tables):
    names = [row[0] for name in ("activation-grids", "weight-grids") for row in body(tables, name)]
    assert sorted(names) == sorted(facts["encodings"])
    parts = {"stages", "recommendations", "sensitivity", "depth", "histograms", "runtime", "transforms", "grids"}
    assert parts <= tables.ids


def test_nothing_is_fetched_and_nothing_is_run(facts, tables):
    assert tables.fetched == []
    assert not re.search(r"url\(|@import|https?://", page(facts))


def test_four_bits_leave_something_to_recommend(facts):
    assert facts["stages"][-1]["metrics"]["sqnr_db"] < 30
    reasons = {each["reason"] for each in facts["recommendations"]}
    assert {"few samples", "one grid for all channels"} <= reasons
    assert any(each["option"] == "--granularity channel" for each in facts["recommendations"])


def test_every_grid_has_its_histogram_and_every_value_is_counted(facts):
    assert set(facts["histograms"]) <= set(facts["encodings"])
    assert "input" in facts["histograms"]
    model = ptqjax.read(EXAMPLES / "digits.onnx")
    weight = facts["histograms"]["classifier.weight"]
    assert sum(weight["counts"]) == model.params["classifier.weight"].size
    assert weight["unit"] == "value"
    grid = facts["encodings"]["classifier.weight"]
    assert (weight["grid"]["low"], weight["grid"]["high"]) == (grid["minimum"], grid["maximum"])


def test_facts_are_plain_data(facts):
    assert json.loads(to_json(facts))["tensors"][0]["name"] == "input"


def test_without_samples_the_page_says_what_is_missing():
    model = ptqjax.read(EXAMPLES / "digits.onnx")
    config = ptqjax.QuantizationConfig(equalize=False, correct="none")
    facts = ptqjax.explain(model, ptqjax.quantize(model, None, config), None, config)
    assert [each["reason"] for each in facts["recommendations"]] == ["no samples"]
    assert "Calibrate on samples" in page(facts)
    assert 'id="depth"' not in page(facts)


def test_a_file_that_the_runtime_cannot_run_is_no_error(run, facts, tmp_path):
    (tmp_path / "broken.onnx").write_bytes(b"no model")
    found = ptqjax.explain(*run, samples=8, file=tmp_path / "broken.onnx")["runtime"]
    assert not found["compared"]
    assert "broken.onnx" in found["reason"]
    assert "Not compared" in page(facts | {"runtime": found})

"""Pictures of a report: all values are counted, the grid is where it says, and names do no harm."""

import re

import numpy as np
import pytest

from ptqjax.encodings.encoding import Encoding, make_encoding
from ptqjax.kernels.histogram import Histogram, histogram_of
from ptqjax.report.charts import depth_plot, histogram_plot, share_bar
from ptqjax.report.histograms import histogram_facts, weight_histogram

UINT8 = make_encoding(np.float32(0.1), np.float32(10), dtype="uint8")  # from -1 to 24.5


def counted(values: np.ndarray) -> Histogram:
    found = histogram_of(values[None, :].astype(np.float32))
    return Histogram(counts=found.counts[0], exponent=found.exponent[0])


def lines(svg: str, name: str) -> list[float]:
    return [float(x) for x in re.findall(rf'<line class="{name}" x1="([\d.]+)"', svg)]


def test_a_histogram_counts_every_value_once_and_its_window_holds_values_and_grid():
    values = np.random.default_rng(0).normal(3, 8, 5000)
    found = histogram_facts(counted(values), UINT8)
    assert sum(found["counts"]) == 5000
    assert found["low"] < values.min()
    assert found["high"] > max(values.max(), 24.5)
    assert found["grid"] == pytest.approx({"low": -1.0, "high": 24.5, "step": 0.1})


def test_bars_of_a_histogram_are_where_the_values_are():
    found = histogram_facts(counted(np.array([-0.9, 20.0, 20.1, 20.2])), UINT8)
    edges = np.linspace(found["low"], found["high"], len(found["counts"]) + 1)
    for count, low, high in zip(found["counts"], edges[:-1], edges[1:], strict=True):
        width = high - low
        if count == 0:
            assert not low + 0.02 < 20.1 < high - 0.02
        else:
            assert low - width < -0.9 < high + width or low - width < 20.1 < high + width


def test_a_grid_that_reaches_much_farther_than_the_values_does_not_hide_them():
    found = histogram_facts(counted(np.linspace(0, 0.1, 100)), UINT8)
    assert found["high"] < 0.2
    assert sum(count > 0 for count in found["counts"]) > 30


@pytest.mark.parametrize("values", [np.zeros(10), np.array([1e-30]), np.array([5.0])])
def test_a_histogram_of_few_values_can_be_drawn(values):
    found = histogram_facts(counted(values), UINT8)
    assert sum(found["counts"]) == len(values)
    assert "nan" not in histogram_plot(found, label="")


def test_a_weight_with_a_scale_per_channel_is_drawn_in_codes():
    encoding = make_encoding(np.array([1.0, 100.0], np.float32), np.zeros(2, np.float32), dtype="int4", axis=0)
    weight = np.array([[-8.0, 0.2, 7.0], [-800.0, 20.0, 900.0]], np.float32)
    found = weight_histogram(weight, encoding)
    assert found["unit"] == "codes"
    assert found["grid"] == {"low": -8.0, "high": 7.0, "step": 1.0}
    assert sum(found["counts"]) == 6
    assert 9 < found["high"] < 10  # 900 is 9 steps of its channel


def test_a_weight_with_one_scale_is_drawn_in_values():
    encoding = make_encoding(np.float32(2.0), np.float32(0), dtype="int4")
    found = weight_histogram(np.linspace(-16, 14, 50, dtype=np.float32), encoding)
    assert found["unit"] == "value"
    assert found["grid"] == {"low": -16.0, "high": 14.0, "step": 2.0}
    assert sum(found["counts"]) == 50


def test_ends_of_the_grid_are_lines_at_their_places_and_what_is_outside_is_shaded():
    histogram = {"low": 0.0, "high": 32.0, "counts": [1] * 32, "grid": {"low": 8.0, "high": 24.0, "step": 4.0}}
    svg = histogram_plot(histogram, label="")
    assert lines(svg, "edge") == [80.0, 240.0]  # of 320
    assert re.findall(r'class="outside" x="([\d.]+)" y="4" width="([\d.]+)"', svg) == [
        ("0.0", "80.0"),
        ("240.0", "80.0"),
    ]
    (steps,) = re.findall(r'class="steps" d="([^"]*)"', svg)
    assert re.findall(r"M([\d.]+) ", steps) == ["80.0", "120.0", "160.0", "200.0", "240.0"]


@pytest.mark.parametrize("step", [None, 0.01])
def test_steps_are_drawn_only_where_they_can_be_told_apart(step):
    grid = {"low": 0.0, "high": 30.0, "step": step}
    assert 'class="steps"' not in histogram_plot({"low": 0.0, "high": 32.0, "counts": [1], "grid": grid}, label="")


def test_a_single_value_is_seen_beside_a_million():
    grid = {"low": 0.0, "high": 2.0, "step": None}
    svg = histogram_plot({"low": 0.0, "high": 2.0, "counts": [10**6, 1], "grid": grid}, label="")
    tall, small = (float(height) for height in re.findall(r"v-([\d.]+)h", svg))
    assert tall > 8 * small > 16


def test_the_line_along_the_depth_falls_with_the_decibels_and_leaves_the_infinite_out():
    svg = depth_plot(["a", "b", "c"], [float("inf"), 30.0, 10.0], [50.0, 35.0, float("inf")], label="")
    (path,) = re.findall(r'class="total" d="([^"]*)"', svg)
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]
    assert len(heights) == 2
    assert heights[0] < heights[1]
    titles = re.findall(r"<title>([^<]+)</title></circle>", svg)
    assert titles == ["b: 35.0 dB", "b: 30.0 dB", "c: 10.0 dB"]  # 50 dB of its own adds nothing to what is there


@pytest.mark.parametrize("values", [[float("inf")], [-12.5, -30.0], [0.0], [3.0] * 2000])
def test_any_depth_stays_inside_its_frame(values):
    svg = depth_plot(["t"] * len(values), values, values, label="")
    assert "nan" not in svg
    assert len(svg) < 120_000
    for y in re.findall(r'(?:cy="|[ML][\d.]+ )(-?[\d.]+)', svg):
        assert 0 <= float(y) <= 300


def test_bars_are_as_long_as_their_shares():
    widths = [float(re.findall(r'width="([\d.]+)"', share_bar(s, largest=0.5, kind="weight"))[0]) for s in (0.5, 0.25)]
    assert widths == [160.0, 80.0]


def test_labels_are_escaped():
    grid = {"low": 0.0, "high": 1.0, "step": None}
    for svg in (
        histogram_plot({"low": 0.0, "high": 1.0, "counts": [1], "grid": grid}, label="<b>"),
        depth_plot(["<b>"], [1.0], [1.0], label="<b>"),
    ):
        assert "<b>" not in svg
        assert "&lt;b&gt;" in svg


def test_a_floating_grid_has_ends_and_no_steps():
    encoding = make_encoding(np.float32(0.01), np.float32(0), dtype="float8_e4m3fn")
    assert isinstance(encoding, Encoding)
    found = histogram_facts(counted(np.linspace(-3, 3, 100)), encoding)
    assert found["grid"]["step"] is None
    assert found["grid"]["high"] == pytest.approx(4.48)

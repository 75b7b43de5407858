"""Widths by group: budgets are kept, more budget is never predicted worse, and `quantize` gives what was chosen."""

import csv
import functools
import io
import itertools
import json
import xml.etree.ElementTree as ET
from dataclasses import replace

import numpy as np
import pytest

from ptqjax import ConfigError, QuantizationConfig, Rule, quantize, read_config, write_config
from ptqjax.experiments.allocation import Allocation, least_noise, least_noise_of_products
from ptqjax.experiments.budgets import Budget, Drop, cost_functions
from ptqjax.experiments.costs import cost_model
from ptqjax.experiments.study import prepared_as_configured
from ptqjax.experiments.tied_tensors import groups_of
from ptqjax.experiments.width_search import mixed_precision
from ptqjax.experiments.widths import adjustable_groups, by_name, pattern_of, with_widths
from ptqjax.ir import Model
from ptqjax.placement.names import matches_name
from ptqjax.ranges.calibrate import calibrate_and_report
from tests.models import Chain

WIDTHS = (2, 3, 4, 6, 8)


def network() -> Model:
    """Layers of unlike sizes and sensitivities, batch norms, a Clip and a pool, so that equalization adds tensors."""
    chain = Chain(3, dtype=np.float32, seed=1)
    chain.conv(8, pad=1).norm().clip().depthwise(pad=1).norm().clip().conv(12, kernel=1).norm()
    chain.add("MaxPool", kernel_shape=(4, 4), strides=(4, 4)).add("Flatten")
    chain.channels *= 4  # of 2 x 2 places
    return chain.gemm(6).build()


def data(count: int = 3) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(0)
    return [{"x": random.normal(size=(8, 3, 8, 8)).astype(np.float32)} for _ in range(count)]


CONFIG = QuantizationConfig(weights="int6", scaling="noise")


# Allocation


def problem(seed: int = 0, groups: int = 4) -> tuple[Allocation, np.ndarray]:
    """Noise that falls with the width, unlike from group to group, and the size of each group."""
    random = np.random.default_rng(seed)
    widths = tuple(np.sort(random.choice(np.arange(2, 9), 4, replace=False)) for _ in range(groups))
    noise = tuple(random.lognormal(sigma=2) * 4.0 ** -found.astype(float) for found in widths)
    sizes = random.integers(1, 100, groups).astype(float)
    return Allocation(widths=widths, noise=noise, cost=lambda chosen: float(sizes @ chosen)), sizes


def by_trying_all(found: Allocation, limit: float) -> float:
    fitting = (np.array(each) for each in itertools.product(*found.widths))
    return min(found.predicted(each) for each in fitting if found.cost(each) <= limit)


@pytest.mark.parametrize("seed", range(4))
def test_the_allocation_is_the_best_of_all_where_costs_add_up(seed):
    found, _ = problem(seed)
    low, high = found.cost(found.narrowest()), found.cost(found.widest())
    for share in (0.0, 0.2, 0.5, 0.9, 1.0):
        # Costs are integers: rounded down to units, the next one would seem to fit.
        limit = np.floor(low + share * (high - low)) + 0.99
        chosen = least_noise(found, limit)
        assert found.cost(chosen) <= limit
        # Rounding costs upwards loses less than a unit of 2^-15 of the room for each group.
        lost = len(found.widths) * (high - low) / 2**15
        best = by_trying_all(found, max(limit - lost, low))
        assert by_trying_all(found, limit) <= found.predicted(chosen) * (1 + 1e-12) <= best * (1 + 1e-9)


def test_the_limit_is_kept_where_costs_are_hardly_larger_than_a_unit():
    """A hundred small groups beside one that makes a unit 0.6: each costs 1.7 units, which round to 2."""
    sizes = np.array([1.0] * 100 + [0.6 * 2**15 - 100])
    widths, noise = np.array([2, 3]), np.array([1.0, 0.5])
    found = Allocation(widths=(widths,) * 101, noise=(noise,) * 101, cost=lambda chosen: float(sizes @ (chosen - 2)))
    chosen = least_noise(found, 50.0)
    assert 40 <= found.cost(chosen) <= 50


def test_a_larger_limit_is_never_predicted_worse():
    found, _ = problem(5, groups=9)
    limits = np.linspace(found.cost(found.narrowest()), found.cost(found.widest()), 200)
    noise = [found.predicted(least_noise(found, limit)) for limit in limits]
    assert np.all(np.diff(noise) <= 0)
    np.testing.assert_array_equal(least_noise(found, limits[0]), found.narrowest())
    np.testing.assert_array_equal(least_noise(found, limits[-1]), found.widest())


@pytest.mark.parametrize("seed", range(4))
def test_the_allocation_of_products_is_close_to_the_best_and_keeps_the_limit(seed):
    found, sizes = problem(seed)
    products = Allocation(
        widths=found.widths,
        noise=found.noise,
        cost=lambda chosen: float(sizes[0] * chosen[0] * chosen[1] + sizes[1] * chosen[2] * chosen[3] + 8 * chosen[0]),
    )
    low, high = products.cost(products.narrowest()), products.cost(products.widest())
    for share in (0.0, 0.1, 0.4, 0.8, 1.0):
        limit = low + share * (high - low)
        chosen = least_noise_of_products(products, limit, [(0, 2), (1, 3)])
        assert products.cost(chosen) <= limit
        # No guarantee: a step of one bit is a factor of four in one group's noise.
        assert products.predicted(chosen) <= 4 * by_trying_all(products, limit)


# Budgets


def test_cost_functions_are_the_costs_of_the_encodings_with_these_widths():
    config = QuantizationConfig(equalize=False, ranges="min-max")
    model, config, _ = prepared_as_configured(network(), data(), config)
    groups = adjustable_groups(model, config, ("weight", "activation"))
    random = np.random.default_rng(0)
    encodings = calibrate_and_report(model, data(), config)[0]
    costs = cost_model(model, data()[0])
    functions = cost_functions(costs, groups, encodings)
    widths = random.integers(2, 9, len(groups))
    chosen = calibrate_and_report(model, data(), with_widths(config, groups, by_name(groups, widths)))[0]
    found = costs.costs(chosen)
    for name, function in functions.items():
        assert function(widths) == pytest.approx(getattr(found, name), rel=1e-12), name


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({}, "mean_weight_bits"),
        ({"mean_weight_bits": 0}, "mean_weight_bits=0"),
        ({"model_bytes": True}, "model_bytes=True"),
        ({"mean_weight_bits": 6, "model_bytes": 1e6}, "limit the same widths"),
        ({"mean_activation_bits": 6, "bit_operations": 1e6}, "limit the same widths"),
    ],
)
def test_a_budget_that_means_nothing_is_refused(settings, named):
    with pytest.raises(ConfigError, match=named):
        Budget(**settings)


@pytest.mark.parametrize(
    ("settings", "named"), [({"most": 1.5}, "most"), ({"metric": "loss"}, "loss"), ({"cost": "x"}, "x")]
)
def test_a_drop_that_means_nothing_is_refused(settings, named):
    with pytest.raises(ConfigError, match=named):
        Drop(**settings)


# Widths as rules


@pytest.mark.parametrize("name", ["conv[0]/weight", "re:.*", "a*b?", "layer.1.w", "[r]x", "plain"])
def test_the_pattern_of_a_name_matches_it_alone(name):
    assert matches_name(pattern_of(name), name)
    others = ["conv0/weight", "re:x", "re", "axb1", "layer11w", "rx", "plain2", "e:.*"]
    assert not any(matches_name(pattern_of(name), other) for other in others)


def test_what_a_rule_has_given_another_type_keeps_it():
    config = QuantizationConfig(equalize=False, rules=(Rule(operators=("Gemm",), of="weights", dtype="int16"),))
    model, config, _ = prepared_as_configured(network(), data(), config)
    kept = {name for group in groups_of(model, config) for name in group.tensors} - {
        name for group in adjustable_groups(model, config, ("weight", "activation")) for name in group.tensors
    }
    (gemm,) = (node for node in model.graph.nodes if node.op_type == "Gemm")
    assert kept == {gemm.inputs[1]}


# The whole search


def found(**settings):
    settings = {"budget": Budget(mean_weight_bits=4.5), "widths": WIDTHS, "points": 3, **settings}
    return mixed_precision(network(), data(), settings.pop("config", CONFIG), **settings)


@functools.cache
def usual():
    """The result that several tests look at."""
    return found()


def widths_of(result, groups) -> dict[str, int]:
    return {group.name: result.encodings[group.name].num_bits for group in groups}


@pytest.mark.parametrize(
    "budget",
    [
        Budget(mean_weight_bits=4.5),
        Budget(mean_weight_bits=4.5, mean_activation_bits=6.5),
        Budget(model_bytes=760),
        Budget(bit_operations=9e5),
    ],
    ids=lambda budget: "+".join(budget.limits),
)
def test_quantize_gives_the_chosen_widths_within_the_budget(budget, tmp_path):
    mixed = found(budget=budget)
    write_config(mixed.config, tmp_path / "config.toml")
    config = read_config(tmp_path / "config.toml")
    assert config == mixed.config
    result = quantize(network(), data(), config)
    groups = [group for group in groups_of(result.model, config) if group.name in mixed.chosen.widths]
    assert widths_of(result, groups) == mixed.chosen.widths
    costs = cost_model(result.model, data()[0]).costs(result.encodings)
    assert costs == mixed.chosen.costs
    for name, limit in budget.limits.items():
        assert 0.8 * limit < getattr(costs, name) <= limit


def test_a_chosen_headroom_leaves_what_few_values_ask_for():
    """With a headroom that trials chose as a setting, ranges are those of `quantize` with the choice left to it."""
    few = [{"x": each["x"][:2]} for each in data(1)]
    config = QuantizationConfig(weights="int6", granularity="tensor", effort="fast", correct="none", rounding="nearest")
    _, chosen, headroom = prepared_as_configured(network(), few, config)
    assert chosen.headroom == headroom == 1.2
    left, taken = (quantize(network(), few, each).encodings for each in (config, chosen))
    assert left.keys() == taken.keys()
    assert all(np.array_equal(left[name].scale, each.scale) for name, each in taken.items())


def test_what_is_chosen_is_no_worse_than_uniform_widths_that_cost_as_much():
    mixed = usual()
    uniform = [point for point in mixed.points if point.is_uniform and point.costs.mean_weight_bits <= 4.5]
    assert len(uniform) == 3
    assert all(mixed.chosen.metrics["sqnr_db"] >= point.metrics["sqnr_db"] for point in uniform)
    assert len(set(mixed.chosen.widths.values())) > 1


def test_a_budget_for_the_widest_widths_gives_them_all():
    mixed = found(budget=Budget(mean_weight_bits=8))
    assert set(mixed.chosen.widths.values()) == {8}
    assert mixed.chosen.is_uniform


def test_the_front_is_the_points_that_nothing_beats():
    mixed = usual()
    for point in mixed.points:
        worse = [
            other
            for other in mixed.points
            if other.costs.bit_operations <= point.costs.bit_operations
            and other.metrics["sqnr_db"] > point.metrics["sqnr_db"]
        ]
        assert (point in mixed.front) == (not worse)


@pytest.mark.parametrize("search", ["greedy", "phases"])
def test_the_drop_is_kept_and_one_step_further_it_is_not(search):
    mixed = found(budget=Drop(most=0.1), search=search)
    assert mixed.chosen.metrics["agreement"] >= 0.9
    cheaper = [p for p in mixed.points if p.costs.mean_weight_bits < mixed.chosen.costs.mean_weight_bits]
    assert cheaper
    assert all(point.metrics["agreement"] < 0.9 for point in cheaper)


def test_phases_flip_the_least_sensitive_first_and_never_back():
    mixed = found(search="phases", points=6)
    path = sorted(
        (point for point in mixed.points if point.name.startswith("phases")),
        key=lambda point: -point.costs.mean_weight_bits,
    )
    assert len(path) == 6
    for before, after in itertools.pairwise(path):
        assert all(after.widths[name] <= before.widths[name] for name in before.widths)


def test_top1_drops_are_measured_on_labels():
    model, batches = network(), data()
    labels = np.zeros(24, int)
    with pytest.raises(ConfigError, match="needs labels"):
        mixed_precision(model, batches, CONFIG, budget=Drop(metric="top1"), widths=(8,))
    mixed = mixed_precision(
        model, batches, CONFIG, budget=Drop(metric="top1", most=0.5), widths=(4, 8), labels=labels, points=2
    )
    assert {"top1", "agreement", "sqnr_db"} == set(mixed.chosen.metrics)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"budget": Budget(mean_weight_bits=1.5)}, "smallest possible, 2,"),
        ({"budget": Drop(most=0.0), "widths": (2, 3)}, "cannot be reached"),
        ({"widths": (1, 8)}, "width 1"),
        ({"widths": ()}, "no widths"),
        ({"search": "annealing"}, "annealing"),
        ({"config": QuantizationConfig(weights="float16", equalize=False)}, "no tensor"),
    ],
)
def test_what_cannot_be_done_is_said(settings, named):
    with pytest.raises(ConfigError, match=named):
        found(**settings)


def test_what_was_found_is_written_as_json_csv_and_a_picture(tmp_path):
    mixed = usual()
    held = json.loads(mixed.to_json(tmp_path / "front.json"))
    assert [point["name"] for point in held["points"]] == [point.name for point in mixed.points]
    assert held["chosen"] == mixed.chosen.name
    assert (tmp_path / "front.json").read_text() == mixed.to_json()
    rows = list(csv.DictReader(io.StringIO(mixed.to_csv(tmp_path / "front.csv"))))
    assert [row["is_chosen"] for row in rows].count("True") == 1
    weights = {key for key in rows[0] if key.startswith("bits of ")}
    assert weights == {f"bits of {name}" for name in mixed.chosen.widths}
    root = ET.fromstring(mixed.to_svg(tmp_path / "front.svg"))  # noqa: S314 - our own
    marks = [each.get("class") for each in root.iter("{http://www.w3.org/2000/svg}circle")]
    assert marks.count("uniform") + marks.count("mixed") == len(mixed.points)
    assert marks.count("chosen") == 1
    texts = [each.text for each in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "uniform 6" in texts


def test_at_a_mean_of_four_bits_solved_weights_are_better_than_at_four_everywhere():
    """Candidates are weights that are solved for, as the result is."""
    found = mixed_precision(
        network(),
        data(),
        replace(CONFIG, scaling="off"),
        budget=Budget(mean_weight_bits=4),
        widths=(2, 3, 4, 5, 6, 8),
        points=2,
    )
    (uniform,) = [point for point in found.points if point.is_uniform and set(point.widths.values()) == {4}]
    assert found.chosen.costs.mean_weight_bits <= 4
    assert found.chosen.metrics["sqnr_db"] > uniform.metrics["sqnr_db"] + 0.25
    result = quantize(network(), data(), found.config)
    assert all(record.done for record in result.reports["correct"] if record.transform == "solve_rounding")

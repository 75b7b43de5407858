"""Weights of few bits: scales that are chosen with the roundings, and what stays true of them on every grid."""

import numpy as np
import pytest

import ptqjax
from ptqjax.encodings.encoding import concrete, fake_quantize, integers, make_encoding
from ptqjax.encodings.low_power import compose, decompose
from ptqjax.fit import rounding, walking
from ptqjax.fit.layer_moments import moments_of_halves
from ptqjax.fit.layer_problem import Problem
from ptqjax.fit.layer_solution import Halves, solution_of
from ptqjax.fit.rounding import solve_weights
from ptqjax.fit.weight_scales import SHRINKS, owners, picked, shrunk, whole
from ptqjax.kernels.gram import Moments
from ptqjax.lowering import Value
from ptqjax.transforms.linear import linear_layers
from tests.test_rounding import layer_model, pictures, small_network

FIGURE = "SQNR of the layer's output, dB"
WEIGHTS = ("w1", "w2", "w3", "w4")
GRIDS = {
    "2 bits": {"dtype": "int2"},
    "3 bits": {"dtype": "int3"},
    "4 bits": {"dtype": "int4"},
    "6 bits": {"dtype": "int6"},
    "4 bits, one scale": {"dtype": "int4", "axis": None},
    "4 bits, blocks": {"dtype": "int4", "block_size": 4},
    "4 bits, low-power blocks": {"dtype": "int4", "block_size": 4, "scale_bits": 4},
    "4 bits, anywhere": {"dtype": "uint4", "symmetric": False},
    "4 bits, powers of two": {"dtype": "int4", "power_of_two": True},
}


@pytest.fixture(scope="module")
def calibrated():
    config = ptqjax.QuantizationConfig(equalize=False, correct="none", rounding="nearest", weights="int4")
    batches = [pictures(seed, 16) for seed in range(2)]
    model = small_network()
    return model, ptqjax.calibrate(model, batches, config), batches


def whole_ranges(model, encodings, case):
    """The encodings with those of weights on another grid, which spans the whole of each range."""
    found = dict(encodings)
    for name in WEIGHTS:
        is_product = name == "w4"
        axis = int(is_product) ^ int("block_size" in GRIDS[case])
        grid = {"axis": axis, "symmetric": True, **GRIDS[case]}
        found[name] = ptqjax.choose_encoding(model.params[name], ranges="min-max", **grid)
    return found


@pytest.mark.parametrize("case", GRIDS)
def test_no_grid_is_worse_than_the_whole_range(case, calibrated):
    """Each step is kept only where samples held back gain by it: nearest, solved, solved with shrunk scales."""
    model, encodings, batches = calibrated
    encodings = whole_ranges(model, encodings, case)
    solved = solve_weights(model, encodings, batches)
    assert len(solved.report) == 4
    for record in solved.report:
        figures = [record.before[FIGURE], record.after.get(f"{FIGURE}, scales as given", -np.inf), record.after[FIGURE]]
        assert figures[0] <= figures[2]
        assert figures[1] <= figures[2]
    for name, encoding in solved.encodings.items():
        if name not in model.params:
            assert encoding is encodings[name]
            continue
        scales, given = (np.asarray(each.scale) for each in (encoding, encodings[name]))
        assert scales.shape == given.shape
        assert np.all(scales <= given) or encoding.scale_bits is not None  # those are products, and are rounded
        on_grid = np.asarray(solved.model.params[name])
        np.testing.assert_array_equal(fake_quantize(on_grid, concrete(encoding)), on_grid)
        if encoding.scale_bits is not None:
            np.testing.assert_array_equal(compose(decompose(encoding)), scales)
        if "powers" in case:
            assert np.all(np.frexp(scales)[0] == 0.5)
    shrunk_ones = [not np.array_equal(solved.encodings[name].scale, encodings[name].scale) for name in WEIGHTS]
    assert any(shrunk_ones) or case in {"4 bits, powers of two", "6 bits"}


def layer_and_moments(case="padded", *, rows=200, seed=0, size=36):
    """A convolution of 4 x 3 x 3 inputs, and moments of rows that are alike in their inputs."""
    model = layer_model("Conv", (6, 4, 3, 3), {})
    (layer,) = linear_layers(model).values()
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(size, size)) * rng.lognormal(size=size)

    def half():
        x = (rng.normal(size=(rows, size)) @ mix).astype(np.float32)
        gram = (x.T @ x)[None]
        return Moments(gram, gram, gram, x.sum(axis=0)[None], x.sum(axis=0)[None], np.float32(rows))

    return layer, np.asarray(model.params["w"]), Halves(half(), half())


def test_each_output_takes_the_scale_that_is_best_for_it():
    layer, weight, halves = layer_and_moments()
    scale = np.abs(weight).reshape(6, -1).max(axis=1) / 7
    given = make_encoding(scale, np.float32(0), dtype="int4", axis=0)
    solution = solution_of(layer, weight, given, halves, ridges=(0.1,), shrinks=SHRINKS)
    first, second = (half.means() for half in halves)
    errors = []
    for factor in (1.0, *SHRINKS):
        problem = Problem.of(layer, weight, given.replace(scale=scale * np.float32(factor)))
        codes = problem.solve(first, 0.1) if solution.ridge else problem.nearest()
        errors.append(problem.row_errors(codes, second))
    best = np.argmin(errors, axis=0)
    np.testing.assert_array_equal(solution.encoding.scale, scale * np.float32([1.0, *SHRINKS])[best])
    assert solution.error == pytest.approx(np.min(errors, axis=0).sum(), rel=1e-9)
    assert 0 < solution.num_shrunk == np.count_nonzero(best)
    assert solution.error < solution.whole < solution.nearest


def test_an_error_is_that_of_the_outputs_row_by_row():
    layer, weight, halves = layer_and_moments()
    encoding = make_encoding(np.float32(0.3), np.float32(0), dtype="int4")
    problem = Problem.of(layer, weight, encoding)
    codes, found = problem.nearest(), halves.first.means()
    error = (codes * 0.3 - problem.weights)[0].astype(np.float64)
    wanted = np.einsum("nk,kl,nl->n", error, found.gram[0].astype(np.float64), error)
    np.testing.assert_allclose(problem.row_errors(codes, found), wanted, rtol=1e-3)


def test_blocks_that_do_nothing_to_each_other_add_up():
    layer, weight, halves = layer_and_moments()
    encoding = make_encoding(np.full((6, 2, 3, 3), 0.3, np.float32), np.float32(0), dtype="int4", axis=1, block_size=2)
    problem = Problem.of(layer, weight, encoding)
    served = owners(encoding, weight.shape, problem.view)
    assert served.are_alone
    cells = served.cells
    apart = halves.first.means()
    gram = np.where(cells[0, 0, :, None] == cells[0, 0, None, :], apart.gram, 0)
    apart = apart._replace(gram=gram, cross=gram, float_gram=gram)
    by_cell = problem.errors_by_cell(problem.nearest(), halves.first.means(), cells)
    rows = np.bincount(served.rows, weights=by_cell, minlength=6)
    np.testing.assert_allclose(rows, problem.row_errors(problem.nearest(), apart), rtol=1e-3)


def test_candidates_hold_zero_and_shrink():
    scale = np.float32([0.1, 0.2])
    anywhere = make_encoding(scale, np.float32([3, 9]), dtype="uint4", axis=0)
    for each in shrunk(anywhere):
        assert np.all((each.zero_point >= 0) & (each.zero_point <= 15) & (each.zero_point == np.round(each.zero_point)))
        assert np.all(each.scale < scale)
    assert len(shrunk(anywhere)) == 3 * len(SHRINKS)
    powers = make_encoding(np.float32([0.25, 2]), np.float32(0), dtype="int4", axis=0)
    assert [each.scale.tolist() for each in shrunk(powers)] == [[0.125, 1.0]]
    chosen = picked([powers, *shrunk(powers)], np.array([1, 0]))
    assert chosen.scale.tolist() == [0.125, 2.0]


def test_a_range_that_cuts_off_is_also_tried_whole():
    layer, weight, halves = layer_and_moments()
    largest = np.abs(weight).max()
    clipped = make_encoding(np.float32(largest / 7 * 0.3), np.float32(0), dtype="int4")
    widest = whole(clipped, weight, np.zeros(weight.shape, int))
    assert widest.scale == np.float32(largest / 7)
    assert whole(widest, weight, np.zeros(weight.shape, int)).scale == widest.scale
    solution = solution_of(layer, weight, clipped, halves, ridges=(0.1,), shrinks=SHRINKS)
    assert solution.encoding.scale == widest.scale
    of_whole = solution_of(layer, weight, widest, halves, ridges=(), shrinks=())
    assert solution.error < of_whole.error  # the whole range, rounded to nearest


def singular(kind):
    """Moments of a layer that float32 or linear algebra might stumble over."""
    layer, weight, halves = layer_and_moments(rows=8 if kind == "fewer samples than unknowns" else 200)
    if kind == "dead inputs":
        halves = Halves(
            *(m._replace(**{n: dead(getattr(m, n)) for n in ("gram", "cross", "float_gram")}) for m in halves)
        )
    if kind == "no moments at all":
        halves = Halves(*(Moments(*(0 * each for each in m[:-1]), m.count) for m in halves))
    if kind == "no moments of anything":
        halves = Halves(*(m._replace(gram=-m.gram) for m in halves))
    return layer, weight, halves


def dead(gram):
    gram = gram.copy()
    gram[:, :9], gram[:, :, :9] = 0, 0
    return gram


@pytest.mark.parametrize(
    "kind", ["fewer samples than unknowns", "dead inputs", "no moments at all", "no moments of anything"]
)
def test_singular_moments_leave_integers(kind):
    layer, weight, halves = singular(kind)
    scale = np.abs(weight).reshape(6, -1).max(axis=1) / 7
    encoding = make_encoding(scale, np.float32(0), dtype="int4", axis=0)
    solution = solution_of(layer, weight, encoding, halves, ridges=(0.1, 1.0), shrinks=SHRINKS)
    assert np.all(np.abs(solution.codes) <= 8)
    assert np.all(solution.codes == np.round(solution.codes))
    if kind != "no moments of anything":
        assert solution.error <= solution.nearest
    assert (solution.num_rows < solution.num_unknowns) == (kind == "fewer samples than unknowns")


def test_the_record_says_where_there_were_fewer_samples_than_unknowns(calibrated):
    model, encodings, _ = calibrated
    report = solve_weights(model, encodings, [pictures(0, 2)]).report
    told = {record.where[1] for record in report if "outputs were looked at for" in record.reason}
    assert told == {"w4"}  # 2 outputs of a product with 8 inputs; convolutions have 64 a sample


def test_moments_of_batches_add_up_and_are_as_large_for_many_as_for_few():
    """Of 36 outputs a sample all are looked at: nothing is drawn."""
    model = layer_model("Conv", (6, 4, 3, 3), {})
    (layer,) = linear_layers(model).values()
    rng = np.random.default_rng(0)
    values = [Value(rng.normal(size=(4, 4, 8, 8)).astype(np.float32)) for _ in range(3)]
    each = [moments_of_halves(layer, (3, 3), [(value, value)], 0) for value in values]
    together = moments_of_halves(layer, (3, 3), [(value, value) for value in values], 0)
    for half in range(2):
        merged = each[0][half].plus(each[1][half]).plus(each[2][half])
        for found, wanted, alone in zip(together[half], merged, each[0][half], strict=True):
            np.testing.assert_array_equal(found, wanted)
            assert np.asarray(found).nbytes == np.asarray(alone).nbytes


def test_what_crosses_is_bounded_so_that_more_samples_than_fit_change_nothing(calibrated, monkeypatch):
    model, encodings, batches = calibrated
    monkeypatch.setattr(walking, "_MOST_BYTES", 1)  # room for no batch at all: one is taken
    bounded, report = rounding.solve_rounding(model, encodings, batches)
    wanted, _ = rounding.solve_rounding(model, encodings, batches[:1])
    for name in WEIGHTS:
        np.testing.assert_array_equal(bounded.params[name], wanted.params[name])
    assert len(report) == 4


def test_chosen_scales_and_integers_come_back_through_files(tmp_path):
    batches = [pictures(0, 16)]
    config = ptqjax.QuantizationConfig(equalize=False, weights="int4")
    result = ptqjax.quantize(small_network(), batches, config)
    wanted = {name: integers(result.model.params[name], result.encodings[name]) for name in WEIGHTS}
    ptqjax.export(result.model, result.encodings, tmp_path, "q")
    assert ptqjax.validate(tmp_path / "q.onnx", batches, in_float=False).largest <= 1
    model, read, _ = ptqjax.read_quantized(tmp_path / "q.onnx")
    of_json, _ = ptqjax.read_encodings(tmp_path / "q.encodings", result.model)
    for found in (read, of_json):
        frozen = {name: found[name] for name in WEIGHTS}
        again = ptqjax.quantize(model, batches, config, frozen=frozen)
        for name in WEIGHTS:
            np.testing.assert_array_equal(integers(again.model.params[name], again.encodings[name]), wanted[name])
            np.testing.assert_array_equal(again.encodings[name].scale, result.encodings[name].scale)

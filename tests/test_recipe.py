"""Recipes: what a TOML file says becomes a record, and every fault names its line."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import ptqjax
from ptqjax.config.checks import SettingError
from ptqjax.data import pictures as images
from ptqjax.errors import ConfigError, DataError
from ptqjax.recipes import data as recipe_data
from ptqjax.recipes.recipe import Pictures, located_in, read_recipe, recipe_of
from tests.models import build, node

BASE = Path("/somewhere")
WHOLE = """\
model = "net.onnx"
seed = 3
metrics = ["top1", "sqnr_db"]
report = "short"
device = "cpu"

[data]
calibration = "c.npz"
evaluation = "/absolute/e.npz"
batch = 8

[transforms]
equalize = true
scaling = "ranges"
headroom = 1.2

[config]
weights = "int4"
exclude = ["head*"]

[[config.rules]]
tensors = ["conv1*"]
dtype = "int8"
"""
PICTURES = """\
model = "net.onnx"
[data.preprocessing]
crop = 4
short_side = 6
mean = [0.1, 0.2, 0.3]
std = [0.4, 0.5, 0.6]
[data.calibration]
folder = "pictures"
count = 3
seed = 5
[data.evaluation]
folder = "pictures"
list = "evaluation.tsv"
channels = "bgr"
"""


def recipe(text: str):
    return recipe_of(text, source="r.toml", base=BASE)


def assert_fault(text: str, *words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        recipe(text)
    assert [word for word in ("r.toml", *words) if word not in str(caught.value)] == [], str(caught.value)


def test_a_recipe_says_what_its_tables_say():
    found = recipe(WHOLE)
    assert (found.model, found.calibration) == (BASE / "net.onnx", BASE / "c.npz")
    assert found.evaluation == Path("/absolute/e.npz")
    assert (found.batch, found.metrics, found.report, found.device) == (8, ("sqnr_db", "top1"), "short", "cpu")
    assert found.config == ptqjax.QuantizationConfig(
        seed=3,
        scaling="ranges",
        headroom=1.2,
        weights="int4",
        exclude=("head*",),
        rules=(ptqjax.Rule(tensors=("conv1*",), dtype="int8"),),
    )


def test_paths_are_relative_to_the_file(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "r.toml").write_text('model = "../net.onnx"\n[data]\ncalibration = "none"\n')
    found = read_recipe(tmp_path / "sub" / "r.toml")
    assert found.model.resolve() == tmp_path / "net.onnx"
    assert found.calibration is None


def test_without_data_biases_are_corrected_as_batch_norms_tell():
    assert recipe('model = "net.onnx"\n[data]\ncalibration = "none"\n').config.correct == "analytic"


@pytest.mark.parametrize("table", ["transforms", "config"])
def test_a_correction_by_samples_where_there_are_none_is_refused(table):
    text = f'model = "net.onnx"\n[data]\ncalibration = "none"\n[{table}]\ncorrect = "empirical"\n'
    assert_fault(text, f"line 5, [{table}]: correct='empirical' with calibration='none'", "take 'analytic'")


def test_axes_of_samples_are_read_and_count_in_the_hash_of_data(tmp_path):
    found = recipe(WHOLE.replace("batch = 8", 'batch_axes = {state = 1, mask = "none"}'))
    assert found.batch_axes == (("state", 1), ("mask", None))
    assert_fault(WHOLE.replace("batch = 8", "batch_axes = {state = -1}"), "line 10", "the axis that counts its samples")
    np.savez(tmp_path / "x.npz", x=np.zeros((3, 3, 4, 4), np.float32))
    told = [recipe_data.load(tmp_path / "x.npz", GRAPH, batch=2, keep=True, axes=axes) for axes in ({}, {"x": 0})]
    assert told[0].digest != told[1].digest


def test_nodes_are_named_in_recipes_and_what_meets_no_model_names_its_line():
    text = WHOLE.replace('tensors = ["conv1*"]', 'nodes = ["/head/*"]').replace("exclude = ", "exclude_nodes = ")
    found = recipe(text)
    assert (found.config.exclude_nodes, found.config.rules[0].nodes) == (("head*",), ("/head/*",))
    for field, rule, line in (("nodes", 0, 22), ("exclude_nodes", None, 19)):
        with pytest.raises(ConfigError, match=f"r.toml, line {line}: no such"), located_in(found):
            raise SettingError(field, "no such", rule=rule)


def test_what_is_left_out_has_the_defaults_of_the_target():
    text = 'model = "net.onnx"\n[data]\ncalibration = "c.npz"\n[config]\ntarget = "tensorrt"\n'
    assert recipe(text).config == ptqjax.QuantizationConfig.for_target("tensorrt")


def test_effort_is_a_setting_as_others_are():
    text = 'model = "net.onnx"\n[data]\ncalibration = "c.npz"\n[config]\neffort = "fast"\n'
    assert recipe(text).config.effort == "fast"
    assert_fault(text.replace("fast", "quick"), "line 5", "effort='quick'", "expected one of fast, balanced, thorough")


def test_what_pictures_share_is_overridden_by_their_own():
    found = recipe(PICTURES)
    shared = {"folder": BASE / "pictures", "crop": 4, "short_side": 6, "normalization": ""}
    shared |= {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6)}
    assert found.calibration == Pictures(**shared, count=3, seed=5)
    assert found.evaluation == Pictures(**shared, list="evaluation.tsv", channels="bgr")


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("seed = 3", "sed = 3", ["line 2", "unknown key 'sed'", "seed"]),
        ("batch = 8", "batches = 8", ["line 10", "unknown key 'batches'", "near names: batch", "[data]"]),
        ("headroom", "head_room", ["line 15", "unknown key 'head_room'", "headroom"]),
        ("weights", "weigths", ["line 18", "unknown key 'weigths'", "weights"]),
        ('"int4"', '"int44"', ["line 18", "weights='int44'"]),
        ('dtype = "int8"', 'dtipe = "int8"', ["line 23", "dtipe"]),
        ("1.2", "12.5", ["line 15", "headroom=12.5"]),
        ("report", "rapport", ["line 4", "near names: report"]),
        ('"short"', '"shrot"', ["line 4", "report='shrot'", "near names: short"]),
        ("batch = 8", "batch = 0", ["line 10", "batch is 0", "1 or more"]),
        ("seed = 3", 'seed = "3"', ["line 2", "seed is '3'", "a whole number"]),
        ('"top1"', '"top5"', ["line 3", "'top5'", "near names: top1"]),
        (
            'exclude = ["head*"]',
            'scaling = "off"',
            ["line 19, [config]: scaling stands in [transforms] too", "take it out"],
        ),
        ('exclude = ["head*"]', "seed = 1", ["line 19, [config]: seed stands on top too", "take it out"]),
        ('calibration = "c.npz"', "", ["calibration is missing", "'none'"]),
        (
            "batch = 8",
            "preprocessing = {crop = 4}",
            ["line 10, [data]: preprocessing is for pictures", "take it out"],
        ),
        ("batch = 8", "preprocessing = {corp = 4}", ["unknown key 'corp'", "near names: crop"]),
        ('model = "net.onnx"', "", ["model is missing"]),
        ('model = "net.onnx"', "model = ", ["is not TOML", "line 1"]),
    ],
)
def test_a_fault_names_its_line(old, new, words):
    assert old in WHOLE
    assert_fault(WHOLE.replace(old, new, 1), *words)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("short_side", "shortside", ["line 4", "'shortside'", "short_side"]),
        ("crop = 4", "crop = 7", ["crop=7 is larger than short_side=6"]),
        ("0.3]", "]", ["line 5", "mean is", "three numbers"]),
        ("0.6", "0", ["line 6", "std is", "above 0"]),
        ("0.6", "-0.6", ["line 6", "std is", "above 0"]),
        ("0.3]", "nan]", ["line 5", "mean is", "three numbers"]),
        ("seed = 5", 'normalization = "tf"', ["line 10", "normalization beside mean and std"]),
        ('"bgr"', '"grb"', ["line 14", "channels='grb'"]),
        ('folder = "pictures"', "", ["folder is missing"]),
    ],
)
def test_a_fault_of_pictures_names_its_line(old, new, words):
    assert old in PICTURES
    assert_fault(PICTURES.replace(old, new, 1), *words)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two classes of three pictures, 8 x 6, and a list of two of them."""
    image = pytest.importorskip("PIL.Image")
    root = tmp_path_factory.mktemp("pictures")
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / "val" / name).mkdir(parents=True)
        for i in range(3):
            pixels = random.integers(0, 256, (6, 8, 3), dtype=np.uint8)
            image.fromarray(pixels).save(root / "val" / name / f"{i}.png")
    (root / "evaluation.tsv").write_text("val/b/2.png\t7\nval/a/0.png\t4\n")
    return root


GRAPH = build([node("Relu", ("x",), "y")], {}, input_shape=("N", 3, 4, 4), outputs=["y"]).graph


def loaded(folder: Path, part: str, **changed: object) -> recipe_data.Data:
    source = getattr(recipe(PICTURES), part)
    return recipe_data.load(replace(source, folder=folder, **changed), GRAPH, batch=2, keep=True)


def test_pictures_are_cropped_normalized_and_turned_round(folder):
    from PIL import Image  # noqa: PLC0415  (an extra)

    found = loaded(folder, "evaluation")
    with Image.open(folder / "val" / "b" / "2.png") as image:
        pixels = np.asarray(image, np.float64)[1:5, 2:6]  # 6 high, 8 wide: the middle 4 x 4
    expected = ((pixels / 255 - [0.1, 0.2, 0.3]) / [0.4, 0.5, 0.6])[..., ::-1].transpose(2, 0, 1)
    (batch,) = found.batches
    assert batch["x"].dtype == np.float32
    np.testing.assert_allclose(batch["x"][0], expected, rtol=0, atol=1e-5)  # float32, values up to 3
    np.testing.assert_array_equal(found.labels, [7, 4])


def test_a_seed_decides_which_pictures_are_taken_and_parts_have_none_in_common(folder):
    def shown(**changed: object) -> list[bytes]:
        found = loaded(folder, "calibration", **changed)
        return [sample.tobytes() for batch in found.batches for sample in batch["x"]]

    assert shown() == shown()
    assert len(shown()) == 3
    assert shown(seed=6) != shown()
    assert not set(shown()) & set(shown(skip=3))


def test_the_hash_of_pictures_is_of_their_contents_and_order_not_of_their_place(folder, tmp_path):
    moved = tmp_path / "elsewhere"
    moved.mkdir()
    (moved / "evaluation.tsv").write_text("second.png\t7\nfirst.png\t4\n")
    (moved / "second.png").write_bytes((folder / "val" / "b" / "2.png").read_bytes())
    (moved / "first.png").write_bytes((folder / "val" / "a" / "0.png").read_bytes())
    here, there = (loaded(each, "evaluation") for each in (folder, moved))
    assert here.digest == there.digest
    (moved / "evaluation.tsv").write_text("first.png\t4\nsecond.png\t7\n")
    assert loaded(moved, "evaluation").digest != here.digest
    (moved / "evaluation.tsv").write_text("second.png\t7\nfirst.png\t5\n")
    assert loaded(moved, "evaluation").digest != here.digest


def test_the_hash_of_arrays_is_of_their_contents_not_of_the_file(tmp_path):
    x = np.random.default_rng(0).normal(size=(3, 3, 4, 4)).astype(np.float32)
    np.savez(tmp_path / "a.npz", x=x)
    np.savez_compressed(tmp_path / "b.npz", x=x)
    np.savez(tmp_path / "c.npz", x=x + np.float32(1e-6))
    np.savez(tmp_path / "d.npz", x=x, labels=np.zeros(3, np.int64))
    a, b, c, d = (recipe_data.load(tmp_path / f"{n}.npz", GRAPH, batch=2, keep=True).digest for n in "abcd")
    assert a == b
    assert len({a, c, d}) == 3


@pytest.mark.parametrize(
    ("part", "changed", "words"),
    [
        ("calibration", {"count": 7}, ["6 pictures", "7 to take"]),
        ("calibration", {"split": "train"}, ["train", "is no folder"]),
        ("evaluation", {"list": "none.tsv"}, ["none.tsv", "cannot be read"]),
    ],
)
def test_pictures_that_are_not_there_are_an_error_that_says_so(folder, part, changed, words):
    with pytest.raises(DataError) as caught:
        loaded(folder, part, **changed)
    assert [word for word in words if word not in str(caught.value)] == []


@pytest.mark.parametrize("line", ["val/a/0.png 4", "val/a/0.png\tcat"])
def test_a_wrong_line_of_a_list_is_named(tmp_path, line):
    (tmp_path / "list.tsv").write_text(f"val/b/2.png\t7\n{line}\n")
    with pytest.raises(DataError, match="line 2"):
        images.read_list(tmp_path, "list.tsv")


def test_a_file_that_is_no_picture_is_named(tmp_path):
    pytest.importorskip("PIL.Image")
    (tmp_path / "x.png").write_text("no picture")
    with pytest.raises(DataError, match=r"x\.png.*cannot be read"):
        images.decode(tmp_path / "x.png", crop=4, short_side=4)


def test_without_pillow_the_error_says_what_to_install(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "PIL", None)
    with pytest.raises(ConfigError, match=r"ptqjax\[images\]"):
        images.decode(tmp_path / "x.png", crop=4, short_side=4)

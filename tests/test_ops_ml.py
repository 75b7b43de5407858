"""ai.onnx.ml and n-grams: against ONNX Runtime and ONNX's reference evaluator."""

import jax
import numpy as np
import onnx
import pytest
from onnx.reference import ReferenceEvaluator

from ptqjax.errors import UnsupportedOperatorError
from ptqjax.ops.ml import label_encoder
from ptqjax.ops.ngrams import tf_idf_vectorizer
from ptqjax.ops.trees import tree_ensemble
from tests.single_node import assert_as_in_onnxruntime, single_node

_ML = "ai.onnx.ml"


def _values(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize(
    ("op_type", "settings"),
    [
        ("Binarizer", {"threshold": 0.3}),
        ("Scaler", {"offset": [0.5, -1.0, 2.0, 0.0], "scale": [2.0, 3.0, -1.0, 0.5]}),
        ("Scaler", {"offset": [0.5], "scale": [2.0]}),
        ("Normalizer", {"norm": "L1"}),
        ("Normalizer", {"norm": "L2"}),
        ("Normalizer", {"norm": "MAX"}),
    ],
)
def test_features_are_onnxruntimes(op_type, settings):
    x = _values(3, 4)
    x[1] = 0
    assert_as_in_onnxruntime(op_type, [x], atol=1e-6, opset=1, domain=_ML, jit=True, **settings)


@pytest.mark.parametrize("shape", [(3, 4), (4,), (2, 3, 4)])
def test_features_are_picked_as_in_onnxruntime(shape):
    inputs = [_values(*shape), np.array([3, 0, 3])]
    assert_as_in_onnxruntime("ArrayFeatureExtractor", inputs, atol=0, opset=1, domain=_ML)


@pytest.mark.parametrize("opset", [2, 4])
def test_labels_are_onnxruntimes(opset):
    x = np.array([[3, 1], [7, -2]])
    settings = {"keys_int64s": [7, 1, 3], "values_floats": [0.5, 0.25, -1.0], "default_float": 9.0}
    assert_as_in_onnxruntime("LabelEncoder", [x], atol=0, opset=opset, domain=_ML, **settings)


def test_nan_is_a_label_like_any_other():
    x = np.array([np.nan, 1, 2], np.float32)
    y = label_encoder(x, keys_floats=(np.nan, 2.0), values_int64s=(5, 6))
    np.testing.assert_array_equal(y, [5, -1, 6])


def test_labels_of_text_are_refused():
    with pytest.raises(UnsupportedOperatorError, match="strings"):
        label_encoder(np.array([1]), keys_int64s=(1,), values_strings=("a",))


_FOREST = {
    "tree_roots": [0, 3],
    "nodes_featureids": [0, 1, 2, 1, 0],
    "nodes_truenodeids": [1, 0, 2, 4, 5],
    "nodes_trueleafs": [0, 1, 1, 0, 1],
    "nodes_falsenodeids": [2, 1, 3, 4, 6],
    "nodes_falseleafs": [0, 1, 1, 1, 1],
    "leaf_targetids": [0, 1, 0, 1, 0, 1, 1],
    "n_targets": 2,
    "nodes_missing_value_tracks_true": [1, 0, 0, 1, 0],
}


def _forest(modes, dtype):
    tensors = {
        "nodes_modes": np.array(modes, np.uint8),
        "nodes_splits": np.array([0.1, -0.2, 0.3, 0.0, 0.4], dtype),
        "leaf_weights": np.arange(1, 8, dtype=dtype) ** 2,
    }
    return _FOREST | tensors


@pytest.mark.parametrize("aggregate_function", [0, 1, 2, 3])
@pytest.mark.parametrize("modes", [[0, 1, 2, 3, 0], [1, 4, 5, 2, 3]])
def test_trees_are_the_reference_evaluators(modes, aggregate_function):
    x = _values(40, 3).round(1)
    x[::5, 1] = np.nan
    forest = _forest(modes, np.float32)
    written = {
        name: onnx.numpy_helper.from_array(value) if isinstance(value, np.ndarray) else value
        for name, value in forest.items()
    }
    proto = single_node("TreeEnsemble", [x], opset=5, domain=_ML, aggregate_function=aggregate_function, **written)
    expected = ReferenceEvaluator(proto).run(None, {"x0": x})[0]
    run = jax.jit(lambda rows: tree_ensemble(rows, aggregate_function=aggregate_function, **forest))
    np.testing.assert_allclose(run(x), expected, rtol=1e-6)


def test_a_softmax_over_zeros_leaves_them():
    x = _values(6, 3)
    plain = np.asarray(tree_ensemble(x, **_forest([0] * 5, np.float32)))
    shares = np.asarray(tree_ensemble(x, post_transform=3, **_forest([0] * 5, np.float32)))
    np.testing.assert_array_equal(shares == 0, plain == 0)
    np.testing.assert_allclose(shares.sum(1), np.ones(6), rtol=1e-6)


def test_a_cycle_is_no_tree():
    forest = _forest([0] * 5, np.float32) | {"nodes_truenodeids": [1, 0, 2, 3, 5]}
    with pytest.raises(UnsupportedOperatorError, match="no trees"):
        tree_ensemble(_values(2, 3), **forest)


_POOL = {
    "pool_int64s": [2, 3, 5, 4, 5, 6, 7, 8, 6, 7, 1, 2, 3],
    "ngram_counts": [0, 4, 10],
    "ngram_indexes": [0, 3, 2, 7, 4, 5, 6, 1],
}


@pytest.mark.parametrize("lengths", [(1, 3), (2, 2), (1, 1)])
@pytest.mark.parametrize("mode", ["TF", "IDF", "TFIDF"])
@pytest.mark.parametrize("dtype", [np.int32, np.int64])
def test_ngrams_are_onnxruntimes(dtype, mode, lengths):
    x = np.random.default_rng(0).integers(1, 9, (3, 15)).astype(dtype)
    x[0, :7] = [1, 9, 2, 9, 3, 5, 6]
    settings = {"min_gram_length": lengths[0], "max_gram_length": lengths[1], "max_skip_count": 2, "mode": mode}
    settings |= {"weights": [float(i) for i in range(1, 9)], **_POOL}
    assert_as_in_onnxruntime("TfIdfVectorizer", [x], atol=1e-6, opset=9, **settings)
    assert_as_in_onnxruntime("TfIdfVectorizer", [x[0]], atol=1e-6, opset=9, **settings)


def test_ngrams_longer_than_the_row_do_not_occur():
    settings = {"min_gram_length": 1, "max_gram_length": 3, "max_skip_count": 2, "mode": "TF", **_POOL}
    assert_as_in_onnxruntime("TfIdfVectorizer", [np.array([[2, 3]])], atol=0, opset=9, jit=True, **settings)


def test_ngrams_of_text_are_refused():
    settings = {"min_gram_length": 1, "max_gram_length": 1, "max_skip_count": 0, "mode": "TF"}
    with pytest.raises(UnsupportedOperatorError, match="pool_strings"):
        tf_idf_vectorizer(np.array([1]), ngram_counts=(0,), ngram_indexes=(0,), pool_strings=("a",), **settings)

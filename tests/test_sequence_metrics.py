"""Metrics of sequences are what their definitions say, for functions, sweeps, tables and the command line alike."""

import json

import numpy as np
import pytest
from click.testing import CliRunner

import ptqjax
from ptqjax import evaluate, onnx_io
from ptqjax.commands.cli import commands
from ptqjax.data.files import load_samples
from ptqjax.errors import ConfigError, DataError
from ptqjax.experiments.engine import Variant, evaluate_variants
from ptqjax.ir import Graph, Model, TensorSpec
from ptqjax.metrics import IGNORED, METRICS, Metric, Tally, mean_of
from ptqjax.metrics.labels import joined_labels
from ptqjax.metrics.records import Seen
from tests.models import node

RANDOM = np.random.default_rng(0)
VOCABULARY, WIDTH, TOKENS = 11, 4, 6
IDS = RANDOM.integers(0, VOCABULARY, (8, TOKENS))
LABELS = np.where(RANDOM.random((8, TOKENS)) < 0.3, IGNORED, RANDOM.integers(0, VOCABULARY, (8, TOKENS)))
TABLE = RANDOM.normal(size=(VOCABULARY, WIDTH)).astype(np.float32)
HEAD = RANDOM.normal(size=(WIDTH, VOCABULARY)).astype(np.float32)
OTHER = HEAD + 0.3 * RANDOM.normal(size=HEAD.shape).astype(np.float32)


def language_model(head=HEAD):
    """Scores of every token from its id alone, and the embedding as a second output."""
    graph = Graph(
        name="test",
        inputs=(TensorSpec(name="ids", dtype=np.dtype(np.int64), shape=("n", "t")),),
        outputs=tuple(TensorSpec(name=name, dtype=np.dtype(np.float32), shape=None) for name in ("logits", "hidden")),
        nodes=(node("Gather", ["table", "ids"], "hidden"), node("MatMul", ["hidden", "head"], "logits")),
        parameters=("head", "table"),
        opsets=(("", 17),),
    )
    return Model(graph=graph, params={"table": TABLE, "head": head})


def scores(head):
    return lambda batch: {"logits": TABLE[batch["ids"]] @ head, "hidden": TABLE[batch["ids"]]}


def batches(size=8):
    return [{"ids": IDS[start : start + size]} for start in range(0, len(IDS), size)]


def probabilities(logits):
    wide = np.exp(logits.astype(np.float64))
    return wide / wide.sum(-1, keepdims=True)


def expected():
    """The definitions, in float64, position by position."""
    p, q = (probabilities(TABLE[IDS] @ head) for head in (HEAD, OTHER))
    at = LABELS != IGNORED
    entropy = -np.mean(np.log(q[at][np.arange(at.sum()), LABELS[at]]))
    return {
        "token_accuracy": np.mean(q[at].argmax(-1) == LABELS[at]),
        "cross_entropy": entropy,
        "perplexity": np.exp(entropy),
        "kl": np.mean(np.sum(p * np.log(p / q), -1)[at]),
        "agreement": np.mean((p.argmax(-1) == q.argmax(-1))[at]),
    }


@pytest.mark.parametrize("size", [1, 3, 8])
def test_figures_are_their_definitions_whatever_the_batches(size):
    found = evaluate(scores(OTHER), batches(size), labels=LABELS, reference=scores(HEAD))
    wanted = expected()
    assert found.top1 is None
    assert found.agreement == wanted.pop("agreement")
    assert dict(found.figures) == pytest.approx(wanted, rel=1e-12)  # of sums in float64
    itself = evaluate(scores(HEAD), batches(size), labels=LABELS, reference=scores(HEAD))
    assert itself.figures["kl"] == 0
    assert itself.agreement == 1


def test_without_labels_every_position_counts():
    found = evaluate(scores(OTHER), batches(), reference=scores(HEAD))
    p, q = (probabilities(TABLE[IDS] @ head) for head in (HEAD, OTHER))
    assert found.agreement == np.mean(p.argmax(-1) == q.argmax(-1))
    assert dict(found.figures) == pytest.approx({"kl": np.mean(np.sum(p * np.log(p / q), -1))})


def test_the_ignored_value_leaves_a_position_out():
    padded = np.pad(IDS, ((0, 0), (0, 2)), constant_values=3), np.pad(LABELS, ((0, 0), (0, 2)), constant_values=IGNORED)
    plain = evaluate(scores(OTHER), batches(), labels=LABELS, reference=scores(HEAD))
    found = evaluate(scores(OTHER), [{"ids": padded[0]}], labels=padded[1], reference=scores(HEAD))
    assert dict(found.figures) == pytest.approx(dict(plain.figures), rel=1e-12)
    assert found.agreement == plain.agreement


def test_labels_of_samples_have_an_entropy_as_well():
    labels = RANDOM.integers(0, VOCABULARY, 8)
    found = evaluate(
        lambda batch: {"y": TABLE[batch["ids"][:, 0]] @ HEAD}, batches(), labels=labels, metrics=("perplexity",)
    )
    q = probabilities(TABLE[IDS[:, 0]] @ HEAD)
    assert found.figures["perplexity"] == pytest.approx(np.exp(-np.mean(np.log(q[np.arange(8), labels]))))
    assert found.top1 == np.mean(q.argmax(-1) == labels)


def test_cosine_is_of_the_named_output_and_of_zeros_one():
    def shifted(batch):
        return {**scores(HEAD)(batch), "hidden": TABLE[batch["ids"]] + np.float32(1)}

    found = evaluate(shifted, batches(3), reference=scores(HEAD), metrics=("cosine:hidden",))
    x, y = TABLE[IDS].astype(np.float64), (TABLE[IDS] + np.float32(1)).astype(np.float64)
    each = (x * y).sum(-1) / np.linalg.norm(x, axis=-1) / np.linalg.norm(y, axis=-1)
    assert found.figures["cosine:hidden"] == pytest.approx(each.mean())
    zeros = {"y": np.array([[0.0, 0], [0, 0], [1, 0]])}
    other = {"y": np.array([[0.0, 0], [1, 0], [2, 0]])}
    assert (
        evaluate(lambda _: zeros, batches(), reference=lambda _: other, metrics=("cosine",)).figures["cosine"] == 2 / 3
    )


def test_the_engine_and_evaluate_agree_to_the_bit():
    model, other = language_model(), language_model(OTHER)
    names = ("sqnr_db", "agreement", "token_accuracy", "perplexity", "kl", "cosine:hidden")
    variant = Variant(name="other", encodings={}, params=other.params)
    swept = evaluate_variants(model, [variant], batches(3), metrics=names, labels=LABELS).values[0]
    run = [lambda batch, of=of: ptqjax.apply(of.graph, of.params, batch) for of in (model, other)]
    found = evaluate(run[1], batches(3), labels=LABELS, reference=run[0], metrics=("cosine:hidden",))
    told = {"sqnr_db": found.sqnr, "agreement": found.agreement, **found.figures}
    assert swept == {name: told[name] for name in names}


def test_a_metric_of_ones_own_is_a_function_or_a_record():
    def largest(seen):
        return np.abs(seen.found["logits"] - seen.wanted["logits"]).max((1, 2))

    worst = Metric(
        name="worst", init=lambda: 0.0, update=lambda s, seen: max(s, float(largest(seen).max())), finish=lambda s: s
    )
    found = evaluate(scores(OTHER), batches(3), reference=scores(HEAD), metrics=(largest, worst))
    each = np.abs(TABLE[IDS] @ OTHER - TABLE[IDS] @ HEAD).max((1, 2))
    assert found.figures["largest"] == pytest.approx(each.mean())
    assert found.figures["worst"] == pytest.approx(each.max())
    with pytest.raises(ConfigError, match="'largest' compares with a reference, and there is none"):
        evaluate(scores(OTHER), batches(), metrics=(mean_of(largest, needs_reference=True),))


def test_states_of_parts_merge_to_those_of_the_whole():
    asked = [factory(None) for name, factory in METRICS.items() if name != "top1"]
    parts = [
        Seen(found=scores(OTHER)(batch), wanted=scores(HEAD)(batch), labels=LABELS[3 * i : 3 * i + 3], inputs=batch)
        for i, batch in enumerate(batches(3))
    ]
    whole, merged = Tally.of(asked), Tally.of(asked)
    for part in parts:
        whole, merged = whole.plus(part), merged.merged(Tally.of(asked).plus(part).states)
    assert merged.figures() == whole.figures()


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (
            LABELS[:, :-1],
            r"labels has 5 tokens a sample, and output 'logits' of batch 0 has 6; expected as many, \[8, 6\]",
        ),
        (np.pad(LABELS, ((0, 0), (0, 1))), "labels has 7 tokens a sample"),
        (LABELS.clip(0) + VOCABULARY, f"token 0; expected 0 to {VOCABULARY - 1}.*-100 where none counts"),
        (np.where(LABELS == IGNORED, -1, LABELS), "holds -1 for sample .*, token"),
        (LABELS[:4], "there are 8 samples and 4 labels"),
    ],
)
def test_labels_that_do_not_fit_sequences_are_errors(labels, words):
    with pytest.raises(DataError, match=words):
        evaluate(scores(HEAD), batches(), labels=labels)


def test_metrics_that_labels_do_not_allow_are_errors():
    with pytest.raises(ConfigError, match="'perplexity' is of labels, and there are none"):
        evaluate(scores(HEAD), batches(), metrics=("perplexity",))
    with pytest.raises(ConfigError, match=r"labels \[N, T\] take 'token_accuracy'"):
        evaluate(scores(HEAD), batches(), labels=LABELS, metrics=("top1",))
    with pytest.raises(ConfigError, match="no such output"):
        evaluate(scores(HEAD), batches(), labels=LABELS, metrics=("perplexity:logit",))
    with pytest.raises(DataError, match="one for each sample, and some one for each token"):
        joined_labels([np.zeros(3, int), np.zeros((2, 4), int)])


def test_sequences_of_unlike_length_have_labels_of_unlike_length(tmp_path):
    lengths = [6, 3, 6, 2]
    ids, labels = (np.empty(4, object) for _ in range(2))
    for i, length in enumerate(lengths):
        ids[i], labels[i] = IDS[i : i + 1, :length], LABELS[i, :length]
    np.savez(tmp_path / "data.npz", ids=ids, labels=labels)
    groups = load_samples(tmp_path / "data.npz", language_model().graph)
    assert [group.num_samples for group in groups] == [2, 1, 1]
    every = joined_labels([group.labels for group in groups])
    found = evaluate(scores(OTHER), [group.part(0, 2) for group in groups], labels=every)
    q = [probabilities(TABLE[IDS[i, :length]] @ OTHER) for i, length in enumerate(lengths)]
    logs = [
        np.log(q[i][t, LABELS[i, t]]) for i, length in enumerate(lengths) for t in range(length) if LABELS[i, t] >= 0
    ]
    assert found.figures["cross_entropy"] == pytest.approx(-np.mean(logs))
    listed = evaluate(scores(OTHER), [group.part(0, 2) for group in groups], labels=[labels[i] for i in (0, 2, 1, 3)])
    assert listed.figures == found.figures


def test_the_command_line_measures_tokens_and_a_function_in_a_file(tmp_path):
    for name, head in (("float", HEAD), ("other", OTHER)):
        (tmp_path / f"{name}.onnx").write_bytes(onnx_io.to_proto(language_model(head)).SerializeToString())
    np.savez(tmp_path / "data.npz", ids=IDS, labels=LABELS)
    (tmp_path / "mine.py").write_text("def width(seen):\n    return seen.found['logits'].max((1, 2))\n")
    asked = ["--metric", f"{tmp_path}/mine.py:width", "--metric", "cosine:hidden"]
    given = ["evaluate", f"{tmp_path}/other.onnx", "--data", f"{tmp_path}/data.npz"]
    done = CliRunner().invoke(commands, [*given, "--reference", f"{tmp_path}/float.onnx", *asked])
    assert done.exit_code == 0, done.output
    wanted = expected()
    for text in (
        f"{wanted['perplexity']:.3f}",
        f"{wanted['kl']:.4f}",
        "perplexity, of the reference",
        "width",
        "cosine:hidden",
    ):
        assert text in done.output
    for metric, words in (
        ("mine.py:nothing", "there is no file"),
        (f"{tmp_path}/mine.py:nothing", "defines no 'nothing'"),
    ):
        done = CliRunner().invoke(commands, [*given, "--metric", metric])
        assert done.exit_code == 2  # of usage
        assert words in done.output
    np.savez(tmp_path / "short.npz", ids=IDS, labels=LABELS[:, :4])
    done = CliRunner().invoke(commands, [*given[:3], f"{tmp_path}/short.npz"])
    assert done.exit_code == 1
    assert "labels has 4 tokens a sample" in done.output


def test_the_table_of_stages_and_the_report_tell_perplexity(tmp_path):
    (tmp_path / "float.onnx").write_bytes(onnx_io.to_proto(language_model()).SerializeToString())
    np.savez(tmp_path / "data.npz", ids=IDS, labels=LABELS)
    given = [f"{tmp_path}/float.onnx", "--calibration", f"{tmp_path}/data.npz", "--out", f"{tmp_path}/q"]
    done = CliRunner().invoke(commands, ["quantize", *given, "--report", "short", "--effort", "fast"])
    assert done.exit_code == 0, done.output
    assert "perplexity" in done.output
    stages = json.loads((tmp_path / "q" / "report.json").read_text())["stages"]
    assert stages[0]["metrics"]["kl"] == 0
    plain = evaluate(scores(HEAD), batches(), labels=LABELS).figures
    assert stages[0]["metrics"]["perplexity"] == pytest.approx(plain["perplexity"], rel=1e-5)  # of float32 products
    assert stages[-1]["metrics"]["perplexity"] == pytest.approx(plain["perplexity"], rel=0.1)
    assert "perplexity" in (tmp_path / "q" / "report.html").read_text()

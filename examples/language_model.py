"""A small language model with weights in int4: python language_model.py MODEL.onnx CALIBRATION.npz TEST.npz OUT.

The .npz files hold `input_ids` [N, T] and `labels` [N, T], the token that follows each (-100 where none counts). A
decoder with past inputs makes its past itself, the quantized one with its own roundings; activations stay in float.
"""

import sys

import numpy as np

import ptqjax
from ptqjax.data.past import interface_of
from ptqjax.evaluation import Evaluation


def feed(model: ptqjax.Model, file: str) -> tuple[list[dict[str, np.ndarray]], np.ndarray | None]:
    """Returns batches of the sequences in a file, and the labels of their tokens."""
    ids, labels = (np.load(file)[name] for name in ("input_ids", "labels"))
    if interface_of(model.graph) is None:
        return [{"input_ids": ids[start : start + 16]} for start in range(0, len(ids), 16)], labels
    decoded = ptqjax.decoding_batches(model, ids, labels=labels)
    return list(decoded), decoded.labels


def main(model_file: str, calibration_file: str, test_file: str, out: str) -> Evaluation:
    """Quantizes, writes OUT/language_model.onnx, and returns what it is worth on the test sequences."""
    model, file = ptqjax.read(model_file), f"{out}/language_model.onnx"
    config = ptqjax.QuantizationConfig(weights="int4", granularity="block:32", activations="float", equalize=False)
    result = ptqjax.quantize(model, feed(model, calibration_file)[0], config)
    ptqjax.export(result.model, result.encodings, out, "language_model", target=config.target)
    batches, labels = feed(ptqjax.read(file), test_file)
    return ptqjax.evaluate(file, batches, labels=labels, reference=model_file)


if __name__ == "__main__":
    found = main(*sys.argv[1:])
    print(f"perplexity {found.figures['perplexity']:.3f}, KL to float {found.figures['kl']:.4f} nats")

"""An encoder (BERT, a ViT) in 8 bits: python encoder.py MODEL.onnx CALIBRATION.npz TEST.npz OUT.

The .npz files hold one array for each model input, first axis the samples; TEST.npz also `labels`, one class a sample.
"""

import sys

import ptqjax
from ptqjax.data.files import Batches, load_samples
from ptqjax.evaluation import Evaluation


def main(model_file: str, calibration_file: str, test_file: str, out: str) -> Evaluation:
    """Quantizes, writes OUT/encoder.onnx, and returns what it is worth on the test samples."""
    model = ptqjax.read(model_file)
    calibration = Batches(load_samples(calibration_file, model.graph), model.graph, size=16)
    result = ptqjax.quantize(model, calibration, ptqjax.QuantizationConfig(weights="int8", activations="uint8"))
    ptqjax.export(result.model, result.encodings, out, "encoder")
    (test,) = load_samples(test_file, model.graph)
    batches = Batches(test, model.graph, size=16)
    return ptqjax.evaluate(f"{out}/encoder.onnx", batches, labels=test.labels, reference=model_file)


if __name__ == "__main__":
    found = main(*sys.argv[1:])
    print(f"top-1 {found.top1:.1%}, agreement with float {found.agreement:.1%}, SQNR {found.sqnr:.1f} dB")

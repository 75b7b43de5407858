"""Quantize every weight of the digits network to four bits: rounded to nearest, and solved for on calibration pictures.

    python examples/four_bits.py

`rounding="solved"`, the default below eight bits, chooses all integers of a layer, and its scales, for the least error
of its output; the file is an ordinary one. `docs/rounding.md` has the formulas. It takes a quarter of a minute of
processor time, most of it compilation.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np

import ptqjax

HERE = Path(__file__).parent


def main() -> None:
    """Prints how often each file answers as the float model does, in ONNX Runtime, on pictures not used before."""
    model = ptqjax.read(HERE / "digits.onnx")
    pictures = np.load(HERE / "digits_calibration.npz")["input"]
    new_ones = np.load(HERE / "digits_evaluation.npz")["input"]
    for rounding in ("nearest", "solved"):
        config = ptqjax.QuantizationConfig(weights="int4", rounding=rounding)
        result = ptqjax.quantize(model, [{"input": pictures}], config)
        with tempfile.TemporaryDirectory() as folder:
            ptqjax.export(result.model, result.encodings, folder, "digits")
            file = Path(folder) / "digits.onnx"
            found = ptqjax.evaluate(file, [{"input": new_ones}], reference=HERE / "digits.onnx")
        print(f"{rounding:8} {100 * (found.agreement or 0.0):6.1f} % as in float, {found.sqnr:5.1f} dB")


if __name__ == "__main__":
    main()

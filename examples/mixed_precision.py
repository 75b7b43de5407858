"""Give each layer's weights a width of their own, within a budget, and look at the front between small and good.

    python examples/mixed_precision.py [--out DIR]

Three bits for every weight cost the digits' network answers; the same bytes, spread over the layers by what each one's
rounding does to the outputs, cost fewer. `ptqjax.mixed_precision` chooses on calibration pictures without labels, and
its result is a configuration that `ptqjax.quantize` takes: a few rules that name tensors. The second search asks the
other way round: how few bytes will do, if at most one answer in a hundred may differ from the float model's?

It takes about a minute of processor time, most of it compilation. With --out, the files, the configurations
(config.toml for `ptqjax quantize --config`) and pictures of the fronts stay.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np

import ptqjax
from ptqjax.drafts import Result

HERE = Path(__file__).parent
CONFIG = ptqjax.QuantizationConfig(weights="int3", scaling="noise")
"""The settings beside the widths; the type is what scales between layers are chosen for."""
BATCH = 32

SEARCHES = {
    "budget": ptqjax.Budget(mean_weight_bits=3.0),
    "drop": ptqjax.Drop(most=0.01, cost="model_bytes"),
}
"""What is asked for: the best at three bits a weight, and the smallest that loses a hundredth of the answers."""


def main() -> None:
    """Reads the command line, searches, exports, and prints how often each file answers as the float model does."""
    parser = argparse.ArgumentParser(description="Choose widths for the weights of the digits network.")
    parser.add_argument("--out", type=Path, help="directory to write into; default: one that is removed at the end")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run(arguments.out or Path(temporary))


def run(out: Path) -> None:
    """Writes a quantized file for uniform widths and for each search into `out`, and prints what they give."""
    original = HERE / "digits.onnx"
    model = ptqjax.read(original)
    pictures = np.load(HERE / "digits_calibration.npz")["input"]
    batches = [{"input": pictures[start : start + BATCH]} for start in range(0, len(pictures), BATCH)]
    uniform = ptqjax.quantize(model, batches, CONFIG)
    show("uniform", original, exported(uniform, out, "uniform"), "3 bits for all weights")
    for name, budget in SEARCHES.items():
        found = ptqjax.mixed_precision(model, batches, CONFIG, budget=budget, points=3)
        out.mkdir(parents=True, exist_ok=True)
        ptqjax.write_config(found.config, out / f"{name}.toml")
        found.to_svg(out / f"{name}.svg", cost="model_bytes")
        costs, widths = found.chosen.costs, found.chosen.widths
        text = f"{costs.mean_weight_bits:.2f} bits on average, {costs.model_bytes} bytes: {dict(widths)}"
        show(name, original, exported(ptqjax.quantize(model, batches, found.config), out, name), text)


def exported(result: Result, out: Path, name: str) -> Path:
    """Returns the file that a quantized model was written to."""
    ptqjax.export(result.model, result.encodings, out, name)
    return out / f"{name}.onnx"


def show(what: str, reference: Path, file: Path, of: str) -> None:
    """Prints how often the file answers as the float model does, in ONNX Runtime, on pictures not used before."""
    data = [{"input": np.load(HERE / "digits_evaluation.npz")["input"]}]
    found = ptqjax.evaluate(file, data, reference=reference)
    print(f"{what:10} {100 * (found.agreement or 0.0):6.1f} % as in float, {found.sqnr:5.1f} dB; {of}")


if __name__ == "__main__":
    main()

"""Prints what quantization costs and what equalization brings back: exported files in ONNX Runtime, on held-out data.

python scripts/quickstart_table.py --reference FLOAT.onnx --data DATA.npz --model "LABEL=MODEL.onnx" ...
"""

from __future__ import annotations

import argparse
from pathlib import Path

import ptqjax
from ptqjax.data.files import Batches, load_samples
from ptqjax.evaluation import Evaluation


def table(rows: dict[str, Evaluation]) -> str:
    """Returns the rows as text; the first is the float model, which the loss is counted from."""
    width = max(map(len, rows))
    lines = [f"{'':{width}}   top-1   lost   agreement   SQNR"]
    best = next(iter(rows.values())).top1 or 0.0
    for label, found in rows.items():
        right, same = 100 * (found.top1 or 0.0), 100 * (found.agreement or 0.0)
        lost = "" if found.top1 == best else f"{100 * best - right:.1f}"
        noise = "" if found.sqnr in (None, float("inf")) else f"{found.sqnr:.1f} dB"
        lines.append(f"{label:{width}}  {right:5.1f} %  {lost:>5}     {same:5.1f} %   {noise}".rstrip())
    return "\n".join(lines)


def main() -> None:
    """Reads the command line, evaluates, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="the float model")
    parser.add_argument("--data", type=Path, required=True, help="held-out samples with labels")
    parser.add_argument("--model", action="append", default=[], metavar="LABEL=MODEL.onnx", help="a quantized model")
    arguments = parser.parse_args()
    graph = ptqjax.read(arguments.reference).graph
    (samples,) = load_samples(arguments.data, graph)
    batches = Batches(samples, graph, size=64)
    models = {"float": arguments.reference} | dict(model.split("=", maxsplit=1) for model in arguments.model)
    found = {
        label: ptqjax.evaluate(path, batches, labels=samples.labels, reference=arguments.reference)
        for label, path in models.items()
    }
    print(f"\n{samples.num_samples} held-out samples; exported files, W8A8, in ONNX Runtime:\n\n{table(found)}\n")


if __name__ == "__main__":
    main()

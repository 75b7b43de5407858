"""Fine-tune a quantized network with Flax and optax, and run it in ONNX Runtime.

    python examples/fine_tuning.py [--out DIR]

At 3 bits, with one grid for a whole tensor, the best ranges and corrected biases do not bring the digits' network back:
its weights have to change. `ptqjax.to_flax` makes the equalized model with its encodings a Flax module, which computes
what the quantized file will compute, and whose gradients pass straight through the rounding. Here it learns from the
float model's answers alone, no labels: what changes are weights, biases and the scales of the grids. `from_flax` then
gives the model and the encodings that `export` writes.

Step sizes were chosen on a sixth of the training pictures, trained on the others. It takes three quarters of a minute
of processor time, most of it compilation.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from train_digits import load

import ptqjax

HERE = Path(__file__).parent
CONFIG = ptqjax.QuantizationConfig(weights="int3", activations="uint3", granularity="tensor")
NUM_CALIBRATION = 128
BATCH = 64
NUM_STEPS = 250
WEIGHT_RATE, SCALE_RATE = 3e-3, 1e-2
"""Adam's rates at the start; both fall along a cosine. Scales are learned as logarithms."""


def optimizer(model: ptqjax.Model, variables: Mapping[str, Any]) -> optax.GradientTransformation:
    """Returns Adam for the layers' weights and biases and for the grids' scales; bounds of activations stay."""
    layers = [node for node in model.graph.nodes if node.op_type in ("Conv", "Gemm")]
    trained = {name for layer in layers for name in layer.inputs[1:]}
    labels = {
        "params": {name: "weights" if name in trained else "frozen" for name in variables["params"]},
        "encodings": dict.fromkeys(variables["encodings"], "scales"),
    }
    rates = {"weights": WEIGHT_RATE, "scales": SCALE_RATE}
    adams = {part: optax.adam(optax.cosine_decay_schedule(rate, NUM_STEPS)) for part, rate in rates.items()}
    return optax.partition({**adams, "frozen": optax.set_to_zero()}, labels)


def fine_tune(
    model: ptqjax.Model, encodings: dict[str, ptqjax.Encoding], pictures: Float[np.ndarray, "n 1 h w"], *, seed: int
) -> tuple[ptqjax.Model, dict[str, ptqjax.Encoding]]:
    """Returns the model and its encodings, trained to answer as the float model does."""
    module = ptqjax.to_flax(model, encodings, learn_scales=True)
    variables = module.init(jax.random.key(seed), pictures[:1])
    adam = optimizer(model, variables)
    wanted = jax.nn.softmax(ptqjax.apply(model.graph, model.params, {"input": pictures})["output"])

    def loss(variables: Any, x: Array, target: Array) -> Array:
        logits: Any = module.apply(variables, x)
        return optax.softmax_cross_entropy(logits, target).mean()

    @jax.jit
    def trained(variables: Any, x: Array, targets: Array, order: Int[Array, "steps batch"]) -> Any:
        def step(state: tuple[Any, Any], chosen: Array) -> tuple[tuple[Any, Any], None]:
            variables, momenta = state
            gradient = jax.grad(loss)(variables, x[chosen], targets[chosen])
            updates, momenta = adam.update(gradient, momenta, variables)
            return (optax.apply_updates(variables, updates), momenta), None

        return jax.lax.scan(step, (variables, adam.init(variables)), order)[0][0]

    order = np.random.default_rng(seed).integers(len(pictures), size=(NUM_STEPS, BATCH))
    return ptqjax.from_flax(module, trained(variables, jnp.asarray(pictures), wanted, jnp.asarray(order)))


def main() -> None:
    """Reads the command line, quantizes, trains, exports, and prints how often each file is right."""
    parser = argparse.ArgumentParser(description="Fine-tune the quantized digits network and export it.")
    parser.add_argument("--out", type=Path, help="directory to write into; default: one that is removed at the end")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run(arguments.out or Path(temporary), seed=arguments.seed)


def run(out: Path, *, seed: int) -> None:
    """Writes both quantized files into `out` and prints their accuracy in ONNX Runtime."""
    digits = load()
    calibration = [{"input": digits.train[:NUM_CALIBRATION]}]
    data, labels = [{"input": digits.evaluation}], digits.evaluation_labels
    original = HERE / "digits.onnx"
    show("float", right(original, data, labels), f"of {len(labels)} digits, in ONNX Runtime")

    model, _ = ptqjax.equalize(ptqjax.read(original))
    encodings = ptqjax.calibrate(model, calibration, CONFIG)
    corrected, _ = ptqjax.correct_biases(model, encodings, calibration)
    ptqjax.export(corrected, encodings, out, "post_training")
    show("post-training", right(out / "post_training.onnx", data, labels), "with weights and activations of 3 bits")

    tuned, learned = fine_tune(model, encodings, digits.train, seed=seed)
    ptqjax.export(tuned, learned, out, "fine_tuned")
    show("fine-tuned", right(out / "fine_tuned.onnx", data, labels), f"the same, {NUM_STEPS} steps later")

    simulate = ptqjax.simulate(tuned, learned)
    simulated = ptqjax.evaluate(
        lambda batch: simulate(tuned.params, learned, batch), data, reference=out / "fine_tuned.onnx"
    )
    show(
        "simulated",
        simulated.agreement or 0.0,
        f"of the answers are the file's, outputs {simulated.sqnr:.0f} dB above noise",
    )


def show(what: str, share: float, of: str) -> None:
    """Prints a share as a line of the table."""
    print(f"{what:13} {100 * share:6.1f} % {of}")


def right(file: Path, data: list[dict[str, np.ndarray]], labels: Int[np.ndarray, " n"]) -> float:
    """Returns how often the file's answer is the label, in ONNX Runtime: a share in 0..1."""
    return ptqjax.evaluate(file, data, labels=labels).top1 or 0.0


if __name__ == "__main__":
    main()

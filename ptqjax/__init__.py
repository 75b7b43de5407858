"""Post-training quantization of ONNX models by pure JAX functions.

    model = ptqjax.read("model.onnx")
    result = ptqjax.quantize(model, batches)
    ptqjax.export(result.model, result.encodings, "out", "model")

`import ptqjax` reads no other module: a name is looked up in its room at its first use, and no backend starts before
something is computed. The names are those of `__init__.pyi`. They also stand, by subject, in `ptqjax.files`,
`ptqjax.experiments` and `ptqjax.recipes`.
"""

from ptqjax.lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(__name__, __file__)

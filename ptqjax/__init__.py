"""Post-training quantization of ONNX models by pure JAX functions."""

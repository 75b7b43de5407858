"""What each ONNX operator computes, by operator set version."""

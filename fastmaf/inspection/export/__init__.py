"""Export of an inspection model to ONNX."""

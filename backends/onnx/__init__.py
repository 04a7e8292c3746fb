"""ONNX emission, shared by every engine that reads ONNX."""

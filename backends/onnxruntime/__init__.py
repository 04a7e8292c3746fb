"""ONNX Runtime: the default engine, on the CPU, and on CUDA when the installed package has it."""

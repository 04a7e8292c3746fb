"""TensorRT: NVIDIA's engine, built by TensorRT-RTX (also on machines without a GPU) or by classic TensorRT."""

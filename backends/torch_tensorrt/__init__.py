"""Torch-TensorRT: plans that PyTorch's own converter builds from a re-exported stage; sessions are those of TensorRT."""

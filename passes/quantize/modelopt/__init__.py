"""NVIDIA modelopt as a source of quantization decisions: run in an environment of its own, file in, file out."""

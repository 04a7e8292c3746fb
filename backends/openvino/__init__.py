"""OpenVINO: the CPU engine with fused attention and integer products whose scales belong to tokens."""
